//! A gated kernel together with the log decays of a sequence, for what knows queries, keys and
//! values only.

use crate::attention::Attention;
use crate::attention::call::{Head, NO_FULL_DECAY, one_head};
use crate::attention::delegate::state_of_stream_inside;
use crate::attention::fingerprint::Fingerprint;
use crate::attention::gradient::{HeadGradient, KERNEL};
use crate::attention::scratch::Scratch;
use crate::attention::sharing::Sharing;
use crate::attention::stream::{Stream, StreamOptions, StreamState};
use crate::error::Error;
use crate::mask::Mask;
use crate::parameters::Parameters;
use crate::scalar::Scalar;
use crate::views;
use ndarray::{Array2, ArrayView2};
use std::sync::Arc;

/// A gated kernel and the log decays of one sequence: an [`Attention`] without gates, for tools
/// that know `q`, `k` and `v` only, such as [`fidelity`](crate::fidelity).
///
/// Token `t` of any call, and of a stream from its first token on, has row `t` of the log decays. A
/// model brings them with every [`Head`] instead.
///
/// They are a parameter, `log_decay`, beside those of the kernel under `kernel`. Rows beyond the
/// sequence of a call have the gradient 0.
///
/// ```
/// use dijiang::{EluFeatures, FixedGates, LinearAttention, Mask, fidelity};
/// use ndarray::Array2;
///
/// let x = Array2::from_shape_fn((30, 8), |(i, j)| ((i * 8 + j) as f32).sin());
/// let log_decay =
///     Array2::from_shape_fn(
///         (30, 1),
///         |(t, _)| if t == 20 { f32::NEG_INFINITY } else { -0.01 },
///     );
/// let kernel = FixedGates::new(
///     LinearAttention::new(EluFeatures::<f32>::new(8)?).gated(),
///     log_decay,
/// );
/// let report = fidelity::compare(&kernel, x.view(), x.view(), x.view(), Mask::Causal)?;
/// assert!(report.output_error > 0.0);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct FixedGates<A, T> {
    kernel: A,
    log_decay: Arc<Array2<T>>,
}

impl<A, T: Scalar> FixedGates<A, T> {
    /// `log_decay [n, 1 or num_features]` serves sequences of up to `n` tokens. Numbers that cannot
    /// be used are reported by the first call that would use them.
    pub fn new(kernel: A, log_decay: Array2<T>) -> Self {
        Self { kernel, log_decay: Arc::new(log_decay) }
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> &A {
        &self.kernel
    }
}

/// The head with the log decays of its tokens, of which `first` is the position of the first.
fn with_gates<'a, T>(
    head: Head<'a, T>,
    log_decay: &'a Array2<T>,
    first: usize,
) -> Result<Head<'a, T>, Error> {
    let log_decay = rows(log_decay, first, head.keys())?;
    Ok(head.with_log_decay(log_decay))
}

/// Some rows of the log decays, if there are so many.
fn rows<T>(log_decay: &Array2<T>, first: usize, tokens: usize) -> Result<ArrayView2<'_, T>, Error> {
    let end = first.saturating_add(tokens);
    if end > log_decay.nrows() {
        return Err(Error::Shape {
            which: "log_decay",
            axis: "rows",
            expected: end,
            found: log_decay.nrows(),
        });
    }
    Ok(views::rows(log_decay.view(), first..end))
}

impl<T: Scalar, A: Attention<T>> Attention<T> for FixedGates<A, T> {
    fn forward_heads(
        &self,
        heads: &mut [Head<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        if mask == Mask::Full {
            return Err(NO_FULL_DECAY);
        }
        heads.iter_mut().try_for_each(|head| {
            let head = with_gates(head.reborrow(), &self.log_decay, 0)?;
            self.kernel.forward_heads(&mut [head], mask, scratch)
        })
    }

    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        self.stream_with(StreamOptions::new(value_dim))
    }

    fn stream_with(&self, options: StreamOptions) -> Result<Box<dyn Stream<T>>, Error> {
        let log_decay = Arc::clone(&self.log_decay);
        Ok(Box::new(FixedGatesStream { stream: self.kernel.stream_with(options)?, log_decay }))
    }

