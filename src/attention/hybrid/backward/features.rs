//! Hybrids with sums of features behind the window: a pass over the blocks from the first to the
//! last, and one back.

use crate::attention::hybrid::backward::flow::{Flow, Held};
use crate::attention::hybrid::backward::head::{BLOCK, OneHead};
use crate::attention::hybrid::backward::log::Log;
use crate::attention::hybrid::parameters::FAR;
use crate::error::Error;
use crate::features::FeatureMap;
use crate::kernel::buffer::padded;
use crate::memory::linear::backward::late::sums::{Asking, Entering, LateSums};
use crate::memory::linear::pass::Pass;
use crate::memory::seen_rows::SeenBlock;
use crate::scalar::Scalar;
use crate::views;
use ndarray::{Array2, ArrayView2, Axis};

/// Working memory.
#[derive(Debug)]
pub(super) struct FeaturesWork<T> {
    flow: Flow<T>,
    block: SeenBlock<T>,
    held: Held<T>,
    sums: LateSums<T>,
    /// Of all tokens, in the order in which they enter the sums: their positions, and the steps.
    arrivals: Vec<[usize; 2]>,
    from: Vec<usize>,
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
            from: Vec::new(),
            kept: [Vec::new(), Vec::new()],
        }
    }
}

impl<T: Scalar> OneHead<'_, '_, T> {
    /// Adds the gradients of a head whose far tokens are read through a map.
    pub(super) fn by_features(
        &mut self,
        log: &Log<T>,
        map: &dyn FeatureMap<T>,
        work: &mut FeaturesWork<T>,
    ) -> Result<(), Error> {
        let value_dim = self.head.v.ncols();
        let pass = Pass::new(map, value_dim, self.config.scale)?;
        let asked = self.head.d_parameters.as_deref().map(|asked| asked.of(FAR).zeros_like());
        let asked = asked.filter(|asked| !asked.is_empty());
        work.held.clear();
        work.arrivals.clear();
        work.kept.iter_mut().for_each(Vec::clear);
        work.sums.begin(&pass, value_dim, self.units, asked);
        let n = self.head.queries();
        for start in (0..n).step_by(BLOCK) {
            self.ask(&pass, log, start, work)?;
        }
        work.sums.turn(&pass);
        let mut arrived = work.arrivals.len();
        for start in (0..n).step_by(BLOCK).rev() {
            let first = work.arrivals[..arrived].partition_point(|&[_, step]| step < start);
            self.ask_again(&pass, start, first..arrived, work)?;
            arrived = first;
        }
        if let (Some(of_map), Some(all)) = (work.sums.end(&pass), &mut self.head.d_parameters) {
            all.add_scaled(T::one(), &of_map.under(FAR))?;
        }
        Ok(())
    }

    /// A block of the first pass: all but what later queries hand on to tokens of the sums.
    fn ask(
        &mut self,
        pass: &Pass<'_, T>,
        log: &Log<T>,
        start: usize,
        FeaturesWork { flow, block, held, sums, arrivals, kept, .. }: &mut FeaturesWork<T>,
    ) -> Result<(), Error> {
        let steps = start..self.head.queries().min(start + BLOCK);
        let (scoring, units) = (self.scoring, self.units);
        flow.walk(self.config, log, held, steps.clone(), self.tokens());
        flow.end(held);
        flow.add_near(self.config, steps.clone(), self.tokens());
        flow.rows.begin_gradients();
        let [k, v] = [self.head.k, self.head.v].map(|x| gathered(x, &flow.arrivals));
        let row = flow.arrivals.first().copied().unwrap_or_default();
        sums.enter(pass, Entering { k: k.view(), v: v.view(), row })?;
        let entered = flow.arrivals.iter().zip(&flow.from);
        arrivals.extend(entered.map(|(&position, &from)| [position, start + from]));
        for g in 0..self.head.group_len() {
            let asking = self.asking(g, steps.clone());
            let [q, d_out] = asking;
            block.begin(asking, scoring, units);
            let asked = Asking { q, d_out, row: start };
            let others = sums.answer(pass, asked, &block.cotangents, &flow.from)?;
            let sink = self.config.sink_logit(g);
            let of_sink = block.weigh(&flow.rows, scoring, Some(others), sink, start)?;
            self.add_sink(g, of_sink);
            let d_q = self.d_q(g, steps.clone());
            block.hand_on(asking, &mut flow.rows, scoring.scale.as_f64(), units, d_q);
            let d_q = self.d_q(g, steps.clone());
            sums.to_queries(pass, asked, [&block.shares, &block.means], &flow.from, d_q)?;
            kept[0].extend_from_slice(&block.log_normalizer);
            kept[1].extend_from_slice(&block.means);
        }
        sums.absorb();
        self.hand_on(flow);
        Ok(())
    }

    /// A block of the second pass: what its queries hand on to tokens of the sums.
    fn ask_again(
        &mut self,
        pass: &Pass<'_, T>,
        start: usize,
        range: core::ops::Range<usize>,
        FeaturesWork { flow, sums, arrivals, from, kept, .. }: &mut FeaturesWork<T>,
    ) -> Result<(), Error> {
        let steps = start..self.head.queries().min(start + BLOCK);
        flow.arrivals.clear();
        flow.arrivals.extend(arrivals[range.clone()].iter().map(|[position, _]| position));
        from.clear();
        from.extend(arrivals[range].iter().map(|[_, step]| step - start));
        let [k, v] = [self.head.k, self.head.v].map(|x| gathered(x, &flow.arrivals));
        let row = flow.arrivals.first().copied().unwrap_or_default();
        let entering = Entering { k: k.view(), v: v.view(), row };
        sums.enter_again(pass, entering)?;
        let width = padded::<T>(steps.len());
        let group = self.head.group_len();
        let first = kept[0].len() - group * width;
        for g in 0..group {
            let [q, d_out] = self.asking(g, steps.clone());
            let own = first + g * width..first + (g + 1) * width;
            let [logs, means] = [&kept[0][own.clone()], &kept[1][own]];
            sums.ask_again(pass, Asking { q, d_out, row: start }, [logs, means], from)?;
        }
        kept.iter_mut().for_each(|kept| kept.truncate(first));
        let [mut d_k, mut d_v] = [k.dim(), v.dim()].map(Array2::zeros);
        sums.to_tokens(pass, entering, d_k.view_mut(), d_v.view_mut())?;
        for (i, &position) in flow.arrivals.iter().enumerate() {
            for (all, own) in [(&mut self.head.d_k, &d_k), (&mut self.head.d_v, &d_v)] {
                let mut to = all.index_axis_mut(Axis(0), position);
                to.zip_mut_with(&views::row(own.view(), i), |to, &x| *to += x);
            }
        }
        Ok(())
    }
}

/// Copies of some rows.
fn gathered<T: Scalar>(x: ArrayView2<'_, T>, positions: &[usize]) -> Array2<T> {
    x.select(Axis(0), positions)
}
