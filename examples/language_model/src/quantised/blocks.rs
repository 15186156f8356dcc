//! The ways in which GGUF files store quantised weights, read as blocks `w = d·q + m`.

use crate::quantised::product::Widths;
use candle_core::quantized::GgmlDType;
use half::f16;

/// How weights of a type are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Of its numbers and blocks.
    pub widths: Widths,
    /// Whether its blocks have an `m`.
    pub has_mins: bool,
}

impl Form {
    /// Of a type; none where its weights are not quantised, or not those of a file.
    #[must_use]
    pub fn of(kind: GgmlDType) -> Option<Self> {
        let (bits, block, has_mins) = match kind {
            GgmlDType::Q4_0 | GgmlDType::Q4_1 | GgmlDType::Q4K => (4, 32, true),
            GgmlDType::Q5_1 | GgmlDType::Q5K => (8, 32, true),
            GgmlDType::Q5_0 | GgmlDType::Q8_0 => (8, 32, false),
            GgmlDType::Q2K | GgmlDType::Q3K => (4, 16, true),
            GgmlDType::Q6K => (8, 16, false),
            _ => return None,
        };
        Some(Self { widths: Widths { bits, block }, has_mins })
    }
}

/// Reads bytes of one row.
pub struct Blocks;

/// `d`, `m` and the numbers of a block.
type Found<'a> = dyn FnMut(f32, f32, &[i8]) + 'a;

impl Blocks {
    /// Shows every block of a row, in order.
    pub fn each(kind: GgmlDType, bytes: &[u8], found: &mut Found<'_>) {
        let read: fn(&[u8], &mut Found<'_>) = match kind {
            GgmlDType::Q4_0 => q4_0,
            GgmlDType::Q4_1 => q4_1,
            GgmlDType::Q5_0 => q5_0,
            GgmlDType::Q5_1 => q5_1,
            GgmlDType::Q8_0 => q8_0,
            GgmlDType::Q2K => q2_k,
            GgmlDType::Q3K => q3_k,
            GgmlDType::Q4K => q4_k,
            GgmlDType::Q5K => q5_k,
            GgmlDType::Q6K => q6_k,
            _ => return,
        };
        bytes.chunks_exact(kind.type_size()).for_each(|bytes| read(bytes, found));
    }
}

/// The 16-bit number at a place.
fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Low halves of 16 bytes, then high halves.
fn nibbles(bytes: &[u8]) -> [i8; 32] {
    std::array::from_fn(|i| (if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 }) as i8)
}

/// The same with a fifth bit each.
fn five_bits(high: &[u8], low: &[u8]) -> [i8; 32] {
    let low = nibbles(low);
    std::array::from_fn(|i| low[i] | ((high[i / 8] >> (i % 8) & 1) << 4) as i8)
}

fn q4_0(bytes: &[u8], found: &mut Found<'_>) {
    let d = half(bytes, 0);
    found(d, -8.0 * d, &nibbles(&bytes[2..]));
}

fn q4_1(bytes: &[u8], found: &mut Found<'_>) {
    found(half(bytes, 0), half(bytes, 2), &nibbles(&bytes[4..]));
}

fn q5_0(bytes: &[u8], found: &mut Found<'_>) {
    let numbers = five_bits(&bytes[2..6], &bytes[6..]).map(|q| q - 16);
    found(half(bytes, 0), 0.0, &numbers);
}

fn q5_1(bytes: &[u8], found: &mut Found<'_>) {
    found(half(bytes, 0), half(bytes, 2), &five_bits(&bytes[4..8], &bytes[8..]));
}

fn q8_0(bytes: &[u8], found: &mut Found<'_>) {
    let numbers: [i8; 32] = std::array::from_fn(|i| bytes[2 + i] as i8);
    found(half(bytes, 0), 0.0, &numbers);
}

/// 16 blocks of 16: scales and minima of 4 bits, numbers of 2.
fn q2_k(bytes: &[u8], found: &mut Found<'_>) {
    let (scales, numbers) = bytes.split_at(16);
    let (d, least) = (half(bytes, 80), half(bytes, 82));
    for (block, scale) in scales.iter().enumerate() {
        let numbers = two_bits(numbers, block).map(|q| q as i8);
        found(d * f32::from(scale & 15), -(least * f32::from(scale >> 4)), &numbers);
    }
}

