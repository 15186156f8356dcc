//! What was saved, changed: an error, or something that works.

use crate::common::{Subject, tokens};
use crate::fuzzed::input::{number, with_kernel};
use arbitrary::{Result, Unstructured};
use dijiang::{
    Attention, CosFormer, DctFeatures, FeatureMap, Fingerprint, LinearAttention, Linformer,
    Performer, ReluFeatures, Retention, Rotary, RotaryAttention, Scalar, SoftmaxAttention,
    StatePlan, Stream, StreamState, TaylorFeatures, Wpff,
};
use ndarray::{Array1, Array2, s};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::sync::Arc;

/// A state of one kernel, or one of the maps and kernels that can be saved, as changed JSON or as
/// bytes that are none.
pub fn states(bytes: &[u8]) {
    let _ = run(&mut Unstructured::new(bytes));
}

fn run(u: &mut Unstructured<'_>) -> Result<()> {
    match u.int_in_range(0..=3)? {
        0 | 1 => with_kernel(u, stream::<f32>, stream::<f64>),
        2 => match u.arbitrary()? {
            true => saved::<f32>(u),
            false => saved::<f64>(u),
        },
        _ => {
            // text that nobody saved
            let text = u.bytes(u.len())?;
            let _ = serde_json::from_slice::<StreamState<f32>>(text);
            let _ = serde_json::from_slice::<StatePlan>(text);
            let _ = serde_json::from_slice::<Fingerprint>(text);
            Ok(())
        }
    }
}

/// Changes one thing in a tree, somewhere.
fn change(u: &mut Unstructured<'_>, value: &mut Value) -> Result<()> {
    match value {
        Value::Array(all) if !all.is_empty() && u.ratio(9, 10)? => {
            let at = u.choose_index(all.len())?;
            match u.int_in_range(0..=9)? {
                0 => all.truncate(at),
                1 => _ = all.remove(at),
                2 => all.push(all[at].clone()),
                _ => return change(u, &mut all[at]),
            }
            Ok(())
        }
        Value::Object(all) if !all.is_empty() && u.ratio(9, 10)? => {
            let at = u.choose_index(all.len())?;
            let name = all.keys().nth(at).expect("it is there").clone();
            match u.int_in_range(0..=9)? {
                0 => {
                    all.remove(&name);
                    Ok(())
                }
                _ => change(u, &mut all[&name]),
            }
        }
        _ => {
            let finite = |x: f64| if x.is_finite() { json!(x) } else { Value::Null };
            *value = match u.int_in_range(0..=9)? {
                0 => Value::Null,
                1 => json!([]),
                2 => json!(u64::MAX),
                3 => json!(u64::from(u.arbitrary::<u32>()?)),
                4 => json!(-1),
                5 => json!(u.arbitrary::<u8>()?),
                6 => json!("f32"),
                7 => json!({}),
                _ => finite(number::<f64>(u)?),
            };
            Ok(())
        }
    }
}

fn changed(u: &mut Unstructured<'_>, whole: &impl Serialize) -> Result<Value> {
    let mut value = serde_json::to_value(whole).expect("it is saved");
    for _ in 0..u.int_in_range(1..=3)? {
        change(u, &mut value)?;
    }
    Ok(value)
}

fn stream<T: Scalar + Serialize + DeserializeOwned>(
    subject: &Subject,
    kernel: &Arc<dyn Attention<T>>,
    u: &mut Unstructured<'_>,
) -> Result<()> {
    if !subject.has_streams() {
        return Ok(());
    }
    let n = u.int_in_range(0..=40)?;
    let [q, k, v] = tokens::<T>(n + 4, subject.head_dim, 2, 0.7, 3);
    let extend = |stream: &mut dyn Stream<T>, from: usize, to: usize| {
        let rows = s![from..to, ..];
        let mut out = Array2::from_elem((to - from, 2), T::nan());
        let found = stream.extend(q.slice(rows), k.slice(rows), v.slice(rows), out.view_mut());
        found.map(|()| out)
    };
    let mut old = kernel.stream(2).expect("a stream");
    extend(&mut *old, 0, n).expect("mild tokens");
    let Ok(state) = old.save() else { return Ok(()) };
    let state = changed(u, &state)?;
    let Ok(state) = serde_json::from_value::<StreamState<T>>(state) else { return Ok(()) };
    let mut stream = kernel.stream(2).expect("a stream");
    extend(&mut *stream, 0, 3).expect("mild tokens");
    let before = stream.save().expect("it can be saved");
    match stream.restore(&state) {
        Ok(()) => {
            for (from, to) in [(n, n + 1), (n + 1, n + 4)] {
                if let Ok(out) = extend(&mut *stream, from, to) {
                    assert!(out.iter().all(|x| x.is_finite()), "{}: not finite", subject.name);
                }
            }
            let again = stream.save().expect("it can be saved");
            stream.restore(&again).expect("its own state");
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert_eq!(stream.save().expect("as before"), before, "{}: {error}", subject.name);
        }
    }
    Ok(())
}

