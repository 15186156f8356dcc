//! Rotary position embedding: the formula, differences of positions, pieces, layouts, bad input.

use crate::common::{assert_close, normal, strided, wide};
use dijiang::attention::naive::positional;
use dijiang::{Error, Rotary, RotaryPairs, Scalar};
use ndarray::{Array2, Array3, s};

const PAIRS: [RotaryPairs; 2] = [RotaryPairs::Halves, RotaryPairs::Interleaved];

fn check<T: Scalar>(head_dim: usize, dims: usize, base: f64, first: usize, pairs: RotaryPairs) {
    let rotary =
        Rotary::partial(head_dim, dims).unwrap().with_base(base).unwrap().with_pairs(pairs);
    let x = normal::<T>(9, head_dim, 1.0, 3);
    let columns = crate::common::written::paired(pairs, &positional::rotary_angles(dims, base));
    let exact = positional::rotate(&wide(&x), first, &columns);
    let what = format!("{dims} of {head_dim} from {first} {pairs:?}");
    let mut out = Array2::from_elem(x.dim(), T::nan());
    rotary.rotate(x.view(), first, out.view_mut()).unwrap();
    // an angle of a million radians is known to 1e-10
    let units = if T::NAME == "f64" { 16.0 + 4.0 * first as f64 } else { 16.0 };
    assert_close(&what, &out, &exact, units);
    assert_eq!(out.slice(s![.., dims..]), x.slice(s![.., dims..]));

    let mut large = strided(x.view());
    rotary.rotate_in_place(large.slice_mut(s![..;2, ..;3]), first).unwrap();
    assert_eq!(large.slice(s![..;2, ..;3]), out, "{what}");
    let mut pieces = x.clone();
    for piece in [0..1, 1..4, 4..9] {
        rotary
            .rotate_in_place(pieces.slice_mut(s![piece.clone(), ..]), first + piece.start)
            .unwrap();
    }
    assert_eq!(pieces, out, "{what}");
}

#[test]
fn is_the_formula_at_any_position_in_any_layout_and_piece() {
    for pairs in PAIRS {
        for (head_dim, dims) in [(2, 2), (3, 2), (1, 0), (64, 64), (64, 16), (80, 20), (7, 4)] {
            for first in [0, 5, 4_000_000] {
                check::<f64>(head_dim, dims, 1e4, first, pairs);
                check::<f32>(head_dim, dims, 5e5, first, pairs);
            }
        }
    }
}

#[test]
fn heads_share_angles() {
    let (n, heads, d) = (7, 3, 10);
    for pairs in PAIRS {
        let rotary = Rotary::gpt_neox(d, 0.45).unwrap().with_pairs(pairs);
        assert_eq!(rotary.dims(), 4);
        let rows = normal::<f64>(n, heads * d, 1.0, 1);
        let mut all = Array3::from_shape_fn((n, heads, d), |(t, h, i)| rows[[t, h * d + i]]);
        let mut heads_first =
            Array3::from_shape_fn((heads, n, d), |(h, t, i)| rows[[t, h * d + i]]);
        let angles = rotary.angles(11, n).unwrap();
        angles.rotate_heads_in_place(all.view_mut()).unwrap();
        angles.rotate_heads_in_place(heads_first.view_mut().permuted_axes([1, 0, 2])).unwrap();
        assert_eq!(heads_first.permuted_axes([1, 0, 2]), all);
        for h in 0..heads {
            let mut head = rows.slice(s![.., h * d..(h + 1) * d]).to_owned();
            rotary.rotate_in_place(head.view_mut(), 11).unwrap();
            assert_eq!(all.slice(s![.., h, ..]), head);
        }
    }
}

#[test]
fn the_two_pairings_are_one_embedding_of_permuted_columns() {
    let d = 8;
    let x = normal::<f64>(5, d, 1.0, 2);
    let mut halves = x.clone();
    Rotary::new(d).unwrap().rotate_in_place(halves.view_mut(), 3).unwrap();
    let order = |j: usize| j / 2 + (j % 2) * d / 2;
    let mut interleaved = Array2::from_shape_fn(x.dim(), |(t, j)| x[[t, order(j)]]);
    let rotary = Rotary::new(d).unwrap().with_pairs(RotaryPairs::Interleaved);
    rotary.rotate_in_place(interleaved.view_mut(), 3).unwrap();
    assert_eq!(interleaved, Array2::from_shape_fn(x.dim(), |(t, j)| halves[[t, order(j)]]));
}

