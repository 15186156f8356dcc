//! ONE checker of backward passes: every kernel that has one makes the same promises.

use super::{assert_close, normal, tokens, wide};
use dijiang::{Attention, Error, HeadGradient, Mask, Parameters, Scalar, Scratch};
use ndarray::{Array2, Array3, Axis, s};

/// A kernel in both number types, with log decays of `gates` columns (none if 0).
#[derive(Clone, Copy)]
pub struct Trained<'a> {
    pub name: &'a str,
    pub head_dim: usize,
    pub f64: &'a dyn Attention<f64>,
    pub f32: &'a dyn Attention<f32>,
    pub masks: &'a [Mask],
    pub gates: usize,
    /// The largest norm of queries and keys, by the root of `d`.
    pub size: f64,
}

/// The arguments of a call: queries of some heads, keys, values, log decays, and cotangents.
#[derive(Clone)]
pub struct Call<T> {
    pub q: Array3<T>,
    pub k: Array2<T>,
    pub v: Array2<T>,
    pub log_decay: Option<Array2<T>>,
    pub d_out: Array3<T>,
}

/// What a backward pass gives.
#[derive(Clone)]
pub struct Found<T> {
    pub q: Array3<T>,
    pub k: Array2<T>,
    pub v: Array2<T>,
    pub log_decay: Option<Array2<T>>,
    pub parameters: Parameters<T>,
}

fn heads<T: Scalar>(group: usize, n: usize, d: usize, size: f64, seed: u64) -> Array3<T> {
    let all = normal::<T>(group * n, d, size, seed);
    Array3::from_shape_vec((group, n, d), all.into_raw_vec_and_offset().0).unwrap()
}

impl<T: Scalar> Call<T> {
    pub fn new(subject: &Trained<'_>, group: usize, [n_q, n_k]: [usize; 2], seed: u64) -> Self {
        let (d, dv) = (subject.head_dim, 3);
        let [_, k, v] = tokens::<T>(n_k, d, dv, subject.size, seed);
        let gates = normal::<T>(n_k, subject.gates.max(1), 1.0, seed + 100);
        // some decays are strong and some weak
        let gates = gates.mapv(|x| -(x * x * x * x) * T::from_f64(0.3) - T::from_f64(0.001));
        Self {
            q: heads(group, n_q, d, subject.size, seed + 7),
            k,
            v,
            log_decay: (subject.gates > 0).then_some(gates),
            d_out: heads(group, n_q, dv, 1.0, seed + 8),
        }
    }

    pub fn narrowed<U: Scalar>(&self) -> Call<U> {
        let two = |x: &Array2<T>| x.mapv(|x| U::from_f64(x.as_f64()));
        let three = |x: &Array3<T>| x.mapv(|x| U::from_f64(x.as_f64()));
        Call {
            q: three(&self.q),
            k: two(&self.k),
            v: two(&self.v),
            log_decay: self.log_decay.as_ref().map(two),
            d_out: three(&self.d_out),
        }
    }

    /// `Σ dO∘O`, whose gradient it is.
    pub fn loss(&self, kernel: &dyn Attention<T>, mask: Mask) -> f64 {
        let mut out = Array3::from_elem(self.d_out.dim(), T::nan());
        let head =
            dijiang::Head::group(self.q.view(), self.k.view(), self.v.view(), out.view_mut());
        let head = match &self.log_decay {
            Some(log_decay) => head.with_log_decay(log_decay.view()),
            None => head,
        };
        kernel.forward_heads(&mut [head], mask, &mut Scratch::new()).unwrap();
        out.iter().zip(&self.d_out).map(|(o, d)| o.as_f64() * d.as_f64()).sum()
    }

    /// The gradients, from buffers that hold `dirt`, which is taken away again.
    pub fn gradient(
        &self,
        kernel: &dyn Attention<T>,
        mask: Mask,
        dirt: f64,
        scratch: &mut Scratch<T>,
    ) -> Result<Found<T>, Error> {
        let dirt = T::from_f64(dirt);
        let mut found = Found {
            q: Array3::from_elem(self.q.dim(), dirt),
            k: Array2::from_elem(self.k.dim(), dirt),
            v: Array2::from_elem(self.v.dim(), dirt),
            log_decay: self.log_decay.as_ref().map(|x| Array2::from_elem(x.dim(), dirt)),
            parameters: kernel.parameters().zeros_like(),
        };
        found.parameters.iter_mut().for_each(|(_, x)| x.fill(dirt));
        let head = HeadGradient::group(
            self.q.view(),
            [self.k.view(), self.v.view()],
            self.d_out.view(),
            found.q.view_mut(),
            [found.k.view_mut(), found.v.view_mut()],
        );
        let head = match (&self.log_decay, &mut found.log_decay) {
            (Some(x), Some(d)) => head.with_log_decay(x.view(), d.view_mut()),
            _ => head,
        };
        let mut heads = [head.with_parameters(&mut found.parameters)];
        kernel.backward_heads(&mut heads, mask, scratch)?;
        found.q.mapv_inplace(|x| x - dirt);
        [&mut found.k, &mut found.v].into_iter().for_each(|x| x.mapv_inplace(|x| x - dirt));
        found.log_decay.iter_mut().for_each(|x| x.mapv_inplace(|x| x - dirt));
        found.parameters.iter_mut().for_each(|(_, x)| x.mapv_inplace(|x| x - dirt));
        Ok(found)
    }
}

