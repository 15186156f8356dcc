//! Losses over the vocabulary and their gradients by the hidden states, some rows at a time.

use crate::convert::ops::{Real, matrix, multiply, rows};
use crate::elementwise::vectorised;
use anyhow::{Result, ensure};
use dijiang::ndarray::ArcArray2;
use faer::MatRef;
use rayon::prelude::*;

/// What a model should say.
#[derive(Clone, Copy, Debug)]
pub enum Goal<'a, T> {
    /// What the exact model says, from its hidden states `[n, width]`: the mean of the
    /// Kullback-Leibler divergences `KL(exact ‖ trained)`.
    Exact(&'a [T]),
    /// The tokens that follow: the mean of `−ln p`.
    Text,
}

/// At a place, or the means over several.
#[derive(Clone, Copy, Debug, Default)]
pub struct Found {
    /// The loss.
    pub loss: f64,
    /// `−ln p` of the tokens that follow, by the trained model and, where it was asked, by the
    /// exact one.
    pub nats: [f64; 2],
}

/// Rows of hidden states, and what is asked of them.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a, T> {
    /// Rows `[n, width]`.
    pub hidden: &'a [T],
    /// `[width, vocabulary]`, makes scores of them.
    pub head: &'a ArcArray2<T>,
    /// The rows that the loss is computed at.
    pub places: &'a [usize],
    /// The token behind row `t` is `next[t]`.
    pub next: &'a [u32],
    /// What should be said.
    pub goal: Goal<'a, T>,
}

/// Places whose scores are held at once.
const PLACES: usize = 512;

impl<T: Real> Question<'_, T> {
    /// The loss.
    pub fn loss(&self) -> Result<Found> {
        self.answer(|_, _| ())
    }

    /// The loss, and its gradient by the hidden states.
    pub fn gradient(&self) -> Result<(Found, Vec<T>)> {
        let width = self.head.nrows();
        let mut all = vec![T::default(); self.hidden.len()];
        let found = self.answer(|places, by_scores| {
            let mut gradient = vec![T::default(); places.len() * width];
            multiply(&mut gradient, None, by_scores, matrix(self.head).transpose());
            for (from, &t) in gradient.chunks_exact(width).zip(places) {
                all[t * width..(t + 1) * width].copy_from_slice(from);
            }
        })?;
        Ok((found, all))
    }

    /// The loss; `each` gets some places and the gradient by their scores.
    fn answer(&self, mut each: impl FnMut(&[usize], MatRef<'_, T>)) -> Result<Found> {
        let &Self { hidden, head, places, next, goal } = self;
        let (width, vocabulary) = head.dim();
        ensure!(!places.is_empty(), "there is no place to compute a loss at");
        let row = |x: &[T], t: usize| x[t * width..(t + 1) * width].to_vec();
        let mut found = Found::default();
        let share = T::rounded(1.0 / places.len() as f64);
        for places in places.chunks(PLACES) {
            let own = places.iter().flat_map(|&t| row(hidden, t));
            let exact = |exact| places.iter().flat_map(move |&t| row(exact, t));
            // both models at once: the head is read once
            let asked: Vec<T> = match goal {
                Goal::Exact(of_exact) => own.chain(exact(of_exact)).collect(),
                Goal::Text => own.collect(),
            };
            let mut scores = vec![T::default(); asked.len() / width * vocabulary];
            multiply(&mut scores, None, rows(&asked, width), matrix(head));
            let (own, exact) = scores.split_at_mut(places.len() * vocabulary);
            let sums: Vec<Found> = match goal {
                Goal::Exact(_) => own
                    .par_chunks_mut(vocabulary)
                    .zip(exact.par_chunks_mut(vocabulary))
                    .zip(places)
                    .map(|((own, exact), &t)| {
                        vectorised(|| divergence(own, exact, next[t] as usize, share))
                    })
                    .collect(),
                Goal::Text => own
                    .par_chunks_mut(vocabulary)
                    .zip(places)
                    .map(|(own, &t)| vectorised(|| cross_entropy(own, next[t] as usize, share)))
                    .collect(),
            };
            for row in sums {
                found.loss += row.loss;
                found.nats.iter_mut().zip(row.nats).for_each(|(sum, nats)| *sum += nats);
            }
            each(places, rows(own, vocabulary));
        }
        let mean = 1.0 / places.len() as f64;
        Ok(Found { loss: found.loss * mean, nats: found.nats.map(|x| x * mean) })
    }
}

