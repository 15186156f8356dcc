//! What is trained, by name, and what AdamW knows of it.

use crate::convert::ops::{Real, read};
use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use dijiang::MultiHead;
use rayon::prelude::*;

/// What numbers may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Any.
    Free,
    /// Any, of a kernel.
    OfKernel,
    /// Radii of directions: any.
    Radius,
    /// Decays, between 0 and 1: their log odds are trained.
    Decay,
    /// Weights of features: a step that leads below 0 ends there.
    NotNegative,
}

/// The largest decay that is trained: log odds of 1 are infinite.
const MOST_DECAY: f64 = 1.0 - 1e-6;

impl Rule {
    /// That of a parameter of a kernel, by its name.
    #[must_use]
    pub fn of(parameter: &str) -> Self {
        let last = |name: &str| parameter.ends_with(name);
        if last("decay.channels") || last("decay.common") {
            Self::Decay
        } else if last(".weights") {
            Self::NotNegative
        } else if last(".radii") {
            Self::Radius
        } else {
            Self::OfKernel
        }
    }

    /// The learning rate, as a multiple of that of the matrices of attention, whose numbers are
    /// some hundredths: those of kernels have further to go. Radii are 8 for heads of 64 columns,
    /// and log odds of decays change by 4.6 from .5 to .99.
    fn speed(self) -> f64 {
        match self {
            Self::Free => 1.0,
            Self::OfKernel | Self::NotNegative => 10.0,
            Self::Decay => 20.0,
            Self::Radius => 100.0,
        }
    }

    /// What is trained in the place of these numbers.
    pub fn stored(self, used: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Decay => {
                let used = used.clamp(1.0 - MOST_DECAY, MOST_DECAY)?;
                (&used / (used.neg()? + 1.0)?)?.log()?
            }
            _ => used.clone(),
        })
    }

    /// The numbers of what is trained.
    pub fn used(self, stored: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Decay => (stored.neg()?.exp()? + 1.0)?.recip()?,
            _ => stored.clone(),
        })
    }
}

/// All that is trained of a model.
#[derive(Clone, Debug, Default)]
pub struct Variables(Vec<Variable>);

/// A tensor that is trained.
#[derive(Clone, Debug)]
pub struct Variable {
    /// Its name in files.
    pub name: String,
    /// What its numbers may be.
    pub rule: Rule,
    /// Whether weight decay applies.
    pub decays: bool,
    /// Its numbers.
    pub var: Var,
}

impl Variables {
    pub(super) fn add(&mut self, name: String, rule: Rule, decays: bool, var: &Var) {
        self.0.push(Variable { name, rule, decays, var: var.clone() });
    }

    /// One after the other.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Variable> {
        self.0.iter()
    }
}

/// The parameters of the kernels of a layer, as they are trained.
#[derive(Clone, Debug)]
pub(super) struct OfKernels(Vec<(String, Rule, Var)>);

impl OfKernels {
    /// Those of a layer, which are added to the variables, by their names behind a prefix.
    pub(super) fn new<T: Real>(
        layer: &MultiHead<T>,
        prefix: &str,
        variables: &mut Variables,
    ) -> Result<Self> {
        let add = |(name, tensor): (String, Tensor)| -> Result<(String, Rule, Var)> {
            let rule = Rule::of(&name);
            let var = Var::from_tensor(&rule.stored(&tensor)?)?;
            variables.add(format!("{prefix}{name}"), rule, false, &var);
            Ok((name, rule, var))
        };
        Ok(Self(dijiang_candle::parameters(layer)?.into_iter().map(add).collect::<Result<_>>()?))
    }

    /// What the kernels take.
    pub(super) fn used(&self) -> Result<Vec<(String, Tensor)>> {
        self.0.iter().map(|(name, rule, var)| Ok((name.clone(), rule.used(var)?))).collect()
    }
}

/// `β₁`, `β₂` and `ε` of AdamW.
const BETAS: [f64; 2] = [0.9, 0.95];
const EPSILON: f64 = 1e-8;

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) with a limit of the gradient's
/// norm.
#[derive(Clone, Debug)]
pub struct AdamW {
    variables: Variables,
    slots: Vec<Slot>,
    steps: usize,
    weight_decay: f64,
    clip: f64,
}

/// Running means of a variable.
#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    /// Of the gradient.
    pub mean: Vec<f32>,
    /// Of its square.
    pub square: Vec<f32>,
    /// The gradient of the step to come.
    gradient: Vec<f32>,
}

