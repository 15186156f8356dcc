//! Tokens, or means of tokens, in the layout of the inner loops, and the softmax over several such
//! sets at once.

use crate::kernel;
use crate::kernel::buffer::{Buffer, padded};
use crate::kernel::loops::products::{Epilogue, Matrix, Product};
use crate::memory::answer::Answer;
use crate::memory::packed::Packed;
use crate::memory::scoring::SoftCap;
use crate::scalar::Scalar;
use crate::state_format::StateFormat;
use ndarray::ArrayView1;

/// Slots that a set has room for at once; beyond, room doubles where it is needed.
const FIRST_SLOTS: usize = 128;

/// The slots to make room for where `used` are in use, of a set that never has more than `most`: a
/// set costs what it holds, not what it may hold one day.
pub(crate) fn room_for(used: usize, most: usize) -> usize {
    most.min(used.next_power_of_two().max(FIRST_SLOTS))
}

/// A bounded set of (key, value) pairs in slots: keys as columns, values as rows, and for each slot
/// what is added to its scores to base 2: log₂ of its multiplicity, or −∞ while it is empty.
#[derive(Clone, Debug)]
pub(crate) struct Slots<T> {
    pub(crate) head_dim: usize,
    pub(crate) value_dim: usize,
    /// Slots that there is room for, whole cache lines of them.
    pub(crate) capacity: usize,
    keys: Buffer<T>,
    values: Buffer<T>,
    /// What holds keys and values in their place, in a format of fewer bits.
    packed: Option<Packed>,
    pub(crate) bias: Buffer<T>,
}

impl<T: Scalar> Slots<T> {
    pub(crate) fn new() -> Self {
        Self {
            head_dim: 0,
            value_dim: 0,
            capacity: 0,
            keys: Buffer::new(),
            values: Buffer::new(),
            packed: None,
            bias: Buffer::new(),
        }
    }

    pub(crate) fn format(&self) -> StateFormat {
        self.packed.as_ref().map_or(StateFormat::F32, Packed::format)
    }

    /// Keeps keys and values in this format: those that come after
    /// [`prepare`](Self::prepare), which must be next.
    pub(crate) fn set_format(&mut self, format: StateFormat) {
        if self.format() != format {
            self.packed = Packed::new(format, self.head_dim, self.value_dim);
        }
    }

    /// Makes every slot empty, for these sizes.
    pub(crate) fn prepare(&mut self, head_dim: usize, value_dim: usize, slots: usize) {
        (self.head_dim, self.value_dim, self.capacity) = (head_dim, value_dim, padded::<T>(slots));
        let format = self.format();
        if let Some(packed) = &mut self.packed {
            if packed.dims() != [head_dim, value_dim] {
                self.packed = Packed::new(format, head_dim, value_dim);
            }
            self.keys.resize(0);
            self.values.resize(0);
            self.bias.resize(self.capacity);
            self.bias.fill(T::neg_infinity());
            self.make_room_packed();
            return;
        }
        self.keys.resize(head_dim * self.capacity);
        self.values.resize(self.capacity * padded::<T>(value_dim));
        self.bias.resize(self.capacity);
        self.keys.fill(T::zero());
        self.values.fill(T::zero());
        self.bias.fill(T::neg_infinity());
    }

    /// Makes room for so many slots; what the set holds stays where it is.
    pub(crate) fn grow(&mut self, slots: usize) {
        let (old, capacity) = (self.capacity, padded::<T>(slots));
        if capacity <= old {
            return;
        }
        self.bias.grow(capacity);
        self.bias[old..].fill(T::neg_infinity());
        self.capacity = capacity;
        if self.packed.is_some() {
            return self.make_room_packed();
        }
        self.keys.grow(self.head_dim * capacity);
        for row in (0..self.head_dim).rev() {
            self.keys.copy_within(row * old..(row + 1) * old, row * capacity);
            self.keys[row * capacity + old..(row + 1) * capacity].fill(T::zero());
        }
        self.values.grow(capacity * padded::<T>(self.value_dim));
    }

    fn make_room_packed(&mut self) {
        if let Some(packed) = &mut self.packed {
            packed.make_room(self.capacity);
        }
    }

    pub(crate) fn copy_from(&mut self, other: &Self) {
        (self.head_dim, self.value_dim, self.capacity) =
            (other.head_dim, other.value_dim, other.capacity);
        for (to, from) in [
            (&mut self.keys, &other.keys),
            (&mut self.values, &other.values),
            (&mut self.bias, &other.bias),
        ] {
            to.resize(from.len());
            to.copy_from_slice(from);
        }
        match (&mut self.packed, &other.packed) {
            (Some(packed), Some(other)) => packed.copy_from(other),
            (packed, other) => packed.clone_from(other),
        }
    }

    /// Fills a slot with one token, rounded to the format.
    pub(crate) fn put(&mut self, slot: usize, key: ArrayView1<'_, T>, value: ArrayView1<'_, T>) {
        self.set(slot, key, value);
        self.bias[slot] = T::zero();
    }

