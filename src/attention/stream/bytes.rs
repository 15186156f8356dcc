//! What a saved state keeps in fewer bits than its number type has.

use crate::attention::stream::StreamState;
use crate::error::Error;

impl<T> StreamState<T> {
    /// The same state with what is kept in fewer bits, as bytes of the kernel's own.
    #[must_use]
    pub fn with_bytes(self, bytes: Vec<u8>) -> Self {
        Self { bytes, ..self }
    }

    /// What is kept in fewer bits, once the count has been compared; what else is to be compared,
    /// [`numbers`](Self::numbers) does.
    ///
    /// # Errors
    ///
    /// [`Error::State`] if the count differs.
    pub fn bytes(&self, count: usize) -> Result<&[u8], Error> {
        if self.bytes.len() == count {
            return Ok(&self.bytes);
        }
        let (expected, found) = (count.to_string(), self.bytes.len().to_string());
        Err(Error::State { which: "bytes", expected, found })
    }
}
