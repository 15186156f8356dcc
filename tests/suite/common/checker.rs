//! ONE checker: every `Attention` and every `FeatureMap` makes the same promises.

use super::{Subject, assert_close, normal, strided, tokens, wide};
use dijiang::attention::naive::{formats::rounded, visible};
use dijiang::{
    Attention, Error, FeatureMap, Mask, Scalar, StateFormat, Stream, StreamOptions, StreamState,
};
use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};

/// Units of epsilon that a result in `T` may differ from the naive f64 formula, relative to the
/// largest number. In f32 the exponents themselves, up to `exponent` in absolute value, carry their
/// rounding into the result.
pub fn units<T: Scalar>(exponent: f64) -> f64 {
    if T::NAME == "f64" { 4096.0 } else { 64.0 + 16.0 * exponent }
}

/// Everything an attention kernel promises, in both number types.
pub fn check_attention(subject: &Subject) {
    for n in [1, 2, 5, 63, 64, 65, 130] {
        check_against_oracle::<f64>(subject, &*subject.f64, n);
        check_against_oracle::<f32>(subject, &*subject.f32, n);
    }
    check_layouts::<f32>(subject, &*subject.f32);
    check_layouts::<f64>(subject, &*subject.f64);
    if !subject.has_streams() {
        check_full_only::<f32>(subject, &*subject.f32);
        check_full_only::<f64>(subject, &*subject.f64);
        return;
    }
    check_splits::<f64>(subject, &*subject.f64);
    check_splits::<f32>(subject, &*subject.f32);
    check_no_future::<f64>(subject, &*subject.f64);
    check_no_future::<f32>(subject, &*subject.f32);
    check_ones_and_hull::<f64>(subject, &*subject.f64);
    check_ones_and_hull::<f32>(subject, &*subject.f32);
    check_stream_life::<f32>(subject, &*subject.f32);
    check_stream_life::<f64>(subject, &*subject.f64);
    check_bad_input::<f32>(subject, &*subject.f32);
    check_bad_input::<f64>(subject, &*subject.f64);
}

fn run<T: Scalar>(kernel: &dyn Attention<T>, [q, k, v]: &[Array2<T>; 3], mask: Mask) -> Array2<T> {
    let mut out = Array2::from_elem((q.nrows(), v.ncols()), T::nan());
    kernel.forward_into(q.view(), k.view(), v.view(), mask, out.view_mut()).unwrap();
    out
}

/// Forward, causal and full and cross, into a NaN-filled buffer, is the formula. f32 is compared
/// with f64 arithmetic on the same f32 input.
fn check_against_oracle<T: Scalar>(subject: &Subject, kernel: &dyn Attention<T>, n: usize) {
    let (d, dv) = (subject.head_dim, 3);
    let input = tokens::<T>(n, d, dv, 0.7, n as u64);
    let [q, k, v] = [wide(&input[0]), wide(&input[1]), wide(&input[2])];
    for &mask in subject.masks() {
        let out = run(kernel, &input, mask);
        let exact = subject.oracle(&q, &k, &v, mask);
        assert_close(
            &format!("{} n={n} {mask:?}", subject.name),
            &out,
            &exact,
            subject.units::<T>(),
        );
    }
    if !subject.masks().contains(&Mask::Full) {
        let error = kernel
            .forward(input[0].view(), input[1].view(), input[2].view(), Mask::Full)
            .unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{}: {error}", subject.name);
        return;
    }
    let few = normal::<T>(4, d, 0.7, 99);
    let out = kernel.forward(few.view(), input[1].view(), input[2].view(), Mask::Full).unwrap();
    let exact = subject.oracle(&wide(&few), &k, &v, Mask::Full);
    assert_close(&format!("{} cross n={n}", subject.name), &out, &exact, subject.units::<T>());
    let nothing = Array2::<T>::zeros((0, d));
    let out = kernel.forward(nothing.view(), input[1].view(), input[2].view(), Mask::Full).unwrap();
    assert_eq!(out.dim(), (0, dv));
}

