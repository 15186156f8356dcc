//! Everything that is made of options: an error, or something that works.

use crate::common::tokens;
use crate::fuzzed::input::{like, number};
use arbitrary::{Result, Unstructured};
use dijiang::{
    Attention, Calibration, CalibrationOptions, CosFormer, DctFeatures, Error, Far, FeatureMap,
    HybridAttention, LinearAttention, Linformer, Mask, MergeCost, Merged, Metric, OfficialDijiang,
    Performer, Points, Radii, ReluFeatures, Retention, Rotary, RotaryAttention, Scalar,
    SoftmaxAttention, StateFormat, Taylor, TaylorFeatures, TaylorFit, Ward, Wpff, alibi_slopes,
    projection,
};
use ndarray::{Array1, Array2};
use std::sync::Arc;

/// A kernel of any options, used once.
pub fn options(bytes: &[u8]) {
    let u = &mut Unstructured::new(bytes);
    let _ = match u.arbitrary() {
        Ok(true) => run::<f32>(u),
        _ => run::<f64>(u),
    };
}

/// A size: small, none, or beyond all memory.
fn size(u: &mut Unstructured<'_>) -> Result<usize> {
    Ok(match u.int_in_range(0..=15)? {
        0 => 0,
        1 => *u.choose(&[usize::MAX, usize::MAX / 2, 1 << 62])?,
        _ => u.int_in_range(1..=24)?,
    })
}

fn real(u: &mut Unstructured<'_>) -> Result<f64> {
    Ok(match u.arbitrary()? {
        true => f64::from(u.arbitrary::<u8>()?) / 256.0,
        false => number::<f64>(u)?,
    })
}

fn numbers<T: Scalar>(u: &mut Unstructured<'_>, rows: usize, columns: usize) -> Result<Array2<T>> {
    let mut all = like::<T>((rows, columns), u64::from(u.arbitrary::<u8>()?));
    if rows * columns > 0 && u.arbitrary()? {
        all[[u.choose_index(rows)?, u.choose_index(columns)?]] = number(u)?;
    }
    Ok(all)
}

fn run<T: Scalar>(u: &mut Unstructured<'_>) -> Result<()> {
    let made = kernel::<T>(u)?;
    let kernel = match made {
        Ok(kernel) => kernel,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return Ok(());
        }
    };
    let (d, dv) = (u.int_in_range(1..=24)?, 2);
    let [q, k, v] = tokens::<T>(20, d, dv, 0.7, 3);
    for mask in [Mask::Causal, Mask::Full] {
        if let Ok(out) = kernel.forward(q.view(), k.view(), v.view(), mask) {
            assert!(out.iter().all(|x| x.is_finite()), "{kernel:?}");
        }
        let _ = kernel.backward(q.view(), k.view(), v.view(), v.view(), mask);
    }
    let tokens = u.int_in_range(0..=1 << 40)?;
    let _ = kernel.state_floats(dv, tokens);
    let _ = kernel.state_bytes(dv, tokens);
    if let Ok(mut stream) = kernel.stream(dv) {
        let mut out = Array2::from_elem((20, dv), T::nan());
        if stream.extend(q.view(), k.view(), v.view(), out.view_mut()).is_ok() {
            assert!(out.iter().all(|x| x.is_finite()), "{kernel:?}");
        }
    }
    Ok(())
}

type Kernel<T> = Arc<dyn Attention<T>>;

