//! States in fewer bits.

use crate::common::checker::{check_attention, feed, units};
use crate::common::formats::{FORMATS, packed_hybrids, packed_softmax};
use crate::common::{assert_close, heads, normal, tokens, wide};
use dijiang::attention::naive::{self, formats::rounded};
use dijiang::{
    Attention, Error, ExactMemory, Far, Head, HybridAttention, Mask, Memory, MergedMemory,
    MultiHead, Scalar, SoftmaxAttention, StateFormat, StreamOptions,
};
use ndarray::{Array2, Array3, Array4, Axis, concatenate, s};

#[test]
fn softmax_over_rounded_keys_and_values_keeps_every_promise() {
    for d in [8, 1, 3, 33, 64] {
        for subject in packed_softmax(d) {
            check_attention(&subject);
        }
    }
}

/// Numbers of every size, of which blocks have few and many, are rounded to the letter.
fn check_rounding<T: Scalar>(columns: usize, format: StateFormat) {
    for exponent in [-44, -38, -20, -3, 0, 3, 20, 38] {
        let size = 10_f64.powi(exponent);
        let x = normal::<f64>(70, columns, 0.8, 3).mapv(|x| T::from_f64((x * size) as f32 as f64));
        let mut memory =
            ExactMemory::<T>::new(columns, columns, 1.0).unwrap().with_state_format(format);
        memory.absorb(x.view(), x.view()).unwrap();
        let expected = rounded(&wide(&x), format);
        assert_eq!(memory.keys().mapv(T::as_f64), expected, "{format:?} {columns} {size:e}");
        assert_eq!(memory.values().mapv(T::as_f64), expected);
        assert_eq!(memory.state_floats(), 70 * 2 * columns);
        assert_eq!(memory.state_bytes(), 70 * 2 * format.row_bytes::<T>(columns));
        // once rounded, always rounded
        let keys = memory.keys().into_owned();
        memory.absorb(keys.view(), keys.view()).unwrap();
        assert_eq!(memory.keys().slice(s![70.., ..]), keys);
        let again = memory.clone().with_state_format(StateFormat::F32).with_state_format(format);
        assert_eq!(memory, again);
    }
}

#[test]
fn rows_are_rounded_as_their_formula_says() {
    for columns in [1, 31, 32, 33, 64, 80] {
        for format in FORMATS {
            check_rounding::<f32>(columns, format);
            check_rounding::<f64>(columns, format);
        }
    }
    let huge = Array2::from_shape_fn((1, 2), |(_, c)| [1e300, -1.0][c]);
    for format in FORMATS {
        let mut memory = ExactMemory::<f64>::new(2, 2, 1.0).unwrap().with_state_format(format);
        memory.absorb(huge.view(), huge.view()).unwrap();
        assert_eq!(*memory.keys(), rounded(&huge, format));
        assert!(memory.keys().iter().all(|x| x.abs() < 3.5e38));
    }
}

