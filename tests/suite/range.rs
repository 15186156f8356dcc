//! One range for each number type, on every path: values up to the largest number.

use crate::common::{assert_close, normal};
use dijiang::{
    Attention, DctFeatures, EluFeatures, Error, ExactMemory, Far, HybridAttention,
    IdentityFeatures, LinearAttention, Mask, Memory, Merged, Partial, Performer, Rotary,
    RotaryAttention, Scalar, SoftmaxAttention, Ward,
};
use ndarray::{Array2, s};

const D: usize = 6;

fn kernels<T: Scalar>() -> Vec<(&'static str, Box<dyn Attention<T>>)> {
    let builder = || HybridAttention::<T>::builder(D).window(5).sinks(2);
    let softmax = || SoftmaxAttention::<T>::new(D).unwrap();
    let performer = || Performer::<T>::new(D, 10, 0).unwrap();
    vec![
        ("softmax", Box::new(softmax())),
        ("rotary", Box::new(RotaryAttention::new(Rotary::new(D).unwrap(), softmax()))),
        ("performer", Box::new(LinearAttention::new(performer()))),
        ("decay", Box::new(LinearAttention::new(performer()).with_decay(0.9))),
        ("dct", Box::new(LinearAttention::new(DctFeatures::<T>::new(D, 10, 0).unwrap()))),
        ("elu", Box::new(LinearAttention::new(EluFeatures::<T>::new(D).unwrap()))),
        ("window", Box::new(builder().far(Far::none()).build().unwrap())),
        ("merged", Box::new(builder().far(Far::merged(6)).build().unwrap())),
        ("block", Box::new(builder().far(Merged::new(6).block(3)).build().unwrap())),
        ("ward", Box::new(builder().far(Ward::new(6)).build().unwrap())),
        ("features", Box::new(builder().far(Far::features(performer())).build().unwrap())),
    ]
}

/// The output of a stream that is given the tokens in pieces of this many.
fn pieces<T: Scalar>(
    kernel: &dyn Attention<T>,
    [q, k, v]: [&Array2<T>; 3],
    most: usize,
) -> Result<Array2<T>, Error> {
    let mut out = Array2::zeros((q.nrows(), v.ncols()));
    let mut stream = kernel.stream(v.ncols())?;
    for start in (0..q.nrows()).step_by(most) {
        let r = s![start..q.nrows().min(start + most), ..];
        stream.extend(q.slice(r), k.slice(r), v.slice(r), out.slice_mut(r))?;
    }
    Ok(out)
}

/// Values that are all alike come back, and values of both signs as `f64` has them in units of the
/// largest.
fn check<T: Scalar>(sizes: &[f64]) {
    let tolerance = T::epsilon() * T::from_f64(256.0);
    for (name, kernel) in kernels::<T>() {
        for n in [1, 2, 5, 6, 63, 64, 65, 200] {
            let [q, k] = [1, 2].map(|seed| normal::<T>(n, D, 1.0, seed));
            let mixed = normal::<f64>(n, 2, 1.0, 3).mapv(|x| x.clamp(-1.0, 1.0));
            let of_one = kernel
                .forward(q.view(), k.view(), mixed.mapv(T::from_f64).view(), Mask::Causal)
                .unwrap();
            for &size in sizes {
                let what = format!("{name}, {n} tokens of {size:e}");
                let v = Array2::from_elem((n, 3), T::from_f64(size));
                let whole = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal);
                let mut all = vec![whole];
                all.extend([1, 3, 7, 64].map(|most| pieces(&*kernel, [&q, &k, &v], most)));
                match kernel.forward(q.view(), k.view(), v.view(), Mask::Full) {
                    Err(Error::Unsupported { .. }) => {} // windows and decays need an order
                    full => all.push(full),
                }
                for out in all {
                    let out = out.unwrap_or_else(|error| panic!("{what}: {error}"));
                    let same = |x: &T| (*x / T::from_f64(size) - T::one()).abs() <= tolerance;
                    assert!(out.iter().all(same), "{what}: {out}");
                }
                let v = mixed.mapv(|x| T::from_f64(x * size));
                let right = of_one.mapv(|x| x.as_f64());
                let whole = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal);
                for out in [whole, pieces(&*kernel, [&q, &k, &v], 1)] {
                    let out = out.unwrap_or_else(|error| panic!("{what}: {error}"));
                    let out = out.mapv(|x| x / T::from_f64(size));
                    // merging compares values, whose squares are out of range here
                    if !["merged", "block"].contains(&name) {
                        assert_close(&what, &out, &right, 2048.0);
                    }
                    assert!(out.iter().all(|x| x.abs() <= T::from_f64(1.00001)), "{what}");
                }
            }
        }
    }
}