fn kernel<T: Scalar>(u: &mut Unstructured<'_>) -> Result<std::result::Result<Kernel<T>, Error>> {
    Ok(match u.int_in_range(0..=7)? {
        0 => softmax(u)?.map(|kernel| Arc::new(kernel) as _),
        1 => {
            let (d, rank, max_len, seed) = (size(u)?, size(u)?, size(u)?, u.arbitrary()?);
            let made = match u.int_in_range(0..=2)? {
                0 => Linformer::<T>::new(d, rank, max_len, seed),
                1 => Linformer::shared(d, rank, max_len, seed),
                _ => {
                    let (rank, len) = (u.int_in_range(0..=8)?, u.int_in_range(0..=30)?);
                    Linformer::from_projections(d, numbers(u, rank, len)?, numbers(u, rank, len)?)
                }
            };
            let scale = real(u)?;
            made.map(|kernel| Arc::new(kernel.with_scale(scale)) as _)
        }
        2 => {
            let (d, len, epsilon) = (size(u)?, size(u)?, real(u)?);
            let made = CosFormer::<T>::new(d, len).and_then(|kernel| kernel.with_epsilon(epsilon));
            made.map(|kernel| Arc::new(kernel) as _)
        }
        3 => {
            let (d, decay, scale) = (size(u)?, real(u)?, real(u)?);
            let (xpos, rotary) = (u.arbitrary::<bool>()?, rotary(u)?);
            let turns = u.arbitrary::<bool>()?;
            let made = Retention::<T>::new(d, decay).and_then(|kernel| match rotary {
                Ok(rotary) if turns => kernel.with_rotary(rotary),
                _ => Ok(kernel),
            });
            made.map(|kernel| if xpos { kernel.with_xpos() } else { kernel })
                .map(|kernel| Arc::new(kernel.with_scale(scale)) as _)
        }
        4 => match (rotary(u)?, softmax::<T>(u)?) {
            (Ok(rotary), Ok(softmax)) => Ok(Arc::new(RotaryAttention::new(rotary, softmax)) as _),
            (Err(error), _) | (_, Err(error)) => Err(error),
        },
        5 | 6 => {
            let map = match map::<T>(u)? {
                Ok(map) => map,
                Err(error) => return Ok(Err(error)),
            };
            let m = map.num_features();
            let mut kernel = LinearAttention::new(map);
            for _ in 0..u.int_in_range(0..=3)? {
                kernel = match u.int_in_range(0..=4)? {
                    0 => kernel.with_scale(real(u)?),
                    1 => kernel.unnormalized(),
                    2 => kernel.with_decay(real(u)?),
                    3 => {
                        let m = if u.ratio(7, 8)? { m } else { u.int_in_range(0..=5)? };
                        kernel.with_channel_decay(Array1::from_elem(m.min(99), real(u)?))
                    }
                    _ => kernel.gated(),
                };
            }
            Ok(Arc::new(kernel) as _)
        }
        _ => hybrid(u)?.map(|kernel| Arc::new(kernel) as _),
    })
}

fn softmax<T: Scalar>(
    u: &mut Unstructured<'_>,
) -> Result<std::result::Result<SoftmaxAttention<T>, Error>> {
    let mut made = SoftmaxAttention::<T>::new(size(u)?);
    for _ in 0..u.int_in_range(0..=3)? {
        let Ok(kernel) = made else { break };
        let x = real(u)?;
        made = match u.int_in_range(0..=7)? {
            0 => Ok(kernel.with_scale(x)),
            1 => kernel.with_soft_cap(x),
            2 => kernel.with_sink_logit(x),
            3 => kernel.with_sink_logits(vec![x; u.int_in_range(0..=2)?]),
            4 => kernel.with_alibi_slope(x),
            5 => kernel.with_alibi_slopes(vec![x; u.int_in_range(0..=2)?]),
            6 => kernel.with_window(size(u)?),
            _ => Ok(kernel.with_state_format(*u.choose(&[StateFormat::Bf16, StateFormat::Q8])?)),
        };
    }
    Ok(made)
}

fn rotary(u: &mut Unstructured<'_>) -> Result<std::result::Result<Rotary, Error>> {
    let d = size(u)?;
    let made = match u.int_in_range(0..=2)? {
        0 => Rotary::new(d),
        1 => Rotary::partial(d, size(u)?),
        _ => Rotary::gpt_neox(d, real(u)?),
    };
    let (which, x, y, z) = (u.int_in_range(0..=4)?, real(u)?, real(u)?, real(u)?);
    let (len, count) = (size(u)?, u.int_in_range(0..=12)?);
    Ok(made.and_then(|rotary| match which {
        0 => rotary.with_base(x),
        1 => rotary.with_frequencies(vec![x; count]),
        2 => rotary.with_linear_scaling(x),
        3 => rotary.with_llama3_scaling(x, y, z, len),
        _ => Ok(rotary),
    }))
}

