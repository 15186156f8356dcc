//! The block of the released DiJiang models is its formula, whole and in any pieces; it refuses
//! what does not fit; its state moves only when a call succeeds.

use crate::common::{golden, matrix, normal, strided, vector, wide};
use dijiang::attention::naive::block::{Weights, dijiang_block};
use dijiang::{
    Attention, DijiangBlock, DijiangWeights, Error, LinearAttention, Mask, OfficialDijiang, Rotary,
    Scalar, decay,
};
use ndarray::{Array1, Array2, s};

/// Seeded weights, of the size that a trained model has.
fn weights<T: Scalar>(hidden: usize, heads: usize, seed: u64) -> DijiangWeights<T> {
    let d = hidden / heads;
    let size = 1.0 / (hidden as f64).sqrt();
    let row = |len, size, seed| normal::<T>(1, len, size, seed).row(0).to_owned();
    DijiangWeights {
        query_key_value: normal(3 * hidden, hidden, 1.5 * size, 100 * seed),
        query_key_value_bias: row(3 * hidden, 0.3, 100 * seed + 1),
        dense: normal(hidden, hidden, size, 100 * seed + 2),
        dense_bias: row(hidden, 0.2, 100 * seed + 3),
        gate: normal(hidden, hidden, 2.0 * size, 100 * seed + 4),
        group_norm_weight: row(hidden, 0.5, 100 * seed + 5).mapv(|x| x + T::one()),
        group_norm_bias: row(hidden, 0.2, 100 * seed + 6),
        radii: row(d, 1.0, 100 * seed + 7),
    }
}

fn widen<T: Scalar>(w: &DijiangWeights<T>) -> Weights {
    let row = |x: &Array1<T>| x.mapv(|x| x.as_f64());
    Weights {
        query_key_value: wide(&w.query_key_value),
        query_key_value_bias: row(&w.query_key_value_bias),
        dense: wide(&w.dense),
        dense_bias: row(&w.dense_bias),
        gate: wide(&w.gate),
        group_norm_weight: row(&w.group_norm_weight),
        group_norm_bias: row(&w.group_norm_bias),
        radii: row(&w.radii),
    }
}

/// The largest difference over the largest number.
fn difference<T: Scalar>(a: &Array2<T>, b: &Array2<f64>) -> f64 {
    assert_eq!(a.dim(), b.dim());
    let size = b.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    assert!(a.iter().all(|x| x.is_finite()));
    a.iter().zip(b).fold(0.0, |m: f64, (a, b)| m.max((a.as_f64() - b).abs())) / size
}

/// hidden, heads, columns that turn
const SIZES: [(usize, usize, usize); 9] = [
    (8, 1, 2),
    (1, 1, 0),
    (3, 3, 0),
    (9, 3, 2),
    (15, 3, 4),
    (16, 2, 8),
    (24, 4, 0),
    (64, 1, 16),
    (240, 3, 20), // d = 80, as GPT-NeoX 2.8B
];

pub fn build<T: Scalar>(
    hidden: usize,
    heads: usize,
    dims: usize,
    seed: u64,
) -> (DijiangWeights<T>, DijiangBlock<T>) {
    let weights = weights::<T>(hidden, heads, seed);
    let rotary = Rotary::partial(hidden / heads, dims).unwrap();
    let block = DijiangBlock::new(weights.clone(), heads, rotary).unwrap();
    assert_eq!((block.hidden(), block.heads(), block.head_dim()), (hidden, heads, hidden / heads));
    (weights, block)
}

fn check_formula<T: Scalar>(tolerance: f64) {
    for (hidden, heads, dims) in SIZES {
        let (weights, block) = build::<T>(hidden, heads, dims, 1);
        for n in [1, 2, 70, 150] {
            let x = normal::<T>(n, hidden, 1.0, 9);
            let exact = dijiang_block(&wide(&x), &widen(&weights), heads, dims, 1e-5);
            let mut out = Array2::from_elem((n, hidden), T::nan());
            block.forward_into(x.view(), out.view_mut()).unwrap();
            let found = difference(&out, &exact);
            assert!(
                found <= tolerance,
                "hidden {hidden} heads {heads} n {n} {}: {found:.1e}",
                T::NAME
            );
        }
    }
}

#[test]
fn is_the_formula() {
    check_formula::<f64>(1e-11);
}

#[test]
fn single_precision_is_the_formula_within_its_digits() {
    check_formula::<f32>(2e-4);
}

