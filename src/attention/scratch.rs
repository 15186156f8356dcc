//! Working memory that a caller lends to kernels.

use crate::attention::threads::Threads;
use core::any::Any;
use core::fmt::Debug;
use core::marker::PhantomData;

/// Working memory for [`Attention::forward_heads`](crate::Attention::forward_heads): it grows to
/// what the largest call needed and says nothing about any call. Any kernel may use the memory of
/// any other.
///
/// One for each thread that computes; a stream has its own.
///
/// ```
/// use dijiang::{Attention, Head, LinearAttention, Mask, Performer, Scratch};
/// use ndarray::Array2;
///
/// let kernel = LinearAttention::new(Performer::<f32>::new(8, 16, 0)?);
/// let mut scratch = Scratch::new();
/// let mut out = Array2::zeros((100, 8));
/// for layer in 0..3 {
///     let x = Array2::from_elem((100, 8), layer as f32);
///     let head = Head::new(x.view(), x.view(), x.view(), out.view_mut());
///     kernel.forward_heads(&mut [head], Mask::Causal, &mut scratch)?; // allocates at first only
///     assert!(out.iter().all(|y| (y - layer as f32).abs() < 1e-5));
/// }
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug)]
pub struct Scratch<T> {
    /// What kernels keep here, each a type of its own.
    parts: Vec<Box<dyn Part>>,
    threads: Threads,
    number: PhantomData<T>,
}

/// Anything that a kernel keeps.
trait Part: Any + Debug + Send {}

impl<P: Any + Debug + Send> Part for P {}

impl<T> Scratch<T> {
    /// Memory that has allocated nothing yet, for calls that may use the threads of the pool.
    #[must_use]
    pub fn new() -> Self {
        Self::with_threads(Threads::default())
    }

    /// Memory for calls that may use so many threads.
    #[must_use]
    pub fn with_threads(threads: Threads) -> Self {
        Self { parts: Vec::new(), threads, number: PhantomData }
    }

    /// The threads that a call may use.
    #[must_use]
    pub fn threads(&self) -> Threads {
        self.threads
    }

    /// Runs `work` with the memory of type `P`, made when it is first asked for, and with the rest
    /// of the scratch: a kernel with another one inside hands that on.
    ///
    /// ```
    /// use dijiang::Scratch;
    ///
    /// #[derive(Debug, Default)]
    /// struct Weights(Vec<f32>); // a type of the kernel's own, so that no other one changes it
    ///
    /// let mut scratch = Scratch::<f32>::new();
    /// let sum: f32 = scratch.with_part(|weights: &mut Weights, _| {
    ///     weights.0.resize(10, 0.5);
    ///     weights.0.iter().sum()
    /// });
    /// assert_eq!(sum, 5.0);
    /// ```
    pub fn with_part<P, R>(&mut self, work: impl FnOnce(&mut P, &mut Self) -> R) -> R
    where
        P: Default + Debug + Send + 'static,
    {
        // From the end, and back to the end: a kernel within itself finds its own again.
        let place = self.parts.iter().rposition(|part| (&**part as &dyn Any).is::<P>());
        let mut part = match place {
            Some(index) => self.parts.remove(index),
            None => Box::new(P::default()),
        };
        let result = match (&mut *part as &mut dyn Any).downcast_mut() {
            Some(part) => work(part, self),
            None => work(&mut P::default(), self),
        };
        self.parts.push(part);
        result
    }
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self::new()
    }
}
