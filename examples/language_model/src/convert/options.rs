//! How a conversion is done.

use crate::convert::student::Trained;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What a conversion is asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// The loss.
    pub loss: LossKind,
    /// What is trained.
    pub trained: Trained,
    /// Tokens to train on.
    pub tokens: usize,
    /// Tokens of a context.
    pub context: usize,
    /// Contexts of a step.
    pub batch: usize,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Taken of every matrix, times the learning rate.
    pub weight_decay: f64,
    /// The largest norm of a gradient.
    pub clip: f64,
    /// Steps in which the maps of each layer learn to answer as exact attention does, before the
    /// model is trained.
    pub distill: usize,
    /// Held-out points of the curve, each at twice the tokens of the one before.
    pub points: usize,
    /// Of the order of the text, and of the factors.
    pub seed: u64,
}

/// What is made small.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossKind {
    /// The divergence from what the exact model says
    Kl,
    /// The surprise at the text; the exact model is tuned on it as well, to be compared with
    Ce,
}

impl LossKind {
    /// As it is asked for.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kl => "kl",
            Self::Ce => "ce",
        }
    }
}

/// Steps between two checkpoints.
pub const CHECKPOINT: usize = 16;

impl Options {
    /// Steps of the training.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.tokens.div_ceil(self.context * self.batch)
    }

    /// Tokens that so many steps have trained on.
    #[must_use]
    pub fn tokens_of(&self, steps: usize) -> usize {
        steps * self.context * self.batch
    }

    /// The learning rate of a step: up over a twentieth of the steps, then down, both linearly.
    #[must_use]
    pub fn learning_rate(&self, step: usize) -> f64 {
        let steps = self.steps();
        let warm_up = steps.div_ceil(20);
        let share = if step < warm_up {
            (step + 1) as f64 / warm_up as f64
        } else {
            (steps - step) as f64 / (steps - warm_up) as f64
        };
        self.learning_rate * share.min(1.0)
    }

    /// Whether the held-out loss is measured after so many steps.
    #[must_use]
    pub fn is_point(&self, done: usize) -> bool {
        let steps = self.steps();
        let of_curve =
            |i: usize| steps.checked_shr(i as u32).is_some_and(|at| at > 0 && at == done);
        self.points > 0 && (done == 0 || (0..self.points).any(of_curve))
    }

    /// The places of a context at which the loss is computed: every second one, in turn.
    pub fn places(&self, step: usize) -> impl Iterator<Item = usize> + use<> {
        (step % 2..self.context).step_by(2)
    }
}
