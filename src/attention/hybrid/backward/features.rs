//! Hybrids with sums of features behind the window: a pass over the blocks from the first to the
//! last, and one back.

use crate::attention::hybrid::backward::flow::{Flow, Held};
use crate::attention::hybrid::backward::head::{BLOCK, OneHead};
use crate::attention::hybrid::backward::log::Log;
use crate::attention::hybrid::far::features::FarFeatures;
use crate::attention::hybrid::parameters::FAR;
use crate::error::Error;
use crate::kernel::buffer::{Buffer, padded};
use crate::mask::Mask;
use crate::memory::linear::backward::late::sums::{Asking, Entering, LateSums};
use crate::memory::linear::decay::Decay;
use crate::memory::linear::pass::Pass;
use crate::memory::seen_rows::SeenBlock;
use crate::scalar::Scalar;
use crate::views;
use core::ops::Range;
use ndarray::{ArrayView2, ArrayViewMut2, Axis};

/// Rows that do not lie one after the other.
#[derive(Debug)]
struct Rows<T> {
    dim: (usize, usize),
    numbers: Buffer<T>,
}

impl<T: Scalar> Rows<T> {
    fn new() -> Self {
        Self { dim: (0, 0), numbers: Buffer::new() }
    }

    fn resize(&mut self, rows: usize, columns: usize) {
        self.dim = (rows, columns);
        self.numbers.resize(rows * columns);
    }

    /// Copies rows of `x`.
    fn gather(&mut self, x: ArrayView2<'_, T>, positions: &[usize]) {
        self.resize(positions.len(), x.ncols());
        for (to, &position) in self.numbers.chunks_exact_mut(x.ncols()).zip(positions) {
            to.iter_mut().zip(views::row(x, position)).for_each(|(to, &x)| *to = x);
        }
    }

    /// Adds to rows of `x`.
    fn add_to(&self, x: &mut ArrayViewMut2<'_, T>, positions: &[usize]) {
        for (from, &position) in self.numbers.chunks_exact(x.ncols()).zip(positions) {
            let to = x.index_axis_mut(Axis(0), position);
            to.into_iter().zip(from).for_each(|(to, &x)| *to += x);
        }
    }

    fn zeros(&mut self, like: &Self) -> ArrayViewMut2<'_, T> {
        self.resize(like.dim.0, like.dim.1);
        self.numbers.fill(T::zero());
        ArrayViewMut2::from_shape(self.dim, &mut self.numbers).expect("counted")
    }

    fn view(&self) -> ArrayView2<'_, T> {
        ArrayView2::from_shape(self.dim, &self.numbers).expect("counted")
    }
}

/// Working memory.
#[derive(Debug)]
pub(super) struct FeaturesWork<T> {
    flow: Flow<T>,
    block: SeenBlock<T>,
    held: Held<T>,
    sums: LateSums<T>,
    /// Of all tokens, in the order in which they enter the sums: their positions, and the steps.
    arrivals: Vec<[usize; 2]>,
    /// The first steps of the blocks.
    starts: Vec<usize>,
    /// Keys and values of tokens that enter, and the gradients by them.
    entering: [Rows<T>; 2],
    d_entering: [Rows<T>; 2],
    /// Logarithms of normalisers and means of all queries, block by block.
    kept: [Vec<T>; 2],
}

impl<T: Scalar> FeaturesWork<T> {
    pub(super) fn new() -> Self {
        Self {
            flow: Flow::new(),
            block: SeenBlock::new(),
            held: Held::default(),
            sums: LateSums::new(),
            arrivals: Vec::new(),
            starts: Vec::new(),
            entering: [Rows::new(), Rows::new()],
            d_entering: [Rows::new(), Rows::new()],
            kept: [Vec::new(), Vec::new()],
        }
    }
}

