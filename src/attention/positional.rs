//! Kernels whose queries and keys are changed by their positions before a kernel inside gets them.

use super::{Attention, HeadCall, Mask, ONE_HEAD, Scratch, Stream, StreamState};
use crate::rotary::angles::RotaryAngles;
use crate::{Error, Rotary, Scalar, check, kernel};
use core::fmt::Debug;
use ndarray::{Array2, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};
use std::sync::Arc;

/// What positions do to queries and keys.
pub(crate) trait Positions: Debug + Send + Sync + 'static {
    /// What saved states are marked with.
    const NAME: &'static str;

    /// Columns that come.
    fn head_dim(&self) -> usize;

    /// Columns that the kernel inside gets.
    fn inner_dim(&self) -> usize;

    /// The angles of positions.
    fn rotary(&self) -> &Rotary;

    /// Fails unless every position before `end` has a meaning.
    fn check_end(&self, end: usize) -> Result<(), Error>;

    /// Changes `x [n, head_dim]`, at the positions of the angles, to `out [n, inner_dim]`.
    fn place<T: Scalar>(
        &self,
        angles: &RotaryAngles<T>,
        x: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error>;
}

impl Positions for Rotary {
    const NAME: &'static str = "rotary";

    fn head_dim(&self) -> usize {
        self.head_dim()
    }

    fn inner_dim(&self) -> usize {
        self.head_dim()
    }

    fn rotary(&self) -> &Rotary {
        self
    }

    fn check_end(&self, _end: usize) -> Result<(), Error> {
        Ok(())
    }

    fn place<T: Scalar>(
        &self,
        angles: &RotaryAngles<T>,
        x: ArrayView2<'_, T>,
        mut out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        out.assign(&x);
        angles.rotate_in_place(out)
    }
}

/// Queries and keys as the kernel inside gets them. Grows to the largest call.
#[derive(Debug)]
pub(crate) struct Placed<T> {
    angles: RotaryAngles<T>,
    q: Vec<T>,
    k: Vec<T>,
}

impl<T: Scalar> Default for Placed<T> {
    fn default() -> Self {
        Self { angles: RotaryAngles::new(), q: Vec::new(), k: Vec::new() }
    }
}

impl<T: Scalar> Placed<T> {
    /// Checks the numbers of `q [group, n_q, d]` and `k [n_k, d]`, whose shapes have been checked,
    /// and changes them from position `first` on.
    fn place<P: Positions>(
        &mut self,
        positions: &P,
        first: usize,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
    ) -> Result<(ArrayView3<'_, T>, ArrayView2<'_, T>), Error> {
        let ((group, queries, _), keys, dim) = (q.dim(), k.nrows(), positions.inner_dim());
        positions.check_end(first.saturating_add(queries.max(keys)))?;
        // before the change, which would spread what is not finite over other columns
        q.outer_iter().try_for_each(|q| check::finite("q", q))?;
        check::finite("k", k)?;
        let Self { angles, q: placed_q, k: placed_k } = self;
        let placed_q = resized(placed_q, [group, queries, dim])?;
        let placed_k = resized(placed_k, [1, keys, dim])?;
        positions.rotary().set_angles(angles, first, queries)?;
        for (q, out) in
            q.outer_iter().zip(view(&mut *placed_q, group, queries, dim).outer_iter_mut())
        {
            positions.place(angles, q, out)?;
        }
        if keys != queries {
            positions.rotary().set_angles(angles, first, keys)?;
        }
        positions.place(
            angles,
            k,
            view(&mut *placed_k, 1, keys, dim).index_axis_move(Axis(0), 0),
        )?;
        for (x, tokens) in [(&*placed_q, queries), (&*placed_k, keys)] {
            if !kernel::all_finite(x) {
                let at = x.iter().position(|x| !x.is_finite()).unwrap_or(0);
                return Err(Error::Overflow {
                    which: "the size of the vector",
                    row: at / dim % tokens,
                });
            }
        }
        let q = ArrayView3::from_shape((group, queries, dim), placed_q).expect("resized");
        Ok((q, ArrayView2::from_shape((keys, dim), placed_k).expect("resized")))
    }
}

