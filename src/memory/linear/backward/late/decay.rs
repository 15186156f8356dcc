//! Sums whose features decay: each by its own factor with every token that enters.
//!
//! The weight of the token that entered as number `a` for a query before which `c` have entered is
//! `Σ_i φ_q,i φ_k,i γ_i^{c−1−a}`. Within a block of `E` that enter, queries are brought as
//! `φ_q γ^{c−E/2}`, keys as `φ_k γ^{E/2−1−a}` and the sums as `γ^{E/2} S`, so that what follows is
//! that of sums which do not decay. With the gradients by what was brought,
//!
//! ```text
//! ∂L/∂ln γ_i = Σ_blocks E P_i + Σ_t c_t q̃_ti dq̃_ti − Σ_a (a + 1) k̃_ai dk̃_ai,
//! ```
//!
//! where `P_i` is what queries behind the block have to do with tokens in and before it, a sum of
//! `q̃_i dq̃_i` by the sums before a block and of `k̃_i dk̃_i` by the queries behind one. Numbers of
//! tokens from the beginning on, in the place of `c` and `a`, would leave little but rounding
//! errors of what is forgotten fast.
#![allow(clippy::cast_precision_loss)] // tokens of a block

use crate::kernel::buffer::Buffer;
use crate::memory::linear::decay::LogDecay;
use crate::memory::linear::log_scale::LogScale;
use crate::memory::linear::state::State;
use crate::memory::linear::state_decay::StateDecay;
use crate::scalar::Scalar;

/// What is known of the decays of a call and of a block.
#[derive(Debug)]
pub(super) struct LateDecay<T> {
    /// `ln γ_i`; empty if nothing decays. Not below [`most`](Self::most) twice: of tokens whose
    /// keys are of a size, less than an epsilon squared is left then.
    rates: Buffer<T>,
    /// `γ_i` as a part of what it is taken for.
    shares: Vec<f64>,
    /// Whether the gradient by γ is asked for.
    is_asked: bool,
    /// Tokens that enter in the block.
    entering: usize,
    /// `γ_i^{c − E/2}`, of rows `c` from 0 to `E`: `[num_features, E + 1]`.
    powers: Buffer<T>,
    /// The half of `E`, of the sums.
    half: StateDecay<T>,
    half_rates: Buffer<T>,
    /// `∂L/∂ln γ_i`.
    sums: Vec<f64>,
    /// What the queries of each block have to do with the tokens before it, `[blocks, features]`.
    of_queries: Vec<f64>,
    /// P.
    across: Vec<f64>,
}

/// What a block of columns is brought by.
#[derive(Clone, Copy, Debug)]
pub(super) enum Brought<'a> {
    /// Queries; tokens enter before the queries of these numbers.
    Queries(&'a [usize]),
    Keys,
}

impl<T: Scalar> LateDecay<T> {
    pub(super) fn new() -> Self {
        Self {
            rates: Buffer::new(),
            shares: Vec::new(),
            is_asked: false,
            entering: 0,
            powers: Buffer::new(),
            half: StateDecay::new(),
            half_rates: Buffer::new(),
            sums: Vec::new(),
            of_queries: Vec::new(),
            across: Vec::new(),
        }
    }

    /// The largest logarithm of a factor.
    fn most() -> T {
        T::max_value().ln() * T::from_f64(0.22)
    }

    pub(super) fn begin(&mut self, decay: Option<&LogDecay<T>>, is_asked: bool) {
        let rates = decay.map(|decay| decay.channels.as_slice()).unwrap_or_default();
        self.is_asked = is_asked && !rates.is_empty();
        self.rates.resize(rates.len());
        let least = -(Self::most() + Self::most());
        self.rates.iter_mut().zip(rates).for_each(|(to, &rate)| *to = rate.max(least));
        let taken = rates.iter().zip(&*self.rates);
        self.shares.clear();
        self.shares.extend(taken.map(|(&rate, &taken)| (rate - taken).as_f64().exp()));
        self.powers.resize(0);
        self.entering = 0;
        self.of_queries.clear();
        for zeros in [&mut self.sums, &mut self.across] {
            zeros.clear();
            zeros.resize(rates.len(), 0.0);
        }
    }

    pub(super) fn is_none(&self) -> bool {
        self.rates.is_empty()
    }

    /// `∂L/∂ln γ_i` in the units of the gradients by features; nothing if nothing decays.
    pub(super) fn sums(&self) -> impl Iterator<Item = f64> {
        self.sums.iter().zip(&self.shares).map(|(sum, share)| sum * share)
    }

    /// The longest block of which nothing leaves the range, up to this one.
    pub(super) fn block(&self, longest: usize) -> usize {
        let fastest = self.rates.iter().fold(T::zero(), |least, &rate| least.min(rate));
        let fits = |len: usize| T::from_f64(0.5 * len as f64) * -fastest <= Self::most();
        (1..=longest).rev().find(|&len| fits(len)).unwrap_or(1)
    }