impl<T: Scalar> Found<T> {
    /// Every array by its name, as rows.
    pub fn arrays(&self) -> Vec<(String, Array2<T>)> {
        let rows = |x: &Array3<T>| {
            let (group, n, d) = x.dim();
            Array2::from_shape_vec((group * n, d), x.iter().copied().collect()).unwrap()
        };
        let mut all = vec![
            ("q".to_owned(), rows(&self.q)),
            ("k".to_owned(), self.k.clone()),
            ("v".to_owned(), self.v.clone()),
        ];
        all.extend(self.log_decay.iter().map(|x| ("log_decay".to_owned(), x.clone())));
        all.extend(self.parameters.iter().map(|(name, x)| {
            let flat = x.iter().copied().collect();
            (name.to_owned(), Array2::from_shape_vec((1, x.len()), flat).unwrap())
        }));
        all
    }

    /// Fails unless all arrays are close, relative to the largest number of an array, or of those
    /// by queries, keys and values: what is zero in exact arithmetic is rounding errors of their
    /// size.
    #[track_caller]
    pub fn assert_close(&self, what: &str, exact: &Found<f64>, units: f64) {
        let largest = |x: &Array2<f64>| x.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
        let exact = exact.arrays();
        let common = exact.iter().take(3).map(|(_, x)| largest(x)).fold(0.0, f64::max);
        for ((name, found), (_, exact)) in self.arrays().iter().zip(&exact) {
            let own = largest(exact).max(f64::MIN_POSITIVE);
            let units = units * (common / own).max(1.0);
            assert_close(&format!("{what}: gradient by {name}"), found, exact, units);
        }
    }
}

/// Everything a backward pass promises.
pub fn check_gradients(subject: &Trained<'_>) {
    for &mask in subject.masks {
        for n in [1, 2, 5, 17, 64, 65, 130] {
            let n_q = if mask == Mask::Full { n / 2 + 1 } else { n };
            check_differences(subject, mask, [n_q, n]);
        }
        check_units::<f64>(subject, subject.f64, mask);
        check_units::<f32>(subject, subject.f32, mask);
        check_precision(subject, mask);
        check_groups(subject, mask);
        check_views(subject, mask);
        check_bad_input::<f64>(subject, subject.f64, mask);
        check_bad_input::<f32>(subject, subject.f32, mask);
    }
    if subject.masks.contains(&Mask::Causal) {
        check_causality(subject);
    }
}

