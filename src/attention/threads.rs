//! How many threads a call may use.

/// How many threads a call may use, with feature `rayon`. The result is the same, bit for bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Threads {
    /// The calling thread only: the caller has work for the others.
    One,
    /// Those of the current pool, where the work is large enough for it.
    #[default]
    Pool,
}

impl Threads {
    /// Whether there may be more than one.
    #[cfg_attr(not(feature = "rayon"), allow(dead_code))]
    pub(crate) fn are_several(self) -> bool {
        self == Self::Pool
    }
}
