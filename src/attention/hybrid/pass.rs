//! The causal pass of a hybrid kernel, and attention of every query to all keys.
//!
//! A step appends the token, moves the oldest tokens out of the window if they are due, and reads.
//! Between two moves nothing but the window changes, and by new tokens only: those steps are
//! computed at once, by matrix products. Every row of such a product gets the bits it would get
//! alone, so that the cut of a sequence into pieces changes nothing at all.

use crate::attention::call::Head;
use crate::attention::hybrid::config::Config;
use crate::attention::hybrid::near::largest;
use crate::attention::hybrid::read::Steps;
use crate::attention::hybrid::state::{HybridScratch, HybridState};
use crate::error::Error;
use crate::scalar::Scalar;
use ndarray::Axis;

/// Queries that are answered at once: tokens times heads of the group.
const MOST_ROWS: usize = 32;

impl<T: Scalar> HybridState<T> {
    /// Causal attention of new tokens, of checked shapes and finite; the state is as before if it
    /// fails.
    pub(super) fn extend(
        &mut self,
        config: &Config<T>,
        calls: &mut [Head<'_, T>],
        scratch: &mut HybridScratch<T>,
    ) -> Result<(), Error> {
        if self.is_safe(config, calls) {
            self.steps(config, calls, scratch)?;
        } else {
            let mut before = scratch.before.take().unwrap_or_else(Self::new);
            before.copy_from(self);
            let result = self.steps(config, calls, scratch);
            if result.is_err() {
                self.copy_from(&before);
            }
            scratch.before = Some(before);
            result?;
        }
        for (near, call) in self.near.iter_mut().zip(&*calls) {
            near.largest_key = near.largest_key.max(largest(call.k));
            near.largest_value = near.largest_value.max(largest(call.v));
        }
        Ok(())
    }

    /// Whether nothing can fail half-way: exact tokens and merged entries, and no score and no sum
    /// of values that can leave the range of `T`.
    #[allow(clippy::cast_precision_loss)] // sizes of heads and memories
    pub(super) fn is_safe(&self, config: &Config<T>, calls: &[Head<'_, T>]) -> bool {
        let limit = T::max_value() * T::from_f64(1.0 / 64.0);
        let slots = T::from_f64((config.near_slots() + config.far_slots(self.near.len())) as f64);
        let factor = T::from_f64(config.scale.max(1.0) * config.head_dim as f64 * 2.0);
        self.far.cannot_fail()
            && self.near.iter().zip(calls).all(|(near, call)| {
                let key = near.largest_key.max(largest(call.k));
                let value = near.largest_value.max(largest(call.v));
                let query = call.q.outer_iter().fold(T::zero(), |m, q| m.max(largest(q)));
                // one factor after the other: none of these products may overflow into a NaN
                query * factor * key.max(T::one()) < limit && key < limit && value * slots < limit
            })
    }

    fn steps(
        &mut self,
        config: &Config<T>,
        calls: &mut [Head<'_, T>],
        scratch: &mut HybridScratch<T>,
    ) -> Result<(), Error> {
        let n = calls[0].k.nrows();
        // tokens before the first query
        let ahead = n - calls[0].q.len_of(Axis(1));
        let group = calls[0].q.len_of(Axis(0));
        let most = (MOST_ROWS / group).max(1);
        let mut start = 0;
        while start < n {
            let first = self.tokens;
            let run = config.steps_at_once(first).min(config.steps_of_room(first));
            let run = run.min(if start < ahead { ahead - start } else { n - start }).min(most);
            self.take(config, calls, start);
            self.leave(config, scratch).map_err(|error| error.in_chunk(start))?;
            for i in start + 1..start + run {
                self.tokens += 1;
                self.take(config, calls, i);
            }
            self.tokens += 1;
            let asked = if start < ahead { &mut [] } else { &mut *calls };
            for (head, call) in asked.iter_mut().enumerate() {
                let start = start - ahead;
                let steps = Steps { head, start, run, causal: true, query_head: 0 };
                self.read(config, steps, call, scratch)?;
            }
            if config.is_window_only() {
                for gone in config.expired(first, self.tokens) {
                    let slot = config.slot(gone);
                    self.near.iter_mut().for_each(|near| near.slots.empty(slot));
                }
            }
            start += run;
        }
        Ok(())
    }

    /// Attention of every query of a query head to all keys, which are taken in first; the state is
    /// empty.
    pub(super) fn full(
        &mut self,
        config: &Config<T>,
        query_head: usize,
        call: &mut Head<'_, T>,
        scratch: &mut HybridScratch<T>,
    ) -> Result<(), Error> {
        for i in 0..call.k.nrows() {
            if config.is_window_only() && i >= config.sinks {
                break;
            }
            self.take(config, core::slice::from_ref(call), i);
            self.leave(config, scratch).map_err(|error| error.in_chunk(i))?;
            self.tokens += 1;
        }
        if !config.is_window_only() {
            self.leave_rest(config, scratch)?;
        }
        let n = call.q.len_of(Axis(1));
        for start in (0..n).step_by(MOST_ROWS) {
            let run = MOST_ROWS.min(n - start);
            let steps = Steps { head: 0, start, run, causal: false, query_head };
            self.read(config, steps, call, scratch)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::hybrid::HybridAttention;
    use crate::attention::hybrid::far::merged::Merged;
    use crate::attention::hybrid::far_memory::merging::MergingPool;
    use crate::attention::hybrid::far_memory::{Sizes, of_kind};
    use crate::memory::merged::entries::MergedMemory;
    use crate::memory::merged::rule::{MergeUnits, Metric};
    use crate::views;
    use ndarray::{Array2, Array3};
    use serde_json::Value;

    fn vector(value: &Value) -> Vec<f64> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    }

    fn matrix(value: &Value) -> Array2<f64> {
        let rows: Vec<_> = value.as_array().unwrap().iter().map(vector).collect();
        Array2::from_shape_fn((rows.len(), rows[0].len()), |(i, j)| rows[i][j])
    }

    fn number(value: &Value) -> usize {
        usize::try_from(value.as_u64().unwrap()).unwrap()
    }

    #[track_caller]
    fn near(what: &str, found: &[f64], exact: &[f64]) {
        let size = exact.iter().fold(1e-100_f64, |m, x| m.max(x.abs()));
        assert_eq!(found.len(), exact.len(), "{what}");
        for (a, b) in found.iter().zip(exact) {
            assert!((a - b).abs() <= 1e-11 * size, "{what}: {found:?}\ninstead of {exact:?}");
        }
    }

    /// The cases of a golden file.
    fn cases(name: &str) -> Vec<Value> {
        let path = format!("{}/tests/data/golden/{name}.json", env!("CARGO_MANIFEST_DIR"));
        let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        file["cases"].as_array().unwrap().clone()
    }

    /// The state after all tokens of a case, given one by one; `each` sees the outputs
    /// `[group, d_v]` of each token and the entries after it.
    fn step_by_step(
        kernel: &HybridAttention<f64>,
        case: &Value,
        mut each: impl FnMut(usize, Array2<f64>, &mut MergedMemory<f64>),
    ) -> HybridState<f64> {
        let heads: Vec<_> = case["q"].as_array().unwrap().iter().map(matrix).collect();
        let (k, v) = (matrix(&case["k"]), matrix(&case["v"]));
        let q = Array3::from_shape_fn((heads.len(), k.nrows(), k.ncols()), |(g, t, c)| {
            heads[g][[t, c]]
        });
        let mut state = HybridState::new();
        let sizes = Sizes { heads: 1, value_dim: v.ncols(), deciding_columns: None };
        state.prepare(&kernel.config, sizes).unwrap();
        let mut scratch = HybridScratch::new();
        for t in 0..k.nrows() {
            let row = |x: &Array2<f64>| views::row(x.view(), t).insert_axis(Axis(0)).to_owned();
            let (k, v) = (row(&k), row(&v));
            let q = q.index_axis(Axis(1), t).insert_axis(Axis(1));
            let mut out = Array3::zeros((heads.len(), 1, v.ncols()));
            let call = Head::group(q, k.view(), v.view(), out.view_mut());
            state.extend(&kernel.config, &mut [call], &mut scratch).unwrap();
            let MergingPool(memories) = of_kind(&mut *state.far).unwrap();
            each(t, out.index_axis_move(Axis(1), 0), &mut memories[0]);
        }
        state
    }

    /// Which pairs are merged, the entries and the attention received in the window, step by step.
    #[test]
    fn the_state_of_the_golden_cases() {
        for case in &cases("received") {
            let name = case["name"].as_str().unwrap();
            let k = matrix(&case["k"]);
            let block = number(&case["block"]);
            let far = Merged::new(number(&case["entries_max"]))
                .decay(case["gamma"].as_f64().unwrap())
                .min_age(number(&case["min_age"]))
                .value_weight(case["beta"].as_f64().unwrap().powi(2))
                .metric(Metric::Identity)
                .block(block);
            let (window, sinks) = (number(&case["window"]), number(&case["sinks"]));
            let kernel = HybridAttention::<f64>::builder(k.ncols())
                .window(window)
                .sinks(sinks)
                .far(far)
                .build()
                .unwrap();
            let config = &kernel.config;
            let state = step_by_step(&kernel, case, |t, _, memory| {
                let what = format!("{name} t={t}");
                let expected =
                    case["merges"].as_array().unwrap().iter().find(|step| number(&step["t"]) == t);
                let pairs = |rounds: &Value| -> Vec<[usize; 2]> {
                    let rounds = rounds.as_array().unwrap().iter();
                    rounds
                        .flat_map(|round| round.as_array().unwrap())
                        .map(|p| [number(&p[0]), number(&p[1])])
                        .collect()
                };
                let expected = expected.map_or(Vec::new(), |step| pairs(&step["rounds"]));
                assert_eq!(memory.merges, expected, "{what}");
                memory.merges.clear();
                for step in
                    case["trace"].as_array().unwrap().iter().filter(|step| number(&step["t"]) == t)
                {
                    let entries = step["entries"].as_array().unwrap();
                    let root = config.scale.sqrt();
                    let all =
                        |x: &str| entries.iter().flat_map(|e| vector(&e[x])).collect::<Vec<_>>();
                    let one = |x: &str| {
                        entries.iter().map(|e| e[x].as_f64().unwrap()).collect::<Vec<_>>()
                    };
                    let flat = |x: Array2<f64>| x.into_iter().collect::<Vec<_>>();
                    near(&what, &flat(memory.keys() * root), &all("key"));
                    near(&what, &flat(memory.values()), &all("value"));
                    near(&what, memory.counts(), &one("count"));
                    near(&what, memory.weights(), &one("weight"));
                }
            });
            let held = config.held(k.nrows());
            assert_eq!(held.start, number(&case["window_end"]["first"]), "{name}");
            let received: Vec<f64> =
                held.map(|position| state.near[0].received[config.slot(position)]).collect();
            near(name, &received, &vector(&case["window_end"]["acc"]));
        }
    }

    /// Which pairs the product cost merges, the outputs and the entries that are left.
    #[test]
    fn the_merges_of_the_product_cost() {
        for case in &cases("product_cost") {
            let name = case["name"].as_str().unwrap();
            let k = matrix(&case["k"]);
            let units = MergeUnits::new(
                vector(&case["metric"]),
                case["value_norm_squared"].as_f64().unwrap(),
            );
            let far = Merged::new(number(&case["entries"]))
                .decay(case["decay"].as_f64().unwrap())
                .units(units.unwrap());
            let kernel = HybridAttention::<f64>::builder(k.ncols())
                .window(number(&case["window"]))
                .sinks(number(&case["sinks"]))
                .scale(case["scale"].as_f64().unwrap())
                .far(far)
                .build()
                .unwrap();
            let (mut merges, mut all) = (Vec::new(), Vec::new());
            let mut state = step_by_step(&kernel, case, |t, out, memory| {
                all.push(out);
                merges.extend(memory.merges.drain(..).map(|[x, y]| [t, x, y]));
            });
            let expected = case["merges"]
                .as_array()
                .unwrap()
                .iter()
                .map(|step| core::array::from_fn(|i| number(&step[i])));
            assert_eq!(merges, expected.collect::<Vec<[usize; 3]>>(), "{name}");
            let MergingPool(memories) = of_kind(&mut *state.far).unwrap();
            let flat = |x: Array2<f64>| x.into_iter().collect::<Vec<_>>();
            let keys = flat(memories[0].keys() * kernel.config.scale.sqrt());
            near(name, &keys, &flat(matrix(&case["final_keys"])));
            near(name, &flat(memories[0].values()), &flat(matrix(&case["final_values"])));
            near(name, memories[0].counts(), &vector(&case["final_counts"]));
            near(name, memories[0].weights(), &vector(&case["final_weights"]));
            for (g, exact) in case["output"].as_array().unwrap().iter().enumerate() {
                let found: Vec<f64> = all.iter().flat_map(|out| out.row(g).to_vec()).collect();
                near(name, &found, &flat(matrix(exact)));
            }
        }
    }
}