/// Feeds a stream in pieces of the given sizes, into NaN-filled buffers.
pub fn feed<T: Scalar>(
    stream: &mut dyn Stream<T>,
    [q, k, v]: &[Array2<T>; 3],
    sizes: &[usize],
) -> Array2<T> {
    let mut out = Array2::from_elem((q.nrows(), v.ncols()), T::nan());
    let mut start = 0;
    for size in sizes {
        let end = q.nrows().min(start + size);
        let rows = s![start..end, ..];
        stream.extend(q.slice(rows), k.slice(rows), v.slice(rows), out.slice_mut(rows)).unwrap();
        start = end;
    }
    assert_eq!(start, q.nrows());
    out
}

/// The state of a stream: saved, or where it holds a memory of one's own, which cannot be, what it
/// answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Snapshot<T> {
    Saved(StreamState<T>),
    Answers(usize, Array2<T>),
}

impl<T: Scalar> Snapshot<T> {
    pub fn of(stream: &dyn Stream<T>, input: &[Array2<T>; 3]) -> Self {
        match stream.save() {
            Ok(state) => Self::Saved(state),
            Err(error) => {
                assert!(matches!(error, Error::Unsupported { .. }), "{error}");
                let few = input.each_ref().map(|x| x.slice(s![..3, ..]).to_owned());
                Self::Answers(stream.len(), feed(&mut *stream.clone_box(), &few, &[3]))
            }
        }
    }
}

/// forward = chunks = token by token, for any split.
fn check_splits<T: Scalar>(subject: &Subject, kernel: &dyn Attention<T>) {
    let n = 150;
    let input = tokens::<T>(n, subject.head_dim, 2, 0.7, 1);
    let whole = wide(&run(kernel, &input, Mask::Causal));
    for size in [1, 2, 3, 7, 31, 64, 65, 149, 150] {
        let mut stream = kernel.stream(2).unwrap();
        assert!(stream.is_empty());
        let out = feed(&mut *stream, &input, &vec![size; n.div_ceil(size)]);
        assert_eq!(stream.len(), n);
        assert_close(&format!("{} pieces of {size}", subject.name), &out, &whole, units::<T>(60.0));
    }
    let mut stream = kernel.stream(2).unwrap();
    let out = feed(&mut *stream, &input, &[0, 1, 0, 64, 5, 1, 1, 60, 0, 18]);
    assert_close(&format!("{} uneven pieces", subject.name), &out, &whole, units::<T>(60.0));
}

/// What comes later changes nothing before: not another last token, not one with a key, a query or
/// a value far outside the others.
fn check_no_future<T: Scalar>(subject: &Subject, kernel: &dyn Attention<T>) {
    // After keys of large norm a small one has the largest log scale by far, and the other way
    // round.
    for (n, norm) in [2, 33, 64, 65, 100]
        .into_iter()
        .flat_map(|n| [(n, 0.7), (n, 30.0 / subject.head_dim as f64)])
    {
        let input = tokens::<T>(n, subject.head_dim, 2, norm, 2);
        let Ok(before) =
            kernel.forward(input[0].view(), input[1].view(), input[2].view(), Mask::Causal)
        else {
            assert!(norm > 1.0 && subject.has_features(), "{}", subject.name);
            continue; // out of the range of f32 as it is
        };
        for size in [-1.0, 8.0, 30.0, -30.0, 0.01] {
            let mut changed = input.clone();
            for x in &mut changed {
                x.row_mut(n - 1).mapv_inplace(|x| x * T::from_f64(size));
            }
            let mut out = Array2::from_elem(before.dim(), T::nan());
            let [q, k, v] = &changed;
            // the changed token itself may leave the range of f32; those before it must not notice
            match kernel.forward_into(q.view(), k.view(), v.view(), Mask::Causal, out.view_mut()) {
                Ok(()) => {}
                Err(Error::Normalizer { row } | Error::Overflow { row, .. }) => {
                    assert_eq!(row, n - 1, "{}", subject.name)
                }
                Err(error) => panic!("{}: {error}", subject.name),
            }
            let (out, before) = (out.slice(s![..n - 1, ..]), before.slice(s![..n - 1, ..]));
            if out.iter().any(|x| x.is_nan()) {
                // the call failed before the rows were written
                continue;
            }
            let what = format!("{} n={n}, last token times {size}", subject.name);
            assert_close(&what, &out.to_owned(), &wide(&before.to_owned()), 64.0);
        }
    }
}