impl<T: Scalar> OneHead<'_, '_, T> {
    /// Adds the gradients of a head whose far tokens are read through a map.
    pub(super) fn by_features(
        &mut self,
        log: &Log<T>,
        far: &FarFeatures<T>,
        work: &mut FeaturesWork<T>,
    ) -> Result<(), Error> {
        let value_dim = self.head.v.ncols();
        let pass = Pass::new(&**far.map, value_dim, self.config.scale)?;
        let pass = pass.with_decay(far.log_decay.as_deref());
        let asked = self.head.d_parameters.as_deref().map(|asked| asked.of(FAR).zeros_like());
        let asked = asked.filter(|asked| !asked.is_empty());
        work.held.clear();
        work.arrivals.clear();
        work.kept.iter_mut().for_each(Vec::clear);
        let trains_decay = Decay::is_trained(self.head.d_parameters.as_deref());
        work.sums.begin(&pass, value_dim, self.units, asked, trains_decay);
        match self.mask {
            Mask::Causal | Mask::CausalTail => self.causal(&pass, log, work)?,
            Mask::Full => self.full(&pass, log, work)?,
        }
        let of_map = work.sums.end(&pass);
        let Some(all) = &mut self.head.d_parameters else { return Ok(()) };
        if let Some(of_map) = of_map {
            all.add_scaled(T::one(), &of_map.under(FAR))?;
            all.check_gradients()?;
        }
        far.decay.add_gradients(&work.sums.decay_sums(), all)
    }

    /// Steps one after the other.
    fn causal(
        &mut self,
        pass: &Pass<'_, T>,
        log: &Log<T>,
        work: &mut FeaturesWork<T>,
    ) -> Result<(), Error> {
        let (n, first) = (self.head.keys(), self.first());
        let block = work.sums.block(BLOCK);
        for start in (0..first).step_by(block) {
            self.arrive(pass, log, start..first.min(start + block), false, work)?;
            work.sums.absorb();
        }
        let (mut start, mut len) = (first, block);
        work.starts.clear();
        while start < n {
            let steps = start..n.min(start + len);
            if !self.arrive(pass, log, steps.clone(), len > 1, work)? {
                len /= 2;
                continue;
            }
            work.flow.add_near(self.config, steps.clone(), self.tokens());
            work.flow.rows.begin_gradients();
            self.ask(pass, self.asked(steps), work)?;
            work.sums.absorb();
            self.hand_on(&mut work.flow);
            work.starts.push(start);
            start += len;
            len = block.min(2 * len);
        }
        work.sums.turn(pass);
        let mut end = n;
        while let Some(start) = work.starts.pop() {
            self.arrive_again(pass, start, work)?;
            self.ask_again(pass, self.asked(start..end), work)?;
            self.end_arrivals(pass, work)?;
            end = start;
        }
        for start in (0..first).step_by(block).rev() {
            self.arrive_again(pass, start, work)?;
            self.end_arrivals(pass, work)?;
        }
        Ok(())
    }

    /// All queries after all tokens.
    fn full(
        &mut self,
        pass: &Pass<'_, T>,
        log: &Log<T>,
        work: &mut FeaturesWork<T>,
    ) -> Result<(), Error> {
        let (n, last) = (self.head.queries(), self.steps());
        for start in (0..last).step_by(BLOCK) {
            self.arrive(pass, log, start..last.min(start + BLOCK), false, work)?;
            work.sums.absorb();
        }
        self.arrive(pass, log, last..last, false, work)?; // nothing, but for the heavy keys
        work.flow.add_sinks(self.config, self.tokens());
        work.flow.rows.begin_gradients();
        for start in (0..n).step_by(BLOCK) {
            self.ask(pass, start..n.min(start + BLOCK), work)?;
        }
        self.hand_on(&mut work.flow);
        work.sums.turn(pass);
        self.arrive_again(pass, last, work)?;
        for start in (0..n).step_by(BLOCK).rev() {
            self.ask_again(pass, start..n.min(start + BLOCK), work)?;
        }
        for start in (0..last).step_by(BLOCK).rev() {
            self.arrive_again(pass, start, work)?;
            self.end_arrivals(pass, work)?;
        }
        Ok(())
    }

