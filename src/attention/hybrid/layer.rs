//! The state of a hybrid kernel and its causal pass: some heads of keys and values, each with the
//! query heads it serves.
//!
//! A step appends the token, moves the oldest tokens out of the window if they are due, and reads.
//! Between two moves nothing but the window changes, and by new tokens only: those steps are
//! computed at once, by matrix products. Every row of such a product gets the bits it would get
//! alone, so that the cut of a sequence into pieces changes nothing at all.
#![allow(clippy::cast_precision_loss)] // sizes of heads and memories

use super::config::{Config, FarKind, LEAST_ENTRIES, Weighing};
use crate::attention::HeadCall as Call;
use crate::features::FeatureMap;
use crate::kernel::{self, Buffer, padded, pairs};
use crate::memory::linear::LinearMemory;
use crate::memory::linear::entry::Workspace;
use crate::memory::merged::{self, MergedMemory, Pair};
use crate::memory::slab::{Reading, Slab, attend};
use crate::memory::{Memory, Partial, divisor};
use crate::{Error, Scalar, views};
use core::ops::Range;
use ndarray::{ArrayView1, ArrayView2, Axis};
use std::sync::Arc;

/// Queries that are answered at once: tokens times heads of the group.
const MOST_ROWS: usize = 32;

/// Tokens that are kept exactly: the sinks, the window (a ring), and the heavy keys.
#[derive(Clone, Debug)]
struct Near<T> {
    slab: Slab<T>,
    /// Attention received, of the window and the heavy keys.
    received: Buffer<T>,
    heavy_scores: Vec<T>,
    /// The largest magnitudes of any key and any value so far.
    largest_key: T,
    largest_value: T,
}

/// What takes the tokens that leave, for each head.
#[derive(Clone, Debug)]
enum Store<T: Scalar> {
    None,
    Merged(Vec<MergedMemory<T>>),
    Linear(Vec<LinearMemory<T, Arc<dyn FeatureMap<T>>>>),
    Own(Vec<Box<dyn Memory<T>>>),
}

/// The state of some heads.
#[derive(Clone, Debug)]
pub(crate) struct Layer<T: Scalar> {
    pub(crate) tokens: usize,
    value_dim: usize,
    near: Vec<Near<T>>,
    far: Store<T>,
}

/// Working memory of the pass.
#[derive(Debug)]
pub(crate) struct Work<T: Scalar> {
    reading: Reading<T>,
    linear: Workspace<T>,
    partial: Partial<T>,
    pairs: Vec<Pair<T>>,
    log_normalizer: Vec<T>,
    inverse: Buffer<T>,
    keys: [Buffer<T>; 2],
    value: Buffer<T>,
    /// The state before a call that may fail.
    before: Option<Layer<T>>,
}

impl<T: Scalar> Work<T> {
    pub(crate) fn new() -> Self {
        Self {
            reading: Reading::new(),
            linear: Workspace::new(),
            partial: Partial::empty(),
            pairs: Vec::new(),
            log_normalizer: Vec::new(),
            inverse: Buffer::new(),
            keys: [Buffer::new(), Buffer::new()],
            value: Buffer::new(),
            before: None,
        }
    }
}

impl<T: Scalar> Near<T> {
    fn new() -> Self {
        Self {
            slab: Slab::new(),
            received: Buffer::new(),
            heavy_scores: Vec::new(),
            largest_key: T::zero(),
            largest_value: T::zero(),
        }
    }

    fn prepare(&mut self, config: &Config<T>, value_dim: usize) {
        self.slab.prepare(config.head_dim, value_dim, config.near_slots());
        self.received.resize(self.slab.capacity);
        self.received.fill(T::zero());
        self.heavy_scores.clear();
        self.heavy_scores.reserve(config.heavy);
        (self.largest_key, self.largest_value) = (T::zero(), T::zero());
    }

    fn copy_from(&mut self, other: &Self) {
        self.slab.copy_from(&other.slab);
        self.received.resize(other.received.len());
        self.received.copy_from_slice(&other.received);
        self.heavy_scores.clone_from(&other.heavy_scores);
        (self.largest_key, self.largest_value) = (other.largest_key, other.largest_value);
    }

    fn put(&mut self, slot: usize, key: ArrayView1<'_, T>, value: ArrayView1<'_, T>) {
        self.slab.put(slot, key, value);
        self.received[slot] = T::zero();
    }

