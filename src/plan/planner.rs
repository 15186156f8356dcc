//! From samples to a plan: costs are measured once, budgets are asked for as often as wanted.

use crate::attention::scratch::Scratch;
use crate::check;
use crate::error::Error;
use crate::plan::choose::{Candidate, Frontier, choose};
use crate::plan::costs::{HeadCosts, WHOLE};
use crate::plan::options::{Budget, Curve, PlanOptions, Sizes};
use crate::plan::sample::{PlanSample, SampleShape};
#[cfg(feature = "serde")]
use crate::plan::saved::SavedPlanner;
use crate::plan::setting::{HeadPlan, HeadSetting, KernelOptions, ModelSizes};
use crate::plan::state_plan::StatePlan;
use crate::scalar::Scalar;
use crate::selection::each;
use core::sync::atomic::{AtomicUsize, Ordering};
use std::collections::BTreeMap;

/// The measured costs of all heads, text by text: what [`StatePlan::fit`] makes plans of, for
/// models whose samples do not fit into memory at once.
///
/// Costs stay, and serialise (feature `serde`): another budget takes no second measurement.
///
/// ```
/// use dijiang::{Budget, HeadSample, PlanOptions, StatePlanner};
/// use ndarray::{Array2, Array3};
///
/// let options = PlanOptions::new(Budget::Slots(12)).sinks(2);
/// let mut planner = StatePlanner::new(&options.grid(&[0.98], &[(4, &[4, 8, 16])]))?;
/// for text in 0..2 {
///     let wave = |h: usize, at: usize| ((at + text) as f32 * (0.3 + h as f32)).sin();
///     let x: Vec<_> =
///         (0..2).map(|h| Array2::from_shape_fn((60, 8), |(t, c)| wave(h, t * 8 + c))).collect();
///     let q: Vec<_> =
///         (0..2).map(|h| Array3::from_shape_fn((2, 60, 8), |(_, t, c)| x[h][[t, c]])).collect();
///     let head = |h: usize| HeadSample {
///         layer: h,
///         kv_head: 0,
///         q: q[h].view(),
///         k: x[h].view(),
///         v: x[h].view(),
///     };
///     planner.add(&[head(0).into(), head(1).into()])?; // and the text can go
/// }
/// let plan = planner.plan()?;
/// let larger = planner.plan_within(Budget::Slots(16))?;
/// assert!(larger.cost() <= plan.cost());
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "SavedPlanner")
)]
pub struct StatePlanner {
    pub(crate) options: PlanOptions,
    pub(crate) shape: Option<SampleShape>,
    /// In order.
    pub(crate) heads: Vec<HeadCosts>,
}

impl StatePlanner {
    /// A planner that has measured nothing yet.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if the budget or the length is 0; [`Error::InvalidOption`] if the grid
    /// is empty or has a setting twice, the scale is not positive and finite; the errors of the
    /// kernels of the settings.
    pub fn new(options: &PlanOptions) -> Result<Self, Error> {
        options.check()?;
        Ok(Self { options: options.clone(), shape: None, heads: Vec::new() })
    }