    /// Takes the tokens that enter the sums within some steps; `false` says that nothing was done,
    /// if that may be.
    fn arrive(
        &mut self,
        pass: &Pass<'_, T>,
        log: &Log<T>,
        steps: Range<usize>,
        may_fail: bool,
        FeaturesWork { flow, held, sums, arrivals, entering, .. }: &mut FeaturesWork<T>,
    ) -> Result<bool, Error> {
        flow.walk(self.config, log, held, steps.clone(), self.tokens());
        let [k, v] = entering;
        k.gather(self.head.k, &flow.arrivals);
        v.gather(self.head.v, &flow.arrivals);
        let row = flow.arrivals.first().copied().unwrap_or_default();
        if !sums.enter(pass, Entering { k: k.view(), v: v.view(), row }, may_fail)? {
            return Ok(false);
        }
        flow.end(held);
        let entered = flow.arrivals.iter().zip(&flow.from);
        arrivals.extend(entered.map(|(&position, &from)| [position, steps.start + from]));
        Ok(true)
    }

    /// Queries of the first pass: all but what they hand on to tokens of the sums.
    fn ask(
        &mut self,
        pass: &Pass<'_, T>,
        range: Range<usize>,
        FeaturesWork { flow, block, sums, kept, .. }: &mut FeaturesWork<T>,
    ) -> Result<(), Error> {
        let (scoring, units, row) = (self.scoring, self.units, range.start);
        for g in 0..self.head.group_len() {
            let asking = self.asking(g, range.clone());
            let [q, d_out] = asking;
            block.begin(asking, scoring, units);
            let asked = Asking { q, d_out, row };
            let others = sums.answer(pass, asked, &block.cotangents, &flow.from)?;
            let sink = self.config.sink_logit(g);
            let of_sink = block.weigh(&flow.rows, scoring, Some(others), sink, row)?;
            self.add_sink(g, of_sink);
            let d_q = self.d_q(g, range.clone());
            block.hand_on(asking, &mut flow.rows, scoring.scale.as_f64(), units, d_q);
            let d_q = self.d_q(g, range.clone());
            sums.add_to_queries(pass, asked, [&block.shares, &block.means], &flow.from, d_q)?;
            kept[0].extend_from_slice(&block.log_normalizer);
            kept[1].extend_from_slice(&block.means);
        }
        Ok(())
    }

    /// The second pass: takes the last tokens that entered from step `start` on.
    fn arrive_again(
        &mut self,
        pass: &Pass<'_, T>,
        start: usize,
        FeaturesWork { flow, sums, arrivals, entering, .. }: &mut FeaturesWork<T>,
    ) -> Result<(), Error> {
        let first = arrivals.partition_point(|&[_, step]| step < start);
        flow.arrivals.clear();
        flow.from.clear();
        for [position, step] in arrivals.drain(first..) {
            flow.arrivals.push(position);
            flow.from.push(step - start);
        }
        let [k, v] = entering;
        k.gather(self.head.k, &flow.arrivals);
        v.gather(self.head.v, &flow.arrivals);
        let row = flow.arrivals.first().copied().unwrap_or_default();
        sums.enter_again(pass, Entering { k: k.view(), v: v.view(), row })
    }

    /// What queries hand on to tokens of the sums.
    fn ask_again(
        &mut self,
        pass: &Pass<'_, T>,
        range: Range<usize>,
        FeaturesWork { flow, sums, kept, .. }: &mut FeaturesWork<T>,
    ) -> Result<(), Error> {
        let (width, group) = (padded::<T>(range.len()), self.head.group_len());
        let first = kept[0].len() - group * width;
        for g in 0..group {
            let [q, d_out] = self.asking(g, range.clone());
            let own = first + g * width..first + (g + 1) * width;
            let kept = [&kept[0][own.clone()], &kept[1][own]];
            sums.ask_again(pass, Asking { q, d_out, row: range.start }, kept, &flow.from)?;
        }
        for kept in kept {
            kept.truncate(first);
        }
        Ok(())
    }

    /// Adds the gradients by the tokens that entered.
    fn end_arrivals(
        &mut self,
        pass: &Pass<'_, T>,
        FeaturesWork { flow, sums, entering: [k, v], d_entering, .. }: &mut FeaturesWork<T>,
    ) -> Result<(), Error> {
        let entering = Entering { k: k.view(), v: v.view(), row: 0 };
        let [d_k, d_v] = d_entering;
        sums.add_to_tokens(pass, entering, d_k.zeros(k), d_v.zeros(v))?;
        d_k.add_to(&mut self.head.d_k, &flow.arrivals);
        d_v.add_to(&mut self.head.d_v, &flow.arrivals);
        Ok(())
    }
}
