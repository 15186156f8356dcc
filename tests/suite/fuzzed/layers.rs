//! Layers with any heads, lengths, padding and masks: each head gets what it would get alone.

use crate::common::checker::units;
use crate::common::{Subject, assert_close, normal, wide};
use crate::fuzzed::input::{number, with_kernel};
use arbitrary::{Result, Unstructured};
use dijiang::{Attention, LayerForward, Mask, MultiHead, Padding, Scalar};
use ndarray::{Array2, Array4, Axis, s};
use std::sync::Arc;

/// A layer, forward and as a stream.
pub fn layers(bytes: &[u8]) {
    let _ = with_kernel(&mut Unstructured::new(bytes), check::<f32>, check::<f64>);
}

fn heads<T: Scalar>([b, h, n, d]: [usize; 4], seed: u64) -> Array4<T> {
    let all = normal::<T>(b * h * n, d, 0.7, seed);
    Array4::from_shape_vec((b, h, n, d), all.into_raw_vec_and_offset().0).expect("as many")
}

/// Which tokens are real.
fn real(u: &mut Unstructured<'_>, [b, n]: [usize; 2]) -> Result<(Array2<bool>, Option<Padding>)> {
    let mut real = Array2::from_elem((b, n), true);
    let padding = match u.int_in_range(0..=2)? {
        0 => Some(Padding::Right),
        1 => Some(Padding::Left),
        _ => None,
    };
    for mut row in real.outer_iter_mut() {
        let length = u.int_in_range(0..=n)?;
        match padding {
            Some(Padding::Right) => row.slice_mut(s![length..]).fill(false),
            Some(Padding::Left) => row.slice_mut(s![..n - length]).fill(false),
            None => {
                for x in &mut row {
                    *x = u.arbitrary()?;
                }
            }
        }
    }
    Ok((real, padding))
}

fn check<T: Scalar>(
    subject: &Subject,
    kernel: &Arc<dyn Attention<T>>,
    u: &mut Unstructured<'_>,
) -> Result<()> {
    let name = &subject.name;
    let (b, kv, group) = (u.int_in_range(1..=3)?, u.int_in_range(1..=2)?, u.int_in_range(1..=3)?);
    let (n, d, dv) = (u.int_in_range(0..=40)?, subject.head_dim, u.int_in_range(1..=3)?);
    let mask = *u.choose(&[Mask::Causal, Mask::Full])?;
    let seed = u64::from(u.arbitrary::<u8>()?);
    let mut q = heads::<T>([b, kv * group, n, d], seed);
    let mut k = heads::<T>([b, kv, n, d], seed + 1);
    let mut v = heads::<T>([b, kv, n, dv], seed + 2);
    let (real, padding) = real(u, [b, n])?;
    // what is not real is not read
    let bad = number::<T>(u)?;
    for (at, _) in real.indexed_iter().filter(|(_, real)| !**real) {
        [&mut q, &mut k, &mut v]
            .into_iter()
            .for_each(|x| x.slice_mut(s![at.0, .., at.1, ..]).fill(bad));
    }
    let lengths: Vec<usize> =
        real.outer_iter().map(|row| row.iter().filter(|&&real| real).count()).collect();
    let layer = MultiHead::per_kv_head(vec![Arc::clone(kernel); kv], kv * group).expect("a layer");
    let layer = padding.iter().fold(layer, |layer, &padding| layer.with_padding(padding));
    let all = [q.view(), k.view(), v.view()];
    let mut out = Array4::from_elem((b, kv * group, n, dv), T::nan());
    let forward = LayerForward::new(all, out.view_mut());
    let found = match padding {
        Some(_) => layer.forward_with(forward, mask, Some(&lengths)),
        None => layer.forward_with(forward.with_key_mask(real.view()), mask, None),
    };
    let Ok(()) = found else { return Ok(()) };
    // heads that share keys may share what a kernel decides by its queries
    let alone = group == 1 || !subject.merges();
    for (i, real) in real.outer_iter().enumerate() {
        let places: Vec<usize> = (0..n).filter(|&t| real[t]).collect();
        for h in 0..kv * group {
            let of = |x: &Array4<T>, h: usize| x.slice(s![i, h, .., ..]).select(Axis(0), &places);
            let own = of(&out, h);
            for t in (0..n).filter(|&t| !real[t]) {
                let is_zero = out.slice(s![i, h, t, ..]).iter().all(|&x| x == T::zero());
                // where all keys are seen, all queries are answered
                assert!(is_zero || mask == Mask::Full, "{name}: padding");
            }
            if places.is_empty() || !alone || mask == Mask::Full {
                continue;
            }
            let (q, k, v) = (of(&q, h), of(&k, h / group), of(&v, h / group));
            let exact = kernel.forward(q.view(), k.view(), v.view(), mask).expect("as in a layer");
            assert_close(&format!("{name} in a layer"), &own, &wide(&exact), units::<T>(60.0));
        }
    }
    if mask == Mask::Full || !subject.has_streams() {
        return Ok(());
    }
    let mut stream = layer.stream(b, dv).expect("a stream");
    let mut answers = Array4::from_elem(out.dim(), T::nan());
    let split = u.int_in_range(0..=n)?;
    for (from, to) in [(0, split), (split, n)] {
        let part = s![.., .., from..to, ..];
        let all = [q.slice(part), k.slice(part), v.slice(part)];
        let step = LayerForward::new(all, answers.slice_mut(part));
        let seen = real.slice(s![.., from..to]);
        stream.extend_with(step.with_key_mask(seen), None).expect("as the whole");
    }
    assert_eq!(stream.lengths(), lengths, "{name}");
    if !subject.merges() {
        let [a, b] =
            [&answers, &out].map(|x| x.view().into_shape_with_order((b * kv * group * n, dv)));
        let (a, b) = (a.expect("rows").to_owned(), b.expect("rows").to_owned());
        assert_close(&format!("{name} as a stream of a layer"), &a, &wide(&b), units::<T>(60.0));
    }
    Ok(())
}