/// So many numbers of a buffer.
fn resized<T: Scalar>(buffer: &mut Vec<T>, shape: [usize; 3]) -> Result<&mut [T], Error> {
    check::array("the number of tokens", shape[1], shape[0].saturating_mul(shape[2]))?;
    let len = shape.iter().product();
    if buffer.len() < len {
        buffer.resize(len, T::zero());
    }
    Ok(&mut buffer[..len])
}

fn view<T>(x: &mut [T], group: usize, tokens: usize, dim: usize) -> ArrayViewMut3<'_, T> {
    ArrayViewMut3::from_shape((group, tokens, dim), x).expect("resized")
}

/// A kernel behind a change of queries and keys. The position of a stream's next token is the
/// length of the stream inside, so that a reset, a rollback or a restored state need nothing more.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Positional<P, A> {
    positions: Arc<P>,
    kernel: A,
}

impl<P, A> Positional<P, A> {
    pub(crate) fn new(positions: P, kernel: A) -> Self {
        Self { positions: Arc::new(positions), kernel }
    }

    pub(crate) fn positions(&self) -> &P {
        &self.positions
    }

    pub(crate) fn kernel(&self) -> &A {
        &self.kernel
    }
}

impl<P: Positions, A> Positional<P, A> {
    fn wrap<T: Scalar>(&self, stream: Box<dyn Stream<T>>, value_dim: usize) -> Box<dyn Stream<T>> {
        Box::new(PositionalStream {
            positions: Arc::clone(&self.positions),
            stream,
            value_dim,
            placed: Placed::default(),
        })
    }

    /// Work with placed queries and keys, in a buffer of the scratch. A stack of them: kernels of
    /// this kind may be nested.
    fn placed<T: Scalar>(
        &self,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        scratch: &mut Scratch<T>,
        work: impl FnOnce(ArrayView3<'_, T>, ArrayView2<'_, T>, &mut Scratch<T>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut placed = scratch.placed.pop().unwrap_or_default();
        let result = placed.place(&*self.positions, 0, q, k).and_then(|(q, k)| work(q, k, scratch));
        scratch.placed.push(placed);
        result
    }
}

impl<T: Scalar, P: Positions, A: Attention<T>> Attention<T> for Positional<P, A> {
    fn forward_into(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        self.forward_with(q, k, v, mask, out, &mut Scratch::new())
    }

    fn forward_with(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        out: ArrayViewMut2<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        check::forward(self.positions.head_dim(), q, k, v, mask, &out)?;
        self.placed(q.insert_axis(Axis(0)), k, scratch, |q, k, scratch| {
            self.kernel.forward_with(q.index_axis_move(Axis(0), 0), k, v, mask, out, scratch)
        })
    }

    fn forward_gated(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        log_decay: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        check::forward(self.positions.head_dim(), q, k, v, Mask::Causal, &out)?;
        self.placed(q.insert_axis(Axis(0)), k, scratch, |q, k, scratch| {
            self.kernel.forward_gated(q.index_axis_move(Axis(0), 0), k, v, log_decay, out, scratch)
        })
    }

    fn is_gated(&self) -> bool {
        self.kernel.is_gated()
    }

    fn forward_group(
        &self,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mask: Mask,
        mut out: ArrayViewMut3<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), Error> {
        check::size("out", "heads", q.len_of(Axis(0)), out.len_of(Axis(0)))?;
        for (q, out) in q.outer_iter().zip(out.outer_iter_mut()) {
            check::forward(self.positions.head_dim(), q, k, v, mask, &out)?;
        }
        if q.is_empty() {
            return Ok(());
        }
        self.placed(q, k, scratch, |q, k, scratch| {
            self.kernel.forward_group(q, k, v, mask, out, scratch)
        })
    }

    fn forward_probed(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        value_dim: usize,
        mask: Mask,
    ) -> Result<Array2<T>, Error> {
        let mut out = Array2::zeros((q.nrows(), v.ncols()));
        check::forward(self.positions.head_dim(), q, k, v, mask, &out.view_mut())?;
        self.placed(q.insert_axis(Axis(0)), k, &mut Scratch::new(), |q, k, _| {
            out =
                self.kernel.forward_probed(q.index_axis_move(Axis(0), 0), k, v, value_dim, mask)?;
            Ok(())
        })?;
        Ok(out)
    }

    fn state_floats(&self, value_dim: usize, tokens: usize) -> Result<usize, Error> {
        self.kernel.state_floats(value_dim, tokens)
    }