    /// A block in which so many tokens enter.
    fn enter(&mut self, entering: usize) {
        if self.is_none() || self.entering == entering && !self.powers.is_empty() {
            return;
        }
        self.entering = entering;
        let columns = entering + 1;
        let half = T::from_f64(0.5 * entering as f64);
        self.powers.resize(self.rates.len() * columns);
        for (row, &rate) in self.powers.chunks_exact_mut(columns).zip(&*self.rates) {
            for (c, power) in row.iter_mut().enumerate() {
                *power = (rate * (T::from_f64(c as f64) - half)).exp();
            }
        }
        self.half_rates.resize(self.rates.len());
        self.half_rates.iter_mut().zip(&*self.rates).for_each(|(to, &rate)| *to = rate * half);
        self.half.set(&self.half_rates);
    }

    /// A block of the first pass.
    pub(super) fn begin_block(&mut self, entering: usize) {
        self.enter(entering);
        self.of_queries.resize(self.of_queries.len() + self.rates.len(), 0.0);
    }

    /// What queries of the block have to do with tokens before it, of columns that were brought.
    pub(super) fn add_queries(&mut self, q: &[T], d_q: &[T], width: usize) {
        let first = self.of_queries.len() - self.rates.len();
        if self.is_asked {
            add_dots(&mut self.of_queries[first..], 1.0, [q, d_q], width);
        }
    }

    /// The same block in the second pass.
    pub(super) fn begin_block_again(&mut self, entering: usize) {
        self.enter(entering);
        let first = self.of_queries.len() - self.rates.len();
        let of_queries = self.of_queries.drain(first..);
        for ((sum, across), of_queries) in
            self.sums.iter_mut().zip(&mut self.across).zip(of_queries)
        {
            *sum += entering as f64 * *across;
            *across += of_queries;
        }
    }

    /// What queries behind the block have to do with its tokens, of columns that were brought.
    pub(super) fn take_keys(&mut self, k: &[T], d_k: &[T], width: usize) {
        if self.is_asked {
            add_dots(&mut self.across, -1.0, [k, d_k], width);
        }
    }

    /// Lets sums decay by half of what enters.
    pub(super) fn sums_by_half(&self, state: &mut State<T>) {
        if self.is_none() || self.entering == 0 {
            return;
        }
        state.decay(&self.half);
        let LogScale { high, low } = state.scale;
        if low != T::zero() {
            state.all_rows().scale(low.exp());
            state.scale = LogScale::of(high);
        }
    }

    /// Multiplies columns `[num_features, width]` by what brings them, or gradients by what was
    /// brought by what makes them gradients by the features.
    pub(super) fn bring(&self, columns: &mut [T], width: usize, which: Brought<'_>) {
        if self.is_none() || self.entering == 0 {
            return;
        }
        let powers = self.powers.chunks_exact(self.entering + 1);
        for (row, powers) in columns.chunks_exact_mut(width).zip(powers) {
            match which {
                Brought::Keys => {
                    let powers = powers[..self.entering].iter().rev();
                    row.iter_mut().zip(powers).for_each(|(x, &power)| *x *= power);
                }
                Brought::Queries(from) => runs(from, width, |run, c| {
                    row[run].iter_mut().for_each(|x| *x *= powers[c]);
                }),
            }
        }
    }

    /// Adds to `∂L/∂ln γ` what these columns, as they were brought, and the gradients by them come
    /// to.
    pub(super) fn add(&mut self, x: &[T], d_x: &[T], width: usize, which: Brought<'_>) {
        if !self.is_asked {
            return;
        }
        let rows = x.chunks_exact(width).zip(d_x.chunks_exact(width));
        for (sum, (x, d_x)) in self.sums.iter_mut().zip(rows) {
            let product = |t: usize| x[t].as_f64() * d_x[t].as_f64();
            match which {
                Brought::Keys => {
                    for a in 0..self.entering {
                        *sum -= (a + 1) as f64 * product(a);
                    }
                }
                Brought::Queries(from) => runs(from, width, |run, c| {
                    let of_run: f64 = run.map(product).sum();
                    *sum += c as f64 * of_run;
                }),
            }
        }
    }
}

/// Adds the products of rows to a sum for each.
fn add_dots<T: Scalar>(sums: &mut [f64], sign: f64, [x, d_x]: [&[T]; 2], width: usize) {
    let rows = x.chunks_exact(width).zip(d_x.chunks_exact(width));
    for (sum, (x, d_x)) in sums.iter_mut().zip(rows) {
        let products = x.iter().zip(d_x).map(|(x, d_x)| x.as_f64() * d_x.as_f64());
        *sum += sign * products.sum::<f64>();
    }
}

/// Runs of columns before which equally many tokens have entered, with how many.
fn runs(from: &[usize], width: usize, mut each: impl FnMut(core::ops::Range<usize>, usize)) {
    let mut start = 0;
    for c in 0..=from.len() {
        let end = from.get(c).copied().unwrap_or(width).min(width);
        if end > start {
            each(start..end, c);
            start = end;
        }
    }
}
