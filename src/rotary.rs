//! Rotary position embedding: positions as angles, which a product of queries and keys sees as
//! differences.

pub(crate) mod angles;
mod frequencies;

use crate::check;
use crate::error::Error;
use crate::rotary::angles::{RotaryAngles, RotaryPairs};
use crate::rotary::frequencies::{check_dims, check_frequencies, formula, linear, llama3, yarn};
use crate::scalar::Scalar;
use ndarray::{ArrayView2, ArrayViewMut2};

/// Rotary position embedding (Su et al., arXiv 2104.09864, section 3.2.2), for queries and keys
/// before a kernel gets them.
///
/// A token at position `t` has each pair `(a, b)` of its first `dims` columns turned by the angle
/// `t·θ_i`; the other columns stay:
///
/// ```text
/// a' = a·cos(t·θ_i) − b·sin(t·θ_i),    b' = a·sin(t·θ_i) + b·cos(t·θ_i),    θ_i = base^(−2i/dims)
/// ```
///
/// so a query at `m` and a key at `n` have a product that depends on `m − n` alone. Angles, cosines
/// and sines are computed in `f64` whatever the number type, and depend on nothing but the
/// position: a sequence in pieces gets the bits of the whole.
///
/// ```
/// use dijiang::Rotary;
/// use ndarray::{Array2, array};
///
/// let rotary = Rotary::new(4)?;
/// let (q, k) = (array![[0.3, -0.5, 1.0, 0.2]], array![[0.1, 0.7, -0.4, 0.9]]);
/// let at = |x: &Array2<f64>, position| {
///     let mut turned = x.clone();
///     rotary.rotate_in_place(turned.view_mut(), position)?;
///     Ok::<_, dijiang::Error>(turned)
/// };
/// let product = |m, n| Ok::<_, dijiang::Error>(at(&q, m)?.row(0).dot(&at(&k, n)?.row(0)));
/// assert!((product(7, 5)? - product(1002, 1000)?).abs() < 1e-12);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "SavedRotary", into = "SavedRotary"))]
pub struct Rotary {
    head_dim: usize,
    base: f64,
    /// `θ_i`, one for each pair.
    frequencies: Vec<f64>,
    pairs: RotaryPairs,
}

impl Rotary {
    /// Turns all `head_dim` columns, in [`RotaryPairs::Halves`], with base 10 000.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` is 0, [`Error::InvalidOption`] if it is odd;
    /// [`partial`](Self::partial) leaves a column over.
    pub fn new(head_dim: usize) -> Result<Self, Error> {
        Self::partial(head_dim, head_dim)
    }

    /// Turns the first `dims` columns of `head_dim`, in [`RotaryPairs::Halves`], with base 10 000.
    /// With `dims` 0 nothing turns.
    ///
    /// ```
    /// use dijiang::{Rotary, RotaryPairs};
    ///
    /// let gpt_j = Rotary::partial(256, 64)?.with_pairs(RotaryPairs::Interleaved);
    /// assert_eq!((gpt_j.head_dim(), gpt_j.dims()), (256, 64));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if `head_dim` is 0, [`Error::InvalidOption`] if `dims` is odd or larger
    /// than `head_dim`.
    pub fn partial(head_dim: usize, dims: usize) -> Result<Self, Error> {
        check::at_least_one("head_dim", head_dim)?;
        check::array("head_dim", head_dim, 1)?;
        check_dims(head_dim, dims)?;
        let mut rotary =
            Self { head_dim, base: 10_000.0, frequencies: Vec::new(), pairs: RotaryPairs::Halves };
        rotary.frequencies = formula(rotary.base, dims);
        Ok(rotary)
    }