    /// Finds the largest key and value.
    fn measure(&mut self) {
        for slot in 0..self.slab.capacity {
            self.largest_key = self.slab.key(slot).fold(self.largest_key, |m, x| m.max(x.abs()));
            self.largest_value =
                self.slab.value(slot).iter().fold(self.largest_value, |m, x| m.max(x.abs()));
        }
    }

    /// Decides what becomes of a token that leaves the window: it may stay as a heavy key. Returns
    /// the slot of the token that goes on to the far memory, if one does.
    fn sift(
        &mut self,
        slot: usize,
        config: &Config<T>,
        keys: &mut [Buffer<T>; 2],
    ) -> Option<usize> {
        if config.heavy == 0 {
            return Some(slot);
        }
        let score = config.static_score(self.slab.key(slot), keys);
        let first = config.sinks + config.ring;
        if self.heavy_scores.len() < config.heavy {
            let to = first + self.heavy_scores.len();
            self.heavy_scores.push(score);
            self.slab.move_slot(slot, to);
            self.received[to] = self.received[slot];
            return None;
        }
        let mut least = 0;
        for (i, other) in self.heavy_scores.iter().enumerate() {
            if *other < self.heavy_scores[least] {
                least = i;
            }
        }
        if score > self.heavy_scores[least] {
            self.heavy_scores[least] = score;
            // they change places
            let spare = config.near_slots() - 1;
            self.slab.move_slot(first + least, spare);
            self.slab.move_slot(slot, first + least);
            self.slab.move_slot(spare, slot);
            self.slab.empty(spare);
            self.received.swap(slot, first + least);
        }
        Some(slot)
    }
}

impl<T: Scalar> Store<T> {
    fn prepare(
        &mut self,
        config: &Config<T>,
        heads: usize,
        value_dim: usize,
        deciding_columns: Option<usize>,
    ) -> Result<(), Error> {
        match &config.far {
            FarKind::None => *self = Self::None,
            FarKind::Merged { rule, .. } => {
                if !matches!(self, Self::Merged(all) if all.len() == heads) {
                    *self = Self::Merged(vec![MergedMemory::with_rule(rule.clone()); heads]);
                }
                let Self::Merged(all) = self else { return Ok(()) };
                for memory in all {
                    memory.rule = rule.clone();
                    memory.rule.value_columns = deciding_columns;
                    memory.rule.spare += (heads - 1) * rule.entries; // of a pool, one head may take all
                    memory.prepare(config.head_dim, value_dim);
                }
            }
            FarKind::Linear(map) => {
                if let Self::Linear(all) = self
                    && all.len() == heads
                    && all.iter().all(|memory| memory.is_of(map, value_dim))
                {
                    all.iter_mut().for_each(LinearMemory::forget);
                    return Ok(());
                }
                let memory = || LinearMemory::new(Arc::clone(map), value_dim, config.scale);
                *self = Self::Linear((0..heads).map(|_| memory()).collect::<Result<_, _>>()?);
            }
            FarKind::Own(make) => {
                *self = Self::Own(
                    (0..heads).map(|_| make(value_dim, config.scale)).collect::<Result<_, _>>()?,
                );
            }
        }
        Ok(())
    }
}

impl<T: Scalar> Layer<T> {
    pub(crate) fn new() -> Self {
        Self { tokens: 0, value_dim: 0, near: Vec::new(), far: Store::None }
    }

    /// Makes it empty, for these sizes. What is merged is decided by the first `deciding_columns`
    /// of the values, or all.
    pub(crate) fn prepare(
        &mut self,
        config: &Config<T>,
        heads: usize,
        value_dim: usize,
        deciding_columns: Option<usize>,
    ) -> Result<(), Error> {
        (self.tokens, self.value_dim) = (0, value_dim);
        self.near.resize_with(heads, Near::new);
        for near in &mut self.near {
            near.prepare(config, value_dim);
        }
        self.far.prepare(config, heads, value_dim, deciding_columns)
    }