impl AdamW {
    /// For these variables, of `f32`.
    #[must_use]
    pub fn new(variables: &Variables, weight_decay: f64, clip: f64) -> Self {
        let slot = |variable: &Variable| {
            let zeros = || vec![0.0; variable.var.elem_count()];
            Slot { mean: zeros(), square: zeros(), gradient: zeros() }
        };
        let slots = variables.iter().map(slot).collect();
        Self { variables: variables.clone(), slots, steps: 0, weight_decay, clip }
    }

    /// The variables with what is known of each.
    pub fn iter(&self) -> impl Iterator<Item = (&Variable, &Slot)> {
        self.variables.iter().zip(&self.slots)
    }

    /// Goes on from what another run knew, in the order of the variables.
    pub fn resume(&mut self, steps: usize, means: Vec<[Vec<f32>; 2]>) -> Result<()> {
        ensure!(means.len() == self.slots.len(), "the running means are those of other variables");
        for (slot, [mean, square]) in self.slots.iter_mut().zip(means) {
            let count = slot.gradient.len();
            ensure!(
                mean.len() == count && square.len() == count,
                "the running means are those of other variables"
            );
            (slot.mean, slot.square) = (mean, square);
        }
        self.steps = steps;
        Ok(())
    }

    /// Adds a share of gradients to those of the step to come.
    pub fn add(&mut self, gradients: &GradStore, share: f64) -> Result<()> {
        let share = share as f32;
        for (variable, slot) in self.variables.iter().zip(&mut self.slots) {
            if let Some(gradient) = gradients.get(variable.var.as_tensor()) {
                read([&gradient.contiguous()?], |[numbers]: [&[f32]; 1]| {
                    slot.gradient.iter_mut().zip(numbers).for_each(|(sum, &g)| *sum += share * g);
                })?;
            }
        }
        Ok(())
    }

    /// Makes a step and forgets the gradients. Gives their norm; where that is not finite, nothing
    /// is changed.
    pub fn step(&mut self, learning_rate: f64) -> Result<f64> {
        let square = |slot: &Slot| slot.gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>();
        let norm = self.slots.iter().map(square).sum::<f64>().sqrt();
        if norm.is_finite() {
            self.steps += 1;
            let limit = if norm > self.clip { self.clip / norm } else { 1.0 };
            let correction = BETAS.map(|beta| 1.0 - beta.powi(self.steps as i32));
            for (variable, slot) in self.variables.iter().zip(&mut self.slots) {
                let learning_rate = learning_rate * variable.rule.speed();
                let decay = if variable.decays { learning_rate * self.weight_decay } else { 0.0 };
                let rate = Rate { learning_rate, limit, correction, decay };
                let numbers = slot.moved(variable, rate).with_context(|| variable.name.clone())?;
                let moved = Tensor::from_vec(numbers, variable.var.shape(), variable.var.device())?;
                variable.var.set(&moved)?;
            }
        }
        self.slots.iter_mut().for_each(|slot| slot.gradient.fill(0.0));
        Ok(norm)
    }
}

/// How far a step goes.
#[derive(Clone, Copy)]
struct Rate {
    learning_rate: f64,
    /// The factor of the gradient.
    limit: f64,
    /// `1 − βᵗ`
    correction: [f64; 2],
    /// What is taken of every number.
    decay: f64,
}

impl Slot {
    /// The numbers of a variable behind a step.
    fn moved(&mut self, variable: &Variable, rate: Rate) -> Result<Vec<f32>> {
        const PART: usize = 1 << 14;
        ensure!(variable.var.dtype() == DType::F32, "only numbers of 32 bits are trained");
        let [b1, b2] = BETAS.map(|beta| beta as f32);
        let [c1, c2] = rate.correction.map(|c| c as f32);
        let (step, limit) = (rate.learning_rate as f32, rate.limit as f32);
        let (keep, epsilon) = ((1.0 - rate.decay) as f32, EPSILON as f32);
        let mut numbers = variable.var.flatten_all()?.to_vec1::<f32>()?;
        let is_bounded = variable.rule == Rule::NotNegative;
        numbers
            .par_chunks_mut(PART)
            .zip(self.mean.par_chunks_mut(PART))
            .zip(self.square.par_chunks_mut(PART))
            .zip(self.gradient.par_chunks(PART))
            .for_each(|(((numbers, means), squares), gradients)| {
                let running = means.iter_mut().zip(squares).zip(gradients);
                for (x, ((mean, square), &gradient)) in numbers.iter_mut().zip(running) {
                    let g = gradient * limit;
                    *mean = b1 * *mean + (1.0 - b1) * g;
                    *square = b2 * *square + (1.0 - b2) * g * g;
                    *x = keep * *x - step * (*mean / c1) / ((*square / c2).sqrt() + epsilon);
                    if is_bounded {
                        *x = x.max(0.0);
                    }
                }
            });
        Ok(numbers)
    }
}