#[test]
fn own_frequencies() {
    let rotary = Rotary::new(6).unwrap().with_frequencies(vec![0.5, -0.25]).unwrap();
    assert_eq!((rotary.dims(), rotary.frequencies()), (4, &[0.5, -0.25][..]));
    let mut x = Array2::from_shape_vec((1, 6), vec![1.0, 0.0, 0.0, 1.0, 3.0, 4.0]).unwrap();
    rotary.rotate_in_place(x.view_mut(), 2).unwrap();
    let expected = [1f64.cos(), 0.5f64.sin(), 1f64.sin(), 0.5f64.cos(), 3.0, 4.0];
    assert_close("own", &x, &Array2::from_shape_vec((1, 6), expected.to_vec()).unwrap(), 4.0);
}

#[test]
fn no_position_and_no_size_panics() {
    // where nothing turns, any number of tokens takes no time
    let still = Rotary::partial(8, 0).unwrap();
    assert_eq!(still.angles::<f32>(0, usize::MAX).unwrap().tokens(), usize::MAX);
    let rotary = Rotary::new(4).unwrap();
    let mut x = Array2::<f32>::ones((3, 4));
    rotary.rotate_in_place(x.view_mut(), usize::MAX).unwrap();
    assert!(x.iter().all(|x| x.is_finite()));
    rotary.rotate_in_place(Array2::<f32>::zeros((0, 4)).view_mut(), 0).unwrap();
    assert!(matches!(
        rotary.angles::<f32>(0, usize::MAX),
        Err(Error::InvalidOption { which: "tokens", .. })
    ));
    rotary
        .angles::<f32>(0, 3)
        .unwrap()
        .rotate_heads_in_place(Array3::zeros((3, 0, 4)).view_mut())
        .unwrap();
}

#[test]
fn bad_input_is_an_error() {
    let invalid =
        |result: Result<Rotary, Error>| assert!(matches!(result, Err(Error::InvalidOption { .. })));
    assert_eq!(Rotary::new(0), Err(Error::ZeroSize { which: "head_dim" }));
    assert_eq!(Rotary::gpt_neox(0, 0.5), Err(Error::ZeroSize { which: "head_dim" }));
    invalid(Rotary::new(5));
    invalid(Rotary::new(usize::MAX - 1));
    invalid(Rotary::partial(4, 6));
    invalid(Rotary::partial(4, 3));
    for pct in [-0.1, 1.1, f64::NAN] {
        invalid(Rotary::gpt_neox(8, pct));
    }
    let rotary = || Rotary::new(4).unwrap();
    for base in [0.0, -1.0, 0.5, f64::NAN, f64::INFINITY] {
        invalid(rotary().with_base(base));
    }
    invalid(rotary().with_frequencies(vec![1.0; 3]));
    for frequency in [f64::NAN, f64::INFINITY, 1e10] {
        invalid(rotary().with_frequencies(vec![frequency]));
    }
    let (x, narrow) = (Array2::<f64>::zeros((3, 4)), Array2::<f64>::zeros((3, 3)));
    let shape = |which, axis, expected, found| Err(Error::Shape { which, axis, expected, found });
    assert_eq!(
        rotary().rotate(narrow.view(), 0, x.clone().view_mut()),
        shape("x", "columns", 4, 3)
    );
    assert_eq!(
        rotary().rotate(x.view(), 0, narrow.clone().view_mut()),
        shape("out", "columns", 4, 3)
    );
    assert_eq!(
        rotary().rotate(x.view(), 0, Array2::zeros((2, 4)).view_mut()),
        shape("out", "rows", 3, 2)
    );
    assert_eq!(rotary().rotate_in_place(narrow.clone().view_mut(), 0), shape("x", "columns", 4, 3));
    let angles = rotary().angles(0, 2).unwrap();
    assert_eq!(angles.rotate_in_place(x.clone().view_mut()), shape("x", "rows", 2, 3));
}

#[cfg(feature = "serde")]
#[test]
fn is_stored_and_checked_when_restored() {
    let rotary = Rotary::gpt_neox(8, 0.5)
        .unwrap()
        .with_pairs(RotaryPairs::Interleaved)
        .with_base(5e5)
        .unwrap();
    let text = serde_json::to_string(&rotary).unwrap();
    assert_eq!(serde_json::from_str::<Rotary>(&text).unwrap(), rotary);
    assert!(
        serde_json::from_str::<Rotary>(&text.replace("\"head_dim\":8", "\"head_dim\":2")).is_err()
    );
}

