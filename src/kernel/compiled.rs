//! Where generic code meets compiled loops: a method for each loop, implemented for `f32` and
//! `f64`.
//!
//! The methods are not generic, so the loops are compiled once, in this crate, at every level; the
//! crates that use it only call them.

use super::simd::{Lanes, Machine};
use super::{columns, exp, gemm, lanes_dct, pairs};

macro_rules! compiled {
    ($($name:ident: $($path:ident)::+ $(-> $out:ty)?;)*) => {
        /// The compiled loops of a number type.
        pub trait Compiled: Lanes {
            $(
                /// Runs the loop at the best level of the machine.
                fn $name(work: $($path)::+<'_, Self>) $(-> $out)?;
            )*
            /// DCT-II, or DCT-III.
            fn run_dct(columns: lanes_dct::Columns<'_, Self>, third: bool);
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

            fn run_dct(columns: lanes_dct::Columns<'_, Self>, third: bool) {
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
    run_product: gemm::Product;
    run_row_times_matrix: gemm::RowTimesMatrix;
    run_two_rows_times_matrix: gemm::TwoRowsTimesMatrix;
    run_exp2: exp::Exp2;
    run_exp2_columns: columns::Exp2BelowMaximum;
    run_soften: columns::Soften -> bool;
    run_scale_and_sum_rows: columns::ScaleAndSumRows;
    run_mask_and_add_rows: columns::MaskAndAddRows;
    run_scale_rows: columns::ScaleRows -> Self;
    run_scale_rows_in_place: columns::ScaleRowsInPlace;
    run_fade: columns::Fade;
    run_transpose: columns::Transpose;
    run_sum_of: super::SumOf -> Self;
    run_max_of: super::MaxOf -> Self;
    run_max_abs_of: super::MaxAbsOf -> Self;
    run_finite_mark_of: super::FiniteMarkOf -> Self;
    run_copy_and_measure: super::CopyAndMeasure -> Self;
    run_dot: super::Dot -> Self;
    run_rows_dot: super::RowsDot;
    run_scale_in_place: super::ScaleInPlace;
    run_add_outer: super::AddOuter;
    run_fade_rows: super::FadeRows;
    run_scale_into: super::ScaleInto -> Self;
    run_exp2_one: super::Exp2BelowMaximum -> (Self, Self);
    run_decode_step: super::DecodeStep -> Self;
    run_read_sums: super::ReadSums;
    run_distances: pairs::Distances;
    run_largest_affinities: pairs::LargestAffinities;
    run_receive: pairs::Receive;
}
