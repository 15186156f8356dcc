//! Loops over tokens in fewer bits, by the type of their numbers.

use crate::kernel::compiled::Compiled;
use crate::kernel::loops::packed::{Code, PackedScores, PackedSums, UnpackKeys, UnpackValues};

/// Numbers in fewer bits, of which loops are compiled.
pub(crate) trait CompiledCode: Code {
    /// Adds scores.
    fn add_scores<T: Compiled>(work: PackedScores<'_, T, Self>);

    /// Adds sums of weighted values.
    fn add_sums<T: Compiled>(work: PackedSums<'_, T, Self>);

    /// Makes numbers of the keys of a tile.
    fn unpack_keys<T: Compiled>(work: UnpackKeys<'_, T, Self>);

    /// Makes numbers of values of a tile.
    fn unpack_values<T: Compiled>(work: UnpackValues<'_, T, Self>);
}

impl CompiledCode for i8 {
    fn add_scores<T: Compiled>(work: PackedScores<'_, T, Self>) {
        T::run_scores_of_bytes(work);
    }

    fn add_sums<T: Compiled>(work: PackedSums<'_, T, Self>) {
        T::run_sums_of_bytes(work);
    }

    fn unpack_keys<T: Compiled>(work: UnpackKeys<'_, T, Self>) {
        T::run_unpack_keys_of_bytes(work);
    }

    fn unpack_values<T: Compiled>(work: UnpackValues<'_, T, Self>) {
        T::run_unpack_values_of_bytes(work);
    }
}

/// Of bfloat16.
impl CompiledCode for u16 {
    fn add_scores<T: Compiled>(work: PackedScores<'_, T, Self>) {
        T::run_scores_of_bf16(work);
    }

    fn add_sums<T: Compiled>(work: PackedSums<'_, T, Self>) {
        T::run_sums_of_bf16(work);
    }

    fn unpack_keys<T: Compiled>(work: UnpackKeys<'_, T, Self>) {
        T::run_unpack_keys_of_bf16(work);
    }

    fn unpack_values<T: Compiled>(work: UnpackValues<'_, T, Self>) {
        T::run_unpack_values_of_bf16(work);
    }
}
