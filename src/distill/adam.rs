//! Adam.

use crate::distill::options::DistillOptions;
use crate::parameters::Parameters;
use crate::scalar::Scalar;

/// Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1), with a learning rate that falls to zero
/// along half a cosine:
///
/// ```text
/// m ← β₁m + (1 − β₁)g,    v ← β₂v + (1 − β₂)g²,
/// change = −rate·(m/(1 − β₁ᵗ))/(√(v/(1 − β₂ᵗ)) + ε)
/// ```
#[derive(Debug)]
pub(super) struct Adam<T> {
    options: DistillOptions,
    mean: Parameters<T>,
    square: Parameters<T>,
    step: usize,
}

const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.999;
const EPSILON: f64 = 1e-12;

impl<T: Scalar> Adam<T> {
    pub(super) fn new(parameters: &Parameters<T>, options: &DistillOptions) -> Self {
        let zeros = parameters.zeros_like();
        Self { options: *options, mean: zeros.clone(), square: zeros, step: 0 }
    }

    /// The change of the parameters that a gradient leads to.
    #[allow(clippy::cast_precision_loss)] // steps
    pub(super) fn step(&mut self, gradient: &Parameters<T>) -> Parameters<T> {
        let done = self.step as f64 / self.options.steps.max(1) as f64;
        self.step += 1;
        let rate =
            self.options.learning_rate * 0.5 * (1.0 + libm::cos(core::f64::consts::PI * done));
        let [of_mean, of_square] =
            [BETA_1, BETA_2].map(|beta| 1.0 - libm::pow(beta, self.step as f64));
        let mut change = gradient.clone();
        let moments = self.mean.iter_mut().zip(self.square.iter_mut());
        for ((_, change), ((_, mean), (_, square))) in change.iter_mut().zip(moments) {
            for (x, (mean, square)) in change.iter_mut().zip(mean.iter_mut().zip(square)) {
                let g = x.as_f64();
                let m = BETA_1 * mean.as_f64() + (1.0 - BETA_1) * g;
                // kept as a root, whose range is that of the gradients
                let root = square.as_f64();
                let root = libm::sqrt(BETA_2 * root * root + (1.0 - BETA_2) * g * g);
                (*mean, *square) = (T::from_f64(m), T::from_f64(root));
                let size = root / libm::sqrt(of_square) + EPSILON;
                *x = T::from_f64(-rate * (m / of_mean) / size);
            }
        }
        change
    }
}