/// Numbers that are added in `T` before they are added in `f64`.
const RUN: usize = 64;

#[inline(always)]
fn largest<T: Real>(x: &[T]) -> T {
    x.iter().copied().fold(T::rounded(f64::NEG_INFINITY), |a, b| if b > a { b } else { a })
}

/// `x ← e^(x − largest)`; gives the sum.
#[inline(always)]
fn exponentials<T: Real>(x: &mut [T], largest: T) -> f64 {
    let mut sum = 0.0;
    for run in x.chunks_mut(RUN) {
        run.iter_mut().for_each(|x| *x = (*x - largest).exponential());
        sum += summed(run);
    }
    sum
}

/// The sum of a few numbers.
#[inline(always)]
fn summed<T: Real>(x: &[T]) -> f64 {
    const LANES: usize = 16;
    let mut lanes = [T::default(); LANES];
    let chunks = x.chunks_exact(LANES);
    let rest: f64 = chunks.remainder().iter().map(|x| x.as_f64()).sum();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(sum, &x)| *sum += x);
    }
    rest + lanes.iter().map(|x| x.as_f64()).sum::<f64>()
}

/// Makes the gradient of `KL(p ‖ q)` by the scores of `q` out of these, `share·(q − p)`; the scores
/// of `p` are used up.
#[inline(always)]
fn divergence<T: Real>(own: &mut [T], exact: &mut [T], next: usize, share: T) -> Found {
    let [top, exact_top] = [largest(own), largest(exact)];
    let said = [(own[next] - top).as_f64(), (exact[next] - exact_top).as_f64()];
    let (mut sum, mut exact_sum, mut product) = (0.0, 0.0, 0.0);
    for (own, exact) in own.chunks_mut(RUN).zip(exact.chunks_mut(RUN)) {
        let mut terms = [T::default(); RUN];
        for ((own, exact), term) in own.iter_mut().zip(exact.iter_mut()).zip(&mut terms) {
            let (q, p) = (*own - top, *exact - exact_top);
            (*own, *exact) = (q.exponential(), p.exponential());
            // p·(ln p − ln q), but for the sums; where p is 0 it is 0, whatever q
            *term = *exact * (p - q);
        }
        sum += summed(own);
        exact_sum += summed(exact);
        product += summed(&terms[..own.len()]);
    }
    let [q, p] = [sum, exact_sum].map(|sum| share * T::rounded(1.0 / sum));
    own.iter_mut().zip(&*exact).for_each(|(own, &exact)| *own = *own * q - exact * p);
    let logs = [sum.ln(), exact_sum.ln()];
    Found {
        loss: product / exact_sum + logs[0] - logs[1],
        nats: [logs[0] - said[0], logs[1] - said[1]],
    }
}

/// Makes the gradient of `−ln q_next` by the scores out of these, `share·(q − 1_next)`.
#[inline(always)]
fn cross_entropy<T: Real>(own: &mut [T], next: usize, share: T) -> Found {
    let top = largest(own);
    let said = (own[next] - top).as_f64();
    let sum = exponentials(own, top);
    let factor = share * T::rounded(1.0 / sum);
    own.iter_mut().for_each(|x| *x *= factor);
    own[next] -= share;
    let loss = sum.ln() - said;
    Found { loss, nats: [loss, 0.0] }
}
