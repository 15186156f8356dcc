//! Exact memory: the keys and values themselves, read by an exact softmax.

use crate::check;
use crate::error::Error;
use crate::memory::Memory;
use crate::memory::key_values::KeyValues;
use crate::memory::online_softmax::{QUERY_BLOCK, Tile, online_softmax_in_range};
use crate::memory::packed::Packed;
use crate::memory::partial::Partial;
use crate::memory::scoring::{Scoring, SoftCap};
use crate::memory::sight::Sight;
use crate::scalar::Scalar;
use crate::state_format::StateFormat;
use crate::views::rows;
use ndarray::{Array2, ArrayView2, CowArray, Ix2};

/// The keys and values of every token absorbed: `w(q, k) = exp(scale·q·k)`, exactly, with scores
/// that are capped if wanted ([`with_soft_cap`](Self::with_soft_cap)).
///
/// It grows by `head_dim + value_dim` numbers a token, which may be kept in fewer bits
/// ([`with_state_format`](Self::with_state_format)).
///
/// ```
/// use dijiang::{ExactMemory, Memory, Partial};
/// use ndarray::array;
///
/// let mut memory = ExactMemory::<f64>::new(2, 1, 1.0)?;
/// memory.absorb(array![[0.0, 0.0], [1.0, 0.0]].view(), array![[10.0], [20.0]].view())?;
/// let mut answer = Partial::new(1, 1)?;
/// memory.read(array![[3.0, 0.0]].view(), &mut answer)?;
/// // ln(e⁰ + e³)
/// assert!((answer.log_normalizer()[0] - (1.0 + 3f64.exp()).ln()).abs() < 1e-15);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "SavedExact<T>", into = "SavedExact<T>"))]
#[cfg_attr(
    feature = "serde",
    serde(bound(
        serialize = "T: Scalar + serde::Serialize",
        deserialize = "T: Scalar + serde::Deserialize<'de>"
    ))
)]
pub struct ExactMemory<T> {
    head_dim: usize,
    value_dim: usize,
    scoring: Scoring<T>,
    keys: Vec<T>,
    values: Vec<T>,
    /// What holds the tokens in their place, in a format of fewer bits.
    packed: Option<Packed>,
    tokens: usize,
}

impl<T: Scalar> PartialEq for ExactMemory<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.scoring, self.state_format()) == (other.scoring, other.state_format())
            && self.keys() == other.keys()
            && self.values() == other.values()
    }
}

impl<T: Scalar> ExactMemory<T> {
    /// An empty memory with weights `exp(scale·q·k)`.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if a dimension is 0, [`Error::InvalidOption`] if it is beyond 2³², or
    /// `scale` is not positive and finite.
    pub fn new(head_dim: usize, value_dim: usize, scale: f64) -> Result<Self, Error> {
        for (which, size) in [("head_dim", head_dim), ("value_dim", value_dim)] {
            check::at_least_one(which, size)?;
            check::array(which, size, 1)?;
        }
        let scale = T::from_f64(check::scale::<T>(Some(scale), head_dim)?);
        Ok(Self {
            head_dim,
            value_dim,
            scoring: Scoring::new(scale),
            keys: Vec::new(),
            values: Vec::new(),
            packed: None,
            tokens: 0,
        })
    }

    /// Caps the scores softly: `w(q, k) = exp(cap·tanh(scale·q·k/cap))`, see
    /// [`SoftmaxAttention::with_soft_cap`](crate::SoftmaxAttention::with_soft_cap).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if `cap` is not positive and finite.
    pub fn with_soft_cap(mut self, cap: f64) -> Result<Self, Error> {
        self.scoring.soft_cap = Some(SoftCap::new(cap)?);
        Ok(self)
    }

