//! What a model says of text that nothing was trained on, beside what the exact model says.

use crate::convert::exact::Exact;
use crate::convert::loss::{Found, Goal, Question};
use crate::convert::ops::Real;
use crate::model::Model;
use crate::perplexity::CHUNK;
use anyhow::Result;
use dijiang::MultiHead;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};

/// Windows of text, and the last hidden states of the exact model on each.
#[derive(Clone, Debug)]
pub struct HeldOut<'a> {
    windows: Vec<(&'a [u32], Vec<f32>)>,
}

/// Means over the first half of the longest window and over the second, in nats; none where a half
/// has no predictions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Said {
    /// Of `−ln p` of the tokens that follow.
    pub halves: [Option<f64>; 2],
    /// The same of the exact model.
    pub exact: [Option<f64>; 2],
    /// Of `KL(exact ‖ model)`.
    pub divergence: [Option<f64>; 2],
}

impl<'a> HeldOut<'a> {
    /// Each window ends with a token that is foretold and not read.
    pub fn new(windows: Vec<&'a [u32]>, exact: &Exact<'_>) -> Result<Self> {
        let windows = windows.into_iter().filter(|window| window.len() > 1);
        let with_exact = |window: &'a [u32]| -> Result<(&'a [u32], Vec<f32>)> {
            Ok((window, exact.hidden(&window[..window.len() - 1])?))
        };
        Ok(Self { windows: windows.map(with_exact).collect::<Result<_>>()? })
    }

    /// By a model with these layers. Advances the bar by one for each prediction.
    pub fn measure(
        &self,
        model: &Model,
        layers: &[MultiHead<f32>],
        bar: &ProgressBar,
    ) -> Result<Said> {
        let head = &f32::weight(model.head());
        let length = self.windows.iter().map(|(window, _)| window.len() - 1).max().unwrap_or(0);
        let mut state = model.state(layers)?;
        let mut sums = [Sum::default(); 2];
        for (window, exact) in &self.windows {
            let (read, next) = (&window[..window.len() - 1], &window[1..]);
            state.reset();
            let mut hidden = Vec::with_capacity(exact.len());
            for read in read.chunks(CHUNK) {
                hidden.extend(model.extend(&mut state, read)?);
            }
            for (sum, half) in sums.iter_mut().zip([0..length / 2, length / 2..length]) {
                let places: Vec<usize> = half.filter(|&at| at < read.len()).collect();
                if !places.is_empty() {
                    let (hidden, places, goal) = (&hidden, &places, Goal::Exact(exact));
                    let found = Question { hidden, head, places, next, goal }.loss()?;
                    sum.add(places.len(), found);
                }
            }
            bar.inc(read.len() as u64);
        }
        let [halves, exact, divergence] = [0, 1, 2].map(|i| sums.map(|sum| sum.mean(i)));
        Ok(Said { halves, exact, divergence })
    }
}

/// Of losses at some places: by the model, by the exact one, and the divergence.
#[derive(Clone, Copy, Default)]
struct Sum {
    places: usize,
    sums: [f64; 3],
}

impl Sum {
    fn add(&mut self, places: usize, Found { loss, nats: [own, exact] }: Found) {
        self.places += places;
        let means = [own, exact, loss];
        self.sums.iter_mut().zip(means).for_each(|(sum, mean)| *sum += places as f64 * mean);
    }

    fn mean(&self, which: usize) -> Option<f64> {
        (self.places > 0).then(|| self.sums[which] / self.places as f64)
    }
}