/// All-ones values give ones; outputs of positive kernels stay within the smallest and largest
/// value of each column.
fn check_ones_and_hull<T: Scalar>(subject: &Subject, kernel: &dyn Attention<T>) {
    if !subject.normalized() {
        return;
    }
    for size in [0.1, 1.0, 2.0] {
        let [q, k, v] = tokens::<T>(70, subject.head_dim, 3, size, 4);
        let values = concatenate![
            Axis(1),
            v,
            Array2::ones((70, 1)),
            Array2::from_elem((70, 1), T::from_f64(-7.0))
        ];
        // numbers that the format of the state has: ones are, where it has all
        let values = rounded(&wide(&values), subject.format()).mapv(T::from_f64);
        for &mask in subject.masks() {
            let out = run(kernel, &[q.clone(), k.clone(), values.clone()], mask);
            let slack = T::epsilon() * T::from_f64(units::<T>(60.0));
            for (t, row) in out.outer_iter().enumerate() {
                assert!(
                    (row[3] - T::one()).abs() <= slack || subject.format() == StateFormat::Q8,
                    "{}: ones give {}",
                    subject.name,
                    row[3]
                );
                let seven = -values[[0, 4]];
                assert!(
                    (row[4] + seven).abs() <= slack * seven,
                    "{}: {} of {seven}",
                    subject.name,
                    row[4]
                );
                let seen = values.slice(s![..visible(mask, t, [70, 70]), ..]);
                for (x, column) in row.iter().zip(seen.columns()).filter(|_| subject.positive) {
                    let (low, high) = column
                        .fold((T::infinity(), T::neg_infinity()), |(l, h), &v| {
                            (l.min(v), h.max(v))
                        });
                    assert!(
                        *x >= low - slack * T::from_f64(4.0)
                            && *x <= high + slack * T::from_f64(4.0),
                        "{}: {x} outside [{low}, {high}]",
                        subject.name
                    );
                }
            }
        }
    }
}

/// Strided, transposed, reversed and broadcast views give what contiguous ones give.
fn check_layouts<T: Scalar>(subject: &Subject, kernel: &dyn Attention<T>) {
    let n = 70;
    let input = tokens::<T>(n, subject.head_dim, 3, 0.7, 5);
    let [q, k, v] = &input;
    let compare = |what: &str,
                   q: ArrayView2<'_, T>,
                   k: ArrayView2<'_, T>,
                   v: ArrayView2<'_, T>,
                   input: &[Array2<T>; 3]| {
        for &mask in subject.masks() {
            let exact = wide(&run(kernel, input, mask));
            let mut buffer = Array2::from_elem((2 * n, 9), T::nan());
            kernel.forward_into(q, k, v, mask, buffer.slice_mut(s![..;2, ..;3])).unwrap();
            let out = buffer.slice(s![..;2, ..;3]).to_owned();
            assert_close(&format!("{} {what} {mask:?}", subject.name), &out, &exact, 64.0);
        }
        if !subject.has_streams() {
            return;
        }
        let exact = wide(&run(kernel, input, Mask::Causal));
        let mut stream = kernel.stream(3).unwrap();
        let mut out = Array2::from_elem((n, 3), T::nan());
        for (t, out) in out.axis_chunks_iter_mut(Axis(0), 1).enumerate().take(5) {
            let rows = s![t..=t, ..];
            stream.extend(q.slice(rows), k.slice(rows), v.slice(rows), out).unwrap();
        }
        let rows = s![5.., ..];
        stream.extend(q.slice(rows), k.slice(rows), v.slice(rows), out.slice_mut(rows)).unwrap();
        assert_close(&format!("{} {what} stream", subject.name), &out, &exact, units::<T>(60.0));
    };
    let wide_views = [q, k, v].map(|x| strided(x.view()));
    let [a, b, c] = wide_views.each_ref().map(|x| x.slice(s![..;2, ..;3]));
    compare("strided", a, b, c, &input);
    let columns = [q, k, v].map(|x| x.t().as_standard_layout().into_owned());
    let [a, b, c] = columns.each_ref().map(|x| x.t());
    compare("transposed", a, b, c, &input);
    let reversed =
        input.clone().map(|x| x.slice(s![..;-1, ..;-1]).as_standard_layout().into_owned());
    let [a, b, c] = [q, k, v].map(|x| x.slice(s![..;-1, ..;-1]));
    compare("reversed", a, b, c, &reversed);
    let row = input.clone().map(|x| x.slice(s![..1, ..]).to_owned());
    let repeated = row.clone().map(|x| x.broadcast((n, x.ncols())).unwrap().to_owned());
    let [a, b, c] = row.each_ref().map(|x| x.broadcast((n, x.ncols())).unwrap());
    compare("broadcast", a, b, c, &repeated);
}