    /// Measures every setting on these samples. A head may come several times, in one call or in
    /// several: its costs are the means over its samples, by their weights. With feature `rayon`
    /// the heads are shared out over the threads of the current pool; the costs are the same, bit
    /// for bit.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if there are no samples, or one has no query heads or no columns;
    /// [`Error::Shape`] if shapes do not fit together, or differ between heads;
    /// [`Error::NotFinite`] if a number is NaN or infinite; [`Error::InvalidOption`] if only some
    /// samples have sensitivities, a weight is not positive and finite, a sample has no more tokens
    /// than the smallest setting holds, or fewer than the length that is planned for;
    /// [`Error::Overflow`] if a cost is not finite; the errors of the kernels. The planner is then
    /// as it was.
    pub fn add<T: Scalar>(&mut self, samples: &[PlanSample<'_, T>]) -> Result<(), Error> {
        self.add_with_progress(samples, &|_, _| {})
    }

    /// As [`add`](Self::add); after each sample `progress` is told how many of this call are done,
    /// and how many there are, from whatever thread measured it.
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add).
    pub fn add_with_progress<T: Scalar>(
        &mut self,
        samples: &[PlanSample<'_, T>],
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<(), Error> {
        check::at_least_one("samples", samples.len())?;
        let shape = self.shape.unwrap_or_else(|| samples[0].shape());
        samples.iter().try_for_each(|sample| {
            shape.check(sample)?;
            self.check_length(sample)
        })?;
        let mut by_head = BTreeMap::<_, Vec<&PlanSample<'_, T>>>::new();
        for sample in samples {
            by_head.entry((sample.sample.layer, sample.sample.kv_head)).or_default().push(sample);
        }
        let (by_head, done) = (Vec::from_iter(by_head), AtomicUsize::new(0));
        let measured = each(&by_head, |scratch: &mut Scratch<T>, (number, of_head)| {
            let curves = self.options.grid.len();
            let mut costs = match self.find(*number) {
                Ok(at) => self.heads[at].clone(),
                Err(_) => HeadCosts::new(number.0, number.1, curves, shape.head_dim),
            };
            for sample in of_head {
                costs.add(sample, &self.options, scratch)?;
                progress(done.fetch_add(1, Ordering::Relaxed) + 1, samples.len());
            }
            Ok(costs)
        })?;
        self.shape = Some(shape);
        for costs in measured {
            match self.find(costs.number()) {
                Ok(at) => self.heads[at] = costs,
                Err(at) => self.heads.insert(at, costs),
            }
        }
        Ok(())
    }

    /// The plan that the options ask for.
    ///
    /// # Errors
    ///
    /// [`Error::ZeroSize`] if nothing was measured; [`Error::InvalidOption`] if heads are missing
    /// (every layer from 0 has the kv heads from 0, as many as the others), there are more exact
    /// heads than heads, or the smallest settings do not fit into the budget.
    pub fn plan(&self) -> Result<StatePlan, Error> {
        self.plan_with(&self.options)
    }

    /// The plan for another budget, from the same costs.
    ///
    /// # Errors
    ///
    /// As [`plan`](Self::plan).
    pub fn plan_within(&self, budget: Budget) -> Result<StatePlan, Error> {
        self.plan_with(&PlanOptions { budget, ..self.options.clone() })
    }

    /// The plan for another budget, number of exact heads, length, format or fingerprint, from the
    /// same costs: those of the format that was measured.
    ///
    /// # Errors
    ///
    /// As [`plan`](Self::plan); [`Error::InvalidOption`] if grid, sinks or scale are not those that
    /// were measured, or the cost at that length was not: known are 256, 512, 1024 and so on up to
    /// the shortest sample, and the length of the planner's own options.
    pub fn plan_with(&self, options: &PlanOptions) -> Result<StatePlan, Error> {
        options.check()?;
        let measured = |o: &PlanOptions| (o.sinks, o.scale, o.grid.clone());
        if measured(options) != measured(&self.options) {
            return Err(Error::InvalidOption {
                which: "options",
                found: "of another grid, scale or number of sinks".to_owned(),
                needed: "those that costs were measured with: add the samples to another planner",
            });
        }
        let Some(shape) = self.shape else { return Err(Error::ZeroSize { which: "samples" }) };
        let sizes = self.model_sizes(shape)?;
        let deciding = self.deciding_length(options)?;
        let kernel = options.kernel(shape.head_dim)?;
        let heads = self.choose(options, deciding, kernel, shape.value_dim)?;
        Ok(StatePlan {
            sizes,
            fingerprint: options.fingerprint.clone(),
            sinks: kernel.sinks,
            scale: kernel.scale,
            format: kernel.format,
            budget: options.budget,
            length: options.length,
            sensitivities: shape.sensitivities,
            heads,
        })
    }

    /// The setting of every head.
    fn choose(
        &self,
        options: &PlanOptions,
        deciding: usize,
        kernel: KernelOptions,
        value_dim: usize,
    ) -> Result<Vec<HeadPlan>, Error> {
        let (count, exact_heads) = (self.heads.len(), options.exact_heads);
        if exact_heads > count {
            return Err(Error::InvalidOption {
                which: "exact_heads",
                found: exact_heads.to_string(),
                needed: "no more than there are heads",
            });
        }
        let sizes = options.budget.sizes(kernel, value_dim)?;
        let frontiers: Vec<_> =
            self.heads.iter().map(|head| self.frontier(head, deciding, sizes)).collect();
        let mut chosen: Vec<Option<Candidate>> = vec![None; count];
        let mut open: Vec<usize> = (0..count).collect();
        // the worst head is taken out, and the others filled again
        for exact in 0..=exact_heads {
            let of_open: Vec<_> = open.iter().map(|&head| &frontiers[head]).collect();
            let total = options.budget.of_a_head().saturating_mul(open.len());
            let Some(settings) = choose(&of_open, total) else {
                return Err(too_small(options.budget, &of_open));
            };
            for (&head, setting) in open.iter().zip(settings) {
                chosen[head] = Some(setting);
            }
            let cost = |head: usize| chosen[head].map_or(0.0, |setting| setting.cost);
            let worst = (0..open.len()).rev().max_by(|&a, &b| {
                cost(open[a]).total_cmp(&cost(open[b])) // the first of equals
            });
            if let Some(worst) = worst.filter(|_| exact < exact_heads) {
                chosen[open.remove(worst)] = None;
            }
        }
        self.heads.iter().zip(chosen).map(|(h, c)| self.head_plan(h, c, deciding)).collect()
    }

    fn frontier(&self, head: &HeadCosts, length: usize, sizes: Sizes) -> Frontier {
        let mut candidates = Vec::new();
        for (curve, Curve { window, .. }) in self.options.grid.iter().enumerate() {
            let costs = head.curve(curve, length);
            candidates.extend(costs.entries().map(|entries| Candidate {
                size: sizes.of(*window, entries),
                cost: costs.cost(entries),
                curve,
                entries,
            }));
        }
        Frontier::new(candidates)
    }

    fn head_plan(
        &self,
        head: &HeadCosts,
        chosen: Option<Candidate>,
        deciding: usize,
    ) -> Result<HeadPlan, Error> {
        let cost = |length| chosen.map_or(0.0, |at| head.curve(at.curve, length).cost(at.entries));
        let setting = chosen.map_or(HeadSetting::Exact, |Candidate { curve, entries, .. }| {
            let Curve { window, decay, .. } = self.options.grid[curve];
            HeadSetting::Merged { window, entries, decay }
        });
        Ok(HeadPlan {
            layer: head.layer,
            kv_head: head.kv_head,
            setting,
            cost: cost(deciding),
            cost_by_length: self.common_lengths().map(|length| (length, cost(length))).collect(),
            units: Some(head.units()?),
        })
    }

    /// The place of a head, or where it goes.
    fn find(&self, number: (usize, usize)) -> Result<usize, usize> {
        self.heads.binary_search_by_key(&number, HeadCosts::number)
    }

    /// The lengths that every sample of every head reaches.
    fn common_lengths(&self) -> impl Iterator<Item = usize> {
        let in_all = |length: usize| self.heads.iter().all(|h| h.lengths().any(|l| l == length));
        let first = self.heads.first().into_iter().flat_map(HeadCosts::lengths);
        first.filter(move |length| *length != WHOLE && in_all(*length))
    }

    /// The length whose costs decide.
    fn deciding_length(&self, options: &PlanOptions) -> Result<usize, Error> {
        let Some(asked) = options.length else { return Ok(WHOLE) };
        if self.common_lengths().any(|length| length == asked) {
            return Ok(asked);
        }
        let known: Vec<_> = self.common_lengths().collect();
        Err(Error::InvalidOption {
            which: "length",
            found: format!("{asked}, where costs are known at {known:?}"),
            needed: "one of these; a planner of that length measures it, on samples as long",
        })
    }

    fn check_length<T: Scalar>(&self, sample: &PlanSample<'_, T>) -> Result<(), Error> {
        let (tokens, least) = (sample.tokens(), self.options.least_slots() + self.options.sinks);
        if tokens <= least {
            return Err(Error::InvalidOption {
                which: "samples",
                found: format!("{tokens} tokens long, where the smallest setting holds {least}"),
                needed: "longer: as long as contexts will be",
            });
        }
        let asked = self.options.length.unwrap_or(tokens);
        if asked <= least || asked > tokens {
            let found = format!("{asked}, where a sample has {tokens} tokens");
            let needed = "no longer than every sample, and more than the smallest setting holds";
            return Err(Error::InvalidOption { which: "length", found, needed });
        }
        Ok(())
    }

    /// The sizes of the model, whose heads must all be here.
    fn model_sizes(&self, shape: SampleShape) -> Result<ModelSizes, Error> {
        let layers = self.heads.last().map_or(0, |head| head.layer.saturating_add(1));
        let kv_heads =
            self.heads.iter().map(|head| head.kv_head.saturating_add(1)).max().unwrap_or(0);
        check::at_least_one("samples", layers)?;
        check::array("layers", layers, kv_heads)?;
        let all = (0..layers).flat_map(|layer| (0..kv_heads).map(move |head| (layer, head)));
        let mut measured = self.heads.iter().map(HeadCosts::number);
        for (layer, kv_head) in all {
            if measured.next() != Some((layer, kv_head)) {
                return Err(Error::InvalidOption {
                    which: "samples",
                    found: format!("without kv head {kv_head} of layer {layer}"),
                    needed: "of every kv head of every layer, numbered from 0",
                });
            }
        }
        let query_heads = kv_heads.saturating_mul(shape.group);
        let SampleShape { head_dim, value_dim, .. } = shape;
        let sizes = ModelSizes { layers, query_heads, kv_heads, head_dim, value_dim };
        sizes.check()?;
        Ok(sizes)
    }
}

fn too_small(budget: Budget, frontiers: &[&Frontier]) -> Error {
    let least: usize = frontiers.iter().map(|frontier| frontier.least()).sum();
    let (of_a_head, least) = (budget.of_a_head(), least.div_ceil(frontiers.len().max(1)));
    Error::InvalidOption {
        which: "budget",
        found: format!("{of_a_head} for each head, where the smallest settings take {least}"),
        needed: "at least that, or the grid must have smaller settings",
    }
}

impl StatePlan {
    /// Measures every setting on the samples of every head, and gives each head the one that the
    /// least sum of costs takes within the budget.
    ///
    /// # Errors
    ///
    /// Those of [`StatePlanner::new`], [`StatePlanner::add`] and [`StatePlanner::plan`].
    pub fn fit<T: Scalar>(
        samples: &[PlanSample<'_, T>],
        options: &PlanOptions,
    ) -> Result<Self, Error> {
        let mut planner = StatePlanner::new(options)?;
        planner.add(samples)?;
        planner.plan()
    }
}

#[cfg(feature = "serde")]
impl TryFrom<SavedPlanner> for StatePlanner {
    type Error = Error;

    fn try_from(saved: SavedPlanner) -> Result<Self, Error> {
        saved.check()?;
        let SavedPlanner { options, shape, heads } = saved;
        Ok(Self { options, shape, heads })
    }
}
