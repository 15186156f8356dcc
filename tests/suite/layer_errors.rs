//! An error of a layer says in which sequence and head it arose, the first of several.

use crate::common::normal;
use crate::layer_streams::{D, HEADS, KV_HEADS, kernels, layers};
use dijiang::{
    EluFeatures, Error, LayerHead, LinearAttention, Mask, MultiHead, Padding, SoftmaxAttention,
};
use ndarray::{Array3, Array4};
use std::error::Error as _;

const BATCH: usize = 3;
const N: usize = 5;

fn random(heads: usize, n: usize, d: usize, seed: u64) -> Array4<f64> {
    normal::<f64>(BATCH * heads * n, d, 0.8, seed)
        .into_shape_with_order((BATCH, heads, n, d))
        .unwrap()
}

fn arrays(layer: &MultiHead<f64>, n: usize) -> [Array4<f64>; 3] {
    let kv = layer.kv_heads();
    [random(HEADS, n, D, 1), random(kv, n, D, 2), random(kv, n, 3, 3)]
}

/// The error of a forward pass, of a stream, and of a stream over rows, which are one.
fn error(layer: &MultiHead<f64>, x: &[Array4<f64>; 3], lengths: Option<&[usize]>) -> Error {
    let [q, k, v] = x;
    let n = q.dim().2;
    let of_forward =
        layer.forward(q.view(), k.view(), v.view(), Mask::Causal, lengths).unwrap_err();
    let mut stream = layer.stream(BATCH, 3).unwrap();
    let mut out = Array4::zeros((BATCH, HEADS, n, 3));
    let error = stream.extend(q.view(), k.view(), v.view(), lengths, out.view_mut()).unwrap_err();
    assert_eq!(error, of_forward);
    let flat = |x: &Array4<f64>| {
        let (b, heads, n, d) = x.dim();
        let x = x.view().permuted_axes([0, 2, 1, 3]);
        Array3::from_shape_vec((b, n, heads * d), x.iter().copied().collect()).unwrap()
    };
    let (q, k, v) = (flat(q), flat(k), flat(v));
    let mut out = Array3::zeros((BATCH, n, HEADS * 3));
    let of_rows =
        stream.extend_rows(q.view(), k.view(), v.view(), lengths, out.view_mut()).unwrap_err();
    assert_eq!(error, of_rows);
    assert_eq!(stream.lengths(), [0; BATCH]);
    error
}

#[test]
fn numbers_that_are_not_finite_are_found_in_their_sequence_and_head() {
    for (name, layer) in layers() {
        for n in [1, N] {
            for (which, at) in ["q", "k", "v"].into_iter().zip(0..) {
                let mut x = arrays(&layer, n);
                let heads = x[at].dim().1;
                for (sequence, head) in [(2, heads - 1), (1, 1), (0, 0)] {
                    // one more that fails, before those that failed already
                    x[at][[sequence, head, n - 1, 2]] = f64::NAN;
                    let error = error(&layer, &x, None);
                    let inner = Error::NotFinite { which, row: n - 1, column: 2 };
                    assert_eq!(error.inner(), &inner, "{name} {error}");
                    let kind = if which == "q" { "query" } else { "kv" };
                    let text = format!("sequence {sequence}, {kind} head {head}: {inner}");
                    assert_eq!(error.to_string(), text, "{name}");
                    let source = error.source().and_then(|source| source.downcast_ref::<Error>());
                    assert_eq!(source, Some(&inner), "{name}");
                    assert!(matches!(error, Error::InHead { .. }));
                }
            }
        }
    }
}

/// Rows are those of the arrays, with padding before the tokens too.
#[test]
fn rows_count_from_the_padding_on() {
    for (name, layer) in layers() {
        let layer = layer.with_padding(Padding::Left);
        for (which, at) in ["q", "k", "v"].into_iter().zip(0..) {
            let mut x = arrays(&layer, N);
            x[at][[1, 1, 0, 0]] = f64::NAN; // padding
            x[at][[1, 1, 3, 1]] = f64::NAN;
            let error = error(&layer, &x, Some(&[5, 3, 0]));
            assert_eq!(error.inner(), &Error::NotFinite { which, row: 3, column: 1 }, "{name}");
            assert!(error.to_string().starts_with("sequence 1, "), "{name}: {error}");
        }
    }
}

