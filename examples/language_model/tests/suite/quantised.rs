//! Weights that stay quantised.

use crate::common::naive::Naive;
use crate::common::{Sizes, difference, logits, softmax, tensor, tokens};
use candle_core::Device;
use candle_core::quantized::{GgmlDType, QTensor};
use language_model::gguf::Gguf;
use language_model::linear::{Linear, Weights};
use language_model::model::Model;
use language_model::quantised::{FEW, Quantised};
use ndarray::{Array2, s};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const KINDS: [GgmlDType; 10] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

fn random(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    Array2::from_shape_simple_fn((rows, columns), || {
        // most are small, some are not
        let x: f32 = random.random_range(-1.0..1.0);
        x * x * x + 0.1
    })
}

/// A weight, and what candle makes of its bytes, `[inputs, outputs]`.
fn stored(kind: GgmlDType, inputs: usize, outputs: usize) -> (Quantised, Array2<f32>) {
    let values = random(outputs, inputs, inputs as u64 + outputs as u64);
    let values = tensor(values.into_raw_vec_and_offset().0, &[outputs, inputs]);
    let stored = QTensor::quantize(&values, kind).unwrap();
    let wide = stored.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let wide = Array2::from_shape_vec((outputs, inputs), wide).unwrap();
    let weight = Quantised::new(kind, &stored.data().unwrap(), inputs, outputs).unwrap();
    (weight, wide.reversed_axes().as_standard_layout().into_owned())
}

#[test]
fn weights_are_those_of_the_file_bit_for_bit() {
    for kind in KINDS {
        for outputs in [1, 16, 39] {
            let (weight, expected) = stored(kind, 512, outputs);
            assert_eq!(weight.dim(), (512, outputs));
            assert!(weight.is_finite());
            assert_eq!(weight.widened(), expected, "{kind:?}");
            let linear = Linear::quantised(weight);
            assert_eq!(linear.weight(), expected);
            for output in 0..outputs {
                let mut column = ndarray::Array1::zeros(512);
                linear.copy_output(output, column.view_mut());
                assert_eq!(column, expected.column(output), "{kind:?}");
            }
        }
    }
}

#[test]
fn products_are_those_of_the_widened_weights() {
    for kind in KINDS {
        for outputs in [1, 16, 39, 2100] {
            let (weight, wide) = stored(kind, 512, outputs);
            for rows in [0, 1, 2, 3, 4, 7, FEW, FEW + 1, FEW + 9] {
                let x = random(rows, 512, 1);
                let expected = x.mapv(f64::from).dot(&wide.mapv(f64::from));
                let found = weight.apply(&x);
                assert_eq!(found.dim(), (rows, outputs));
                if rows > FEW {
                    let same = found == Linear::new(wide.clone()).apply(&x);
                    println!("{kind:?}, {rows} rows, {outputs} outputs: same bits {same}");
                }
                if rows > 0 {
                    let error = difference(&found, &expected);
                    assert!(error < 2e-6, "{kind:?}, {rows} rows, {outputs} outputs: {error:e}");
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_few() {
    for kind in [GgmlDType::Q4_1, GgmlDType::Q6K, GgmlDType::Q8_0] {
        // enough outputs for threads
        let (weight, _) = stored(kind, 256, 5000);
        let x = random(FEW, 256, 2);
        let all = weight.apply(&x);
        for rows in [1, 2, 3, 5, 6] {
            let part = weight.apply(&x.slice(s![3..3 + rows, ..]).to_owned());
            assert_eq!(part, all.slice(s![3..3 + rows, ..]), "{kind:?}, {rows} rows");
        }
    }
}

#[test]
fn what_does_not_fit_is_not_kept() {
    assert!(!Quantised::can_hold(GgmlDType::F16, 64));
    assert!(!Quantised::can_hold(GgmlDType::Q8_0, 48));
    assert!(!Quantised::can_hold(GgmlDType::Q6K, 128));
    assert!(Quantised::new(GgmlDType::Q8_0, &[0; 34], 32, 2).is_none());
    assert!(Quantised::new(GgmlDType::Q8_0, &[0; 70], 32, 2).is_none());
    assert!(Quantised::new(GgmlDType::Q8_0, &[0; 68], 32, 2).is_some());
    assert!(Quantised::new(GgmlDType::F32, &[0; 8], 1, 2).is_none());
    assert!(Quantised::new(GgmlDType::Q8_0, &[], 0, 2).is_none());
}

#[test]
fn scales_that_are_not_finite_are_seen() {
    for kind in [GgmlDType::Q4_1, GgmlDType::Q8_0] {
        let mut bytes = vec![0; kind.type_size()];
        bytes[..2].copy_from_slice(&0x7C00_u16.to_le_bytes());
        assert!(!Quantised::new(kind, &bytes, 32, 1).unwrap().is_finite());
    }
}

/// A tiny model of each kind of weights, `f32` in file and memory where there is none to keep.
fn models() -> impl Iterator<Item = (Sizes, crate::common::Written, Model)> {
    [GgmlDType::F32, GgmlDType::F16, GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q4K]
        .into_iter()
        .enumerate()
        .map(|(i, weights)| {
            let wide = if weights == GgmlDType::Q4K { 256 } else { 64 };
            let (tied, seed) = (i % 2 == 0, 60 + i as u64);
            let sizes = Sizes {
                weights,
                tied,
                seed,
                width: wide,
                feed_forward: wide,
                layers: 1,
                ..Sizes::default()
            };
            let written = sizes.write();
            let mut file = Gguf::open(&written.path).unwrap();
            let model = Model::from_gguf(&mut file, Weights::Quantised).unwrap();
            (sizes, written, model)
        })
}

#[test]
fn a_model_gives_what_its_widened_weights_give() {
    for (sizes, written, model) in models() {
        let naive = Naive::read(&sizes, &written.path);
        for count in [1, 5, FEW, FEW + 20] {
            let read = tokens(count, sizes.vocabulary, sizes.seed + count as u64);
            let mut state = model.state(&softmax(&model)).unwrap();
            let error = difference(&logits(&model, &mut state, &read, &[]), &naive.logits(&read));
            assert!(error < 4e-6, "{count} tokens of {sizes:?}: {error:e}");
        }
        let wide = written.model().weight_bytes();
        match sizes.weights {
            GgmlDType::F32 | GgmlDType::F16 => assert_eq!(model.weight_bytes(), wide),
            _ => assert!(3 * model.weight_bytes() < wide),
        }
    }
}

#[test]
fn pieces_make_no_difference_but_in_rounding() {
    for (sizes, _written, model) in models() {
        let read = tokens(101, sizes.vocabulary, 5);
        for name in ["softmax", "window:16", "merged:8,window=16,pool"] {
            let kernel: language_model::kernels::Kernel = name.parse().unwrap();
            let layers = kernel.layers(model.config(), None, &[]).unwrap();
            let fed = |pieces: &[usize]| {
                logits(&model, &mut model.state(&layers).unwrap(), &read, pieces)
            };
            let whole = fed(&[]).mapv(f64::from);
            for pieces in [&[1; 101][..], &[50, 1, 1, 1, 40], &[7; 14]] {
                let found = difference(&fed(pieces), &whole);
                assert!(found < 1e-4, "`{name}`, {:?}: {found:e}", sizes.weights);
            }
        }
    }
}
