//! Which keys a query sees.

/// Which keys a query sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Mask {
    /// Every query sees every key (encoders, cross attention).
    Full,
    /// Query `t` sees keys `0..=t` (decoders); needs as many queries as keys.
    Causal,
}