#[test]
fn epsilon_is_used() {
    let (weights, block) = build::<f64>(12, 3, 2, 2);
    let x = normal::<f64>(6, 12, 1.0, 9);
    let out = block.with_epsilon(0.3).unwrap().forward(x.view()).unwrap();
    assert!(difference(&out, &dijiang_block(&x, &widen(&weights), 3, 2, 0.3)) < 1e-11);
    assert!(difference(&out, &dijiang_block(&x, &widen(&weights), 3, 2, 1e-5)) > 1e-3);
}

fn check_pieces<T: Scalar>(tolerance: f64) {
    let n = 150;
    for (hidden, heads, dims) in SIZES {
        let (_, block) = build::<T>(hidden, heads, dims, 3);
        let x = normal::<T>(n, hidden, 1.0, 9);
        let whole = wide(&block.forward(x.view()).unwrap());
        for sizes in [&[1; 150][..], &[150], &[64, 64, 22], &[0, 1, 0, 65, 3, 1, 80, 0], &[149, 1]]
        {
            let mut stream = block.stream().unwrap();
            assert!(stream.is_empty());
            let size = stream.state_floats();
            // a layout of its own, on top of rubbish
            let large = strided(x.view());
            let x = large.slice(s![..;2, ..;3]);
            let mut out = Array2::from_elem((n, 2 * hidden), T::nan());
            let mut out = out.slice_mut(s![.., ..;2]);
            let mut start = 0;
            for count in sizes {
                let rows = s![start..start + count, ..];
                stream.extend(x.slice(rows), out.slice_mut(rows)).unwrap();
                start += count;
                assert_eq!((stream.len(), stream.state_floats()), (start, size));
            }
            let found = difference(&out.to_owned(), &whole);
            assert!(
                found <= tolerance,
                "hidden {hidden} heads {heads} in {} pieces: {found:.1e}",
                sizes.len()
            );
        }
    }
}

#[test]
fn pieces_are_the_whole() {
    check_pieces::<f64>(1e-11);
    check_pieces::<f32>(2e-4);
}

#[test]
fn clones_go_on_alone_and_reset_forgets() {
    let (_, block) = build::<f64>(15, 3, 4, 4);
    let x = normal::<f64>(20, 15, 1.0, 9);
    let whole = block.forward(x.view()).unwrap();
    let mut stream = block.stream().unwrap();
    let (mut first, mut second) = (Array2::zeros((8, 15)), Array2::zeros((12, 15)));
    stream.extend(x.slice(s![..8, ..]), first.view_mut()).unwrap();
    let mut copy = stream.clone();
    stream.extend(x.slice(s![..12, ..]), second.view_mut()).unwrap();
    copy.extend(x.slice(s![8.., ..]), second.view_mut()).unwrap();
    assert_eq!((stream.len(), copy.len()), (20, 20));
    assert!(difference(&second, &whole.slice(s![8.., ..]).to_owned()) < 1e-11);
    stream.reset();
    assert!(stream.is_empty());
    let mut again = Array2::zeros((8, 15));
    stream.extend(x.slice(s![..8, ..]), again.view_mut()).unwrap();
    assert_eq!(again, first);
}

#[test]
fn after_an_error_the_stream_goes_on_as_if_it_had_not_been() {
    let (_, block) = build::<f32>(12, 3, 4, 5);
    let x = normal::<f32>(10, 12, 1.0, 9);
    let whole = block.forward(x.view()).unwrap();
    let mut stream = block.stream().unwrap();
    let mut out = Array2::zeros((5, 12));
    stream.extend(x.slice(s![..5, ..]), out.view_mut()).unwrap();
    let mut fails = |x: &Array2<f32>, out: &mut Array2<f32>| {
        let error = stream.extend(x.view(), out.view_mut()).unwrap_err();
        assert_eq!(stream.len(), 5);
        error
    };
    let mut out = Array2::zeros((3, 12));
    let shape = |which, axis, expected, found| Error::Shape { which, axis, expected, found };
    assert_eq!(fails(&Array2::zeros((3, 11)), &mut out), shape("x", "columns", 12, 11));
    assert_eq!(fails(&Array2::zeros((2, 12)), &mut out), shape("out", "rows", 2, 3));
    assert_eq!(
        fails(&Array2::zeros((3, 12)), &mut Array2::zeros((3, 11))),
        shape("out", "columns", 12, 11)
    );
    let mut bad = Array2::zeros((3, 12));
    bad[[2, 7]] = f32::NAN;
    assert_eq!(fails(&bad, &mut out), Error::NotFinite { which: "x", row: 2, column: 7 });
    for size in [1e38, 1e36, 3e37] {
        bad.row_mut(2).fill(0.0);
        bad.row_mut(1).assign(&(&x.row(0) * size));
        assert!(matches!(fails(&bad, &mut out).inner(), Error::Overflow { row: 1, .. }));
    }

    let mut out = Array2::zeros((5, 12));
    stream.extend(x.slice(s![5.., ..]), out.view_mut()).unwrap();
    assert!(difference(&out, &wide(&whole.slice(s![5.., ..]).to_owned())) < 2e-4);
}