/// The query heads of a group, which a step answers at once, are what each is by itself: with sinks
/// and slopes of their own, over a long cache.
fn check_group<T: Scalar>(format: StateFormat, n: usize) {
    let (d, dv, group) = (33, 20, 5);
    let kernel = SoftmaxAttention::<T>::new(d)
        .unwrap()
        .with_soft_cap(20.0)
        .unwrap()
        .with_sink_logits(vec![0.5, -1.0, 2.0, 0.0, 1.0])
        .unwrap()
        .with_alibi_slopes(vec![0.0, 0.5, 0.01, 0.001, 0.1])
        .unwrap()
        .with_state_format(format);
    let [_, k, v] = tokens::<T>(n, d, dv, 0.7, 3);
    let q = Array3::from_shape_fn((group, n, d), |(g, t, c)| {
        T::from_f64(((g * 31 + t * 7 + c) as f64).sin())
    });
    let mut stream = kernel.stream_with(StreamOptions::new(dv).group(group)).unwrap();
    let mut out = Array3::from_elem((group, n, dv), T::nan());
    for rows in [0..n - 20, n - 20..n - 5].into_iter().chain((n - 5..n).map(|t| t..t + 1)) {
        let part = s![rows.clone(), ..];
        let (k, v) = (k.slice(part), v.slice(part));
        let (q, out) = (q.slice(s![.., rows.clone(), ..]), out.slice_mut(s![.., rows, ..]));
        stream.extend_heads(&mut [Head::group(q, k, v, out)]).unwrap();
    }
    let [wide_k, wide_v] = [&k, &v].map(|x| rounded(&wide(x), format));
    for g in 0..group {
        let of_one = |list: [f64; 5]| list[g];
        let q = wide(&q.index_axis(Axis(0), g).to_owned());
        let scores = naive::scores(&q, &wide_k, 1.0 / (d as f64).sqrt())
            .mapv(|score| naive::options::soft_capped(score, Some(20.0)));
        let slope = of_one([0.0, 0.5, 0.01, 0.001, 0.1]);
        let logs = naive::options::alibi(scores, slope, Mask::Causal);
        let sink = of_one([0.5, -1.0, 2.0, 0.0, 1.0]);
        let exact = naive::options::with_sink(&logs, &wide_v, Some(sink), Mask::Causal);
        let found = out.index_axis(Axis(0), g).to_owned();
        assert_close(&format!("{format:?} head {g}"), &found, &exact, units::<T>(60.0));
    }
}

#[test]
fn heads_of_a_group_are_answered_at_once_and_alike() {
    for format in FORMATS {
        check_group::<f32>(format, 700);
        check_group::<f64>(format, 700);
    }
}

#[test]
fn states_of_another_format_are_refused() {
    let kernel = |format| SoftmaxAttention::<f32>::new(4).unwrap().with_state_format(format);
    let x = normal::<f32>(9, 4, 1.0, 1);
    let input = [x.clone(), x.clone(), x];
    let formats = [StateFormat::F32, StateFormat::Bf16, StateFormat::Q8];
    for own in formats {
        let mut stream = kernel(own).stream(4).unwrap();
        feed(&mut *stream, &input, &[9]);
        let saved = stream.save().unwrap();
        for other in formats {
            let mut stream = kernel(other).stream(4).unwrap();
            let result = stream.restore(&saved);
            assert_eq!(result.is_ok(), own == other, "{own:?} in {other:?}");
            if own != other {
                assert!(matches!(result, Err(Error::State { .. })), "{result:?}");
            }
        }
        // a scale, or a bfloat16, that is no number
        if own != StateFormat::F32 {
            let count = 9 * 2 * own.row_bytes::<f32>(4);
            let mut bytes = saved.bytes(count).unwrap().to_vec();
            assert!(saved.bytes(count + 1).is_err());
            (bytes[0], bytes[1]) = (0xC0, 0x7F);
            let error = stream.restore(&saved.clone().with_bytes(bytes)).unwrap_err();
            assert!(matches!(error, Error::NotFinite { which: "state", .. }), "{error}");
            assert_eq!(stream.save().unwrap(), saved);
        }
    }
}

#[cfg(feature = "serde")]
#[test]
fn kernels_states_and_memories_keep_their_format_in_text() {
    let x = normal::<f32>(9, 5, 1.0, 1);
    for format in FORMATS {
        let kernel = SoftmaxAttention::<f32>::new(5).unwrap().with_state_format(format);
        let text = serde_json::to_string(&kernel).unwrap();
        assert_eq!(serde_json::from_str::<SoftmaxAttention<f32>>(&text).unwrap(), kernel);
        let mut stream = kernel.stream(5).unwrap();
        feed(&mut *stream, &[x.clone(), x.clone(), x.clone()], &[9]);
        let saved = stream.save().unwrap();
        let text = serde_json::to_string(&saved).unwrap();
        let read: dijiang::StreamState<f32> = serde_json::from_str(&text).unwrap();
        assert_eq!(read, saved);
        let mut memory = ExactMemory::<f32>::new(5, 5, 1.0).unwrap().with_state_format(format);
        memory.absorb(x.view(), x.view()).unwrap();
        let text = serde_json::to_string(&memory).unwrap();
        assert_eq!(serde_json::from_str::<ExactMemory<f32>>(&text).unwrap(), memory);
    }
}

