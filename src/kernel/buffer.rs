//! Buffers whose first element lies on a cache line: vectors that straddle two lines cost twice.

use crate::kernel::simd::Lanes;
use core::ops::{Deref, DerefMut};
use num_traits::Zero;

/// Cache lines of a page. What lies whole pages apart is taken for the same by the stores of a
/// core, which then wait for each other; so larger buffers begin in different parts of a page.
const PAGE: usize = 64;

/// Cache lines by which buffers on neighbouring pages are shifted, and after how many pages that
/// begins again.
const STAGGER: usize = 9;
const PAGES: usize = 7;

/// A slice of numbers, of any type, aligned to 64 bytes.
#[derive(Debug)]
pub struct Buffer<T> {
    data: Vec<T>,
    offset: usize,
    len: usize,
}

impl<T: Copy + Zero> Buffer<T> {
    pub(crate) const fn new() -> Self {
        Self { data: Vec::new(), offset: 0, len: 0 }
    }

    pub(crate) fn zeros(len: usize) -> Self {
        let mut buffer = Self::new();
        buffer.resize(len);
        buffer
    }

    /// Makes it `len` long, of any content. Allocates only to grow beyond what it ever was.
    #[inline]
    pub(crate) fn resize(&mut self, len: usize) {
        if self.offset + len > self.data.len() {
            *self = Self::of(T::zero(), len);
        }
        self.len = len;
    }

    /// Makes it longer: what it holds stays, and zeros follow. Allocates only to grow beyond what
    /// it ever was.
    pub(crate) fn grow(&mut self, len: usize) {
        let old = self.len;
        if self.offset + len > self.data.len() {
            let mut longer = Self::zeros(len);
            longer[..old].copy_from_slice(self);
            *self = longer;
        } else {
            self.len = len;
            self[old..].fill(T::zero());
        }
    }
}

impl<T: Clone> Buffer<T> {
    fn of(value: T, len: usize) -> Self {
        let line = 64 / size_of::<T>();
        let stagger = if len < PAGE * line { 0 } else { STAGGER * line };
        let data = vec![value; len + line + (PAGES - 1) * stagger];
        let page = data.as_ptr().addr() / (64 * PAGE) % PAGES;
        let offset = data.as_ptr().align_offset(64).min(line) + page * stagger;
        Self { data, offset, len }
    }
}

impl<T: Clone> Clone for Buffer<T> {
    fn clone(&self) -> Self {
        match self.first() {
            None => Self { data: Vec::new(), offset: 0, len: 0 },
            Some(value) => {
                let mut buffer = Self::of(value.clone(), self.len);
                buffer.clone_from_slice(self);
                buffer
            }
        }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.data[self.offset..self.offset + self.len]
    }
}

impl<T> DerefMut for Buffer<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.offset..self.offset + self.len]
    }
}

/// `n` rounded up to whole cache lines.
#[inline]
pub(crate) fn padded<T: Lanes>(n: usize) -> usize {
    n.next_multiple_of(T::PAD)
}