#[test]
fn large_and_equal_numbers_stay_finite() {
    // values so large that their squares are out of range, gates at both ends, groups without
    // variance
    for size in [1e-300, 1e-3, 1e3, 1e150, 1e200] {
        let (mut weights, _) = build::<f64>(12, 3, 4, 6);
        weights.query_key_value.slice_mut(s![..;1, ..]).mapv_inplace(|w| w * size);
        weights.query_key_value_bias.fill(0.0);
        weights.gate *= 1e4;
        let block = DijiangBlock::new(weights, 3, Rotary::partial(4, 2).unwrap()).unwrap();
        match block.forward(normal::<f64>(7, 12, 1.0, 9).view()) {
            Ok(out) => assert!(out.iter().all(|x| x.is_finite()), "{size}"),
            Err(error) => {
                assert!(
                    size > 1e100 && matches!(error.inner(), Error::Overflow { .. }),
                    "{size}: {error}"
                )
            }
        }
    }
    let (_, block) = build::<f64>(12, 3, 4, 6);
    assert!(block.forward(Array2::zeros((7, 12)).view()).unwrap().iter().all(|x| x.is_finite()));
    assert_eq!(block.forward(Array2::zeros((0, 12)).view()).unwrap().dim(), (0, 12));
}

#[test]
fn bad_weights_are_errors() {
    let rotary = || Rotary::partial(4, 2).unwrap();
    let with = |change: fn(&mut DijiangWeights<f32>)| {
        let mut weights = weights::<f32>(12, 3, 1);
        change(&mut weights);
        DijiangBlock::new(weights, 3, rotary()).unwrap_err()
    };
    let shape = |which, axis, expected, found| Error::Shape { which, axis, expected, found };
    assert_eq!(
        with(|w| w.query_key_value = Array2::zeros((12, 12))),
        shape("query_key_value", "rows", 36, 12)
    );
    assert_eq!(
        with(|w| w.query_key_value_bias = Array1::zeros(12)),
        shape("query_key_value_bias", "elements", 36, 12)
    );
    assert_eq!(with(|w| w.dense = Array2::zeros((12, 4))), shape("dense", "columns", 12, 4));
    assert_eq!(with(|w| w.dense_bias = Array1::zeros(4)), shape("dense_bias", "elements", 12, 4));
    assert_eq!(with(|w| w.gate = Array2::zeros((4, 12))), shape("gate", "rows", 12, 4));
    assert_eq!(
        with(|w| w.group_norm_weight = Array1::zeros(3)),
        shape("group_norm_weight", "elements", 12, 3)
    );
    assert_eq!(
        with(|w| w.group_norm_bias = Array1::zeros(0)),
        shape("group_norm_bias", "elements", 12, 0)
    );
    assert_eq!(with(|w| w.radii = Array1::zeros(12)), shape("radii", "elements", 4, 12));
    assert_eq!(
        with(|w| w.query_key_value = Array2::zeros((0, 0))),
        Error::ZeroSize { which: "query_key_value columns" }
    );
    assert_eq!(
        with(|w| w.gate[[3, 1]] = f32::NAN),
        Error::NotFinite { which: "gate", row: 3, column: 1 }
    );
    assert_eq!(
        with(|w| w.radii[2] = f32::INFINITY),
        Error::NotFinite { which: "radii", row: 0, column: 2 }
    );
    let new =
        |heads, rotary| DijiangBlock::new(weights::<f32>(12, 3, 1), heads, rotary).unwrap_err();
    assert_eq!(new(0, rotary()), Error::ZeroSize { which: "heads" });
    assert!(matches!(new(5, rotary()), Error::InvalidOption { which: "heads", .. }));
    assert_eq!(new(3, Rotary::new(8).unwrap()), shape("rotary", "columns", 4, 8));
    for epsilon in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let (_, block) = build::<f32>(12, 3, 2, 1);
        assert!(matches!(
            block.with_epsilon(epsilon),
            Err(Error::InvalidOption { which: "epsilon", .. })
        ));
    }
}

