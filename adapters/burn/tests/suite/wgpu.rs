//! `linear_attention` on the backend wgpu, against Flex. Where no device is found nothing is
//! tested, and a line says so.

use crate::common::{assert_close, numbers, wave};
use burn::tensor::{DType, Device, DeviceType, Int, Tensor, TensorData};
use dijiang_burn::{LinearOptions, linear_attention};
use std::io::Write;

const B: usize = 2;
const N: usize = 23;
const M: usize = 5;

/// A device with gradients, if there is one.
#[allow(clippy::explicit_write)] // the harness hides what macros print
fn device() -> Option<Device> {
    let device = Device::enumerate(DeviceType::Wgpu).into_vec().into_iter().next();
    if device.is_none() {
        writeln!(std::io::stderr(), "skipped: wgpu finds no device").unwrap();
    }
    device.map(Device::autodiff)
}

/// Numbers in `f32`, on a device.
fn on<const D: usize>(x: &Tensor<D>, device: &Device) -> Tensor<D> {
    let data = TensorData::new(numbers(x.clone()), x.dims()).convert::<f32>();
    Tensor::from_data(data, (device, DType::F32)).require_grad()
}

/// The output, and the gradients of a weighted sum of it: by features, values, log scales and log
/// decays.
fn pass(
    [q, k, v]: [&Tensor<4>; 3],
    [log_scale, log_decay]: [Option<&Tensor<3>>; 2],
    chunk: usize,
    device: &Device,
) -> (Tensor<4>, Vec<Tensor<4>>) {
    let [q, k, v] = [q, k, v].map(|x| on(x, device));
    let [log_scale, log_decay] = [log_scale, log_decay].map(|x| x.map(|x| on(x, device)));
    let options =
        LinearOptions { log_scale: log_scale.clone(), log_decay: log_decay.clone(), chunk };
    let out = linear_attention(q.clone(), k.clone(), v.clone(), &options);
    let weights = on(&wave(out.dims(), 6, &Device::flex()), device).detach();
    let gradients = (out.clone() * weights).sum().backward();
    let mut all = [q, k, v].map(|x| x.grad(&gradients).unwrap()).to_vec();
    let rows = [log_scale, log_decay].into_iter().flatten();
    all.extend(rows.map(|x| x.grad(&gradients).unwrap().unsqueeze_dim(3)));
    (out, all)
}

#[track_caller]
fn assert_same(qkv: [&Tensor<4>; 3], rows: [Option<&Tensor<3>>; 2], chunk: usize, device: &Device) {
    let (found, by) = pass(qkv, rows, chunk, device);
    let (expected, expected_by) = pass(qkv, rows, chunk, &Device::flex().autodiff());
    assert_close(found, expected, 1e-5);
    assert_eq!(by.len(), expected_by.len());
    for (found, expected) in by.into_iter().zip(expected_by) {
        assert_close(found, expected, 1e-4);
    }
}

#[test]
fn all_options_equal_flex() {
    let Some(device) = device() else { return };
    let flex = Device::flex();
    let [q, k] = [wave([B, 4, N, M], 1, &flex), wave([B, 2, N, M], 2, &flex)].map(|x| x + 1.5);
    let v = wave([B, 2, N, 3], 3, &flex);
    let (log_scale, log_decay) = (wave([B, 2, N], 4, &flex) * 3.0, wave([B, 2, N], 5, &flex) - 1.2);
    for rows in [
        [None, None],
        [Some(&log_scale), None],
        [None, Some(&log_decay)],
        [Some(&log_scale), Some(&log_decay)],
    ] {
        for chunk in [4, 64] {
            assert_same([&q, &k, &v], rows, chunk, &device);
        }
    }
}

#[test]
fn log_scales_beyond_the_range_of_exponentials() {
    let Some(device) = device() else { return };
    let flex = Device::flex();
    let [q, k] = [1, 2].map(|seed| wave([B, 2, N, M], seed, &flex) + 1.5);
    let v = wave([B, 2, N, 3], 3, &flex);
    // some hundreds, which grow from key to key and jump
    let growing = Tensor::<1, Int>::arange(0..N as i64, &flex).float().cast(DType::F64) * 20.0;
    let log_scale = wave([B, 2, N], 4, &flex) * growing.unsqueeze::<3>();
    let largest = log_scale.clone().abs().max().into_scalar::<f64>();
    assert!(largest > 110.0, "{largest}"); // the exponential would be 0 or infinite
    assert_same([&q, &k, &v], [Some(&log_scale), None], 8, &device);
}