    /// Sets the key and the value of a slot, rounded to the format.
    pub(crate) fn set(&mut self, slot: usize, key: ArrayView1<'_, T>, value: ArrayView1<'_, T>) {
        if let Some(packed) = &mut self.packed {
            return packed.put(slot, key, value);
        }
        for (column, &x) in self.keys[slot..].iter_mut().step_by(self.capacity).zip(key) {
            *column = x;
        }
        let row = self.value_mut(slot);
        match value.to_slice() {
            Some(value) => row.copy_from_slice(value),
            None => row.iter_mut().zip(value).for_each(|(to, &x)| *to = x),
        }
    }

    /// Fills a slot with what is in a slot of another set of the same sizes and format.
    pub(crate) fn put_from(&mut self, slot: usize, other: &Self, from: usize) {
        self.bias[slot] = other.bias[from];
        if let (Some(packed), Some(other)) = (&mut self.packed, &other.packed) {
            return packed.put_from(slot, other, from);
        }
        let keys = other.keys[from..].iter().step_by(other.capacity);
        for (to, &x) in self.keys[slot..].iter_mut().step_by(self.capacity).zip(keys) {
            *to = x;
        }
        let stride = padded::<T>(self.value_dim);
        self.values[slot * stride..(slot + 1) * stride].copy_from_slice(other.value_row(from));
    }

    /// The same within this set.
    pub(crate) fn move_slot(&mut self, from: usize, to: usize) {
        self.bias[to] = self.bias[from];
        if let Some(packed) = &mut self.packed {
            return packed.copy_token(from, to);
        }
        for row in self.keys.chunks_exact_mut(self.capacity) {
            row[to] = row[from];
        }
        let stride = padded::<T>(self.value_dim);
        self.values.copy_within(from * stride..(from + 1) * stride, to * stride);
    }

    pub(crate) fn empty(&mut self, slot: usize) {
        self.bias[slot] = T::neg_infinity();
    }

    /// The key of a slot, as it is kept.
    pub(crate) fn key(&self, slot: usize) -> impl Iterator<Item = T> {
        let wide = self.keys.get(slot..).unwrap_or_default().iter().step_by(self.capacity).copied();
        let packed = self.packed.iter();
        wide.chain(packed.flat_map(move |all| (0..self.head_dim).map(move |c| all.key(slot, c))))
    }

    /// The value of a slot, as it is kept.
    pub(crate) fn value(&self, slot: usize) -> impl Iterator<Item = T> {
        let at = slot * padded::<T>(self.value_dim);
        let wide = self.values.get(at..).unwrap_or_default().iter().copied();
        let packed = self.packed.iter();
        let packed =
            packed.flat_map(move |all| (0..self.value_dim).map(move |c| all.value(slot, c)));
        wide.chain(packed).take(self.value_dim)
    }

    /// Copies the key of a slot, as it is kept.
    pub(crate) fn read_key(&self, slot: usize, out: &mut [T]) {
        if let Some(packed) = &self.packed {
            return packed.read_key(slot, &mut out[..self.head_dim]);
        }
        let column = self.keys[slot..].iter().step_by(self.capacity);
        out.iter_mut().zip(column).for_each(|(to, &x)| *to = x);
    }

    /// Copies the value of a slot, as it is kept.
    pub(crate) fn read_value(&self, slot: usize, out: &mut [T]) {
        if let Some(packed) = &self.packed {
            return packed.read_value(slot, &mut out[..self.value_dim]);
        }
        out[..self.value_dim].copy_from_slice(&self.value_row(slot)[..self.value_dim]);
    }

    /// What holds keys and values where they are in fewer bits; columns and rows are of the others.
    pub(crate) fn packed(&self) -> Option<&Packed> {
        self.packed.as_ref()
    }

    /// All keys, `[head_dim, capacity]`.
    pub(crate) fn key_columns(&self) -> &[T] {
        &self.keys
    }

    /// All values, `[capacity, value_dim padded with zeros]`, and one of them.
    pub(crate) fn value_rows(&self) -> &[T] {
        &self.values
    }

    pub(crate) fn value_row(&self, slot: usize) -> &[T] {
        let stride = padded::<T>(self.value_dim);
        &self.values[slot * stride..(slot + 1) * stride]
    }

    fn value_mut(&mut self, slot: usize) -> &mut [T] {
        &mut self.values[slot * padded::<T>(self.value_dim)..][..self.value_dim]
    }
}

/// Working memory of [`attend`]. Queries `[rows, head_dim]` are in units of scores to base 2; row
/// `i` of the scores `[rows, width]` holds the slots of one set after the other, and begins with
/// their biases.
#[derive(Debug)]
pub(crate) struct Reading<T> {
    pub(crate) queries: Buffer<T>,
    pub(crate) scores: Buffer<T>,
    /// Products that are capped before they are added to the scores.
    products: Buffer<T>,
    /// Queries in units of their own, and the factors of their scores: for sets in fewer bits.
    units: [Buffer<T>; 2],
    pub(crate) width: usize,
    pub(crate) answer: Answer<T>,
}

