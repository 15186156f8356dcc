//! Hybrids with merged entries or with nothing behind the window: blocks of steps, from the last to
//! the first.

use crate::attention::hybrid::backward::flow::{Flow, Held};
use crate::attention::hybrid::backward::head::{BLOCK, OneHead};
use crate::attention::hybrid::backward::log::Log;
use crate::error::Error;
use crate::memory::seen_rows::SeenBlock;
use crate::scalar::Scalar;
use core::ops::Range;

/// Parts that more steps than a block are cut into, and each of them again.
const PARTS: usize = 16;

/// Working memory.
#[derive(Debug)]
pub(super) struct EntriesWork<T> {
    flow: Flow<T>,
    block: SeenBlock<T>,
    /// Before a part; and before each of the parts that it is cut into.
    held: Held<T>,
    checkpoints: Vec<Held<T>>,
    /// The gradients by the entries after a part.
    d_entries: [Vec<T>; 2],
}

impl<T: Scalar> EntriesWork<T> {
    pub(super) fn new() -> Self {
        Self {
            flow: Flow::new(),
            block: SeenBlock::new(),
            held: Held::default(),
            checkpoints: Vec::new(),
            d_entries: [Vec::new(), Vec::new()],
        }
    }
}

impl<T: Scalar> OneHead<'_, '_, T> {
    /// Adds the gradients of a head.
    pub(super) fn by_entries(
        &mut self,
        log: &Log<T>,
        work: &mut EntriesWork<T>,
    ) -> Result<(), Error> {
        work.held.clear();
        self.part(log, 0..self.head.queries(), 0, work)
    }

    /// Some steps, from what is held before them and the gradients by the entries after them, which
    /// become those by the entries before them.
    fn part(
        &mut self,
        log: &Log<T>,
        part: Range<usize>,
        depth: usize,
        work: &mut EntriesWork<T>,
    ) -> Result<(), Error> {
        if part.len() <= BLOCK {
            return self.block(log, part, work);
        }
        let mut len = BLOCK;
        while len * PARTS < part.len() {
            len *= PARTS;
        }
        let starts: Vec<usize> = part.clone().step_by(len).collect();
        let first = depth * PARTS;
        if work.checkpoints.len() < first + PARTS {
            work.checkpoints.resize_with(first + PARTS, Held::default);
        }
        for (i, &start) in starts.iter().enumerate() {
            work.checkpoints[first + i].copy_from(&work.held);
            let Some(&end) = starts.get(i + 1) else { break };
            for start in (start..end).step_by(BLOCK) {
                let steps = start..end.min(start + BLOCK);
                work.flow.walk(self.config, log, &work.held, steps, self.tokens());
                work.flow.end(&mut work.held);
            }
        }
        for (i, &start) in starts.iter().enumerate().rev() {
            work.held.copy_from(&work.checkpoints[first + i]);
            self.part(log, start..part.end.min(start + len), depth + 1, work)?;
        }
        Ok(())
    }

    fn block(
        &mut self,
        log: &Log<T>,
        steps: Range<usize>,
        EntriesWork { flow, block, held, d_entries, .. }: &mut EntriesWork<T>,
    ) -> Result<(), Error> {
        let (scoring, units) = (self.scoring, self.units);
        flow.walk(self.config, log, held, steps.clone(), self.tokens());
        flow.add_near(self.config, steps.clone(), self.tokens());
        flow.rows.begin_gradients();
        if steps.end < self.head.queries() {
            let mut from = 0..0;
            let mut value_from = 0..0;
            for &row in &flow.entries {
                let [key, value] = flow.rows.gradient(row);
                from = from.end..from.end + key.len();
                value_from = value_from.end..value_from.end + value.len();
                key.copy_from_slice(&d_entries[0][from.clone()]);
                value.copy_from_slice(&d_entries[1][value_from.clone()]);
            }
        }
        for g in 0..self.head.group_len() {
            let asking = self.asking(g, steps.clone());
            block.begin(asking, scoring, units);
            let sink = self.config.sink_logit(g);
            let of_sink = block.weigh(&flow.rows, scoring, None, sink, steps.start)?;
            self.add_sink(g, of_sink);
            let d_q = self.d_q(g, steps.clone());
            block.hand_on(asking, &mut flow.rows, scoring.scale.as_f64(), units, d_q);
        }
        self.hand_on(flow);
        d_entries.iter_mut().for_each(Vec::clear);
        for row in 0..held.entries() {
            let gradient = flow.rows.gradient(row);
            d_entries.iter_mut().zip(gradient).for_each(|(all, row)| all.extend_from_slice(row));
        }
        Ok(())
    }
}