    /// Forgets every token.
    pub(crate) fn clear(&mut self, config: &Config<T>) {
        self.tokens = 0;
        for near in &mut self.near {
            near.prepare(config, self.value_dim);
        }
        match &mut self.far {
            Store::None => {}
            Store::Merged(all) => all.iter_mut().for_each(Memory::reset),
            Store::Linear(all) => all.iter_mut().for_each(LinearMemory::forget),
            Store::Own(all) => all.iter_mut().for_each(|memory| memory.reset()),
        }
    }

    pub(crate) fn copy_from(&mut self, other: &Self) {
        (self.tokens, self.value_dim) = (other.tokens, other.value_dim);
        self.near.resize_with(other.near.len(), Near::new);
        for (to, from) in self.near.iter_mut().zip(&other.near) {
            to.copy_from(from);
        }
        match (&mut self.far, &other.far) {
            (Store::Merged(to), Store::Merged(from)) if to.len() == from.len() => {
                to.iter_mut().zip(from).for_each(|(to, from)| to.copy_from(from));
            }
            (Store::Linear(to), Store::Linear(from)) if to.len() == from.len() => {
                to.iter_mut().zip(from).for_each(|(to, from)| to.copy_from(from));
            }
            (to, from) => to.clone_from(from),
        }
    }

    pub(crate) fn state_floats(&self, config: &Config<T>) -> usize {
        let near = self.near.len() * config.near_floats(self.value_dim);
        near + match &self.far {
            Store::None => 0,
            Store::Merged(all) => all.iter().map(MergedMemory::floats).sum(),
            Store::Linear(all) => all.iter().map(Memory::state_floats).sum(),
            Store::Own(all) => all.iter().map(|memory| memory.state_floats()).sum(),
        }
    }

