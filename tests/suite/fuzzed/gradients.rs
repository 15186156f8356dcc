//! Every backward pass, on any numbers.

use crate::common::Subject;
use crate::fuzzed::input::{Arrays, like, number, with_kernel};
use arbitrary::{Result, Unstructured};
use dijiang::{Attention, Mask, Scalar};
use ndarray::Array2;
use std::sync::Arc;

/// A backward pass of one kernel.
pub fn gradients(bytes: &[u8]) {
    let _ = with_kernel(&mut Unstructured::new(bytes), check::<f32>, check::<f64>);
}

fn check<T: Scalar>(
    subject: &Subject,
    kernel: &Arc<dyn Attention<T>>,
    u: &mut Unstructured<'_>,
) -> Result<()> {
    let n = u.int_in_range(0..=100)?;
    let dv = u.int_in_range(1..=4)?;
    let arrays = Arrays::<T>::of(u, n, subject.head_dim, dv)?;
    let mask = *u.choose(&[Mask::Causal, Mask::Full])?;
    let mut d_out = like::<T>((n, dv), u64::from(u.arbitrary::<u8>()?));
    if n > 0 && u.ratio(1, 4)? {
        d_out[[u.choose_index(n)?, u.choose_index(dv)?]] = number(u)?;
    }
    let is_bad = arrays.is_bad || d_out.iter().any(|x| !x.is_finite());
    let [q, k, v] = &arrays.qkv;
    let name = &subject.name;
    let backward =
        |d_out: &Array2<T>| kernel.backward(q.view(), k.view(), v.view(), d_out.view(), mask);
    let Ok(found) = backward(&d_out) else { return Ok(()) };
    assert!(!is_bad, "{name}: bad numbers have gradients");
    let finite = |x: &Array2<T>| x.iter().all(|x| x.is_finite());
    assert!(finite(&found.q) && finite(&found.k) && finite(&found.v), "{name}: not finite");
    for (parameter, x) in found.parameters.iter() {
        assert!(x.iter().all(|x| x.is_finite()), "{name}: {parameter} is not finite");
    }
    if arrays.is_mild && d_out.iter().all(|x| x.as_f64().abs() < 8.0) {
        // it is linear in the cotangent, and of values the loss is linear too: Σ dV∘V = Σ dO∘O
        let twice = backward(&(&d_out + &d_out)).expect("as before");
        let close = |a: &Array2<T>, b: &Array2<T>| {
            let size = a.iter().fold(1.0, |m: f64, x| m.max(x.as_f64().abs()));
            let slack = size * 4096.0 * T::epsilon().as_f64();
            a.iter().zip(b).all(|(a, b)| (a.as_f64() * 2.0 - b.as_f64()).abs() <= slack)
        };
        assert!(close(&found.q, &twice.q), "{name}: queries");
        assert!(close(&found.k, &twice.k), "{name}: keys");
        assert!(close(&found.v, &twice.v), "{name}: values");
        let out = kernel.forward(q.view(), k.view(), v.view(), mask).expect("it has a gradient");
        let dot = |a: &Array2<T>, b: &Array2<T>| -> [f64; 2] {
            let terms = || a.iter().zip(b).map(|(a, b)| a.as_f64() * b.as_f64());
            [terms().sum(), terms().map(f64::abs).sum()]
        };
        let ([of_v, size_v], [of_o, size_o]) = (dot(&found.v, v), dot(&d_out, &out));
        let slack = (1.0 + size_v + size_o) * 4096.0 * T::epsilon().as_f64();
        let rounds = subject.format() != dijiang::StateFormat::F32;
        assert!(rounds || (of_v - of_o).abs() <= slack, "{name}: {of_v} of {of_o}");
    }
    Ok(())
}