/// The heads of the block, as the released code computes them.
#[test]
fn heads_are_those_of_the_released_code() {
    for case in golden("golden/official_dijiang")["cases"].as_array().unwrap() {
        let map = OfficialDijiang::from_projection(matrix(&case["P"]).view()).unwrap();
        let radii = vector(&case["radii_t"]);
        assert!((map.radii() - &radii).iter().all(|e| e.abs() < 1e-14));
        let decays = vector(&case["gamma"]);
        for (a, b) in decays.iter().zip(decay::dijiang(decays.len())) {
            assert!((a - b).abs() < 1e-15);
        }
        let kernel = LinearAttention::new(map).with_scale(1.0).unnormalized();
        for (h, &decay) in decays.iter().enumerate() {
            let [q, k, v] = ["q", "k", "v"].map(|x| matrix(&case[x][h]));
            let kernel = kernel.clone().with_decay(decay);
            let out = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap();
            assert!(difference(&out, &matrix(&case["output_unnormalised_decay"][h])) < 1e-12);
        }
    }
}

/// The whole block, as modules of PyTorch and the class of the released code compute it.
#[test]
fn is_the_released_block() {
    for case in golden("golden/dijiang_block")["cases"].as_array().unwrap() {
        let d = case["radii"].as_array().unwrap().len();
        let heads = case["heads"].as_u64().unwrap() as usize;
        let rotary = || Rotary::gpt_neox(d, case["rotary_pct"].as_f64().unwrap()).unwrap();
        let weights = DijiangWeights {
            query_key_value: matrix(&case["query_key_value.weight"]),
            query_key_value_bias: vector(&case["query_key_value.bias"]),
            dense: matrix(&case["dense.weight"]),
            dense_bias: vector(&case["dense.bias"]),
            gate: matrix(&case["W_G"]),
            group_norm_weight: vector(&case["group_norm.weight"]),
            group_norm_bias: vector(&case["group_norm.bias"]),
            radii: vector(&case["radii"]),
        };
        let (x, output) = (matrix(&case["x"]), matrix(&case["output"]));
        let check = |block: &DijiangBlock<f64>| {
            let mut stream = block.stream().unwrap();
            let mut pieces = Array2::from_elem(x.dim(), f64::NAN);
            for t in 0..x.nrows() {
                stream.extend(x.slice(s![t..=t, ..]), pieces.slice_mut(s![t..=t, ..])).unwrap();
            }
            for (which, found) in
                [("whole", block.forward(x.view()).unwrap()), ("token by token", pieces)]
            {
                let found = difference(&found, &output);
                assert!(found <= 1e-12, "{} {which}: {found:.1e}", case["name"]);
            }
        };
        check(&DijiangBlock::new(weights, heads, rotary()).unwrap());
        #[cfg(feature = "safetensors")]
        {
            let bytes = checkpoint(case);
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            check(&DijiangBlock::from_safetensors(&file, LAYER, heads, rotary()).unwrap());
        }
    }
}

#[cfg(feature = "safetensors")]
const LAYER: &str = "gpt_neox.layers.0.attention";

/// A checkpoint with the weights of a golden case, under the names that it has for them.
#[cfg(feature = "safetensors")]
fn checkpoint(case: &serde_json::Value) -> Vec<u8> {
    use safetensors::tensor::{Dtype, TensorView, serialize};
    let bytes = |numbers: &mut dyn Iterator<Item = &f64>| {
        numbers.flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()
    };
    let matrices = ["query_key_value.weight", "dense.weight", "W_G", "proj_matrix"].map(|name| {
        let x = matrix(&case[name]);
        (name, x.shape().to_vec(), bytes(&mut x.iter()))
    });
    let vectors = ["query_key_value.bias", "dense.bias", "group_norm.weight", "group_norm.bias"]
        .map(|name| {
            let x = vector(&case[name]);
            (name, x.shape().to_vec(), bytes(&mut x.iter()))
        });
    let tensors = matrices.iter().chain(&vectors).map(|(name, shape, bytes)| {
        (format!("{LAYER}.{name}"), TensorView::new(Dtype::F64, shape.clone(), bytes).unwrap())
    });
    serialize(tensors, None).unwrap()
}