    /// Causal attention of new tokens, of checked shapes and finite; the state is as before if it
    /// fails.
    pub(crate) fn extend(
        &mut self,
        config: &Config<T>,
        calls: &mut [Call<'_, T>],
        work: &mut Work<T>,
    ) -> Result<(), Error> {
        if self.is_safe(config, calls) {
            self.steps(config, calls, work)?;
        } else {
            let mut before = work.before.take().unwrap_or_else(Self::new);
            before.copy_from(self);
            let result = self.steps(config, calls, work);
            if result.is_err() {
                self.copy_from(&before);
            }
            work.before = Some(before);
            result?;
        }
        for (near, call) in self.near.iter_mut().zip(&*calls) {
            near.largest_key = near.largest_key.max(largest(call.k));
            near.largest_value = near.largest_value.max(largest(call.v));
        }
        Ok(())
    }

    /// Whether nothing can fail half-way: exact tokens and merged entries, and no score and no sum
    /// of values that can leave the range of `T`.
    pub(crate) fn is_safe(&self, config: &Config<T>, calls: &[Call<'_, T>]) -> bool {
        let limit = T::max_value() * T::from_f64(1.0 / 64.0);
        let slots = T::from_f64((config.near_slots() + config.far_slots(self.near.len())) as f64);
        let factor = T::from_f64(config.scale.max(1.0) * config.head_dim as f64 * 2.0);
        matches!(self.far, Store::None | Store::Merged(_))
            && self.near.iter().zip(calls).all(|(near, call)| {
                let key = near.largest_key.max(largest(call.k));
                let value = near.largest_value.max(largest(call.v));
                let query = call.q.outer_iter().fold(T::zero(), |m, q| m.max(largest(q)));
                // one factor after the other: none of these products may overflow into a NaN
                query * factor * key.max(T::one()) < limit && key < limit && value * slots < limit
            })
    }

    fn steps(
        &mut self,
        config: &Config<T>,
        calls: &mut [Call<'_, T>],
        work: &mut Work<T>,
    ) -> Result<(), Error> {
        let n = calls[0].k.nrows();
        let group = calls[0].q.len_of(Axis(0));
        let most = (MOST_ROWS / group).max(1);
        let mut start = 0;
        while start < n {
            let first = self.tokens;
            let run = config.steps_at_once(self.tokens).min(n - start).min(most);
            self.take(config, calls, start);
            self.leave(config, work).map_err(|error| error.in_chunk(start))?;
            for i in start + 1..start + run {
                self.tokens += 1;
                self.take(config, calls, i);
            }
            self.tokens += 1;
            for (head, call) in calls.iter_mut().enumerate() {
                self.read(config, head, call, start, run, true, work)?;
            }
            if config.trails() {
                for gone in config.expired(first, self.tokens) {
                    let slot = config.slot(gone);
                    self.near.iter_mut().for_each(|near| near.slab.empty(slot));
                }
            }
            start += run;
        }
        Ok(())
    }

    /// Appends token `i` of the call to the sinks or the window.
    fn take(&mut self, config: &Config<T>, calls: &[Call<'_, T>], i: usize) {
        let slot = config.slot(self.tokens);
        for (head, (near, call)) in self.near.iter_mut().zip(calls).enumerate() {
            let value = views::row(call.v, i);
            near.put(slot, views::row(call.k, i), value);
            if self.tokens >= config.sinks
                && let Store::Merged(memories) = &mut self.far
            {
                memories[head]
                    .observe(call.q.outer_iter().map(|q| q.index_axis_move(Axis(0), i)), value);
            }
        }
    }

    /// Moves the oldest tokens out of the window, if the newest one makes that due.
    fn leave(&mut self, config: &Config<T>, work: &mut Work<T>) -> Result<(), Error> {
        match config.leaving(self.tokens) {
            Some(leaving) => self.move_out(config, leaving, work),
            None => Ok(()),
        }
    }

    /// Moves everything out of the window that it still holds.
    fn leave_rest(&mut self, config: &Config<T>, work: &mut Work<T>) -> Result<(), Error> {
        let rest = config.held(self.tokens);
        if rest.is_empty() { Ok(()) } else { self.move_out(config, rest, work) }
    }

    fn move_out(
        &mut self,
        config: &Config<T>,
        leaving: Range<usize>,
        work: &mut Work<T>,
    ) -> Result<(), Error> {
        for position in leaving {
            let slot = config.slot(position);
            for head in 0..self.near.len() {
                if let Some(slot) = self.near[head].sift(slot, config, &mut work.keys) {
                    self.far_absorb(config, head, slot, work)?;
                }
                self.near[head].slab.empty(slot);
            }
        }
        if let (Store::Merged(memories), FarKind::Merged { rule, .. }) =
            (&mut self.far, &config.far)
        {
            let heads = memories.len();
            let least = if heads > 1 { LEAST_ENTRIES } else { 1 };
            work.pairs.clear();
            work.pairs.reserve(heads * (rule.entries + rule.block));
            merged::reduce(memories, rule.entries * heads, least, rule.block, &mut work.pairs);
        }
        Ok(())
    }

    /// Gives the token in a slot to the far memory.
    fn far_absorb(
        &mut self,
        config: &Config<T>,
        head: usize,
        slot: usize,
        work: &mut Work<T>,
    ) -> Result<(), Error> {
        let near = &self.near[head];
        let (d, dv) = (config.head_dim, self.value_dim);
        match &mut self.far {
            Store::None => return Ok(()),
            Store::Merged(memories) => {
                let memory = &mut memories[head];
                let weight = match config.weighing() {
                    Weighing::One => T::one(),
                    Weighing::Expected => {
                        config.expected_attention(near.slab.key(slot), &mut work.keys)
                    }
                    Weighing::Received { .. } => MergedMemory::weight_of(near.received[slot]),
                };
                let end = memory.held;
                memory.slab.put_from(end, &near.slab, slot);
                memory.enter(weight);
                return Ok(());
            }
            Store::Linear(_) | Store::Own(_) => {}
        }
        let [key, _] = &mut work.keys;
        key.resize(d);
        work.value.resize(dv);
        key.iter_mut().zip(near.slab.key(slot)).for_each(|(to, x)| *to = x);
        work.value.copy_from_slice(near.slab.value(slot));
        let k = ArrayView1::from(&**key).insert_axis(Axis(0));
        let v = ArrayView1::from(&*work.value).insert_axis(Axis(0));
        match &mut self.far {
            Store::Linear(memories) => memories[head].absorb_with(k, v, &mut work.linear),
            Store::Own(memories) => memories[head].absorb(k, v),
            Store::None | Store::Merged(_) => Ok(()),
        }
    }

    /// Attention of every query to all keys, which are taken in first; of one head, which is empty.
    pub(crate) fn full(
        &mut self,
        config: &Config<T>,
        call: &mut Call<'_, T>,
        work: &mut Work<T>,
    ) -> Result<(), Error> {
        for i in 0..call.k.nrows() {
            if config.trails() && i >= config.sinks {
                break;
            }
            self.take(config, core::slice::from_ref(call), i);
            self.leave(config, work).map_err(|error| error.in_chunk(i))?;
            self.tokens += 1;
        }
        if !config.trails() {
            self.leave_rest(config, work)?;
        }
        let n = call.q.len_of(Axis(1));
        for start in (0..n).step_by(MOST_ROWS) {
            self.read(config, 0, call, start, MOST_ROWS.min(n - start), false, work)?;
        }
        Ok(())
    }

    /// Answers steps `start..start + run` of a head, and tells the memories what they received.
    /// `causal`: the last of these steps is the newest token, and none sees those after it.
    #[allow(clippy::too_many_arguments)]
    fn read(
        &mut self,
        config: &Config<T>,
        head: usize,
        call: &mut Call<'_, T>,
        start: usize,
        run: usize,
        causal: bool,
        work: &mut Work<T>,
    ) -> Result<(), Error> {
        let group = call.q.len_of(Axis(0));
        let rows = run * group;
        let near = &self.near[head];
        let memory = match &self.far {
            Store::Merged(memories) => Some(&memories[head]),
            _ => None,
        };
        let (own, far) = (near.slab.capacity, memory.map_or(0, MergedMemory::used));
        let Work { reading, inverse, .. } = &mut *work;
        reading.prepare(rows, config.head_dim, own + far, self.value_dim);
        for row in 0..rows {
            let (step, g) = (row / group, row % group);
            let q = call.q.index_axis(Axis(0), g).index_axis_move(Axis(0), start + step);
            reading.set_query(row, q, config.factor());
            let (exact, merged) = reading.row(row).split_at_mut(own);
            exact.copy_from_slice(&near.slab.bias);
            if causal {
                let first = self.tokens - run;
                for hidden in config.hidden(first, first + step, self.tokens) {
                    exact[config.slot(hidden)] = T::neg_infinity();
                }
            }
            if let Some(memory) = memory {
                merged.copy_from_slice(&memory.slab.bias[..far]);
            }
        }
        attend(
            &[(&near.slab, own), (memory.map_or(&near.slab, |memory| &memory.slab), far)],
            rows,
            reading,
        );
        if let Some(row) = reading.answer.first_overflow() {
            return Err(Error::Overflow { which: "a score", row: start + row / group });
        }
        inverse.resize(rows);
        self.add_far(head, call, start, run, work)?;
        let Work { reading, inverse, .. } = &mut *work;
        for (row, inverse) in inverse.iter_mut().enumerate() {
            *inverse = divisor(reading.answer.denominator[row], start + row / group)?.recip();
        }
        write_rows(reading, inverse, call, start, self.value_dim)?;
        if causal {
            self.receive(config, head, call, start, run, work);
        }
        Ok(())
    }

    /// Adds what a far memory of another kind answers to the same queries.
    fn add_far(
        &mut self,
        head: usize,
        call: &Call<'_, T>,
        start: usize,
        run: usize,
        work: &mut Work<T>,
    ) -> Result<(), Error> {
        let q = queries(call, start, run);
        let Work { reading, linear, partial, .. } = work;
        let answer = &mut reading.answer;
        let value_dim = self.value_dim;
        match &self.far {
            Store::Linear(memories) if memories[head].len() > 0 => {
                memories[head].read_with(q, linear, |first, part| {
                    for (i, numerator) in
                        part.numerator.chunks_exact(padded::<T>(value_dim)).enumerate()
                    {
                        answer.add_row(
                            first + i,
                            numerator,
                            part.denominator[i],
                            part.log_scale[i],
                        );
                    }
                    Ok(())
                })
            }
            Store::Own(memories) => {
                if partial.numerator().dim() == (q.nrows(), value_dim) {
                    partial.reset();
                } else {
                    *partial = Partial::new(q.nrows(), value_dim)?;
                }
                memories[head].read(q, partial)?;
                for (i, numerator) in partial.numerator.outer_iter().enumerate() {
                    let numerator = numerator.to_slice().unwrap_or_default();
                    answer.add_row(i, numerator, partial.denominator[i], partial.log_scale[i]);
                }
                Ok(())
            }
            _ => Ok(()),
        }
        .map_err(|error: Error| error.in_chunk(start))
    }

    /// Weights by the attention just received; the factors `inverse` make probabilities of the rows
    /// of weights.
    fn receive(
        &mut self,
        config: &Config<T>,
        head: usize,
        call: &Call<'_, T>,
        start: usize,
        run: usize,
        work: &mut Work<T>,
    ) {
        let group = call.q.len_of(Axis(0));
        let Work { reading, inverse, log_normalizer, .. } = work;
        if let Store::Own(memories) = &mut self.far {
            let answer = &reading.answer;
            log_normalizer.clear();
            log_normalizer.extend(
                (0..run * group).map(|row| answer.denominator[row].ln() + answer.log_scale[row]),
            );
            memories[head].received(queries(call, start, run), ArrayView1::from(&*log_normalizer));
        }
        let (Store::Merged(memories), Weighing::Received { decay, min_age }) =
            (&mut self.far, config.weighing())
        else {
            return;
        };
        let (memory, decay) = (&mut memories[head], T::from_f64(decay));
        let pooled = self.near.len() > 1;
        let near = &mut self.near[head];
        let (own, width) = (near.slab.capacity, reading.width);
        for step in 0..run {
            let t = self.tokens - run + step;
            let rows = step * group..(step + 1) * group;
            let factors = &mut inverse[rows.clone()];
            if pooled {
                // heads compare by what they give to all but the sinks
                let mut mass = T::zero();
                for (row, &factor) in rows.clone().zip(&*factors) {
                    mass += factor * kernel::sum(&reading.row(row)[config.sinks..]);
                }
                if mass > T::zero() {
                    let unit = T::from_f64(group as f64) / mass;
                    kernel::scale(factors, unit);
                }
            }
            for row in rows.clone() {
                let young = min_age.min(config.ring).min((t + 1).saturating_sub(config.sinks));
                for position in t + 1 - young..=t {
                    reading.row(row)[config.slot(position)] = T::zero();
                }
            }
            let scores = &reading.scores[rows.start * width..];
            pairs::receive(
                &mut near.received,
                decay,
                MergedMemory::<T>::least_weight(),
                factors,
                scores,
                width,
            );
            memory.receive(decay, factors, &scores[own..], width);
        }
    }

    /// What has to be kept to go on from here: for each head the sinks, the window from its oldest
    /// token on, the heavy keys, the far memory.
    pub(crate) fn numbers(&self, config: &Config<T>) -> Option<Vec<T>> {
        let mut out = Vec::new();
        for (head, near) in self.near.iter().enumerate() {
            let mut token = |slot: usize| {
                out.extend(near.slab.key(slot));
                out.extend(near.slab.value(slot));
                out.push(near.received[slot]);
            };
            (0..config.sinks.min(self.tokens)).for_each(&mut token);
            config.held(self.tokens).map(|position| config.slot(position)).for_each(&mut token);
            (0..near.heavy_scores.len())
                .map(|i| config.sinks + config.ring + i)
                .for_each(&mut token);
            out.extend(&near.heavy_scores);
            match &self.far {
                Store::None => {}
                Store::Merged(memories) => {
                    out.push(T::from_f64(memories[head].held as f64));
                    memories[head].numbers(&mut out);
                }
                Store::Linear(memories) => out.extend(memories[head].numbers()),
                Store::Own(_) => return None,
            }
        }
        Some(out)
    }

    /// The inverse; `false` if the numbers are not as many as they should be. The state is then
    /// unspecified.
    pub(crate) fn set_numbers(
        &mut self,
        config: &Config<T>,
        tokens: usize,
        mut numbers: &[T],
    ) -> bool {
        self.clear(config);
        self.tokens = tokens;
        let (d, dv) = (config.head_dim, self.value_dim);
        let (heads, mut all_entries) = (self.near.len(), 0);
        let gone = tokens.saturating_sub(config.sinks) - config.held(tokens).len();
        let heavy = if config.trails() { 0 } else { gone.min(config.heavy) };
        for (head, near) in self.near.iter_mut().enumerate() {
            let sinks = 0..config.sinks.min(tokens);
            let ring = config.held(tokens).map(|position| config.slot(position));
            let heavy_slots = (0..heavy).map(|i| config.sinks + config.ring + i);
            for slot in sinks.chain(ring).chain(heavy_slots) {
                let Some((token, rest)) = numbers.split_at_checked(d + dv + 1) else {
                    return false;
                };
                near.put(slot, ArrayView1::from(&token[..d]), ArrayView1::from(&token[d..d + dv]));
                near.received[slot] = token[d + dv];
                if near.received[slot] < T::zero() {
                    return false;
                }
                numbers = rest;
            }
            let Some((scores, rest)) = numbers.split_at_checked(heavy) else { return false };
            near.heavy_scores.extend_from_slice(scores);
            numbers = rest;
            let count = match &mut self.far {
                Store::None => 0,
                Store::Merged(memories) => {
                    let memory = &mut memories[head];
                    let Some((&entries, rest)) = numbers.split_first() else { return false };
                    let is_it = |n: &usize| T::from_f64(*n as f64) == entries;
                    let Some(entries) = (0..=memory.slab.capacity).find(is_it) else {
                        return false;
                    };
                    all_entries += entries;
                    let count = memory.count_numbers(entries);
                    let Some(own) = rest.get(..count) else { return false };
                    if !memory.set_numbers(
                        entries,
                        gone - heavy,
                        tokens.saturating_sub(config.sinks),
                        own,
                    ) {
                        return false;
                    }
                    count + 1
                }
                Store::Linear(memories) => {
                    let memory = &mut memories[head];
                    let count = if gone == heavy { 0 } else { memory.state_floats() };
                    let Some(own) = numbers.get(..count) else { return false };
                    memory.set_numbers(gone - heavy, own);
                    count
                }
                Store::Own(_) => return false,
            };
            numbers = &numbers[count..];
            near.measure();
            if let Store::Merged(memories) = &self.far {
                near.largest_key = near.largest_key.max(largest(memories[head].keys().view()));
                near.largest_value =
                    near.largest_value.max(largest(memories[head].values().view()));
            }
        }
        let merged = match &config.far {
            FarKind::Merged { rule, .. } => heads * rule.entries.min(gone - heavy),
            _ => 0,
        };
        numbers.is_empty() && all_entries == merged
    }
}

/// The queries of some steps, as rows: of one step those of all heads, of several steps those of
/// one head.
fn queries<'a, T: Scalar>(call: &Call<'a, T>, start: usize, run: usize) -> ArrayView2<'a, T> {
    if run == 1 {
        call.q.index_axis_move(Axis(1), start)
    } else {
        views::rows(call.q.index_axis_move(Axis(0), 0), start..start + run)
    }
}

/// Writes numerators times factors.
fn write_rows<T: Scalar>(
    reading: &Reading<T>,
    factors: &[T],
    call: &mut Call<'_, T>,
    start: usize,
    value_dim: usize,
) -> Result<(), Error> {
    let group = call.out.len_of(Axis(0));
    let stride = padded::<T>(value_dim);
    for (row, &factor) in factors.iter().enumerate() {
        let numerator = &reading.answer.numerator[row * stride..][..value_dim];
        let mut out = call.out.index_axis_mut(Axis(0), row % group);
        let mut out = out.index_axis_mut(Axis(0), start + row / group);
        let mark = if let Some(out) = out.as_slice_mut() {
            kernel::scale_into(factor, numerator, out)
        } else {
            let mut mark = T::zero();
            for (out, &x) in out.iter_mut().zip(numerator) {
                *out = x * factor;
                mark += *out * T::zero();
            }
            mark
        };
        if mark != T::zero() {
            return Err(Error::Overflow {
                which: "the weighted sum of values",
                row: start + row / group,
            });
        }
    }
    Ok(())
}

/// The largest magnitude.
fn largest<T: Scalar>(x: ArrayView2<'_, T>) -> T {
    match x.to_slice() {
        Some(x) => kernel::max_abs(x),
        None => x.iter().fold(T::zero(), |m, x| m.max(x.abs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Far, HybridAttention, Metric};
    use ndarray::{Array2, Array3};
    use serde_json::Value;

    fn vector(value: &Value) -> Vec<f64> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    }

    fn matrix(value: &Value) -> Array2<f64> {
        let rows: Vec<_> = value.as_array().unwrap().iter().map(vector).collect();
        Array2::from_shape_fn((rows.len(), rows[0].len()), |(i, j)| rows[i][j])
    }

    fn number(value: &Value) -> usize {
        usize::try_from(value.as_u64().unwrap()).unwrap()
    }

    #[track_caller]
    fn near(what: &str, found: &[f64], exact: &[f64]) {
        let size = exact.iter().fold(1e-100_f64, |m, x| m.max(x.abs()));
        assert_eq!(found.len(), exact.len(), "{what}");
        for (a, b) in found.iter().zip(exact) {
            assert!((a - b).abs() <= 1e-11 * size, "{what}: {found:?}\ninstead of {exact:?}");
        }
    }

    /// Which pairs are merged, the entries and the attention received in the window, step by step.
    #[test]
    fn the_state_of_the_golden_cases() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden/received.json");
        let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for case in file["cases"].as_array().unwrap() {
            let name = case["name"].as_str().unwrap();
            let heads: Vec<_> = case["q"].as_array().unwrap().iter().map(matrix).collect();
            let (k, v) = (matrix(&case["k"]), matrix(&case["v"]));
            let q = Array3::from_shape_fn((heads.len(), k.nrows(), k.ncols()), |(g, t, c)| {
                heads[g][[t, c]]
            });
            let block = number(&case["block"]);
            let far = Far::merged(number(&case["entries_max"]))
                .with_decay(case["gamma"].as_f64().unwrap())
                .with_min_age(number(&case["min_age"]))
                .with_value_weight(case["beta"].as_f64().unwrap().powi(2))
                .with_metric(Metric::Identity)
                .with_block(block);
            let (window, sinks) = (number(&case["window"]), number(&case["sinks"]));
            let kernel = HybridAttention::<f64>::builder(k.ncols())
                .window(window)
                .sinks(sinks)
                .far(far)
                .build()
                .unwrap();
            let config = kernel.config();
            let mut layer = Layer::new();
            layer.prepare(config, 1, v.ncols(), None).unwrap();
            let (mut work, mut out) = (Work::new(), Array3::zeros((heads.len(), 1, v.ncols())));
            for t in 0..k.nrows() {
                let rows =
                    |x: &'_ Array2<f64>| views::row(x.view(), t).insert_axis(Axis(0)).to_owned();
                let (k, v) = (rows(&k), rows(&v));
                let q = q.index_axis(Axis(1), t).insert_axis(Axis(1));
                let call =
                    Call { q, k: k.view(), v: v.view(), log_decay: None, out: out.view_mut() };
                layer.extend(config, &mut [call], &mut work).unwrap();
                let Store::Merged(memories) = &mut layer.far else { panic!() };
                let what = format!("{name} t={t}");
                let expected =
                    case["merges"].as_array().unwrap().iter().find(|step| number(&step["t"]) == t);
                let pairs = |rounds: &Value| -> Vec<[usize; 2]> {
                    let rounds = rounds.as_array().unwrap().iter();
                    rounds
                        .flat_map(|round| round.as_array().unwrap())
                        .map(|p| [number(&p[0]), number(&p[1])])
                        .collect()
                };
                let expected = expected.map_or(Vec::new(), |step| pairs(&step["rounds"]));
                assert_eq!(memories[0].merges, expected, "{what}");
                memories[0].merges.clear();
                for step in
                    case["trace"].as_array().unwrap().iter().filter(|step| number(&step["t"]) == t)
                {
                    let entries = step["entries"].as_array().unwrap();
                    let root = config.scale.sqrt();
                    let all =
                        |x: &str| entries.iter().flat_map(|e| vector(&e[x])).collect::<Vec<_>>();
                    let one = |x: &str| {
                        entries.iter().map(|e| e[x].as_f64().unwrap()).collect::<Vec<_>>()
                    };
                    near(
                        &what,
                        &(memories[0].keys() * root).into_iter().collect::<Vec<_>>(),
                        &all("key"),
                    );
                    near(
                        &what,
                        &memories[0].values().into_iter().collect::<Vec<_>>(),
                        &all("value"),
                    );
                    near(&what, memories[0].counts(), &one("count"));
                    near(&what, memories[0].weights(), &one("weight"));
                }
            }
            let held = config.held(k.nrows());
            assert_eq!(held.start, number(&case["window_end"]["first"]), "{name}");
            let received: Vec<f64> =
                held.map(|position| layer.near[0].received[config.slot(position)]).collect();
            near(name, &received, &vector(&case["window_end"]["acc"]));
        }
    }
}
