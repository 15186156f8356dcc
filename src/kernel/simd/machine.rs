//! The SIMD levels of the machine, found at run time, and a loop run at one of them.

use crate::kernel::simd::{Level, Loop};
use pulp::NullaryFnOnce;

/// The levels of this machine.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Machine {
    /// AVX-512 (x86-64-v4).
    #[cfg(target_arch = "x86_64")]
    Avx512(pulp::x86::V4),
    /// AVX2 and FMA (x86-64-v3).
    #[cfg(target_arch = "x86_64")]
    Avx2(pulp::x86::V3),
    /// NEON.
    #[cfg(target_arch = "aarch64")]
    Neon(pulp::aarch64::Neon),
    /// Whatever the build's target has; correct everywhere.
    Portable,
}

impl Machine {
    /// The best level there is.
    #[inline]
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(level) = pulp::x86::V4::try_new() {
            return Self::Avx512(level);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(level) = pulp::x86::V3::try_new() {
            return Self::Avx2(level);
        }
        #[cfg(target_arch = "aarch64")]
        if let Some(level) = pulp::aarch64::Neon::try_new() {
            return Self::Neon(level);
        }
        Self::Portable
    }

    /// Every level there is, the best first.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        all.extend(pulp::x86::V3::try_new().map(Self::Avx2));
        #[cfg(target_arch = "x86_64")]
        all.extend(pulp::x86::V4::try_new().map(Self::Avx512));
        #[cfg(target_arch = "aarch64")]
        all.extend(pulp::aarch64::Neon::try_new().map(Self::Neon));
        all.reverse();
        all
    }

    /// Runs a loop at this level.
    #[inline]
    pub(crate) fn run<F: Loop>(self, work: F) -> F::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(level) => level.vectorize(At { work, level }),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(level) => level.vectorize(At { work, level }),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(level) => level.vectorize(At { work, level }),
            Self::Portable => portable(At { work, level: pulp::Scalar128b }),
        }
    }
}

#[inline(never)]
fn portable<F: NullaryFnOnce>(work: F) -> F::Output {
    work.call()
}

struct At<F, L> {
    work: F,
    level: L,
}

impl<F: Loop, L: Level> NullaryFnOnce for At<F, L> {
    type Output = F::Output;

    #[inline(always)]
    fn call(self) -> F::Output {
        self.work.run(self.level)
    }
}

impl Level for pulp::Scalar128b {}

#[cfg(target_arch = "aarch64")]
impl Level for pulp::aarch64::Neon {}