#[test]
fn layers_count_bytes() {
    let kernel = SoftmaxAttention::<f32>::new(64).unwrap().with_state_format(StateFormat::Q8);
    let layer = MultiHead::new(kernel, 4, 2).unwrap();
    assert_eq!(layer.state_bytes(64, 1000).unwrap(), 2 * 1000 * 136);
    let mut stream = layer.stream(1, 64).unwrap();
    let (q, kv) = (Array4::<f32>::ones((1, 4, 7, 64)), Array4::ones((1, 2, 7, 64)));
    let mut out = Array4::zeros((1, 4, 7, 64));
    stream.extend(q.view(), kv.view(), kv.view(), None, out.view_mut()).unwrap();
    assert_eq!((stream.state_bytes(), stream.state_floats()), (2 * 7 * 136, 2 * 7 * 128));
}

/// What rounding costs, on heads of a real model: relative output errors against `f64`.
#[test]
fn real_heads_lose_little() {
    for head in heads() {
        let [q, k, v] = &head.test;
        let d = q.ncols();
        let exact = naive::softmax(q, k, v, 1.0 / (d as f64).sqrt(), head.mask);
        let norm = |x: &Array2<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let errors = [StateFormat::F32, StateFormat::Bf16, StateFormat::Q8].map(|format| {
            let kernel = SoftmaxAttention::<f32>::new(d).unwrap().with_state_format(format);
            let [q, k, v] = [q, k, v].map(|x| x.mapv(|x| x as f32));
            let out = kernel.forward(q.view(), k.view(), v.view(), head.mask).unwrap();
            norm(&(wide(&out) - &exact)) / norm(&exact)
        });
        println!(
            "{}: f32 {:.1e}, bf16 {:.1e}, q8 {:.1e}",
            head.name, errors[0], errors[1], errors[2]
        );
        assert!(errors[0] < 1e-5 && errors[1] < 0.03 && errors[2] < 0.06, "{errors:?}");
    }
}

#[test]
fn hybrids_of_rounded_tokens_keep_every_promise() {
    for (d, m) in [(8, 20), (1, 1), (3, 7)] {
        for subject in packed_hybrids(d, m) {
            // a column of few bits has many equal distances, which rounding tells apart
            if d > 1 || !subject.merges() {
                check_attention(&subject);
            }
        }
    }
}