    fn state_floats(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        self.kernel.state_floats(value_dim, tokens)
    }

    fn state_bytes(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        self.kernel.state_bytes(value_dim, tokens)
    }

    fn sharing(&self) -> Sharing {
        self.kernel.sharing()
    }

    fn backward_heads(
        &self,
        heads: &mut [HeadGradient<'_, T>],
        mask: Mask,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        if mask == Mask::Full {
            return Err(NO_FULL_DECAY);
        }
        heads.iter_mut().try_for_each(|head| {
            head.check_not_gated()?;
            let keys = head.keys();
            let log_decay = Some(rows(&self.log_decay, 0, keys)?);
            let mut d_all = match &mut head.d_parameters {
                // a copy: the kernel inside gets the parameters as well
                Some(d) => d.matrix_mut(LOG_DECAY, &self.log_decay)?.map(|d| d.to_owned()),
                None => None,
            };
            head.with_kernel_inside(|mut head| {
                let d_all = d_all.as_mut().map(|d| d.view_mut());
                let d_log_decay = d_all.map(|d| views::rows_mut(d, 0..keys));
                let head = HeadGradient { log_decay, d_log_decay, ..head.reborrow() };
                self.kernel.backward_heads(&mut [head], mask, scratch)
            })?;
            if let (Some(d_all), Some(d_parameters)) = (d_all, &mut head.d_parameters) {
                d_parameters.insert(LOG_DECAY, d_all.into_dyn());
            }
            Ok(())
        })
    }

    fn parameters(&self) -> Parameters<T> {
        let log_decay = (*self.log_decay).clone().into_dyn();
        self.kernel.parameters().under(KERNEL).with(LOG_DECAY, log_decay)
    }

    fn with_parameters(&self, parameters: &Parameters<T>) -> Result<Box<dyn Attention<T>>, Error> {
        Attention::<T>::parameters(self).check_names(parameters)?;
        let kernel = self.kernel.with_parameters(&parameters.of(KERNEL))?;
        let log_decay = match parameters.get(LOG_DECAY) {
            Some(_) => Arc::new(parameters.matrix(LOG_DECAY).to_owned()),
            None => Arc::clone(&self.log_decay),
        };
        Ok(Box::new(FixedGates { kernel, log_decay }))
    }
}

/// The name of the log decays among the parameters.
const LOG_DECAY: &str = "log_decay";

/// A stream whose next token has the row of its position.
#[derive(Clone, Debug)]
struct FixedGatesStream<T: Scalar> {
    stream: Box<dyn Stream<T>>,
    log_decay: Arc<Array2<T>>,
}

impl<T: Scalar> FixedGatesStream<T> {
    fn fingerprint(&self) -> Fingerprint {
        Fingerprint::new().with("log decays", self.log_decay.iter().map(|x| x.as_f64()))
    }
}

impl<T: Scalar> Stream<T> for FixedGatesStream<T> {
    fn extend_heads(&mut self, heads: &mut [Head<'_, T>]) -> Result<(), Error> {
        let head = with_gates(one_head(heads)?.reborrow(), &self.log_decay, self.stream.len())?;
        self.stream.extend_heads(&mut [head])
    }

    fn prepare_heads(&mut self, heads: &mut [Head<'_, T>]) -> bool {
        let position = self.stream.len();
        let head = one_head(heads);
        head.and_then(|head| with_gates(head.reborrow(), &self.log_decay, position))
            .is_ok_and(|head| self.stream.prepare_heads(&mut [head]))
    }

    state_of_stream_inside!();

    fn save(&self) -> Result<StreamState<T>, Error> {
        let state = self.stream.save()?;
        let fingerprint = state.fingerprint().clone().and(self.fingerprint());
        Ok(state.with_fingerprint(fingerprint))
    }

    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        let inside = self.fingerprint().check_end(state.fingerprint())?;
        self.stream.restore(&state.clone().with_fingerprint(inside))
    }
}