    fn stream(&self, value_dim: usize) -> Result<Box<dyn Stream<T>>, Error> {
        Ok(self.wrap(self.kernel.stream(value_dim)?, value_dim))
    }

    fn group_stream(
        &self,
        group: usize,
        value_dim: usize,
    ) -> Result<Option<Box<dyn Stream<T>>>, Error> {
        Ok(self.kernel.group_stream(group, value_dim)?.map(|stream| self.wrap(stream, value_dim)))
    }

    fn heads_are_independent(&self) -> bool {
        self.kernel.heads_are_independent()
    }

    fn log_weights(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
    ) -> Result<Option<Array2<f64>>, Error> {
        check::size("q", "columns", self.positions.head_dim(), q.ncols())?;
        check::size("k", "columns", self.positions.head_dim(), k.ncols())?;
        let mut placed = Placed::default();
        let (q, k) = placed.place(&*self.positions, 0, q.insert_axis(Axis(0)), k)?;
        self.kernel.log_weights(q.index_axis_move(Axis(0), 0), k)
    }
}

/// A stream of the kernel inside, and what its calls need.
#[derive(Debug)]
struct PositionalStream<T: Scalar, P> {
    positions: Arc<P>,
    stream: Box<dyn Stream<T>>,
    value_dim: usize,
    placed: Placed<T>,
}

impl<T: Scalar, P: Positions> Stream<T> for PositionalStream<T, P> {
    fn extend(
        &mut self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        self.extend_group(q.insert_axis(Axis(0)), k, v, out.insert_axis(Axis(0)))
    }

    fn extend_gated(
        &mut self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        log_decay: ArrayView2<'_, T>,
        out: ArrayViewMut2<'_, T>,
    ) -> Result<(), Error> {
        let (q, out) = (q.insert_axis(Axis(0)), out.insert_axis(Axis(0)));
        self.extend_heads(&mut [HeadCall { q, k, v, log_decay: Some(log_decay), out }])
    }

    fn group(&self) -> usize {
        self.stream.group()
    }

    fn extend_group(
        &mut self,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        out: ArrayViewMut3<'_, T>,
    ) -> Result<(), Error> {
        self.extend_heads(&mut [HeadCall { q, k, v, log_decay: None, out }])
    }