/// A random direction by an argument, and what the gradient says of it.
pub fn check_differences(subject: &Trained<'_>, mask: Mask, sizes: [usize; 2]) {
    let kernel = subject.f64;
    let call = Call::<f64>::new(subject, 1, sizes, sizes[1] as u64);
    let found = call.gradient(kernel, mask, 0.0, &mut Scratch::new()).unwrap();
    let what = format!("{} n={sizes:?} {mask:?}", subject.name);
    let step = 1e-6;
    let check = |name: &str, gradient: &[f64], direction: &[f64], [up, down]: [f64; 2]| {
        let difference = (up - down) / (2.0 * step);
        let exact: f64 = gradient.iter().zip(direction).map(|(g, u)| g * u).sum();
        let size: f64 = gradient.iter().zip(direction).map(|(g, u)| (g * u).abs()).sum();
        let size = size.max(difference.abs()).max(up.abs() * 1e-3);
        let error = (difference - exact).abs();
        assert!(
            error <= 3e-6 * size + 1e-9,
            "{what}: by {name} {exact}, by difference {difference}"
        );
    };
    for seed in 0..2 {
        let moved = |which: &str, sign: f64| {
            let mut moved = call.clone();
            let u = |n: usize, d: usize| normal::<f64>(n, d, sign * step, 50 + seed);
            match which {
                "q" => {
                    let (_, n, d) = call.q.dim();
                    moved.q += &u(n, d);
                }
                "k" => moved.k += &u(call.k.nrows(), call.k.ncols()),
                "v" => moved.v += &u(call.v.nrows(), call.v.ncols()),
                _ => {
                    if let Some(x) = &mut moved.log_decay {
                        // a decay of nothing cannot become less
                        let u = u(x.nrows(), x.ncols());
                        x.zip_mut_with(&u, |x, u| *x = (*x + u).min(0.0));
                    }
                }
            }
            moved.loss(kernel, mask)
        };
        for (name, gradient) in found.arrays().iter().take(3 + usize::from(subject.gates > 0)) {
            let direction = normal::<f64>(gradient.nrows(), gradient.ncols(), 1.0, 50 + seed);
            let losses = [1.0, -1.0].map(|sign| moved(name, sign));
            let flat = |x: &Array2<f64>| x.iter().copied().collect::<Vec<_>>();
            check(name, &flat(gradient), &flat(&direction), losses);
        }
        let parameters = kernel.parameters();
        for (name, gradient) in found.parameters.iter() {
            let value = parameters.get(name).unwrap();
            let direction = normal::<f64>(1, gradient.len(), 1.0, 60 + seed);
            // weights of 0 stay
            let direction: Vec<f64> = direction
                .iter()
                .zip(value.iter())
                .map(|(u, x)| if *x == 0.0 { 0.0 } else { *u * x.abs().min(1.0) })
                .collect();
            let losses = [1.0, -1.0].map(|sign| {
                let mut moved = parameters.clone();
                let array = moved.get_mut(name).unwrap();
                array.iter_mut().zip(&direction).for_each(|(x, u)| *x += sign * step * u);
                let one = Parameters::new().with(name, array.clone());
                call.loss(&*kernel.with_parameters(&one).unwrap(), mask)
            });
            check(name, &gradient.iter().copied().collect::<Vec<_>>(), &direction, losses);
        }
    }
}

/// Gradients are added; cotangents of any size scale them; those of zero give zero.
pub fn check_units<T: Scalar>(subject: &Trained<'_>, kernel: &dyn Attention<T>, mask: Mask) {
    let mut scratch = Scratch::new();
    for n in [1, 40, 70] {
        let call = Call::<T>::new(subject, 1, [n, n], 3);
        let what = format!("{} n={n} {mask:?} {}", subject.name, T::NAME);
        let plain = call.gradient(kernel, mask, 0.0, &mut scratch).unwrap();
        let exact = Found {
            q: plain.q.mapv(T::as_f64),
            k: wide(&plain.k),
            v: wide(&plain.v),
            log_decay: plain.log_decay.as_ref().map(wide),
            parameters: plain
                .parameters
                .iter()
                .map(|(name, x)| (name.to_owned(), x.mapv(T::as_f64)))
                .collect(),
        };
        let largest =
            exact.arrays().iter().flat_map(|(_, x)| x.iter().copied()).fold(0.0, f64::max);
        if largest < 1e3 {
            let dirty = call.gradient(kernel, mask, 2.0, &mut scratch).unwrap();
            for ((name, found), (_, exact)) in dirty.arrays().iter().zip(exact.arrays()) {
                for (a, b) in found.iter().zip(&exact) {
                    let error = (a.as_f64() - b).abs() / T::epsilon().as_f64();
                    assert!(
                        error <= 64.0 * (2.0 + b.abs()),
                        "{what} {name}: added to what is there"
                    );
                }
            }
        }
        for power in [80, -80] {
            let unit = 2.0_f64.powi(if T::NAME == "f64" { 8 * power } else { power });
            let mut scaled = call.clone();
            scaled.d_out.mapv_inplace(|x| x * T::from_f64(unit));
            let found = scaled.gradient(kernel, mask, 0.0, &mut scratch).unwrap();
            for ((name, found), (_, exact)) in found.arrays().iter().zip(exact.arrays()) {
                let found = found.mapv(|x| T::from_f64(x.as_f64() / unit));
                let what = format!("{what} {name}, cotangents times 2^{power}");
                assert_close(&what, &found, &exact, 64.0);
            }
        }
        let mut nothing = call.clone();
        nothing.d_out.fill(T::zero());
        let found = nothing.gradient(kernel, mask, 0.0, &mut scratch).unwrap();
        for (name, found) in found.arrays() {
            assert!(found.iter().all(|x| *x == T::zero()), "{what} {name} of nothing");
        }
    }
    let none = Call::<T>::new(subject, 1, [0, 0], 3);
    none.gradient(kernel, mask, 0.0, &mut scratch).unwrap();
}