/// LLaMA 3.2 1B: 15 pairs stay, 14 are divided, and those between are between.
#[test]
fn the_scaling_of_llama_3() {
    let rotary = Rotary::new(64).unwrap().with_base(5e5).unwrap();
    let (factor, low, high, old) = (32.0, 1.0, 4.0, 8192.0);
    let formula = |&f: &f64| {
        let wavelength = std::f64::consts::TAU / f;
        if wavelength < old / high {
            f
        } else if wavelength > old / low {
            f / factor
        } else {
            let smooth = (old / wavelength - low) / (high - low);
            (1.0 - smooth) * f / factor + smooth * f
        }
    };
    let scaled = rotary.clone().with_llama3_scaling(factor, low, high, 8192).unwrap();
    let pairs = rotary.frequencies().iter().zip(scaled.frequencies());
    for (i, (old, new)) in pairs.enumerate() {
        assert!((new / formula(old) - 1.0).abs() < 1e-14, "{i}");
        match i {
            0..=14 => assert_eq!(new, old),
            18.. => assert_eq!(*new, old / 32.0),
            _ => assert!(*new < *old && *new > old / 32.0),
        }
    }
    let bad = |factor, low, high, old| {
        let error = rotary.clone().with_llama3_scaling(factor, low, high, old).unwrap_err();
        assert!(matches!(error, Error::InvalidOption { .. }), "{error}");
    };
    bad(0.0, 1.0, 4.0, 8192);
    bad(f64::NAN, 1.0, 4.0, 8192);
    bad(8.0, 0.0, 4.0, 8192);
    bad(8.0, 4.0, 4.0, 8192);
    bad(8.0, 4.0, 1.0, 8192);
    bad(8.0, 1.0, f64::INFINITY, 8192);
    bad(8.0, 1.0, 4.0, 0);
}

#[test]
fn linear_scaling_divides_positions() {
    let rotary = Rotary::new(16).unwrap();
    let scaled = rotary.clone().with_linear_scaling(4.0).unwrap();
    let x = normal::<f64>(1, 16, 1.0, 1);
    let at = |rotary: &Rotary, position| {
        let mut x = x.clone();
        rotary.rotate_in_place(x.view_mut(), position).unwrap();
        x
    };
    assert_close("a quarter", &at(&scaled, 400), &at(&rotary, 100), 64.0);
    for factor in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-20] {
        assert!(rotary.clone().with_linear_scaling(factor).is_err(), "{factor}");
    }
}

/// The released code of YaRN: fast pairs stay, slow ones are interpolated, a ramp between.
#[test]
fn the_scaling_of_yarn() {
    let (dims, base, factor, old) = (128, 1e6_f64, 4.0, 32_768.0);
    let rotary = Rotary::new(dims).unwrap().with_base(base).unwrap();
    let scaled = rotary.clone().with_yarn_scaling(factor, 32_768, 32.0, 1.0).unwrap();
    let dim = |rotations: f64| {
        dims as f64 * (old / (rotations * 2.0 * std::f64::consts::PI)).ln() / (2.0 * base.ln())
    };
    let (low, high) = (dim(32.0).floor(), dim(1.0).ceil());
    assert_eq!((low, high), (23.0, 40.0));
    for (i, new) in scaled.frequencies().iter().enumerate() {
        let extrapolated = base.powf(-2.0 * i as f64 / dims as f64);
        let mask = 1.0 - ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        let exact = extrapolated / factor * (1.0 - mask) + extrapolated * mask;
        assert!((new / exact - 1.0).abs() < 1e-13, "{i}: {new} {exact}");
    }
    let bad = |base, factor, old, fast, slow| {
        let rotary = Rotary::new(8).unwrap().with_base(base).unwrap();
        assert!(rotary.with_yarn_scaling(factor, old, fast, slow).is_err());
    };
    bad(1.0, 4.0, 4096, 32.0, 1.0);
    bad(1e4, 0.0, 4096, 32.0, 1.0);
    bad(1e4, 4.0, 0, 32.0, 1.0);
    bad(1e4, 4.0, 4096, 1.0, 32.0);
    bad(1e4, 4.0, 4096, f64::NAN, 1.0);
    bad(1e4, 4.0, 4096, 32.0, 0.0);
}