    fn extend_heads(&mut self, calls: &mut [HeadCall<'_, T>]) -> Result<(), Error> {
        let [HeadCall { q, k, v, log_decay, out }] = calls else { return Err(ONE_HEAD) };
        check::extend_group(
            self.positions.head_dim(),
            self.value_dim,
            self.stream.group(),
            *q,
            *k,
            *v,
            out,
        )?;
        let (q, k) = self.placed.place(&*self.positions, self.stream.len(), *q, *k)?;
        self.stream.extend_heads(&mut [HeadCall {
            q,
            k,
            v: *v,
            log_decay: *log_decay,
            out: out.view_mut(),
        }])
    }

    fn len(&self) -> usize {
        self.stream.len()
    }

    fn state_floats(&self) -> usize {
        self.stream.state_floats()
    }

    fn clone_box(&self) -> Box<dyn Stream<T>> {
        Box::new(Self {
            positions: Arc::clone(&self.positions),
            stream: self.stream.clone_box(),
            value_dim: self.value_dim,
            placed: Placed::default(),
        })
    }

    fn reset(&mut self) {
        self.stream.reset();
    }

    fn stay_on_one_thread(&mut self) {
        self.stream.stay_on_one_thread();
    }

    fn checkpoint(&mut self) -> bool {
        self.stream.checkpoint()
    }

    fn rollback(&mut self) -> Result<(), Error> {
        self.stream.rollback()
    }

    fn save(&self) -> Result<StreamState<T>, Error> {
        let state = self.stream.save()?;
        Ok(StreamState { kernel: format!("{} {}", P::NAME, state.kernel), ..state })
    }

    fn restore(&mut self, state: &StreamState<T>) -> Result<(), Error> {
        match state.kernel.split_once(' ') {
            Some((name, kernel)) if name == P::NAME => {
                self.stream.restore(&StreamState { kernel: kernel.to_owned(), ..state.clone() })
            }
            _ => {
                let found = state.kernel.clone();
                Err(Error::State { which: "kernel", expected: format!("{} ..", P::NAME), found })
            }
        }
    }
}

/// Implements [`Attention`] for a type by a kernel inside.
macro_rules! attention_by {
    ([$($generics:tt)*] $type:ty, $this:ident => $kernel:expr) => {
        impl<$($generics)*> $crate::Attention<T> for $type {
            fn forward_into(
                &self,
                q: ndarray::ArrayView2<'_, T>,
                k: ndarray::ArrayView2<'_, T>,
                v: ndarray::ArrayView2<'_, T>,
                mask: $crate::Mask,
                out: ndarray::ArrayViewMut2<'_, T>,
            ) -> Result<(), $crate::Error> {
                let $this = self;
                $kernel.forward_into(q, k, v, mask, out)
            }

            fn forward_with(
                &self,
                q: ndarray::ArrayView2<'_, T>,
                k: ndarray::ArrayView2<'_, T>,
                v: ndarray::ArrayView2<'_, T>,
                mask: $crate::Mask,
                out: ndarray::ArrayViewMut2<'_, T>,
                scratch: &mut $crate::Scratch<T>,
            ) -> Result<(), $crate::Error> {
                let $this = self;
                $kernel.forward_with(q, k, v, mask, out, scratch)
            }

            fn forward_gated(
                &self,
                q: ndarray::ArrayView2<'_, T>,
                k: ndarray::ArrayView2<'_, T>,
                v: ndarray::ArrayView2<'_, T>,
                log_decay: ndarray::ArrayView2<'_, T>,
                out: ndarray::ArrayViewMut2<'_, T>,
                scratch: &mut $crate::Scratch<T>,
            ) -> Result<(), $crate::Error> {
                let $this = self;
                $kernel.forward_gated(q, k, v, log_decay, out, scratch)
            }

            fn is_gated(&self) -> bool {
                let $this = self;
                $kernel.is_gated()
            }

            fn forward_group(
                &self,
                q: ndarray::ArrayView3<'_, T>,
                k: ndarray::ArrayView2<'_, T>,
                v: ndarray::ArrayView2<'_, T>,
                mask: $crate::Mask,
                out: ndarray::ArrayViewMut3<'_, T>,
                scratch: &mut $crate::Scratch<T>,
            ) -> Result<(), $crate::Error> {
                let $this = self;
                $kernel.forward_group(q, k, v, mask, out, scratch)
            }

            fn forward_probed(
                &self,
                q: ndarray::ArrayView2<'_, T>,
                k: ndarray::ArrayView2<'_, T>,
                v: ndarray::ArrayView2<'_, T>,
                value_dim: usize,
                mask: $crate::Mask,
            ) -> Result<ndarray::Array2<T>, $crate::Error> {
                let $this = self;
                $kernel.forward_probed(q, k, v, value_dim, mask)
            }

            fn state_floats(&self, value_dim: usize, tokens: usize) -> Result<usize, $crate::Error> {
                let $this = self;
                $kernel.state_floats(value_dim, tokens)
            }

            fn stream(&self, value_dim: usize) -> Result<Box<dyn $crate::Stream<T>>, $crate::Error> {
                let $this = self;
                $kernel.stream(value_dim)
            }

            fn group_stream(
                &self,
                group: usize,
                value_dim: usize,
            ) -> Result<Option<Box<dyn $crate::Stream<T>>>, $crate::Error> {
                let $this = self;
                $kernel.group_stream(group, value_dim)
            }

            fn heads_are_independent(&self) -> bool {
                let $this = self;
                $kernel.heads_are_independent()
            }

            fn as_hybrid(&self) -> Option<&$crate::HybridAttention<T>> {
                let $this = self;
                $kernel.as_hybrid()
            }

            fn log_weights(
                &self,
                q: ndarray::ArrayView2<'_, T>,
                k: ndarray::ArrayView2<'_, T>,
            ) -> Result<Option<ndarray::Array2<f64>>, $crate::Error> {
                let $this = self;
                $kernel.log_weights(q, k)
            }
        }
    };
}
pub(crate) use attention_by;

attention_by!([T: Scalar, A: Attention<T> + ?Sized] Arc<A>, this => (**this));
attention_by!([T: Scalar, A: Attention<T> + ?Sized] Box<A>, this => (**this));
