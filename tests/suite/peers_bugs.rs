//! Bugs found in other implementations, one test each.

use crate::common::{MAPS, assert_close, checker::feed, map, normal, tokens, wide};
use dijiang::attention::naive::linear;
use dijiang::{
    Attention, DctFeatures, LinearAttention, Mask, MultiHead, Performer, SoftmaxAttention,
};
use ndarray::{Array2, Array4, Axis, s};

/// performer-pytorch takes the key maximum over all keys, the future included, and adds an epsilon:
/// outputs before a changed last key move by 0.7 to 1.3. Here they do not move.
#[test]
fn a_later_key_does_not_set_the_unit_of_earlier_ones() {
    let n = 64;
    let [q, mut k, v] = tokens::<f32>(n, 16, 4, 2.5, 1);
    k.row_mut(n - 1).fill(0.0); // the smallest key has the largest log scale, −|k|²/2 = 0
    let kernel = LinearAttention::new(Performer::<f32>::new(16, 64, 0).unwrap());
    let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
    let rows = s![..n - 1, ..];
    let alone = kernel.forward(q.slice(rows), k.slice(rows), v.slice(rows), Mask::Causal).unwrap();
    assert_close("before the last key", &out.slice(rows).to_owned(), &wide(&alone), 64.0);
}

/// Nor does it make one fail: here the features of early queries and keys overlap by e^{−60} only,
/// and the last key's unit, 15 natural units higher, would push that below what f32 can divide by.
#[test]
fn a_later_key_does_not_make_an_earlier_query_fail() {
    #[derive(Debug)]
    struct Apart;
    impl dijiang::FeatureMap<f32> for Apart {
        fn head_dim(&self) -> usize {
            1
        }
        fn num_features(&self) -> usize {
            2
        }
        fn map_queries(
            &self,
            _: ndarray::ArrayView2<'_, f32>,
            mut values: ndarray::ArrayViewMut2<'_, f32>,
            mut log_scale: ndarray::ArrayViewMut1<'_, f32>,
        ) -> Result<(), dijiang::Error> {
            log_scale.fill(0.0);
            values.column_mut(0).fill(1.0);
            values.column_mut(1).fill((-60.0_f32).exp());
            Ok(())
        }
        fn map_keys(
            &self,
            x: ndarray::ArrayView2<'_, f32>,
            mut values: ndarray::ArrayViewMut2<'_, f32>,
            mut log_scale: ndarray::ArrayViewMut1<'_, f32>,
        ) -> Result<(), dijiang::Error> {
            values.column_mut(0).fill(0.0);
            values.column_mut(1).fill(1.0);
            log_scale.assign(&x.column(0));
            Ok(())
        }
    }
    let n = 8;
    let kernel = LinearAttention::new(Apart).with_scale(1.0);
    let (mut k, v) = (Array2::<f32>::zeros((n, 1)), normal::<f32>(n, 2, 1.0, 1));
    let before = kernel.forward(k.view(), k.view(), v.view(), Mask::Causal).unwrap();
    k[[n - 1, 0]] = 15.0;
    let after = kernel.forward(k.view(), k.view(), v.view(), Mask::Causal).unwrap();
    let rows = s![..n - 1, ..];
    assert_close(
        "before",
        &after.slice(rows).to_owned(),
        &wide(&before.slice(rows).to_owned()),
        64.0,
    );
}

/// Decay as γ^n on queries and γ^{−m} on keys, as in the released code, leaves f32 after 2 794
/// tokens at γ = 1 − 1/32.
#[test]
fn decay_does_not_overflow_however_long_the_sequence() {
    let (n, gamma) = (6000, 1.0 - 1.0 / 32.0);
    assert!((gamma as f32).powi(-2_795).is_infinite());
    let [q, k, v] = tokens::<f32>(n, 8, 3, 0.7, 1);
    let map = crate::common::official::<f32>(8, 5);
    let kernel = LinearAttention::new(map).with_scale(1.0).unnormalized().with_decay(gamma);
    let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
    // what is 1000 tokens away has lost all but 1.6e-14
    let last = s![n - 1000.., ..];
    let alone = kernel.forward(q.slice(last), k.slice(last), v.slice(last), Mask::Causal).unwrap();
    let end = s![900.., ..];
    assert_close(
        "the end",
        &out.slice(last).slice(end).to_owned(),
        &wide(&alone.slice(end).to_owned()),
        256.0,
    );
}