    /// Keeps keys and values in this format from now on; tokens that are there are rounded to it.
    ///
    /// ```
    /// use dijiang::{ExactMemory, Memory, StateFormat};
    /// use ndarray::array;
    ///
    /// let mut memory =
    ///     ExactMemory::<f64>::new(2, 2, 1.0)?.with_state_format(StateFormat::Q8);
    /// memory.absorb(array![[254.0, 1.4]].view(), array![[1.0, 0.0]].view())?;
    /// assert_eq!(memory.keys(), array![[254.0, 2.0]]); // in steps of 254/127
    /// assert_eq!((memory.state_floats(), memory.state_bytes()), (4, 8));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    #[must_use]
    pub fn with_state_format(mut self, format: StateFormat) -> Self {
        if format == self.state_format() {
            return self;
        }
        let (k, v) = (self.keys().into_owned(), self.values().into_owned());
        self.reset();
        self.packed = Packed::new(format, self.head_dim, self.value_dim);
        (self.keys, self.values) = (Vec::new(), Vec::new());
        self.push(k.view(), v.view());
        self
    }

    /// The format of keys and values, [`StateFormat::F32`] unless set.
    #[must_use]
    pub fn state_format(&self) -> StateFormat {
        self.packed.as_ref().map_or(StateFormat::F32, Packed::format)
    }

    /// The keys `[len, head_dim]`, as they are kept: a view, or a copy where they are in a format
    /// of fewer bits.
    #[must_use]
    pub fn keys(&self) -> CowArray<'_, T, Ix2> {
        match &self.packed {
            None => matrix(&self.keys, self.tokens, self.head_dim).into(),
            Some(packed) => {
                let number = |(token, c)| packed.key(token, c);
                Array2::from_shape_fn((self.tokens, self.head_dim), number).into()
            }
        }
    }

    /// The values `[len, value_dim]`, likewise.
    #[must_use]
    pub fn values(&self) -> CowArray<'_, T, Ix2> {
        match &self.packed {
            None => matrix(&self.values, self.tokens, self.value_dim).into(),
            Some(packed) => {
                let number = |(token, c)| packed.value(token, c);
                Array2::from_shape_fn((self.tokens, self.value_dim), number).into()
            }
        }
    }

    /// Both as a softmax reads them.
    pub(crate) fn key_values(&self) -> KeyValues<'_, T> {
        match &self.packed {
            None => KeyValues::Wide(
                matrix(&self.keys, self.tokens, self.head_dim),
                matrix(&self.values, self.tokens, self.value_dim),
            ),
            Some(packed) => KeyValues::Packed(packed, self.tokens),
        }
    }

    /// Tokens absorbed so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether no token has been absorbed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Forgets every token.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    fn soft_cap(&self) -> Option<f64> {
        self.scoring.soft_cap.map(SoftCap::cap)
    }

    /// Appends the tokens of another memory of the same shape, scale and cap; they are rounded if
    /// this one has another format.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if the dimensions differ, [`Error::InvalidOption`] if the scales or the
    /// caps do.
    pub fn merge(&mut self, other: &Self) -> Result<(), Error> {
        check::size("other", "key columns", self.head_dim, other.head_dim)?;
        check::size("other", "value columns", self.value_dim, other.value_dim)?;
        check::same_scale(self.scoring.scale, other.scoring.scale)?;
        let [own, found] = [self, other].map(Self::soft_cap);
        if own != found {
            return Err(Error::InvalidOption {
                which: "other",
                found: format!("a memory of soft cap {found:?}"),
                needed: "a memory of the same soft cap",
            });
        }
        self.push(other.keys().view(), other.values().view());
        Ok(())
    }

    pub(crate) fn dims(&self) -> (usize, usize) {
        (self.head_dim, self.value_dim)
    }

    pub(crate) fn scale(&self) -> T {
        self.scoring.scale
    }

    /// Appends tokens that have been checked.
    pub(crate) fn push(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) {
        let before = self.tokens;
        self.tokens += k.nrows();
        match &mut self.packed {
            None => {
                self.keys.extend(k.iter());
                self.values.extend(v.iter());
            }
            Some(packed) => {
                packed.make_room(self.tokens);
                for (token, (k, v)) in (before..).zip(k.outer_iter().zip(v.outer_iter())) {
                    packed.put(token, k, v);
                }
            }
        }
    }

    /// Appends the tokens as they are kept, in a format of fewer bits: see [`Packed::save`].
    pub(crate) fn save(&self, out: &mut Vec<u8>) {
        if let Some(packed) = &self.packed {
            (0..self.tokens).for_each(|token| packed.save(token, out));
        }
    }

    /// Takes tokens as they were kept in place of those that are there; false, and then empty, if
    /// they are no such tokens.
    #[must_use]
    pub(crate) fn restore(&mut self, tokens: usize, bytes: &[u8]) -> bool {
        self.reset();
        let size = self.token_bytes();
        let Some(packed) = &mut self.packed else { return false };
        packed.make_room(tokens);
        let whole = bytes.len() == tokens * size
            && bytes.chunks_exact(size).enumerate().all(|(i, bytes)| packed.restore(i, bytes));
        self.tokens = if whole { tokens } else { 0 };
        whole
    }

    /// The bytes of a token.
    pub(crate) fn token_bytes(&self) -> usize {
        let format = self.state_format();
        format.row_bytes::<T>(self.head_dim) + format.row_bytes::<T>(self.value_dim)
    }

    /// Forgets all but the first `tokens` tokens.
    pub(crate) fn truncate(&mut self, tokens: usize) {
        self.keys.truncate(tokens * self.head_dim);
        self.values.truncate(tokens * self.value_dim);
        self.tokens = self.tokens.min(tokens);
    }
}

