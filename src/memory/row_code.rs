//! What a format makes of a block of a row, and back.

use crate::kernel::packed::CompiledCode;
use crate::scalar::Scalar;
use crate::state_format::{from_bf16, is_finite, to_bf16, to_bytes};

/// What a format does with a row.
pub(crate) trait RowCode: CompiledCode + num_traits::Zero {
    /// Writes the numbers of a block; returns their scale.
    fn encode<T: Scalar>(block: &[T], code: impl FnMut(usize, Self)) -> u16;

    /// The number of a code.
    fn decode<T: Scalar>(self, scale: u16) -> T;

    /// Writes a block to be kept elsewhere.
    fn save(scale: u16, codes: impl Iterator<Item = Self>, out: &mut Vec<u8>);

    /// Reads a block; its scale, unless a number is not finite.
    fn restore(bytes: &[u8], code: impl FnMut(usize, Self)) -> Option<u16>;
}

impl RowCode for i8 {
    fn encode<T: Scalar>(block: &[T], code: impl FnMut(usize, Self)) -> u16 {
        to_bytes(block, code)
    }

    #[inline]
    fn decode<T: Scalar>(self, scale: u16) -> T {
        // exact in both types: 7 bits times 8
        T::from_f64(f64::from(self)) * from_bf16(scale)
    }

    fn save(scale: u16, codes: impl Iterator<Item = Self>, out: &mut Vec<u8>) {
        out.extend(scale.to_le_bytes());
        out.extend(codes.map(i8::cast_unsigned));
    }

    fn restore(bytes: &[u8], mut code: impl FnMut(usize, Self)) -> Option<u16> {
        let (scale, codes) = bytes.split_first_chunk()?;
        codes.iter().enumerate().for_each(|(i, x)| code(i, x.cast_signed()));
        Some(u16::from_le_bytes(*scale)).filter(|&scale| is_finite(scale))
    }
}

/// Of bfloat16.
impl RowCode for u16 {
    fn encode<T: Scalar>(block: &[T], mut code: impl FnMut(usize, Self)) -> u16 {
        block.iter().enumerate().for_each(|(i, &x)| code(i, to_bf16(x)));
        0
    }

    #[inline]
    fn decode<T: Scalar>(self, _: u16) -> T {
        from_bf16(self)
    }

    fn save(_: u16, codes: impl Iterator<Item = Self>, out: &mut Vec<u8>) {
        codes.for_each(|code| out.extend(code.to_le_bytes()));
    }

    fn restore(bytes: &[u8], mut code: impl FnMut(usize, Self)) -> Option<u16> {
        let mut finite = true;
        for (i, bytes) in bytes.as_chunks().0.iter().enumerate() {
            let x = u16::from_le_bytes(*bytes);
            finite &= is_finite(x);
            code(i, x);
        }
        finite.then_some(0)
    }
}