/// Absolute powers γ^{−m} overflow f32 after 2 794 tokens. Units here are relative to the running
/// maximum: log scales that rise by thousands over a sequence, or fall, do no harm.
#[test]
fn log_scales_that_rise_for_ever_do_not_overflow() {
    let (n, d) = (6000, 4);
    let [q, k, v] = tokens::<f32>(n, d, 3, 1.0, 2);
    for rising in [true, false] {
        // |k|²/2 goes from about 1800 to 0 or back: log scales run over 1800 natural units
        let mut k = k.clone();
        for (t, mut row) in k.outer_iter_mut().enumerate() {
            let t = if rising { n - t } else { t };
            let size = (t as f32 / n as f32) * 60.0 * (d as f32).powf(0.25);
            let length = row.dot(&row).sqrt();
            row.mapv_inplace(|x| x / length * size);
        }
        let q = q.mapv(|x| x * 0.01);
        let map = Performer::<f32>::new(d, 64, 0).unwrap();
        let kernel = LinearAttention::new(map);
        let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
        let map = Performer::<f64>::new(d, 64, 0).unwrap();
        let phi_q = crate::common::features(&map, &wide(&q), 0.5, false);
        let phi_k = crate::common::features(&map, &wide(&k), 0.5, true);
        let exact = linear::normalized(&phi_q, &phi_k, &wide(&v), Mask::Causal);
        // exponents reach 1800: f32 rounds them by 1800·ε
        assert_close("rising", &out, &exact, 8.0 * 1800.0);
    }
}

/// Padding that masks the values but not the normaliser shrinks every output. Here padding is never
/// read.
#[test]
fn padding_is_not_in_the_normaliser() {
    let layer =
        MultiHead::new(LinearAttention::new(Performer::<f64>::new(8, 32, 0).unwrap()), 2, 1)
            .unwrap();
    let [q, mut k, mut v] = [2, 1, 1].map(|heads| {
        Array4::from_shape_vec(
            (1, heads, 10, 8),
            normal::<f64>(heads * 10, 8, 1.0, 5).into_raw_vec_and_offset().0,
        )
        .unwrap()
    });
    let real = s![.., .., ..6, ..];
    let short = layer.forward(q.view(), k.slice(real), v.slice(real), Mask::Full, None).unwrap();
    k.slice_mut(s![.., .., 6.., ..]).fill(f64::NAN);
    v.slice_mut(s![.., .., 6.., ..]).fill(1e9);
    let padded = layer.forward(q.view(), k.view(), v.view(), Mask::Full, Some(&[6])).unwrap();
    assert_eq!(padded, short);
}

/// A fixed epsilon in the denominator pulls outputs towards zero where features are small. Nothing
/// is added here: ones stay ones when every feature is of order e^{−450}.
#[test]
fn small_features_are_not_drowned_by_an_epsilon() {
    let x = normal::<f32>(40, 16, 1.0, 3).mapv(|x| x * 15.0);
    let ones = Array2::ones((40, 2));
    for kernel in [
        Box::new(LinearAttention::new(Performer::<f32>::new(16, 64, 0).unwrap()))
            as Box<dyn Attention<f32>>,
        Box::new(LinearAttention::new(DctFeatures::<f32>::new(16, 64, 0).unwrap())),
    ] {
        let log_weights = kernel.pair_weights().unwrap().log_weights(x.view(), x.view()).unwrap();
        assert!(log_weights.iter().any(|w| *w < -400.0));
        let out = kernel.forward(x.view(), x.view(), ones.view(), Mask::Causal).unwrap();
        assert_close("ones", &out, &wide(&ones), 64.0);
    }
}

/// Decoding that forgets the normaliser, or draws features anew in every call, does not agree with
/// the forward pass; and calls do not agree with each other.
#[test]
fn decoding_agrees_with_forward_and_calls_with_each_other() {
    for name in MAPS {
        let input = tokens::<f64>(20, 8, 3, 1.0, 4);
        let [q, k, v] = &input;
        let kernel = LinearAttention::new(map::<f64>(name, 8, 16, 0));
        let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
        assert_eq!(
            kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap(),
            out,
            "{name}: a second call"
        );
        let decoded = feed(&mut *Attention::<f64>::stream(&kernel, 3).unwrap(), &input, &[1; 20]);
        assert_close(name, &decoded, &out, 4096.0);
    }
}

/// A query sees its own token: alone, it returns its value.
#[test]
fn the_own_token_is_seen() {
    let [q, k, v] = tokens::<f64>(30, 8, 3, 1.0, 6);
    let mut kernels: Vec<Box<dyn Attention<f64>>> =
        vec![Box::new(SoftmaxAttention::new(8).unwrap())];
    for name in MAPS {
        kernels.push(Box::new(LinearAttention::new(map::<f64>(name, 8, 16, 0))));
    }
    for kernel in kernels {
        let one = [&q, &k, &v].map(|x| x.slice(s![..1, ..]));
        let out = kernel.forward(one[0], one[1], one[2], Mask::Causal).unwrap();
        assert_close(&format!("{kernel:?}"), &out, &one[2].to_owned(), 64.0);
        let all = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
        assert_close("first row", &all.slice(s![..1, ..]).to_owned(), &one[2].to_owned(), 64.0);
        // and it counts: another own value moves the output
        let mut other = v.clone();
        other.index_axis_mut(Axis(0), 29).fill(50.0);
        let moved = kernel.forward(q.view(), k.view(), other.view(), Mask::Causal).unwrap();
        assert!((moved[[29, 0]] - all[[29, 0]]).abs() > 1e-6);
    }
}