fn matrix<T>(data: &[T], rows: usize, columns: usize) -> ArrayView2<'_, T> {
    ArrayView2::from_shape((rows, columns), data).expect("the memory holds whole rows")
}

impl<T: Scalar> Memory<T> for ExactMemory<T> {
    fn absorb(&mut self, k: ArrayView2<'_, T>, v: ArrayView2<'_, T>) -> Result<(), Error> {
        check::size("v", "columns", self.value_dim, v.ncols())?;
        check::keys_values(self.head_dim, k, v)?;
        self.push(k, v);
        Ok(())
    }

    fn read(&self, q: ArrayView2<'_, T>, answer: &mut Partial<T>) -> Result<(), Error> {
        check::queries(self.head_dim, q)?;
        check::size("answer", "rows", q.nrows(), answer.numerator.nrows())?;
        check::size("answer", "columns", self.value_dim, answer.numerator.ncols())?;
        let mut tile = Tile::new();
        for start in (0..q.nrows()).step_by(QUERY_BLOCK) {
            let q = rows(q, start..q.nrows().min(start + QUERY_BLOCK));
            let tokens = self.key_values();
            online_softmax_in_range(
                q,
                tokens,
                self.scoring,
                Sight::up_to(None),
                &mut tile,
                |block| block.add_in_range_to(answer, start),
            )?;
        }
        Ok(())
    }

    fn state_floats(&self) -> usize {
        self.tokens * (self.head_dim + self.value_dim)
    }

    fn state_bytes(&self) -> usize {
        self.tokens * self.token_bytes()
    }
}

/// What is saved.
#[cfg(feature = "serde")]
#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct SavedExact<T> {
    scale: T,
    #[serde(default)]
    soft_cap: Option<f64>,
    /// Of which the numbers are; rounding them again changes nothing.
    #[serde(default)]
    format: StateFormat,
    keys: Array2<T>,
    values: Array2<T>,
}

#[cfg(feature = "serde")]
impl<T: Scalar> From<ExactMemory<T>> for SavedExact<T> {
    fn from(memory: ExactMemory<T>) -> Self {
        Self {
            scale: memory.scoring.scale,
            soft_cap: memory.soft_cap(),
            format: memory.state_format(),
            keys: memory.keys().into_owned(),
            values: memory.values().into_owned(),
        }
    }
}

#[cfg(feature = "serde")]
impl<T: Scalar> TryFrom<SavedExact<T>> for ExactMemory<T> {
    type Error = Error;

    fn try_from(parts: SavedExact<T>) -> Result<Self, Error> {
        let mut memory = Self::new(parts.keys.ncols(), parts.values.ncols(), parts.scale.as_f64())?;
        if let Some(cap) = parts.soft_cap {
            memory = memory.with_soft_cap(cap)?;
        }
        memory = memory.with_state_format(parts.format);
        memory.absorb(parts.keys.view(), parts.values.view())?;
        Ok(memory)
    }
}