#[test]
fn radii_are_found_in_a_projection_of_that_form_only() {
    for d in [1, 3, 8, 64, 80] {
        let radii = normal::<f64>(1, d, 1.0, 4).row(0).to_owned();
        let p = OfficialDijiang::new(radii.clone()).unwrap().projection().reversed_axes();
        let found = |p: &Array2<f64>| {
            OfficialDijiang::from_projection(p.view()).map(|map| map.radii().clone())
        };
        assert!((found(&p).unwrap() - &radii).iter().all(|e| e.abs() < 1e-13));
        // stored in eight or eleven bits
        let size = radii.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        let halves = [
            p.mapv(|x| half::bf16::from_f64(x).to_f64()),
            p.mapv(|x| half::f16::from_f64(x).to_f64()),
        ];
        for half in halves {
            assert!((found(&half).unwrap() - &radii).iter().all(|e| e.abs() <= size / 256.0));
        }
        if d > 1 {
            let refused = |p: &Array2<f64>| {
                matches!(found(p), Err(Error::InvalidOption { which: "projection", .. }))
            };
            assert!(refused(&p.t().to_owned()));
            let mut trained = p.clone();
            trained[[d - 1, 0]] += 0.1;
            assert!(refused(&trained));
        }
    }
    let wrong = OfficialDijiang::<f32>::from_projection(Array2::zeros((3, 4)).view()).unwrap_err();
    assert_eq!(wrong, Error::Shape { which: "projection", axis: "columns", expected: 3, found: 4 });
}

/// The gradients by the input and by every parameter are what differences say, in `f32` too.
#[test]
fn gradients_are_central_differences() {
    for (i, (hidden, heads, turning)) in SIZES.into_iter().enumerate() {
        let rotary = |d: usize| Rotary::partial(d, turning).unwrap();
        let w = weights::<f64>(hidden, heads, i as u64 + 1);
        let block = DijiangBlock::new(w.clone(), heads, rotary(hidden / heads)).unwrap();
        for n in [1, 2, 70] {
            let [x, d_out] = [1, 2].map(|seed| normal::<f64>(n, hidden, 0.7, seed));
            let d = block.backward(x.view(), d_out.view()).unwrap();
            let step = 1e-6;
            let loss = |block: &DijiangBlock<f64>, x: &Array2<f64>| {
                (block.forward(x.view()).unwrap() * &d_out).sum()
            };
            let check = |what: &str, exact: f64, size: f64, [up, down]: [f64; 2]| {
                let found = (up - down) / (2.0 * step);
                let error = (exact - found).abs();
                let size = size.max(1e-2 * up.abs());
                assert!(
                    error <= 1e-5 * size + 1e-9,
                    "{hidden} {heads} n={n} {what}: {exact} {found}"
                );
            };
            let u = normal::<f64>(n, hidden, 1.0, 3);
            let moved = [step, -step].map(|step| loss(&block, &(&x + &(&u * step))));
            check("x", (&d.x * &u).sum(), (&d.x * &u).mapv(f64::abs).sum(), moved);
            for (name, gradient) in d.parameters.iter() {
                let u = normal::<f64>(1, gradient.len(), 1.0, 4).into_shape_clone(gradient.shape());
                let u = u.unwrap();
                let moved = [step, -step].map(|step| {
                    let mut parameters = block.parameters();
                    let array = parameters.get_mut(name).unwrap();
                    *array = &*array + &(&u * step);
                    loss(&block.with_parameters(&parameters).unwrap(), &x)
                });
                let product = gradient * &u;
                check(name, product.sum(), product.mapv(f64::abs).sum(), moved);
            }
        }
        let narrow = |x: &Array2<f64>| x.mapv(|x| x as f32);
        let [x, d_out] = [1, 2].map(|seed| normal::<f64>(40, hidden, 0.7, seed));
        let exact = block.backward(x.view(), d_out.view()).unwrap();
        let w = weights::<f32>(hidden, heads, i as u64 + 1);
        let block = DijiangBlock::new(w, heads, rotary(hidden / heads)).unwrap();
        let found = block.backward(narrow(&x).view(), narrow(&d_out).view()).unwrap();
        let largest = exact.x.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
        let worst = found
            .x
            .iter()
            .zip(&exact.x)
            .fold(0.0, |m: f64, (a, b)| m.max((f64::from(*a) - b).abs()));
        // one number alone in its group is nothing but its ε
        assert!(
            hidden == heads || worst < 2e-3 * largest,
            "{hidden} {heads}: {worst} of {largest}"
        );
    }
    let block =
        DijiangBlock::new(weights::<f64>(8, 2, 1), 2, Rotary::partial(4, 2).unwrap()).unwrap();
    let x = normal::<f64>(5, 8, 0.7, 1);
    let mut bad = x.clone();
    bad[[3, 2]] = f64::NAN;
    let error = block.backward(x.view(), bad.view()).unwrap_err();
    assert_eq!(error, Error::NotFinite { which: "d_out", row: 3, column: 2 });
    let error = block.backward(x.view(), x.slice(s![..4, ..])).unwrap_err();
    assert!(matches!(error, Error::Shape { which: "d_out", .. }), "{error}");
    let none = Array2::zeros((0, 8));
    assert_eq!(block.backward(none.view(), none.view()).unwrap().x.dim(), (0, 8));
}