/// Reads a changed map back; what is read works, or says why not.
fn of_map<M, T>(u: &mut Unstructured<'_>, of: &M) -> Result<()>
where
    T: Scalar,
    M: FeatureMap<T> + Serialize + DeserializeOwned,
{
    let value = changed(u, of)?;
    let Ok(map) = serde_json::from_value::<M>(value) else { return Ok(()) };
    let (d, m) = (map.head_dim(), map.num_features());
    if d.saturating_mul(m) > 1 << 16 {
        return Ok(());
    }
    let x = tokens::<T>(3, d, 1, 0.7, 5)[0].clone();
    let mut values = Array2::from_elem((3, m), T::nan());
    let mut scales = Array1::from_elem(3, T::nan());
    for keys in [false, true] {
        let found = match keys {
            true => map.map_keys(x.view(), values.view_mut(), scales.view_mut()),
            false => map.map_queries(x.view(), values.view_mut(), scales.view_mut()),
        };
        let finite = values.iter().chain(&scales).all(|x| x.is_finite());
        assert!(found.is_err() || finite, "{map:?}");
    }
    Ok(())
}

fn of_kernel<A, T>(u: &mut Unstructured<'_>, d: usize, of: &A) -> Result<()>
where
    T: Scalar,
    A: Attention<T> + Serialize + DeserializeOwned,
{
    let value = changed(u, of)?;
    let Ok(kernel) = serde_json::from_value::<A>(value) else { return Ok(()) };
    let [q, k, v] = tokens::<T>(5, d, 2, 0.7, 3);
    for mask in [dijiang::Mask::Causal, dijiang::Mask::Full] {
        if let Ok(out) = kernel.forward(q.view(), k.view(), v.view(), mask) {
            assert!(out.iter().all(|x| x.is_finite()), "{kernel:?}");
        }
    }
    Ok(())
}

fn saved<T>(u: &mut Unstructured<'_>) -> Result<()>
where
    T: Scalar + Serialize + DeserializeOwned,
{
    let (d, m) = (6, 10);
    let seed = 5;
    let rotary = || Rotary::new(d).unwrap();
    match u.int_in_range(0..=14)? {
        0 => of_map(u, &Performer::<T>::new(d, m, seed).unwrap()),
        1 => of_map(u, &DctFeatures::<T>::new(d, m, seed).unwrap()),
        2 => of_map(u, &crate::common::official::<T>(d, seed)),
        3 => of_map(u, &Wpff::<T>::new(d, m, seed).unwrap()),
        4 => {
            let hedgehog = u.arbitrary()?;
            of_map(u, &crate::common::learned::<T>(d, m, hedgehog, seed))
        }
        5 => of_map::<_, T>(u, &ReluFeatures::<T>::new(d).unwrap()),
        6 => of_map::<_, T>(u, &TaylorFeatures::new(d).unwrap()),
        7 => of_kernel::<_, T>(u, d, &SoftmaxAttention::new(d).unwrap()),
        8 => of_kernel::<_, T>(u, d, &CosFormer::<T>::new(d, 50).unwrap()),
        9 => of_kernel::<_, T>(u, d, &Linformer::<T>::new(d, 3, 20, seed).unwrap()),
        10 => of_kernel::<_, T>(u, d, &Retention::<T>::new(d, 0.9).unwrap()),
        11 => {
            let softmax = SoftmaxAttention::<T>::new(d).unwrap();
            of_kernel::<_, T>(u, d, &RotaryAttention::new(rotary(), softmax))
        }
        12 => {
            let map = Performer::<T>::new(d, m, seed).unwrap();
            of_kernel::<_, T>(u, d, &LinearAttention::new(map).with_decay(0.9))
        }
        13 => {
            let value = changed(u, &rotary())?;
            if let Ok(rotary) = serde_json::from_value::<Rotary>(value)
                && rotary.head_dim() < 1 << 12
            {
                let mut x = Array2::<T>::ones((3, rotary.head_dim()));
                let _ = rotary.rotate_in_place(x.view_mut(), 7);
                assert!(x.iter().all(|x| x.is_finite()), "{rotary:?}");
            }
            Ok(())
        }
        _ => {
            let value = changed(u, &StreamState::<T>::new("own", 3, vec![1, 2], vec![T::one()]))?;
            let _ = serde_json::from_value::<StreamState<T>>(value);
            Ok(())
        }
    }
}