fn map<T: Scalar>(
    u: &mut Unstructured<'_>,
) -> Result<std::result::Result<Arc<dyn FeatureMap<T>>, Error>> {
    let (d, m, seed) = (size(u)?, size(u)?, u.arbitrary()?);
    let (small, x) = (u.int_in_range(0..=6)?, real(u)?);
    let weights = Array1::from_elem(u.int_in_range(0..=24)?, T::from_f64(x));
    let weighted = u.arbitrary::<bool>()?;
    let radii = *u.choose(&[Radii::Normal, Radii::Antithetic, Radii::Sobol, Radii::Chi])?;
    Ok(match u.int_in_range(0..=9)? {
        0 => Performer::<T>::new(d, m, seed)
            .and_then(|map| if weighted { map.with_weights(weights) } else { Ok(map) })
            .map(|map| Arc::new(map) as _),
        1 => Performer::<T>::iid(d, m, seed).map(|map| Arc::new(map) as _),
        2 => Performer::<T>::hyperbolic(d, m, seed).map(|map| Arc::new(map) as _),
        3 => {
            Performer::from_projection(numbers::<T>(u, small, small)?).map(|map| Arc::new(map) as _)
        }
        4 => DctFeatures::<T>::new(d, m, seed)
            .and_then(|map| map.with_radii(radii))
            .and_then(|map| if weighted { map.with_weights(weights) } else { Ok(map) })
            .map(|map| Arc::new(map) as _),
        5 => OfficialDijiang::new(numbers::<T>(u, 1, small)?.row(0).to_owned())
            .map(|map| Arc::new(map) as _),
        6 => {
            let points = *u.choose(&[Points::Sobol, Points::Orthogonal])?;
            Wpff::<T>::with_sampling(d, m, seed, points, radii)
                .and_then(|map| if weighted { map.with_weights(weights) } else { Ok(map) })
                .map(|map| Arc::new(map) as _)
        }
        7 => TaylorFeatures::new(d).map(|map| Arc::new(map) as _),
        8 => ReluFeatures::<T>::new(d)
            .and_then(|map| map.with_epsilon(x))
            .map(|map| Arc::new(map) as _),
        _ => {
            let (n, d) = (u.int_in_range(0..=20)?, u.int_in_range(0..=6)?);
            let [q, k] = [numbers::<T>(u, n, d)?, numbers::<T>(u, n, d)?];
            let options = CalibrationOptions::new()
                .with_window(size(u)?)
                .with_sinks(size(u)?)
                .with_scale(real(u)?)
                .with_shrinkage(real(u)?)
                .with_stride(size(u)?);
            Calibration::from_samples(q.view(), k.view(), options).and_then(|calibration| {
                let map = DctFeatures::<T>::new(d, 8, seed)?.calibrated(&calibration)?;
                let _ = calibration.taylor_coefficients(m, TaylorFit::default());
                Ok(Arc::new(map) as _)
            })
        }
    })
}

fn hybrid<T: Scalar>(
    u: &mut Unstructured<'_>,
) -> Result<std::result::Result<HybridAttention<T>, Error>> {
    let d = size(u)?;
    let far: Far<T> = match u.int_in_range(0..=4)? {
        0 => Far::none(),
        1 => match map::<T>(u)? {
            Ok(map) if u.arbitrary()? => {
                let m = map.num_features().min(99);
                Far::decaying_features(map, Array1::from_elem(m, real(u)?))
            }
            Ok(map) => Far::features(map),
            Err(_) => Far::none(),
        },
        2 => Ward::new(size(u)?).block(size(u)?).into(),
        3 => Taylor::new(size(u)?).into(),
        _ => {
            let cost = match u.arbitrary()? {
                true => MergeCost::Product,
                false => MergeCost::Ward { value_weight: real(u)? },
            };
            Merged::new(size(u)?)
                .decay(real(u)?)
                .min_age(size(u)?)
                .cost(cost)
                .metric(if u.arbitrary()? { Metric::Identity } else { Metric::default() })
                .block(size(u)?)
                .into()
        }
    };
    let mut builder = HybridAttention::<T>::builder(d)
        .window(size(u)?)
        .sinks(size(u)?)
        .heavy(if u.ratio(1, 4)? { size(u)? } else { 0 })
        .far(far);
    if u.ratio(1, 3)? {
        builder = builder.scale(real(u)?);
    }
    if u.ratio(1, 3)? {
        builder = builder.soft_cap(real(u)?);
    }
    if u.ratio(1, 3)? {
        builder = builder.sink_logit(real(u)?);
    }
    let _ = (alibi_slopes(size(u)?.min(1 << 12)), projection::chi_quantile(size(u)?, real(u)?));
    Ok(builder.build())
}