/// f32 agrees with f64 on the same numbers.
pub fn check_precision(subject: &Trained<'_>, mask: Mask) {
    for n in [33, 200, 700] {
        let call = Call::<f32>::new(subject, 1, [n, n], 5);
        let found = call.gradient(subject.f32, mask, 0.0, &mut Scratch::new()).unwrap();
        let exact = call.narrowed::<f64>();
        let exact = exact.gradient(subject.f64, mask, 0.0, &mut Scratch::new()).unwrap();
        found.assert_close(&format!("{} n={n} {mask:?}", subject.name), &exact, 4096.0);
    }
}

/// Keys and values get the sum over the query heads of a group.
pub fn check_groups(subject: &Trained<'_>, mask: Mask) {
    let kernel = subject.f64;
    let what = format!("{} {mask:?}", subject.name);
    let call = Call::<f64>::new(subject, 3, [50, 50], 9);
    let mut scratch = Scratch::new();
    let all = call.gradient(kernel, mask, 0.0, &mut scratch).unwrap();
    let mut sum: Option<Found<f64>> = None;
    for g in 0..3 {
        let one = Call {
            q: call.q.slice(s![g..=g, .., ..]).to_owned(),
            d_out: call.d_out.slice(s![g..=g, .., ..]).to_owned(),
            ..call.clone()
        };
        let own = one.gradient(kernel, mask, 0.0, &mut scratch).unwrap();
        let part = all.q.slice(s![g, .., ..]).to_owned();
        assert_close(&what, &part, &own.q.slice(s![0, .., ..]).to_owned(), 1e4);
        sum = Some(match sum {
            None => own,
            Some(mut sum) => {
                sum.k += &own.k;
                sum.v += &own.v;
                let gates = sum.log_decay.iter_mut().zip(&own.log_decay);
                gates.for_each(|(sum, own)| *sum += own);
                sum.parameters.add_scaled(1.0, &own.parameters).unwrap();
                sum
            }
        });
    }
    let sum = Found { q: all.q.clone(), ..sum.unwrap() };
    all.assert_close(&format!("{what}, a group"), &sum, 1e5);
}

/// Views may lie in any way.
pub fn check_views(subject: &Trained<'_>, mask: Mask) {
    let kernel = subject.f64;
    let what = format!("{} {mask:?}", subject.name);
    let call = Call::<f64>::new(subject, 3, [50, 50], 9);
    let mut scratch = Scratch::new();
    let all = call.gradient(kernel, mask, 0.0, &mut scratch).unwrap();
    let turned = Call {
        q: call
            .q
            .clone()
            .permuted_axes([2, 1, 0])
            .as_standard_layout()
            .permuted_axes([2, 1, 0])
            .to_owned(),
        k: call.k.t().as_standard_layout().into_owned().reversed_axes(),
        v: call.v.t().as_standard_layout().into_owned().reversed_axes(),
        log_decay: call
            .log_decay
            .as_ref()
            .map(|x| x.t().as_standard_layout().into_owned().reversed_axes()),
        d_out: call.d_out.clone(),
    };
    let (group, n, d) = turned.q.dim();
    let dv = turned.v.ncols();
    let mut d_q = Array3::zeros((d, 2 * n, group));
    let [mut d_k, mut d_v] = [d, dv].map(|columns| Array2::zeros((columns, 2 * n)));
    let mut d_gates = Array2::zeros((subject.gates, n));
    let mut parameters = kernel.parameters().zeros_like();
    let mut d_out = Array3::zeros((group, n, 2 * dv));
    d_out.slice_mut(s![.., .., ..;2]).assign(&turned.d_out);
    let head = HeadGradient::group(
        turned.q.view(),
        [turned.k.view(), turned.v.view()],
        d_out.slice(s![.., .., ..;2]),
        d_q.slice_mut(s![.., ..;2, ..]).permuted_axes([2, 1, 0]),
        [d_k.slice_mut(s![.., ..;2]).reversed_axes(), d_v.slice_mut(s![.., ..;2]).reversed_axes()],
    );
    let head = match &turned.log_decay {
        Some(x) => head.with_log_decay(x.view(), d_gates.view_mut().reversed_axes()),
        None => head,
    };
    let mut heads = [head.with_parameters(&mut parameters)];
    kernel.backward_heads(&mut heads, mask, &mut scratch).unwrap();
    let found = Found {
        q: d_q.slice(s![.., ..;2, ..]).permuted_axes([2, 1, 0]).to_owned(),
        k: d_k.slice(s![.., ..;2]).reversed_axes().to_owned(),
        v: d_v.slice(s![.., ..;2]).reversed_axes().to_owned(),
        log_decay: turned.log_decay.as_ref().map(|_| d_gates.reversed_axes()),
        parameters,
    };
    found.assert_close(&format!("{what}, turned"), &all, 64.0);
}