/// Clone, reset, save and restore; state sizes that do not depend on the length unless the kernel
/// is exact.
fn check_stream_life<T: Scalar>(subject: &Subject, kernel: &dyn Attention<T>) {
    let input = tokens::<T>(90, subject.head_dim, 2, 0.7, 6);
    let (first, rest): ([Array2<T>; 3], [Array2<T>; 3]) = (
        input.clone().map(|x| x.slice(s![..50, ..]).to_owned()),
        input.clone().map(|x| x.slice(s![50.., ..]).to_owned()),
    );
    let sizes = [1, 30, 9];
    let mut stream = kernel.stream(2).unwrap();
    let state_of = |stream: &dyn Stream<T>| Snapshot::of(stream, &first);
    let empty = (stream.state_floats(), state_of(&*stream));
    feed(&mut *stream, &first, &[50]);
    let mut copy = stream.clone();
    let saved = state_of(&*stream);
    let out = feed(&mut *stream, &rest, &sizes);
    assert_eq!((copy.len(), stream.len()), (50, 90));
    assert_eq!(feed(&mut *copy, &rest, &sizes), out, "{}: a clone", subject.name);
    if let Snapshot::Saved(saved) = &saved {
        assert_eq!(saved.tokens(), 50);
        let mut restored = kernel.stream(2).unwrap();
        feed(&mut *restored, &rest, &[40]); // dirty
        restored.restore(saved).unwrap();
        assert_eq!(restored.len(), 50);
        assert_eq!(feed(&mut *restored, &rest, &sizes), out, "{}: restored", subject.name);
        assert_eq!(state_of(&*restored), state_of(&*stream));
    }

    let mut tried = kernel.stream(2).unwrap();
    feed(&mut *tried, &first, &[50]);
    assert!(
        matches!(tried.rollback(), Err(Error::Unsupported { .. })),
        "{}: no checkpoint yet",
        subject.name
    );
    assert!(tried.checkpoint());
    for _ in 0..2 {
        assert_eq!(feed(&mut *tried, &rest, &sizes), out, "{}: from a checkpoint", subject.name);
        tried.rollback().unwrap();
        assert_eq!(state_of(&*tried), saved, "{}: rolled back", subject.name);
    }
    tried.reset();
    assert!(
        matches!(tried.rollback(), Err(Error::Unsupported { .. })),
        "{}: reset since",
        subject.name
    );

    stream.reset();
    assert_eq!(
        (stream.len(), stream.state_floats(), state_of(&*stream)),
        (0, empty.0, empty.1.clone())
    );
    let again = feed(&mut *stream, &first, &[50]);
    let mut fresh = kernel.stream(2).unwrap();
    assert_eq!(feed(&mut *fresh, &first, &[50]), again, "{}: a reset stream", subject.name);
    let floats = fresh.state_floats();
    feed(&mut *fresh, &rest, &sizes);
    if subject.grows() {
        assert_eq!(fresh.state_floats(), subject.state_floats(2, 90));
    } else {
        assert_eq!((floats, fresh.state_floats()), (empty.0, empty.0), "{}", subject.name);
        assert_eq!(floats, subject.state_floats(2, 90), "{}", subject.name);
    }
    assert_eq!(kernel.state_floats(2, 90).unwrap(), fresh.state_floats());
    assert_eq!(kernel.state_bytes(2, 90).unwrap(), fresh.state_bytes());

    if let (Snapshot::Saved(empty), Snapshot::Saved(saved)) = (&empty.1, &saved) {
        stream.restore(empty).unwrap();
        assert!(stream.is_empty());
        let mut other = kernel.stream(3).unwrap();
        let error = other.restore(saved).unwrap_err();
        assert!(matches!(error, Error::State { which: "shape", .. }), "{}", subject.name);
    }
}