    /// As GPT-NeoX has it: turns the first `int(head_dim·rotary_pct)` columns, in
    /// [`RotaryPairs::Halves`]. Pythia has a `rotary_pct` of 0.25.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if `rotary_pct` is not from 0 to 1, or gives an odd number of
    /// columns; [`Error::ZeroSize`] if `head_dim` is 0.
    pub fn gpt_neox(head_dim: usize, rotary_pct: f64) -> Result<Self, Error> {
        if !(0.0..=1.0).contains(&rotary_pct) {
            let found = rotary_pct.to_string();
            return Err(Error::InvalidOption {
                which: "rotary_pct",
                found,
                needed: "a number from 0 to 1",
            });
        }
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss
        )]
        let dims = (head_dim as f64 * rotary_pct) as usize;
        Self::partial(head_dim, dims)
    }

    /// Sets the base (`rope_theta` of configurations), and the frequencies to
    /// `θ_i = base^(−2i/dims)`.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if `base` is not a finite number of at least 1.
    pub fn with_base(mut self, base: f64) -> Result<Self, Error> {
        if !(base.is_finite() && base >= 1.0) {
            let found = base.to_string();
            return Err(Error::InvalidOption {
                which: "base",
                found,
                needed: "a finite number of at least 1",
            });
        }
        self.base = base;
        self.frequencies = formula(base, self.dims());
        Ok(self)
    }

    /// Sets the frequencies `θ_i` of the pairs themselves, for models that depart from the formula,
    /// such as RetNet. They turn the first `2·frequencies.len()` columns.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if there are more than `head_dim/2`, or one is not a number of at
    /// most 10⁹ in absolute value.
    pub fn with_frequencies(mut self, frequencies: Vec<f64>) -> Result<Self, Error> {
        check_dims(self.head_dim, frequencies.len().saturating_mul(2))?;
        check_frequencies(&frequencies)?;
        self.frequencies = frequencies;
        Ok(self)
    }

    /// Stretches positions: `θ_i ← θ_i/factor` (position interpolation, Chen et al., arXiv
    /// 2306.15595; `rope_scaling` of type `linear`). Set the base before.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if `factor` is not positive and finite.
    pub fn with_linear_scaling(mut self, factor: f64) -> Result<Self, Error> {
        self.frequencies = linear(&self.frequencies, factor)?;
        Ok(self)
    }

    /// The frequencies of LLaMA 3.1 and later (`rope_scaling` of type `llama3`), by wavelength
    /// `λ_i = 2π/θ_i`. Set the base before.
    ///
    /// ```text
    /// θ_i ← θ_i                                  where λ_i < original_context/high_freq_factor
    /// θ_i ← θ_i/factor                           where λ_i > original_context/low_freq_factor
    /// θ_i ← (1 − s)·θ_i/factor + s·θ_i           between, with
    /// s = (original_context/λ_i − low_freq_factor)/(high_freq_factor − low_freq_factor)
    /// ```
    ///
    /// ```
    /// use dijiang::Rotary;
    ///
    /// // Llama 3.2 1B
    /// let rotary = Rotary::new(64)?.with_base(500_000.0)?;
    /// let scaled = rotary.clone().with_llama3_scaling(32.0, 1.0, 4.0, 8192)?;
    /// let (old, new) = (rotary.frequencies(), scaled.frequencies());
    /// assert_eq!(old[..15], new[..15]);
    /// assert!((18..32).all(|i| new[i] == old[i] / 32.0));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if a factor is not positive and finite, `high_freq_factor` is not
    /// above `low_freq_factor`, or `original_context` is 0.
    pub fn with_llama3_scaling(
        mut self,
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_context: usize,
    ) -> Result<Self, Error> {
        let bands = [low_freq_factor, high_freq_factor];
        self.frequencies = llama3(&self.frequencies, factor, bands, original_context)?;
        Ok(self)
    }

    /// The frequencies of YaRN (Peng et al., arXiv 2309.00071, section 3.2), with the ramp over
    /// pairs of its released code, whose ends are whole: `beta_fast` 32 and `beta_slow` 1 in most
    /// models. Set the base before.
    ///
    /// ```text
    /// θ_i ← r_i·θ_i/factor + (1 − r_i)·θ_i,   r_i = (i − low)/(high − low), from 0 to 1,
    /// low = ⌊p(beta_fast)⌋,   high = ⌈p(beta_slow)⌉,
    /// p(β) = dims·ln(original_context/(2πβ))/(2 ln base)
    /// ```
    ///
    /// YaRN also multiplies queries and keys by `m = 0.1·ln(factor) + 1`. That is the caller's:
    /// set the scale of the kernel to `m²/√d`.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if `factor` is not positive and finite, a β is not, `beta_fast` is
    /// below `beta_slow`, `original_context` is 0, or the base is 1.
    pub fn with_yarn_scaling(
        mut self,
        factor: f64,
        original_context: usize,
        beta_fast: f64,
        beta_slow: f64,
    ) -> Result<Self, Error> {
        let betas = [beta_fast, beta_slow];
        self.frequencies = yarn(&self.frequencies, self.base, factor, betas, original_context)?;
        Ok(self)
    }

    /// Sets which columns turn together, [`RotaryPairs::Halves`] unless set.
    #[must_use]
    pub fn with_pairs(mut self, pairs: RotaryPairs) -> Self {
        self.pairs = pairs;
        self
    }

    /// Columns of a head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// How many of them turn, the first.
    #[must_use]
    pub fn dims(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// `θ_i` of the pairs `[dims/2]`.
    #[must_use]
    pub fn frequencies(&self) -> &[f64] {
        &self.frequencies
    }

    /// Which columns turn together.
    #[must_use]
    pub fn pairs(&self) -> RotaryPairs {
        self.pairs
    }

    /// Writes `x [n, head_dim]`, tokens at the positions `first_position..first_position + n`,
    /// turned over whatever `out` held.
    ///
    /// Numbers are not looked at: NaN in a token stays in that token, and the kernel reports it.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] if `x` has not `head_dim` columns or `out` another shape,
    /// [`Error::InvalidOption`] if `n·dims/2` is over 2³².
    pub fn rotate<T: Scalar>(
        &self,
        x: ArrayView2<'_, T>,
        first_position: usize,
        mut out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        check::size("x", "columns", self.head_dim, x.ncols())?;
        check::size("out", "rows", x.nrows(), out.nrows())?;
        check::size("out", "columns", x.ncols(), out.ncols())?;
        out.assign(&x);
        self.rotate_in_place(out, first_position)
    }

    /// Turns `x [n, head_dim]`, tokens at the positions `first_position..first_position + n`, in
    /// place.
    ///
    /// # Errors
    ///
    /// As [`rotate`](Self::rotate).
    pub fn rotate_in_place<T: Scalar>(
        &self,
        x: ArrayViewMut2<'_, T>,
        first_position: usize,
    ) -> Result<(), Error> {
        self.angles(first_position, x.nrows())?.rotate_in_place(x)
    }

    /// Cosines and sines of the positions `first_position..first_position + tokens`, once for all
    /// heads, layers and sequences.
    ///
    /// ```
    /// use dijiang::Rotary;
    /// use ndarray::Array2;
    ///
    /// let (n, heads, d) = (10, 4, 16);
    /// let angles = Rotary::new(d)?.angles(0, n)?;
    /// for layer in 0..2 {
    ///     let mut q = Array2::<f32>::ones((n, heads * d)); // x·W_q
    ///     if let Ok(q) = q.view_mut().into_shape_with_order((n, heads, d)) {
    ///         angles.rotate_heads_in_place(q)?;
    ///     }
    ///     assert!(q.iter().any(|&x| x != 1.0));
    /// }
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] if `tokens·dims/2` is over 2³².
    pub fn angles<T: Scalar>(
        &self,
        first_position: usize,
        tokens: usize,
    ) -> Result<RotaryAngles<T>, Error> {
        let mut angles = RotaryAngles::new();
        self.set_angles(&mut angles, first_position, tokens)?;
        Ok(angles)
    }

    /// As [`angles`](Self::angles), in the memory of others.
    pub(crate) fn set_angles<T: Scalar>(
        &self,
        angles: &mut RotaryAngles<T>,
        first_position: usize,
        tokens: usize,
    ) -> Result<(), Error> {
        check::array("tokens", tokens, self.frequencies.len())?;
        angles.set(self.head_dim, self.pairs, &self.frequencies, first_position, tokens);
        Ok(())
    }
}

/// What is stored.
#[cfg(feature = "serde")]
#[derive(serde::Serialize, serde::Deserialize)]
struct SavedRotary {
    head_dim: usize,
    base: f64,
    frequencies: Vec<f64>,
    pairs: RotaryPairs,
}

#[cfg(feature = "serde")]
impl From<Rotary> for SavedRotary {
    fn from(Rotary { head_dim, base, frequencies, pairs }: Rotary) -> Self {
        Self { head_dim, base, frequencies, pairs }
    }
}

#[cfg(feature = "serde")]
impl TryFrom<SavedRotary> for Rotary {
    type Error = Error;

    fn try_from(saved: SavedRotary) -> Result<Self, Error> {
        let SavedRotary { head_dim, base, frequencies, pairs } = saved;
        Ok(Self::partial(head_dim, 0)?
            .with_base(base)?
            .with_frequencies(frequencies)?
            .with_pairs(pairs))
    }
}