/// 16 blocks of 16: numbers of 3 bits less 4, the third apart, and scales of 6 bits less 32.
fn q3_k(bytes: &[u8], found: &mut Found<'_>) {
    let (third, numbers, scales) = (&bytes[..32], &bytes[32..96], &bytes[96..108]);
    let all = half(bytes, 108);
    for block in 0..16 {
        let low = if block < 8 { scales[block] & 15 } else { scales[block - 8] >> 4 };
        let high = scales[8 + block % 4] >> (2 * (block / 4)) & 3;
        let d = all * (f32::from(low | high << 4) - 32.0);
        let low = two_bits(numbers, block);
        let third = |i: usize| third[16 * (block % 2) + i] >> (block / 2) & 1;
        let numbers: [i8; 16] = std::array::from_fn(|i| (low[i] | third(i) << 2) as i8);
        found(d, -4.0 * d, &numbers);
    }
}

/// The numbers of 2 bits of a block of 16. 32 bytes hold 128 numbers: 32 in their lowest bits, and
/// so on.
fn two_bits(bytes: &[u8], block: usize) -> [u8; 16] {
    let (half, shift, first) = (block / 8, block % 8 / 2 * 2, block % 2 * 16);
    std::array::from_fn(|i| bytes[32 * half + first + i] >> shift & 3)
}

/// 8 blocks of 32: scales and minima of 6 bits, numbers of 4.
fn q4_k(bytes: &[u8], found: &mut Found<'_>) {
    for block in 0..8 {
        let (d, m) = six_bits(bytes, block);
        found(d, m, &k_nibbles(&bytes[16..], block));
    }
}

/// The same with a fifth bit each.
fn q5_k(bytes: &[u8], found: &mut Found<'_>) {
    for block in 0..8 {
        let (d, m) = six_bits(bytes, block);
        let low = k_nibbles(&bytes[48..], block);
        let numbers: [i8; 32] =
            std::array::from_fn(|i| low[i] | ((bytes[16 + i] >> block & 1) << 4) as i8);
        found(d, m, &numbers);
    }
}

/// `d` and `m` of a block, from two numbers of 16 bits and 12 bytes of 6-bit factors.
fn six_bits(bytes: &[u8], block: usize) -> (f32, f32) {
    let q = &bytes[4..16];
    let (scale, least) = match block {
        0..4 => (q[block] & 63, q[block + 4] & 63),
        _ => {
            (q[block + 4] & 15 | (q[block - 4] >> 6) << 4, q[block + 4] >> 4 | (q[block] >> 6) << 4)
        }
    };
    (half(bytes, 0) * f32::from(scale), -(half(bytes, 2) * f32::from(least)))
}

/// 32 bytes hold two blocks: one in their low halves, the next in their high halves.
fn k_nibbles(bytes: &[u8], block: usize) -> [i8; 32] {
    let bytes = &bytes[block / 2 * 32..][..32];
    std::array::from_fn(|i| (bytes[i] >> (4 * (block % 2)) & 15) as i8)
}

/// 16 blocks of 16: scales of 8 bits, numbers of 6 bits less 32.
fn q6_k(bytes: &[u8], found: &mut Found<'_>) {
    let (low, high, scales) = (&bytes[..128], &bytes[128..192], &bytes[192..208]);
    let d = half(bytes, 208);
    for (block, &scale) in scales.iter().enumerate() {
        // 128 numbers: four quarters of 32, each of two blocks
        let (half, quarter, first) = (block / 8, block % 8 / 2, block % 2 * 16);
        let numbers: [i8; 16] = std::array::from_fn(|i| {
            let at = first + i;
            let low = low[64 * half + quarter % 2 * 32 + at] >> (quarter / 2 * 4) & 15;
            let high = high[32 * half + at] >> (2 * quarter) & 3;
            (low | high << 4) as i8 - 32
        });
        found(d * f32::from(scale as i8), 0.0, &numbers);
    }
}