/// A kernel that has no causal form says so, and takes bad input as the others do.
fn check_full_only<T: Scalar>(subject: &Subject, kernel: &dyn Attention<T>) {
    let name = &subject.name;
    let [q, k, v] = tokens::<T>(70, subject.head_dim, 2, 0.7, 7);
    let unsupported =
        |error: Error| assert!(matches!(error, Error::Unsupported { .. }), "{name}: {error}");
    unsupported(kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap_err());
    unsupported(kernel.stream(2).unwrap_err());
    unsupported(kernel.state_floats(2, 70).unwrap_err());
    assert!(kernel.stream_with(StreamOptions::new(2).group(2)).is_err(), "{name}");
    for (which, argument) in ["q", "k", "v"].into_iter().enumerate() {
        let call = |change: &dyn Fn(&mut Array2<T>)| {
            let mut changed = [q.clone(), k.clone(), v.clone()];
            change(&mut changed[which]);
            let [q, k, v] = &changed;
            kernel.forward(q.view(), k.view(), v.view(), Mask::Full)
        };
        for (row, bad) in [(0, T::nan()), (66, T::infinity()), (69, T::neg_infinity())] {
            let error = call(&|x| x[[row, 0]] = bad).unwrap_err();
            assert_eq!(error, Error::NotFinite { which: argument, row, column: 0 }, "{name}");
        }
        if argument != "v" {
            let error = call(&|x| *x = Array2::zeros((70, subject.head_dim + 1))).unwrap_err();
            assert!(
                matches!(error, Error::Shape { which, .. } if which == argument),
                "{name}: {error}"
            );
        }
        // finite, but beyond the range of the type: an error or a finite result
        for size in [1e10, 1e30, 1e37] {
            let size = T::from_f64(if T::NAME == "f64" { 1e270 * size } else { size });
            match call(&|x| x.row_mut(66).mapv_inplace(|x| x * size)) {
                Ok(out) => {
                    assert!(out.iter().all(|x| x.is_finite()), "{name}: {argument} times {size}")
                }
                Err(error) => {
                    assert!(
                        matches!(error, Error::Overflow { .. } | Error::NotFinite { .. }),
                        "{name}: {error}"
                    )
                }
            }
        }
    }
    let nothing = (Array2::zeros((0, subject.head_dim)), Array2::zeros((0, 2)));
    assert!(
        kernel.forward(q.view(), nothing.0.view(), nothing.1.view(), Mask::Full).is_err(),
        "{name}: no keys"
    );
}

