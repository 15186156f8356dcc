//! Every way a call can fail, each with the numbers a person needs to mend it.

use core::fmt;

/// What was wrong with a call. The message says which argument and what to do.
///
/// No function of this crate panics on bad input, and a stream that returned an error is as it was
/// before the call.
///
/// ```
/// use dijiang::{Attention, Error, Mask, SoftmaxAttention};
/// use ndarray::Array2;
///
/// let kernel = SoftmaxAttention::<f32>::new(4)?;
/// let q = Array2::zeros((3, 4));
/// let k = Array2::zeros((3, 5));
/// let v = Array2::zeros((3, 2));
/// let error = kernel.forward(q.view(), k.view(), v.view(), Mask::Causal).unwrap_err();
/// assert_eq!(error, Error::Shape { which: "k", axis: "columns", expected: 4, found: 5 });
/// assert_eq!(
///     error.to_string(),
///     "`k` has 5 columns where 4 are needed: check its shape against the other arguments"
/// );
/// # Ok::<(), Error>(())
/// ```
///
/// <style>pre.item-decl { max-height: 11em; overflow: auto; }</style>
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// An array has the wrong size along one axis.
    Shape {
        /// The argument.
        which: &'static str,
        /// The axis, in words (`"rows"`, `"columns"`, `"heads"`, ..).
        axis: &'static str,
        /// The size that was needed.
        expected: usize,
        /// The size that was found.
        found: usize,
    },
    /// A size that must be at least one is zero.
    ZeroSize {
        /// The argument.
        which: &'static str,
    },
    /// A number is NaN or infinite.
    NotFinite {
        /// The argument.
        which: &'static str,
        /// Its row (token).
        row: usize,
        /// Its column.
        column: usize,
    },
    /// An option cannot be used.
    InvalidOption {
        /// The option.
        which: &'static str,
        /// Its value.
        found: String,
        /// The values that can be used.
        needed: &'static str,
    },
    /// A finite input led to a number beyond the range of the type.
    Overflow {
        /// What overflowed.
        which: &'static str,
        /// Its row (token).
        row: usize,
    },
    /// The normaliser of a query is zero, or so small that its digits are lost: the features of the
    /// query and of every key it may see do not overlap within the range of the type.
    Normalizer {
        /// The row (token) of the query.
        row: usize,
    },
    /// A query sees no key: a [key mask](crate::Head::with_key_mask) or
    /// [biases](crate::Head::with_bias) hide all, and there is no learned sink.
    NothingSeen {
        /// The row of the query.
        row: usize,
    },
    /// A sequence is longer than the kernel was made for.
    TooLong {
        /// The most tokens it takes.
        max_len: usize,
        /// The tokens of the sequence, in a stream with those before.
        found: usize,
    },
    /// The kernel has no such operation.
    Unsupported {
        /// The operation.
        what: &'static str,
        /// Why, and what to do instead.
        why: &'static str,
    },
    /// A saved state does not belong to this stream.
    State {
        /// What differs.
        which: &'static str,
        /// The value this stream has.
        expected: String,
        /// The value of the saved state.
        found: String,
    },
    /// A [`StatePlan`](crate::StatePlan) is one of another model.
    Plan {
        /// What differs.
        which: &'static str,
        /// The value this model has.
        expected: String,
        /// The value of the plan.
        found: String,
    },
    /// A parameter of a map or a kernel cannot be set, or its gradient not be added to.
    Parameter {
        /// Its name.
        name: String,
        /// What was found.
        found: String,
        /// What is needed.
        needed: String,
    },
    /// A tensor of a checkpoint is missing, or not what it must be.
    Tensor {
        /// Its full name.
        name: String,
        /// What it is.
        found: String,
        /// What is needed.
        needed: String,
    },
    /// A call of a layer failed in one head of one sequence. Of several this is the first, where
    /// heads of a [pool](crate::MultiHead::pooled) come last. Calls that are refused whatever the
    /// sequences hold ([`Shape`](Self::Shape), [`ZeroSize`](Self::ZeroSize),
    /// [`Unsupported`](Self::Unsupported)) name no head.
    InHead {
        /// The sequence, by its index in the batch.
        sequence: usize,
        /// The head.
        head: LayerHead,
        /// What went wrong there. Rows are those of the arrays of the layer.
        error: Box<Error>,
    },
}

/// The head of a layer that an [`Error::InHead`] is about.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayerHead {
    /// A query head.
    Query(usize),
    /// A head of keys and values, and where it is not known which of them, its query heads.
    Kv(usize),
    /// Heads of keys and values that share their entries, where it is not known which of them.
    Pool(Vec<usize>),
}

impl fmt::Display for LayerHead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Query(head) => write!(f, "query head {head}"),
            Self::Kv(head) => write!(f, "kv head {head}"),
            Self::Pool(heads) => write!(f, "the pool of kv heads {heads:?}"),
        }
    }
}

/// What overflows where values are huge.
pub(crate) const SUM_OF_VALUES: &str = "the weighted sum of values";

impl Error {
    /// Whether a sum of weighted values has left the range of the type, and nothing else has.
    pub(crate) fn is_of_values(&self) -> bool {
        matches!(self, Self::Overflow { which: SUM_OF_VALUES, .. })
    }