/// Keys and values get nothing from queries before them.
pub fn check_causality(subject: &Trained<'_>) {
    let kernel = subject.f64;
    for (n, first) in [(2, 1), (65, 64), (130, 70), (130, 5)] {
        let call = Call::<f64>::new(subject, 1, [n, n], 11);
        let mut other = call.clone();
        other.d_out.slice_mut(s![.., ..first, ..]).mapv_inplace(|x| 3.0 - 2.0 * x);
        let [a, b] = [&call, &other]
            .map(|call| call.gradient(kernel, Mask::Causal, 0.0, &mut Scratch::new()).unwrap());
        for (name, a, b) in [("k", &a.k, &b.k), ("v", &a.v, &b.v)] {
            let size = a.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
            for j in first..n {
                for (x, y) in a.row(j).iter().zip(b.row(j)) {
                    let what = &subject.name;
                    assert!((x - y).abs() <= 1e-11 * size, "{what}: d_{name}[{j}] of {n}");
                }
            }
        }
    }
}

/// Bad input gives the documented error.
pub fn check_bad_input<T: Scalar>(subject: &Trained<'_>, kernel: &dyn Attention<T>, mask: Mask) {
    let call = Call::<T>::new(subject, 2, [70, 70], 13);
    let mut scratch = Scratch::new();
    let mut run = |call: &Call<T>| call.gradient(kernel, mask, 0.0, &mut scratch).err();
    for bad in [T::nan(), T::infinity()] {
        for row in [0, 66] {
            for which in ["q", "k", "v", "d_out"] {
                let mut changed = call.clone();
                match which {
                    "q" => changed.q[[1, row, 0]] = bad,
                    "k" => changed.k[[row, 0]] = bad,
                    "v" => changed.v[[row, 0]] = bad,
                    _ => changed.d_out[[1, row, 0]] = bad,
                }
                let error = run(&changed).expect("a number is not finite");
                let expected = Error::NotFinite { which, row, column: 0 };
                assert_eq!(error, expected, "{} {mask:?}: {which}", subject.name);
            }
        }
    }
    let [d, dv] = [subject.head_dim, 3];
    let wrong = [
        Call { q: Array3::zeros((2, 70, d + 1)), ..call.clone() },
        Call { k: Array2::zeros((70, d + 1)), ..call.clone() },
        Call { v: Array2::zeros((69, dv)), ..call.clone() },
        Call { v: Array2::zeros((70, dv + 1)), ..call.clone() },
        Call { d_out: Array3::zeros((1, 70, dv)), ..call.clone() },
        Call { d_out: Array3::zeros((2, 69, dv)), ..call.clone() },
    ];
    for (i, wrong) in wrong.iter().enumerate() {
        let error = run(wrong).expect("a shape is wrong");
        assert!(matches!(error, Error::Shape { .. }), "{} {i}: {error}", subject.name);
    }
    let gates = match &call.log_decay {
        Some(_) => None,
        None => Some(Array2::zeros((70, 1))),
    };
    let error = run(&Call { log_decay: gates, ..call.clone() }).expect("log decays");
    assert!(matches!(error, Error::Unsupported { .. }), "{}: {error}", subject.name);
    // finite, but perhaps beyond the range of the type
    for which in 0..4 {
        let mut changed = call.clone();
        let huge = T::max_value() * T::from_f64(0.01);
        match which {
            0 => changed.q.index_axis_mut(Axis(0), 1).row_mut(66).fill(huge),
            1 => changed.k.row_mut(66).fill(huge),
            2 => changed.v.row_mut(66).fill(huge),
            _ => changed.d_out.index_axis_mut(Axis(0), 1).row_mut(66).fill(huge),
        }
        match changed.gradient(kernel, mask, 0.0, &mut scratch) {
            Ok(found) => {
                for (name, found) in found.arrays().iter().take(3) {
                    let finite = found.iter().all(|x| x.is_finite());
                    assert!(finite, "{}: gradient by {name}, argument {which}", subject.name);
                }
            }
            Err(error) => {
                let expected = matches!(error, Error::Overflow { .. } | Error::Normalizer { .. });
                assert!(expected, "{}: {error}", subject.name);
            }
        }
    }
}
