//! Where generic code meets compiled loops: a method for each loop, implemented for `f32` and
//! `f64`.
//!
//! The methods are not generic, so the loops are compiled once, in this crate, at every level; the
//! crates that use it only call them.

use crate::kernel::loops::{
    columns, dct, decay, decode, exp, gradient_columns, gradients, packed, pairs, products, reduce,
    scores, vectors,
};
use crate::kernel::simd::Lanes;
use crate::kernel::simd::machine::Machine;

macro_rules! compiled {
    ($($name:ident: $($path:ident)::+ $(-> $out:ty)?;)*) => {
        /// The compiled loops of a number type.
        pub trait Compiled: Lanes {
            $(
                /// Runs the loop at the best level of the machine.
                fn $name(work: $($path)::+<'_, Self>) $(-> $out)?;
            )*
            /// DCT-II, or DCT-III.
            fn run_dct(columns: dct::DctColumns<'_, Self>, third: bool);
        }

        compiled!(@for f32, $($name: $($path)::+ $(-> $out)?;)*);
        compiled!(@for f64, $($name: $($path)::+ $(-> $out)?;)*);
    };
    (@for $t:ty, $($name:ident: $($path:ident)::+ $(-> $out:ty)?;)*) => {
        impl Compiled for $t {
            $(
                fn $name(work: $($path)::+<'_, Self>) $(-> $out)? {
                    Machine::best().run(work)
                }
            )*

            fn run_dct(columns: dct::DctColumns<'_, Self>, third: bool) {
                if third {
                    columns.run::<true>(Machine::best());
                } else {
                    columns.run::<false>(Machine::best());
                }
            }
        }
    };
}
compiled! {
    run_product: products::Product;
    run_row_times_matrix: products::RowTimesMatrix;
    run_exp2: exp::Exp2;
    run_exp2_columns_below_maximum: columns::Exp2ColumnsBelowMaximum;
    run_online_softmax: columns::OnlineSoftmax -> bool;
    run_scale_and_sum_rows: columns::ScaleAndSumRows;
    run_multiply_and_sum_columns: columns::MultiplyAndSumColumns;
    run_mask_and_add_rows: columns::MaskAndAddRows;
    run_scale_rows: columns::ScaleRows -> Self;
    run_scale_rows_in_place: columns::ScaleRowsInPlace;
    run_decay_queries_and_keys: columns::DecayQueriesAndKeys;
    run_transpose: columns::Transpose;
    run_sum_of: reduce::SumOf -> Self;
    run_max_of: reduce::MaxOf -> Self;
    run_max_abs_of: reduce::MaxAbsOf -> Self;
    run_finite_mark_of: reduce::FiniteMarkOf -> Self;
    run_take_token: reduce::TakeToken -> [Self; 2];
    run_exponential_pair: exp::ExponentialPair -> [(Self, Self); 2];
    run_copy_and_measure: reduce::CopyAndMeasure -> Self;
    run_dot: reduce::Dot -> Self;
    run_rows_dot: reduce::RowsDot;
    run_scale_in_place: vectors::ScaleInPlace;
    run_add_outer: vectors::AddOuter;
    run_decay_rows: decay::DecayRows;
    run_scale_into: vectors::ScaleInto -> Self;
    run_exp2_below_maximum: exp::Exp2BelowMaximum -> (Self, Self);
    run_decode_step: decode::DecodeStep -> Self;
    run_decay_step: decode::DecayStep -> Self;
    run_let_wait: decode::LetWait;
    run_read_sums: decode::ReadSums;
    run_column_distances: pairs::ColumnDistances;
    run_row_distances: pairs::RowDistances;
    run_share_affinities: pairs::ShareAffinities;
    run_largest_within: pairs::LargestWithin -> Self;
    run_reach: pairs::Reach;
    run_largest_affinities: pairs::LargestAffinities;
    run_receive: pairs::Receive;
    run_dot_columns: gradient_columns::DotColumns;
    run_affine_columns: gradient_columns::AffineColumns;
    run_causal_affine: gradient_columns::CausalAffine;
    run_add_and_scale_columns: gradient_columns::AddAndScaleColumns;
    run_add_exponential_rows: gradient_columns::AddExponentialRows -> Self;
    run_soft_cap: scores::SoftCap;
    run_add_distances: scores::AddDistances;
    run_add_bounded: scores::AddBounded;
    run_softmax_gradient: gradients::SoftmaxGradient;
    run_soft_cap_gradient: gradients::SoftCapGradient;
    run_add_rows: gradients::AddRows -> Self;
    run_scores_of_bytes: packed::ScoresOfBytes;
    run_scores_of_bf16: packed::ScoresOfBf16;
    run_sums_of_bytes: packed::SumsOfBytes;
    run_sums_of_bf16: packed::SumsOfBf16;
    run_unpack_keys_of_bytes: packed::UnpackKeysOfBytes;
    run_unpack_keys_of_bf16: packed::UnpackKeysOfBf16;
    run_unpack_values_of_bytes: packed::UnpackValuesOfBytes;
    run_unpack_values_of_bf16: packed::UnpackValuesOfBf16;
}