#[test]
fn log_decays_are_found_as_well() {
    let kernel = LinearAttention::new(EluFeatures::<f64>::new(D).unwrap()).gated();
    let layer = MultiHead::new(kernel, HEADS, KV_HEADS).unwrap();
    for (padding, lengths) in [(Padding::Right, None), (Padding::Left, Some(&[5, 5, 3][..]))] {
        let layer = layer.clone().with_padding(padding);
        let [q, k, v] = arrays(&layer, N);
        let mut gates = Array4::from_elem((BATCH, KV_HEADS, N, 1), -0.1);
        gates[[2, 1, 3, 0]] = 0.5;
        let mut out = Array4::zeros((BATCH, HEADS, N, 3));
        let (q, k, v, g) = (q.view(), k.view(), v.view(), gates.view());
        let mut stream = layer.stream(BATCH, 3).unwrap();
        for error in [
            layer.forward_gated(q, k, v, g, lengths, out.view_mut()).unwrap_err(),
            stream.extend_gated(q, k, v, g, lengths, out.view_mut()).unwrap_err(),
        ] {
            let text = "sequence 2, kv head 1: `log_decay` is 0.5 at row 3, column 0";
            assert!(error.to_string().starts_with(text), "{error}");
            assert!(matches!(error.inner(), Error::InvalidOption { which: "log_decay", .. }));
        }
    }
}

/// Where the head is known and no more, it is that of the state.
#[test]
fn numbers_out_of_range_name_a_head() {
    for (_, kernel) in kernels() {
        let layer = MultiHead::new(kernel, HEADS, KV_HEADS).unwrap();
        let mut x = arrays(&layer, N);
        x[1][[1, 1, 2, 0]] = 1e300;
        let [q, k, v] = &x;
        let mut out = Array4::zeros((BATCH, HEADS, N, 3));
        let mut stream = layer.stream(BATCH, 3).unwrap();
        for result in [
            layer.forward(q.view(), k.view(), v.view(), Mask::Causal, None).map(|_| ()),
            stream.extend(q.view(), k.view(), v.view(), None, out.view_mut()),
        ] {
            let Err(error) = result else { continue };
            let Error::InHead { sequence: 1, head, .. } = &error else { panic!("{error}") };
            assert!(matches!(head, LayerHead::Kv(1) | LayerHead::Query(2)), "{error}");
            assert!(matches!(error.inner(), Error::Overflow { row: 2.., .. }), "{error}");
        }
    }
}

/// What does not fit any head is an error of the call.
#[test]
fn errors_of_the_whole_call_name_no_head() {
    let layer = MultiHead::new(SoftmaxAttention::<f64>::new(D).unwrap(), HEADS, KV_HEADS).unwrap();
    let [_, k, v] = arrays(&layer, N);
    let q = random(HEADS, N, D + 1, 1);
    let error = layer.forward(q.view(), k.view(), v.view(), Mask::Full, None).unwrap_err();
    assert_eq!(error, Error::Shape { which: "q", axis: "columns", expected: D, found: D + 1 });
    assert_eq!((error.inner(), error.source().is_none()), (&error, true));
}

/// A saved state that does not fit is that of another layer, whatever the head.
#[test]
fn states_of_another_layer_are_refused() {
    let softmax = || SoftmaxAttention::<f64>::new(D).unwrap();
    let layer = MultiHead::new(softmax(), HEADS, KV_HEADS).unwrap();
    let linear = LinearAttention::new(EluFeatures::<f64>::new(D).unwrap());
    let mixed = MultiHead::per_kv_head(
        vec![std::sync::Arc::new(softmax()), std::sync::Arc::new(linear)],
        HEADS,
    )
    .unwrap();
    let saved = mixed.stream(2, 3).unwrap().save().unwrap();
    let error = layer.stream(2, 3).unwrap().restore(&saved).unwrap_err();
    assert!(matches!(error, Error::State { which: "kernel", .. }), "{error}");
}

/// Threads report the first error too.
#[cfg(feature = "rayon")]
#[test]
fn threads_report_the_first_error() {
    let n = 4000;
    let too_slow_or_short = ["one's own", "cosformer"];
    for (name, kernel) in
        kernels().into_iter().filter(|(name, _)| !too_slow_or_short.contains(name))
    {
        let layer = MultiHead::new(kernel, HEADS, KV_HEADS).unwrap();
        let mut x = arrays(&layer, n);
        for (sequence, head) in [(1, 1), (2, 0), (2, 1)] {
            x[2][[sequence, head, 7, 1]] = f64::INFINITY;
        }
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let error = pool.install(|| error(&layer, &x, None));
            let inner = Error::NotFinite { which: "v", row: 7, column: 1 };
            let head = LayerHead::Kv(1);
            let expected = Error::InHead { sequence: 1, head, error: Box::new(inner) };
            assert_eq!(error, expected, "{name}");
        }
    }
}