/// Each step of a merging memory is what its formula makes of the entries that are kept: the pair
/// of least cost, and its means, rounded.
fn check_merges(format: StateFormat, d: usize, dv: usize) {
    let (entries, n) = (9, 120);
    let mut memory =
        MergedMemory::<f64>::new(d, dv, entries, 1.0).unwrap().with_state_format(format).unwrap();
    let [_, k, v] = tokens::<f64>(n, d, dv, 1.0, 8);
    for t in 0..n {
        let list = |kept: Array2<f64>, x: &Array2<f64>| {
            let new = rounded(&x.slice(s![t..=t, ..]).to_owned(), format);
            concatenate![Axis(0), kept, new]
        };
        let mut keys = list(memory.keys(), &k);
        let mut values = list(memory.values(), &v);
        let mut counts = memory.counts().to_vec();
        counts.push(1.0);
        if keys.nrows() > entries {
            let cost = |i: usize, j: usize| {
                let difference = &keys.row(i) - &keys.row(j);
                counts[i] * counts[j] / (counts[i] + counts[j]) * difference.dot(&difference)
            };
            let pairs = (0..entries).flat_map(|i| (i + 1..=entries).map(move |j| (i, j)));
            let (i, j) = pairs.min_by(|a, b| cost(a.0, a.1).total_cmp(&cost(b.0, b.1))).unwrap();
            let share = counts[j] / (counts[i] + counts[j]);
            for x in [&mut keys, &mut values] {
                let mean = &x.row(i) + &((&x.row(j) - &x.row(i)) * share);
                let mean = rounded(&mean.insert_axis(Axis(0)), format);
                x.row_mut(i).assign(&mean.row(0));
                let last = x.row(entries).to_owned();
                x.row_mut(j).assign(&last);
            }
            counts[i] += counts[j];
            counts[j] = counts[entries];
            counts.pop();
            keys = keys.slice(s![..entries, ..]).to_owned();
            values = values.slice(s![..entries, ..]).to_owned();
        }
        let row = s![t..=t, ..];
        memory.absorb(k.slice(row), v.slice(row)).unwrap();
        assert_eq!(memory.counts(), counts, "{format:?} {t}");
        assert_eq!((memory.keys(), memory.values()), (keys, values), "{format:?} {t}");
    }
    let rows = format.row_bytes::<f64>(d) + format.row_bytes::<f64>(dv);
    assert_eq!(memory.state_bytes(), entries * (rows + 16));
}

#[test]
fn merged_entries_are_rounded_anew_and_measured_as_they_are_kept() {
    for format in FORMATS {
        check_merges(format, 5, 3);
        check_merges(format, 40, 33);
    }
}

/// What rounding costs a hybrid, on heads of a real model, against the same hybrid in `f64`.
#[test]
fn hybrids_of_real_heads_lose_little() {
    for head in heads().into_iter().filter(|head| head.mask == Mask::Causal) {
        let d = head.test[0].ncols();
        let norm = |x: &Array2<f64>| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let [q, k, v] = &head.test;
        let softmax = naive::softmax(q, k, v, 1.0 / (d as f64).sqrt(), head.mask);
        let errors = [StateFormat::F32, StateFormat::Bf16, StateFormat::Q8].map(|format| {
            let kernel = HybridAttention::<f64>::builder(d)
                .far(Far::merged(64))
                .state_format(format)
                .build()
                .unwrap();
            let out = kernel.forward(q.view(), k.view(), v.view(), head.mask).unwrap();
            norm(&(out - &softmax)) / norm(&softmax)
        });
        println!("{}: f64 {:.4}, bf16 {:.4}, q8 {:.4}", head.name, errors[0], errors[1], errors[2]);
        let slack = 0.02 + 0.3 * errors[0];
        assert!(errors[1] < errors[0] + slack && errors[2] < errors[0] + slack, "{errors:?}");
    }
}

#[test]
fn a_hybrids_bytes_are_those_of_its_entries() {
    let kernel = |format| {
        HybridAttention::<f32>::builder(64)
            .far(Far::merged(256))
            .state_format(format)
            .build()
            .unwrap()
    };
    let bytes = |format| kernel(format).state_bytes(64, 5000).unwrap();
    // of the window the attention received, of entries weight and count, the units of distances
    let wide = 64 * 4 + 256 * 8 + 65 * 4;
    assert_eq!(bytes(StateFormat::Q8), 324 * 136 + wide);
    assert_eq!(bytes(StateFormat::Bf16), 324 * 256 + wide);
    assert_eq!(bytes(StateFormat::F32), 324 * 512 + wide);
    let floats = [StateFormat::F32, StateFormat::Q8]
        .map(|format| kernel(format).state_floats(64, 5000).unwrap());
    assert_eq!(floats[0], floats[1]);
    let layer = MultiHead::new(kernel(StateFormat::Q8), 6, 2).unwrap();
    assert_eq!(layer.state_bytes(64, 5000).unwrap(), 2 * bytes(StateFormat::Q8));
}
