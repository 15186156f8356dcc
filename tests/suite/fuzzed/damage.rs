//! Files that were good.

use arbitrary::{Result, Unstructured};

/// Bytes like these, with some changed, left out or added, most of them within the header.
pub fn damaged(u: &mut Unstructured<'_>, mut bytes: Vec<u8>, header: usize) -> Result<Vec<u8>> {
    for _ in 0..u.int_in_range(0..=6)? {
        if bytes.is_empty() {
            break;
        }
        // headers come first, and matter most
        let most = if u.ratio(7, 8)? { bytes.len().min(header) } else { bytes.len() };
        let at = u.choose_index(most)?;
        match u.int_in_range(0..=9)? {
            0 => bytes.truncate(at),
            1 => _ = bytes.remove(at),
            2 => bytes.insert(at, u.arbitrary()?),
            3 => bytes[at] ^= 1 << u.int_in_range(0..=7)?,
            4 => bytes[at] = *u.choose(b"0919-.\"{}[],:")?,
            5 => bytes[at] = u8::MAX,
            _ => bytes[at] = u.arbitrary()?,
        }
    }
    Ok(bytes)
}
