//! Gradients by log decays.
//!
//! The weight of key j for query t has the log decays `g_i` of the tokens `j < i ≤ t`. With
//! `W_tj = ∂L/∂ln w_tj`, for one feature or for all,
//!
//! ```text
//! ∂L/∂g_i = Σ_{j < i ≤ t} W_tj.
//! ```
//!
//! The difference of sums `Σ_{t≥i} (φ_q(t)·dφ_q(t) − φ_k(t)·dφ_k(t))` has the same value, but adds
//! and takes away all pairs after i: over a long sequence it is rounding errors where decay is
//! strong. Here the pairs are added as what they are, of a group of tokens with i among them:
//!
//! ```text
//! j before the group, t after it:    ⟨S, R⟩ + z·r
//! j before it, t in it from i on:    Σ_{t≥i} q̃_t·(S G_t + h_t z)
//! j in it before i, t after it:      Σ_{j<i} k̃_j·(R v_j + r)
//! both in it:                        Σ_{j<i≤t} A_tj (v_j·G_t + h_t)
//! ```
//!
//! Only where features decay differently is the last one that difference, within the group.

use crate::kernel::gradients::dot_columns;
use crate::kernel::{self, buffer::Buffer};
use crate::memory::linear::backward::call::{TokenGradients, Units};
use crate::memory::linear::backward::tape::Entry;
use crate::memory::linear::gates::Rates;
use crate::memory::linear::state::State;
use crate::scalar::Scalar;
use crate::views;
use ndarray::ArrayViewMut2;

/// Sums of a group, and over all tokens.
#[derive(Debug)]
pub(super) struct GateGradients<T> {
    /// What the sums before the group have to do with its queries: `[width]`, or
    /// `[num_features, width]`.
    of_sums: Buffer<T>,
    /// The gradient by the log decays of the tokens of a group, `[tokens, 1 or num_features]`.
    tokens: Buffer<T>,
    /// Over all tokens of a call, of one log decay for all features or of one for each.
    sums: Vec<f64>,
}

/// What a group is asked for.
#[derive(Debug)]
pub(super) struct GroupDecays<'a, T> {
    /// As they were brought, `[num_features, width]`.
    pub(super) q: &'a [T],
    pub(super) k: &'a [T],
    pub(super) entry: &'a Entry<T>,
    /// The gradient by the queries as they were brought.
    pub(super) d_features: &'a [T],
}

impl<T: Scalar> GateGradients<T> {
    pub(super) fn new() -> Self {
        Self { of_sums: Buffer::new(), tokens: Buffer::new(), sums: Vec::new() }
    }

    pub(super) fn begin(&mut self) {
        self.sums.clear();
    }

    pub(super) fn sums(&self) -> &[f64] {
        &self.sums
    }

    /// Keeps `q̃_t·(S G_t + h_t z)` of a group, or of each feature.
    pub(super) fn of_sums(&mut self, rates: Rates, q: &[T], d_features: &[T], width: usize) {
        if rates == Rates::PerFeature {
            self.of_sums.resize(q.len());
            let products = q.iter().zip(d_features);
            self.of_sums.iter_mut().zip(products).for_each(|(to, (&q, &d))| *to = q * d);
        } else {
            self.of_sums.resize(width);
            self.of_sums.fill(T::zero());
            dot_columns(q, d_features, 0, &mut self.of_sums);
        }
    }

    /// Adds what the queries of a group have to do with keys of it and before it. `scores` are A
    /// and the gradients by it, `[width, width]` of keys and queries.
    pub(super) fn within(
        &mut self,
        GroupDecays { q, k, entry, d_features }: GroupDecays<'_, T>,
        [scores, d_scores]: [&[T]; 2],
        units: Units<T>,
        out: &mut TokenGradients<'_, T>,
    ) {
        let (count, width) = (entry.tokens(), entry.width);
        let m = q.len() / width;
        if entry.rates == Rates::PerFeature {
            self.tokens.resize(count * m);
            for f in 0..m {
                let row = f * width;
                let (mut of_sums, mut of_group) = (T::zero(), T::zero());
                for t in (0..count).rev() {
                    let before = self.of_sums[row + t];
                    of_sums += before;
                    let query = q[row + t] * d_features[row + t] - before;
                    of_group += query - k[row + t] * entry.d_keys[row + t];
                    self.tokens[t * m + f] = of_sums + of_group;
                }
            }
        } else {
            self.tokens.resize(count);
            self.tokens.fill(T::zero());
            let mut later = T::zero();
            for t in (0..count).rev() {
                later += self.of_sums[t];
                self.tokens[t] = later;
            }
            for j in 0..count {
                let row = j * width..(j + 1) * width;
                let (scores, d_scores) = (&scores[row.clone()], &d_scores[row]);
                let mut later = T::zero();
                for i in (j + 1..count).rev() {
                    later += scores[i] * d_scores[i];
                    self.tokens[i] += later;
                }
            }
        }
        self.add(entry, units, out);
    }

