//! The gradients of sums of features that tokens enter long after they came, and whose answers
//! stand under a normaliser with those of other memories.
//!
//! With the weights `w_tj = φ(q_t)·φ(k_j)` of the tokens j that have entered before query t, the
//! logarithm `L_t` of the normaliser of all memories and `D_t = dO_t·O_t`,
//!
//! ```text
//! dφ_q(t) = e^{−L_t} Σ_j φ_k(j) (dO_t·v_j − D_t),
//! dφ_k(j) = Σ_t e^{−L_t} φ_q(t) (dO_t·v_j − D_t),    dv_j = Σ_t e^{−L_t} w_tj dO_t.
//! ```
//!
//! Blocks of queries come with the tokens that enter within them. A first pass takes the blocks in
//! order and has the sums over j; a second one takes them from the last to the first and has those
//! over t. Between them, `L_t` and `D_t` are kept. Features may [decay](decay).

mod decay;
mod queries;
pub(crate) mod sums;
mod tokens;
