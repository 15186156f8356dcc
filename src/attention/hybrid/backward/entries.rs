//! Hybrids with merged entries or with nothing behind the window: blocks of steps, from the last to
//! the first.

use crate::attention::hybrid::backward::flow::{Flow, Held};
use crate::attention::hybrid::backward::head::{BLOCK, OneHead};
use crate::attention::hybrid::backward::log::Log;
use crate::error::Error;
use crate::mask::Mask;
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
        work.d_entries.iter_mut().for_each(Vec::clear);
        if self.mask == Mask::Full {
            self.read_last(log, work)?;
        }
        let (first, steps) = (self.first(), self.steps());
        if first > 0 {
            self.pass_by(log, 0..first, work);
            self.part(log, first..steps, 0, work)?;
            work.held.clear();
            return self.part(log, 0..first, 0, work);
        }
        self.part(log, 0..steps, 0, work)
    }

    /// Takes some steps, without reading.
    fn pass_by(&self, log: &Log<T>, part: Range<usize>, work: &mut EntriesWork<T>) {
        for start in part.clone().step_by(BLOCK) {
            let steps = start..part.end.min(start + BLOCK);
            work.flow.walk(self.config, log, &work.held, steps, self.tokens());
            work.flow.end(&mut work.held);
        }
    }

    /// Where every query sees every key: all of them read what is held after the last step.
    fn read_last(&mut self, log: &Log<T>, work: &mut EntriesWork<T>) -> Result<(), Error> {
        let last = self.steps();
        self.pass_by(log, 0..last, work);
        let EntriesWork { flow, block, held, d_entries, .. } = work;
        flow.walk(self.config, log, held, last..last, self.tokens());
        flow.add_sinks(self.config, self.tokens());
        flow.rows.begin_gradients();
        for start in (0..self.head.queries()).step_by(BLOCK) {
            self.read(flow, block, start..self.head.queries().min(start + BLOCK))?;
        }
        self.hand_on(flow);
        keep_gradients(flow, held, d_entries);
        held.clear();
        Ok(())
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
        let parts = part.len().div_ceil(len);
        let of = |i: usize| {
            let start = part.start + i * len;
            start..part.end.min(start + len)
        };
        let first = depth * PARTS;
        if work.checkpoints.len() < first + PARTS {
            work.checkpoints.resize_with(first + PARTS, Held::default);
        }
        for i in 0..parts {
            work.checkpoints[first + i].copy_from(&work.held);
            if i + 1 < parts {
                self.pass_by(log, of(i), work);
            }
        }
        for i in (0..parts).rev() {
            work.held.copy_from(&work.checkpoints[first + i]);
            self.part(log, of(i), depth + 1, work)?;
        }
        Ok(())
    }

    fn block(
        &mut self,
        log: &Log<T>,
        steps: Range<usize>,
        EntriesWork { flow, block, held, d_entries, .. }: &mut EntriesWork<T>,
    ) -> Result<(), Error> {
        flow.walk(self.config, log, held, steps.clone(), self.tokens());
        let is_asked = self.mask != Mask::Full && steps.start >= self.first();
        if is_asked {
            flow.add_near(self.config, steps.clone(), self.tokens());
        }
        flow.rows.begin_gradients();
        if !d_entries[0].is_empty() {
            let [mut at, mut value_at] = [0; 2];
            for &row in &flow.entries {
                let [key, value] = flow.rows.gradient(row);
                key.copy_from_slice(&d_entries[0][at..at + key.len()]);
                value.copy_from_slice(&d_entries[1][value_at..value_at + value.len()]);
                (at, value_at) = (at + key.len(), value_at + value.len());
            }
        }
        if is_asked {
            self.read(flow, block, self.asked(steps))?;
        }
        self.hand_on(flow);
        keep_gradients(flow, held, d_entries);
        Ok(())
    }

    /// Adds the gradients by some queries, and by the rows that they see.
    fn read(
        &mut self,
        flow: &mut Flow<T>,
        block: &mut SeenBlock<T>,
        range: Range<usize>,
    ) -> Result<(), Error> {
        let (scoring, units) = (self.scoring, self.units);
        for g in 0..self.head.group_len() {
            let asking = self.asking(g, range.clone());
            block.begin(asking, scoring, units);
            let sink = self.config.sink_logit(g);
            let of_sink = block.weigh(&flow.rows, scoring, None, sink, range.start)?;
            self.add_sink(g, of_sink);
            let d_q = self.d_q(g, range.clone());
            block.hand_on(asking, &mut flow.rows, scoring.scale.as_f64(), units, d_q);
        }
        Ok(())
    }
}

/// Keeps the gradients by the entries before a block.
fn keep_gradients<T: Scalar>(flow: &mut Flow<T>, held: &Held<T>, kept: &mut [Vec<T>; 2]) {
    kept.iter_mut().for_each(Vec::clear);
    for row in 0..held.entries() {
        let gradient = flow.rows.gradient(row);
        kept.iter_mut().zip(gradient).for_each(|(all, row)| all.extend_from_slice(row));
    }
}