/// Bad input gives the documented error, and the stream is bit for bit what it was.
fn check_bad_input<T: Scalar>(subject: &Subject, kernel: &dyn Attention<T>) {
    let (d, name) = (subject.head_dim, &subject.name);
    let input = tokens::<T>(70, d, 2, 0.7, 7);
    let mut stream = kernel.stream(2).unwrap();
    feed(&mut *stream, &input, &[70]);
    let state = Snapshot::of(&*stream, &input);

    let mut bad: Vec<([Array2<T>; 3], &str)> = Vec::new();
    for (which, argument) in ["q", "k", "v"].into_iter().enumerate() {
        for value in [T::nan(), T::infinity(), T::neg_infinity()] {
            for row in [0, 66, 69] {
                let mut changed = input.clone();
                let column = changed[which].ncols() - 1;
                changed[which][[row, column]] = value;
                bad.push((changed, argument));
            }
        }
        let mut wider = input.clone();
        wider[which] = Array2::zeros((70, input[which].ncols() + 1));
        bad.push((wider, argument));
        let mut narrower = input.clone();
        narrower[which] = Array2::zeros((70, input[which].ncols() - 1));
        bad.push((narrower, argument));
        let mut shorter = input.clone();
        shorter[which] = Array2::zeros((69, input[which].ncols()));
        bad.push((shorter, "k"));
        let mut none = input.clone();
        none[which] = Array2::zeros((0, 0));
        bad.push((none, argument));
    }
    for ([q, k, v], argument) in &bad {
        let mut out = Array2::zeros((q.nrows(), 2));
        let error = stream.extend(q.view(), k.view(), v.view(), out.view_mut()).unwrap_err();
        match error {
            Error::NotFinite { which, row, column } => {
                assert_eq!(which, *argument, "{name}");
                let x = [q, k, v][["q", "k", "v"].iter().position(|x| *x == which).unwrap()]
                    [[row, column]];
                assert!(!x.is_finite(), "{name}: {error}");
            }
            Error::Shape { .. } | Error::ZeroSize { .. } => {}
            _ => panic!("{name}: {error}"),
        }
        assert_eq!(Snapshot::of(&*stream, &input), state, "{name}: {error}");
        assert!(!error.to_string().is_empty());
        if v.ncols() != 2 && v.ncols() > 0 && v.nrows() == 70 {
            continue; // a forward pass takes any value dimension
        }
        assert!(kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).is_err(), "{name}");
    }
    let [q, k, v] = &input;
    let mut small = Array2::zeros((69, 2));
    assert!(stream.extend(q.view(), k.view(), v.view(), small.view_mut()).is_err());
    assert_eq!(Snapshot::of(&*stream, &input), state);
    assert!(matches!(kernel.stream(0), Err(Error::ZeroSize { .. })), "{name}");
    let none = Array2::zeros((0, d));
    let values = Array2::zeros((0, 2));
    assert!(
        kernel.forward(q.view(), none.view(), values.view(), Mask::Full).is_err(),
        "{name}: no keys"
    );

    // finite, but beyond the range of the type: an error or a finite result, never NaN; and all or
    // nothing
    for size in [1e10_f64, 1e18, 1e30, 1e37] {
        let huge = T::from_f64(if T::NAME == "f64" { size * size.powi(6) } else { size });
        for which in 0..3 {
            for row in [0, 66, 69] {
                let mut changed = input.clone();
                changed[which].row_mut(row).mapv_inplace(|x| x * huge);
                let [q, k, v] = &changed;
                if changed[which].iter().any(|x| !x.is_finite()) {
                    continue;
                }
                let mut out = Array2::from_elem((70, 2), T::nan());
                let (before, kept) = (Snapshot::of(&*stream, &input), stream.clone());
                match stream.extend(q.view(), k.view(), v.view(), out.view_mut()) {
                    Ok(()) => {
                        assert!(
                            out.iter().all(|x| x.is_finite()),
                            "{name}: input {which} row {row} times {huge}"
                        );
                        stream.clone_from(&kept);
                    }
                    Err(error) => {
                        assert!(
                            matches!(error, Error::Overflow { .. } | Error::Normalizer { .. }),
                            "{name}: {error}"
                        );
                        assert_eq!(Snapshot::of(&*stream, &input), before, "{name}: {error}");
                    }
                }
                // and the same one token at a time
                let one = |x: &Array2<T>| x.slice(s![row..=row, ..]).to_owned();
                let mut out = Array2::from_elem((1, 2), T::nan());
                match stream.extend(one(q).view(), one(k).view(), one(v).view(), out.view_mut()) {
                    Ok(()) => assert!(out.iter().all(|x| x.is_finite())),
                    Err(_) => assert_eq!(Snapshot::of(&*stream, &input), before),
                }
                stream.clone_from(&kept);
            }
        }
    }
}