#[test]
fn every_path_takes_values_up_to_the_largest_number() {
    check::<f32>(&[1e-30, 1.0, 1e19, 1e25, 3e31, 1e36, 3e38]);
    check::<f64>(&[1e-300, 1e150, 1e290, 1e307, 1.7e308]);
}

/// A later value may be huge, or an earlier one.
#[test]
fn huge_values_leave_the_others_their_digits() {
    let n = 150;
    let [q, k] = [1, 2].map(|seed| normal::<f32>(n, D, 1.0, seed));
    let mut v = normal::<f32>(n, 2, 1.0, 3);
    let right = |kernel: &dyn Attention<f64>, v: &Array2<f32>| {
        let [q, k, v] = [&q, &k, v].map(|x| x.mapv(f64::from));
        kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap()
    };
    for at in [0, 70, 149] {
        v[[at, 0]] = 3e38;
        for ((name, kernel), (_, exact)) in kernels::<f32>().into_iter().zip(kernels::<f64>()) {
            if ["merged", "block", "features"].contains(&name) {
                continue;
            }
            let right = right(&*exact, &v);
            for out in [
                kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap(),
                pieces(&*kernel, [&q, &k, &v], 1).unwrap(),
            ] {
                // before it nothing has happened, and the other column goes on as it was
                let rows = s![..at, ..];
                assert_close(name, &out.slice(rows).to_owned(), &right.slice(rows).to_owned(), 1e3);
                let column = s![.., 1..];
                let (out, right) = (out.slice(column).to_owned(), right.slice(column).to_owned());
                assert_close(name, &out, &right, 1e3);
            }
        }
    }
}

#[test]
fn partial_sums_of_huge_values_merge() {
    let q = Array2::<f32>::zeros((1, D));
    let mut answer = Partial::new(1, 2).unwrap();
    for (tokens, value) in [(1, 3e38), (3, 3e38), (100, 3e38), (1, 3e38)] {
        let mut memory = ExactMemory::<f32>::new(D, 2, 1.0).unwrap();
        let v = Array2::from_elem((tokens, 2), value);
        memory.absorb(Array2::zeros((tokens, D)).view(), v.view()).unwrap();
        memory.read(q.view(), &mut answer).unwrap();
    }
    let mut out = Array2::zeros((1, 2));
    answer.normalize_into(out.view_mut()).unwrap();
    assert!(out.iter().all(|x| (x / 3e38 - 1.0).abs() < 1e-5), "{out}");
}

/// Where the answer itself is out of range, every path says so.
#[test]
fn sums_beyond_the_largest_number_are_an_error_on_every_path() {
    let map = IdentityFeatures::<f32>::new(D).unwrap();
    let kernel = LinearAttention::new(map).with_scale(1.0).unnormalized();
    let x = Array2::<f32>::ones((70, D));
    let v = Array2::from_elem((70, 2), 1e38);
    assert!(kernel.forward(x.view(), x.view(), v.view(), Mask::Causal).is_err());
    for most in [1, 7, 64] {
        let error = pieces(&kernel, [&x, &x, &v], most).unwrap_err();
        assert!(matches!(error, Error::Overflow { .. }), "{error}");
    }
    let v = Array2::from_elem((70, 2), 1e35);
    let right = Array2::from_shape_fn((70, 2), |(t, _)| (t + 1) as f64 * 6e35);
    for most in [1, 7, 64, 70] {
        assert_close("sums", &pieces(&kernel, [&x, &x, &v], most).unwrap(), &right, 64.0);
    }
}
