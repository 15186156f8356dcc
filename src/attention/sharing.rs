//! How far the heads of a layer share a state.

/// How far the heads of a layer depend on each other, and share a state of a kernel:
/// [`Attention::sharing`](crate::Attention::sharing).
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Sharing {
    /// Each query head gets what it would get alone, so that those of a group may be answered one
    /// by one, on several threads.
    Head,
    /// The query heads of a group go together: the state may learn from what all of them read.
    #[default]
    Group,
    /// As `Group`; and several heads of keys and values may go together as well, with one budget
    /// of entries: [`MultiHead::pooled`](crate::MultiHead::pooled).
    Layer {
        /// What the kernels of all these heads must have in common.
        options: String,
        /// The most heads of keys and values that can share a budget; 1 if these options do not
        /// allow it.
        max_heads: usize,
    },
}