    /// Adds what later queries have to do with the keys of a group and those before it. They
    /// are given as their sums, as seen from where the group begins, the gradients by keys as they
    /// were brought that follow, and the factor of these.
    pub(super) fn add_later(
        &mut self,
        entry: &Entry<T>,
        (suffix, d_features, factor): (&State<T>, &[T], T),
        units: Units<T>,
        out: &mut TokenGradients<'_, T>,
    ) {
        let (count, width) = (entry.tokens(), entry.width);
        let m = d_features.len() / width;
        let per_feature = entry.rates == Rates::PerFeature;
        let columns = if per_feature { m } else { 1 };
        self.tokens.resize(count * columns);
        let stride = suffix.stride();
        let scale = if entry.sums.is_empty() {
            T::zero()
        } else {
            let (sums, suffix) = (entry.sums_scale, suffix.scale);
            ((sums.high + suffix.high) + (sums.low + suffix.low)).exp()
        };
        let mut total = T::zero();
        let before = |f: usize| {
            if scale == T::zero() {
                return T::zero();
            }
            let row = f * stride..(f + 1) * stride;
            let sums = kernel::dot(&entry.sums[row.clone()], &suffix.sums[row]);
            (sums + entry.normalizer[f] * suffix.normalizer[f]) * scale
        };
        let key = |f: usize, t: usize| {
            let at = f * width + t;
            let key = entry.keys[at] * entry.key_factors[t] * (factor * d_features[at]);
            if entry.decays.is_empty() { key } else { key / entry.decays[at] }
        };
        if per_feature {
            for f in 0..m {
                let mut sum = before(f);
                for t in 0..count {
                    self.tokens[t * m + f] = sum;
                    sum += key(f, t);
                }
            }
        } else {
            for f in 0..m {
                total += before(f);
            }
            self.of_sums.resize(width);
            self.of_sums.fill(T::zero());
            dot_columns(&entry.keys, d_features, 0, &mut self.of_sums);
            for t in 0..count {
                self.tokens[t] = total;
                total += self.of_sums[t] * (factor * entry.key_factors[t]);
            }
        }
        self.add(entry, units, out);
    }

    /// Adds the gradients of a group to those of the tokens and to the sums.
    fn add(&mut self, entry: &Entry<T>, units: Units<T>, out: &mut TokenGradients<'_, T>) {
        let columns = self.tokens.len() / entry.tokens();
        if self.sums.len() != columns {
            self.sums.clear();
            self.sums.resize(columns, 0.0);
        }
        units.bring(&mut self.tokens);
        for row in self.tokens.chunks_exact(columns) {
            for (sum, x) in self.sums.iter_mut().zip(row) {
                *sum += x.as_f64();
            }
        }
        if let Some(d_log_decay) = &mut out.d_log_decay {
            let rows = views::rows_mut(d_log_decay.view_mut(), entry.rows.clone());
            add_tokens(&self.tokens, columns, rows);
        }
    }
}

/// Adds rows of one number or one for each feature to rows of as many, or of their sum.
fn add_tokens<T: Scalar>(tokens: &[T], columns: usize, mut rows: ArrayViewMut2<'_, T>) {
    let is_sum = rows.ncols() < columns;
    for (mut row, own) in rows.outer_iter_mut().zip(tokens.chunks_exact(columns)) {
        if is_sum {
            row[0] += kernel::sum(own);
        } else {
            row.iter_mut().zip(own).for_each(|(sum, &x)| *sum += x);
        }
    }
}
