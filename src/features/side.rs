//! The two sides of a product.

/// Whether queries or keys are mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Queries.
    Query,
    /// Keys.
    Key,
}

impl Side {
    /// The argument.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Query => "q",
            Self::Key => "k",
        }
    }
}
