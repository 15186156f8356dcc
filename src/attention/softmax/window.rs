//! Softmax attention with a sliding window.

use crate::attention::Attention;
use crate::attention::hybrid::HybridAttention;
use crate::attention::hybrid::far::Far;
use crate::attention::softmax::options::SoftmaxAttention;
use crate::attention::stream::{Stream, StreamOptions};
use crate::check;
use crate::error::Error;
use crate::mask::Mask;
use crate::scalar::Scalar;

const FULL_WINDOW: Error = Error::Unsupported {
    what: "a full mask with a sliding window",
    why: "a window needs an order of queries; use `Mask::Causal` or `Mask::CausalTail`",
};

const STREAM_OF_SLOPES: Error = Error::Unsupported {
    what: "a stream of a sliding window with linear biases",
    why: "what keeps the window knows no positions; use one of the two, or the whole sequence",
};

impl<T: Scalar> SoftmaxAttention<T> {
    /// Lets each query see only the last `window` keys up to its own position (Mistral 7B, Jiang et
    /// al., arXiv 2310.06825, section 2):
    ///
    /// ```text
    /// o_t = Σ_j e^{s_tj} v_j / Σ_j e^{s_tj},    t − window < j ≤ t
    /// ```
    ///
    /// Time is O(n·window), and a stream keeps the window only: it is that of a
    /// [`HybridAttention`] with this window and nothing behind it, whose state has
    /// `window·(head_dim + value_dim)` numbers from the first token on. All other options go with
    /// it, but there is no stream with linear biases. With [`Mask::Full`] it is
    /// [`Error::Unsupported`].
    ///
    /// ```
    /// use dijiang::{Attention, Mask, SoftmaxAttention};
    /// use ndarray::{Array2, array};
    ///
    /// let kernel = SoftmaxAttention::<f64>::new(1)?.with_window(2)?;
    /// let (x, v) = (Array2::zeros((3, 1)), array![[1.0], [2.0], [4.0]]);
    /// let out = kernel.forward(x.view(), x.view(), v.view(), Mask::Causal)?;
    /// assert_eq!(out, array![[1.0], [1.5], [3.0]]);
    /// assert_eq!(kernel.state_floats(1, 1_000_000)?, 4); // however many tokens
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `window` is 0. One that no memory can hold is reported by
    /// [`Attention::stream`].
    pub fn with_window(mut self, window: usize) -> Result<Self, Error> {
        check::at_least_one("window", window)?;
        self.window = Some(window);
        Ok(self)
    }

    /// The sliding window, if there is one.
    #[must_use]
    pub fn window(&self) -> Option<usize> {
        self.window
    }

    /// Refuses a mask without an order of queries where there is a window.
    pub(crate) fn check_mask(&self, mask: Mask) -> Result<(), Error> {
        if mask == Mask::Full && self.window.is_some() { Err(FULL_WINDOW) } else { Ok(()) }
    }

    /// What streams with a window are those of.
    pub(super) fn of_window(&self, window: usize) -> Result<HybridAttention<T>, Error> {
        if self.has_slopes() {
            return Err(STREAM_OF_SLOPES);
        }
        let builder = HybridAttention::builder(self.head_dim)
            .window(window)
            .sinks(0)
            .far(Far::none())
            .state_format(self.format);
        self.with_options(builder).build()
    }

    /// A stream that keeps a window.
    pub(super) fn window_stream(
        &self,
        window: usize,
        options: StreamOptions,
    ) -> Result<Box<dyn Stream<T>>, Error> {
        options.check_one_head()?;
        self.check(options.group)?;
        self.of_window(window)?.stream_with(options)
    }
}
