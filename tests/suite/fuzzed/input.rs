//! Arguments made of bytes: sizes, and arrays with numbers that are seldom thought of.

use crate::common::{
    Subject, formats, normal, optional_subjects, subjects, tokens, written_subjects,
};
use arbitrary::{Result, Unstructured};
use dijiang::{Attention, Scalar};
use ndarray::Array2;
use std::cell::OnceCell;
use std::sync::Arc;

/// Head dimensions and features.
const SIZES: [(usize, usize); 3] = [(1, 1), (3, 7), (8, 20)];

thread_local! {
    static SUBJECTS: [OnceCell<Vec<Subject>>; SIZES.len()] =
        const { [const { OnceCell::new() }; SIZES.len()] };
}

/// What is done with a kernel.
pub type Check<T> = fn(&Subject, &Arc<dyn Attention<T>>, &mut Unstructured<'_>) -> Result<()>;

/// Runs a check with one of all kernels, in either type of numbers. Bytes that are too few say
/// nothing.
pub fn with_kernel(u: &mut Unstructured<'_>, single: Check<f32>, double: Check<f64>) -> Result<()> {
    let size = u.choose_index(SIZES.len())?;
    SUBJECTS.with(|all| {
        let (d, m) = SIZES[size];
        let all = all[size].get_or_init(|| {
            let parts = [
                subjects(d, m),
                optional_subjects(d, m),
                written_subjects(d, m),
                formats::packed_softmax(d),
                formats::packed_hybrids(d, m),
            ];
            parts.into_iter().flatten().collect()
        });
        let which = u.choose_index(all.len())?;
        let subject = &all[which];
        match u.arbitrary()? {
            true => single(subject, &subject.f32, u),
            false => double(subject, &subject.f64, u),
        }
    })
}

/// Queries, keys and values.
#[derive(Clone, Debug)]
pub struct Arrays<T> {
    pub qkv: [Array2<T>; 3],
    /// Whether a number is no number, or infinite.
    pub is_bad: bool,
    /// Whether all are of the size that models have.
    pub is_mild: bool,
}

impl<T: Scalar> Arrays<T> {
    /// Normal numbers of a seed, some of which are replaced, and some rows of which are stretched.
    pub fn of(u: &mut Unstructured<'_>, n: usize, d: usize, dv: usize) -> Result<Self> {
        let mut qkv = tokens::<T>(n, d, dv, 0.7, u64::from(u.arbitrary::<u8>()?));
        for _ in 0..u.int_in_range(0..=4)? {
            let x = &mut qkv[u.choose_index(3)?];
            if n == 0 {
                break;
            }
            let (row, column) = (u.choose_index(n)?, u.choose_index(x.ncols())?);
            let number: T = number(u)?;
            match u.arbitrary()? {
                true => x[[row, column]] = number,
                false => x.row_mut(row).mapv_inplace(|x| x * number),
            }
        }
        let all = || qkv.iter().flatten();
        let is_bad = all().any(|x| !x.is_finite());
        let is_mild = all().all(|x| x.as_f64().abs() <= 4.0);
        Ok(Self { qkv, is_bad, is_mild })
    }
}

/// A number, seldom thought of.
pub fn number<T: Scalar>(u: &mut Unstructured<'_>) -> Result<T> {
    let largest = T::max_value().as_f64();
    let smallest = T::min_positive_value().as_f64();
    let all = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        2.5,
        -40.0,
        1e-8,
        smallest,
        smallest / 64.0,
        -smallest,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
        largest,
        -largest,
        largest / 2.0,
        largest.sqrt(),
        -largest.sqrt(),
        1e4,
        88.0,
        -88.0,
        1e10,
        1e-30,
    ];
    Ok(T::from_f64(match u.arbitrary()? {
        true => *u.choose(&all)?,
        false => f64::from(u.arbitrary::<i16>()?) / 4096.0,
    }))
}

/// The sizes of the pieces that `n` tokens come in.
pub fn pieces(u: &mut Unstructured<'_>, n: usize) -> Result<Vec<usize>> {
    let mut sizes = Vec::new();
    let mut left = n;
    while left > 0 && sizes.len() < 16 {
        let size = match u.arbitrary()? {
            true => u.int_in_range(0..=3)?,
            false => u.int_in_range(0..=80)?,
        };
        sizes.push(size.min(left));
        left -= size.min(left);
    }
    if left > 0 {
        sizes.push(left);
    }
    Ok(sizes)
}

/// Normal numbers, as long as `x`.
pub fn like<T: Scalar>(x: (usize, usize), seed: u64) -> Array2<T> {
    normal(x.0, x.1, 1.0, seed)
}