/// Everything a feature map promises.
pub fn check_feature_map<T: Scalar>(name: &str, map: &dyn FeatureMap<T>) {
    let (d, m) = (map.head_dim(), map.num_features());
    for n in [0, 1, 2, 9] {
        let x = normal::<T>(n, d, 0.8, 11);
        let evaluate = |x: ArrayView2<'_, T>, keys: bool| {
            let mut values = Array2::from_elem((x.nrows(), m), T::nan());
            let mut log_scale = Array1::from_elem(x.nrows(), T::nan());
            if keys {
                map.map_keys(x, values.view_mut(), log_scale.view_mut()).unwrap();
            } else {
                map.map_queries(x, values.view_mut(), log_scale.view_mut()).unwrap();
            }
            (values, log_scale)
        };
        for keys in [false, true] {
            let (values, log_scale) = evaluate(x.view(), keys);
            assert!(
                values.iter().chain(&log_scale).all(|x| x.is_finite()),
                "{name}: dirty buffers"
            );
            // a row depends on nothing but itself
            for i in 0..n {
                let (alone, alone_scale) = evaluate(x.slice(s![i..=i, ..]), keys);
                let size = values.row(i).fold(T::zero(), |m, x| m.max(x.abs()));
                for (a, b) in alone.iter().zip(values.row(i)) {
                    let slack = size * T::epsilon() * T::from_f64(256.0);
                    assert!((*a - *b).abs() <= slack, "{name}: row {i} alone gives {a}, not {b}");
                }
                assert!(
                    (alone_scale[0] - log_scale[i]).abs()
                        <= T::epsilon() * T::from_f64(256.0) * (T::one() + log_scale[i].abs())
                );
            }
            // strided input and output
            let large = strided(x.view());
            let mut strided_values = Array2::from_elem((m, 2 * n), T::nan());
            let mut strided_scale = Array1::from_elem(3 * n, T::nan());
            let (input, output) = (
                large.slice(s![..;2, ..;3]),
                strided_values.slice_mut(s![.., ..;2]).reversed_axes(),
            );
            if keys {
                map.map_keys(input, output, strided_scale.slice_mut(s![..;3])).unwrap();
            } else {
                map.map_queries(input, output, strided_scale.slice_mut(s![..;3])).unwrap();
            }
            for ((i, j), value) in values.indexed_iter() {
                let slack = T::epsilon() * T::from_f64(256.0);
                assert!((strided_values[[j, 2 * i]] - *value).abs() <= slack, "{name}: strided");
                assert!(
                    (strided_scale[3 * i] - log_scale[i]).abs()
                        <= slack * (T::one() + log_scale[i].abs())
                );
            }
        }
    }
    // bad input
    let (x, mut values, mut log_scale) =
        (normal::<T>(3, d, 1.0, 1), Array2::zeros((3, m)), Array1::zeros(3));
    for value in [T::nan(), T::infinity()] {
        let mut bad = x.clone();
        bad[[2, d - 1]] = value;
        let error =
            map.map_queries(bad.view(), values.view_mut(), log_scale.view_mut()).unwrap_err();
        assert_eq!(error, Error::NotFinite { which: "x", row: 2, column: d - 1 }, "{name}");
    }
    let shape = |error| assert!(matches!(error, Err(Error::Shape { .. })), "{name}");
    shape(map.map_queries(
        Array2::zeros((3, d + 1)).view(),
        values.view_mut(),
        log_scale.view_mut(),
    ));
    shape(map.map_queries(x.view(), Array2::zeros((2, m)).view_mut(), log_scale.view_mut()));
    shape(map.map_queries(x.view(), Array2::zeros((3, m + 1)).view_mut(), log_scale.view_mut()));
    shape(map.map_keys(x.view(), values.view_mut(), Array1::zeros(4).view_mut()));
    // large norms: finite values in units of the log scale, or the documented error
    for size in [1e-30, 1.0, 30.0, 1e6, 1e15, 1e25] {
        let large = x.mapv(|x| x * T::from_f64(size));
        match map.map_queries(large.view(), values.view_mut(), log_scale.view_mut()) {
            Ok(()) => {
                assert!(values.iter().chain(&log_scale).all(|x| x.is_finite()), "{name} at {size}")
            }
            Err(error) => {
                assert!(matches!(error, Error::Overflow { .. }), "{name} at {size}: {error}")
            }
        }
    }
}