    /// What went wrong, without the sequence and head of a layer it went wrong in: the error
    /// inside of an [`InHead`](Self::InHead), any other as it is.
    ///
    /// ```
    /// use dijiang::{Error, Mask, MultiHead, SoftmaxAttention};
    /// use ndarray::Array4;
    ///
    /// let layer = MultiHead::new(SoftmaxAttention::<f32>::new(4)?, 4, 2)?;
    /// let (q, k) = (Array4::zeros((3, 4, 5, 4)), Array4::zeros((3, 2, 5, 4)));
    /// let mut v = Array4::zeros((3, 2, 5, 4));
    /// v[[2, 1, 3, 0]] = f32::NAN;
    /// let error =
    ///     layer.forward(q.view(), k.view(), v.view(), Mask::Causal, None).unwrap_err();
    /// assert!(error.to_string().starts_with("sequence 2, kv head 1: `v` is NaN"));
    /// assert_eq!(error.inner(), &Error::NotFinite { which: "v", row: 3, column: 0 });
    /// # Ok::<(), Error>(())
    /// ```
    #[must_use]
    pub fn inner(&self) -> &Self {
        if let Self::InHead { error, .. } = self { error.inner() } else { self }
    }

    /// The row that it is about, if it is one of a query or a token.
    fn row(&mut self) -> Option<&mut usize> {
        match self {
            Self::NotFinite { row, .. }
            | Self::Overflow { row, .. }
            | Self::Normalizer { row }
            | Self::NothingSeen { row } => Some(row),
            _ => None,
        }
    }

    /// The same error, of another row.
    pub(crate) fn map_row(mut self, of: impl FnOnce(usize) -> usize) -> Self {
        if let Some(row) = self.row() {
            *row = of(*row);
        }
        self
    }

    /// The same error of a chunk that began at `first_row`: rows count from the beginning of the
    /// call.
    pub(crate) fn in_chunk(mut self, first_row: usize) -> Self {
        if let Some(row) = self.row() {
            *row += first_row;
        }
        self
    }

    /// The same error of the tail of a sequence that began at key `first`: rows of keys, values and
    /// log decays count from the first key, others from the first query.
    pub(crate) fn of_tail(self, first: usize) -> Self {
        match self {
            Self::NotFinite { which: "k" | "v", .. } => self.in_chunk(first),
            error => error,
        }
    }

    /// The same error of the first row, where rows stand for the query heads of one token.
    pub(crate) fn of_first_row(mut self) -> Self {
        if let Some(row) = self.row() {
            *row = 0;
        }
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape { which: "k", axis: "rows", expected, found } => write!(
                f,
                "`k` has {found} rows where `q` has {expected}: with `Mask::Causal`, and in a \
                 stream, each query needs its own key; give a stream the earlier tokens first, or \
                 take `Mask::Full`, which allows any numbers"
            ),
            Self::Shape { which, axis, expected, found } => write!(
                f,
                "`{which}` has {found} {axis} where {expected} are needed: check its shape \
                 against the other arguments"
            ),
            Self::ZeroSize { which } => write!(f, "`{which}` is 0: pass at least 1"),
            Self::NotFinite { which, row, column } => {
                write!(
                    f,
                    "`{which}` is NaN or infinite at row {row}, column {column}: pass finite \
                     numbers only"
                )
            }
            Self::InvalidOption { which, found, needed } if found == "not set" => {
                write!(f, "`{which}` is not set: {needed}")
            }
            Self::InvalidOption { which, found, needed } => {
                write!(f, "`{which}` is {found}, which cannot be used: it must be {needed}")
            }
            Self::Overflow { which, row } => {
                write!(
                    f,
                    "{which} of row {row} left the range of the number type: scale the input \
                     down, or use f64"
                )
            }
            Self::Normalizer { row } => write!(
                f,
                "the normaliser of query row {row} is zero within the range of the number type: \
                 use f64, smaller norms, or a map whose features are never zero"
            ),
            Self::NothingSeen { row } => write!(
                f,
                "query row {row} sees no key: let it see one, or give the kernel a learned sink \
                 (`SoftmaxAttention::with_sink_logit`), with which its output is zero"
            ),
            Self::TooLong { max_len, found } => write!(
                f,
                "the sequence has {found} tokens where the kernel takes at most {max_len}: build \
                 it with a larger `max_len`, or begin anew"
            ),
            Self::Unsupported { what, why } => write!(f, "{what} is not supported: {why}"),
            Self::State { which, expected, found } => write!(
                f,
                "the saved state has {which} {found} where this stream has {expected}: restore it \
                 into a stream of the kernel that saved it"
            ),
            Self::Plan { which, expected, found } => write!(
                f,
                "the plan is of a model with {which} {found} where this one has {expected}: make \
                 a plan of this model"
            ),
            Self::Tensor { name, found, needed } => write!(
                f,
                "tensor `{name}` is {found} where {needed} is needed: check the file, the prefix \
                 of the names and the number of heads"
            ),
            Self::Parameter { name, found, needed } => write!(
                f,
                "the parameter `{name}` is {found} where {needed} is needed: take the names and \
                 shapes that `parameters()` gives"
            ),
            Self::InHead { sequence, head, error } => {
                write!(f, "sequence {sequence}, {head}: {error}")
            }
        }
    }
}

impl core::error::Error for Error {
    fn source(&self) -> Option<&(dyn core::error::Error + 'static)> {
        if let Self::InHead { error, .. } = self { Some(&**error) } else { None }
    }
}