impl<T: Scalar> Reading<T> {
    pub(crate) fn new() -> Self {
        Self {
            queries: Buffer::new(),
            scores: Buffer::new(),
            products: Buffer::new(),
            units: [Buffer::new(), Buffer::new()],
            width: 0,
            answer: Answer::new(),
        }
    }

    pub(crate) fn prepare(&mut self, rows: usize, head_dim: usize, width: usize, value_dim: usize) {
        self.width = width;
        self.queries.resize(rows * head_dim);
        self.scores.resize(rows * width);
        self.answer.resize(rows, rows, padded::<T>(value_dim));
    }

    /// Sets query `row`, times `factor`.
    pub(crate) fn set_query(&mut self, row: usize, q: ArrayView1<'_, T>, factor: T) {
        let to = &mut self.queries[row * q.len()..(row + 1) * q.len()];
        match q.to_slice() {
            Some(q) => _ = kernel::scale_into(factor, q, to),
            None => to.iter_mut().zip(q).for_each(|(to, &x)| *to = x * factor),
        }
    }

    /// The scores of a row; after [`attend`] the weights in units of the row's log scale.
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        &mut self.scores[row * self.width..(row + 1) * self.width]
    }
}

/// Sets the answer to `Σ_s 2^(bias_s + q·k_s)·(v_s, 1)` over the first slots of several sets, as
/// many as given: whole cache lines. With a soft cap `q·k_s` is capped, and the bias is not.
///
/// A row gets the same bits whatever the number of rows: products and sums of a row do not depend
/// on the others.
pub(crate) fn attend<T: Scalar>(
    sets: &[(&Slots<T>, usize)],
    rows: usize,
    soft_cap: Option<SoftCap<T>>,
    share: T,
    reading: &mut Reading<T>,
) {
    let Reading { queries, scores, products, units: [own_queries, factors], width, answer } =
        reading;
    let width = *width;
    let target = if soft_cap.is_some() {
        products.resize(rows * width);
        &mut *products
    } else {
        &mut *scores
    };
    if let Some(packed) = sets.iter().find_map(|(slots, _)| slots.packed()) {
        own_queries.resize(queries.len());
        own_queries.copy_from_slice(queries);
        factors.resize(rows);
        factors.fill(T::one());
        packed.set_units(own_queries, factors);
        if soft_cap.is_some() {
            target.fill(T::zero());
        }
    }
    let mut offset = 0;
    for (slots, used) in sets {
        if let Some(packed) = slots.packed() {
            let queries = [&**own_queries, &**factors];
            packed.add_scores([0, *used], queries, &mut target[offset..], width);
        } else if *used > 0 {
            Product {
                m: rows,
                n: *used,
                k: slots.head_dim,
                a: Matrix::rows(queries, slots.head_dim),
                b: &slots.keys,
                ldb: slots.capacity,
                c: &mut target[offset..],
                ldc: width,
                into: if soft_cap.is_some() { Epilogue::Set } else { Epilogue::Add },
            }
            .run();
        }
        offset += used;
    }
    if let Some(cap) = soft_cap {
        cap.apply(products);
        kernel::add_scaled(scores, T::one(), products);
    }
    for (i, row) in scores.chunks_exact_mut(width.max(1)).enumerate().take(rows) {
        let largest = kernel::max(row);
        answer.log_scale[i] = largest * T::from_f64(core::f64::consts::LN_2);
        if largest == T::neg_infinity() {
            row.fill(T::zero());
            answer.denominator[i] = T::zero();
        } else {
            kernel::exp2_slice(row, largest);
            if share != T::one() {
                kernel::scale(row, share);
                answer.log_scale[i] -= share.ln();
            }
            answer.denominator[i] = kernel::sum(row);
        }
    }
    if width == 0 {
        answer.log_scale.fill(T::neg_infinity());
        answer.denominator.fill(T::zero());
    }
    let (mut offset, mut first) = (0, true);
    for (slots, used) in sets {
        let stride = padded::<T>(slots.value_dim);
        if let Some(packed) = slots.packed() {
            if first {
                answer.numerator.fill(T::zero());
            }
            let weights = (scores.get(offset..).unwrap_or_default(), width);
            packed.add_sums([0, *used], weights, &mut answer.numerator, stride);
            first = false;
        } else if *used > 0 {
            Product {
                m: rows,
                n: stride,
                k: *used,
                a: Matrix::rows(&scores[offset..], width),
                b: &slots.values,
                ldb: stride,
                c: &mut answer.numerator,
                ldc: stride,
                into: if first { Epilogue::Set } else { Epilogue::Add },
            }
            .run();
            first = false;
        }
        offset += used;
    }
    if first {
        answer.numerator.fill(T::zero());
    }
}
