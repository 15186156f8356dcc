//! Plans and costs as they are read, perhaps from a file that a person changed.

use crate::check;
use crate::error::Error;
use crate::plan::costs::{HeadCosts, WHOLE};
use crate::plan::options::{Budget, PlanOptions};
use crate::plan::sample::SampleShape;
use crate::plan::setting::{HeadPlan, KernelOptions, ModelSizes};
use crate::state_format::StateFormat;

/// A [`StatePlan`](crate::StatePlan) as it is read.
#[derive(serde::Deserialize)]
#[serde(rename = "StatePlan")]
pub(crate) struct SavedPlan {
    pub(crate) sizes: ModelSizes,
    pub(crate) fingerprint: String,
    pub(crate) sinks: usize,
    pub(crate) scale: f64,
    #[serde(default)]
    pub(crate) format: StateFormat,
    pub(crate) budget: Budget,
    pub(crate) length: Option<usize>,
    pub(crate) sensitivities: bool,
    pub(crate) heads: Vec<HeadPlan>,
}

/// What a file says that no plan says.
fn refuse(found: String, needed: &'static str) -> Error {
    Error::InvalidOption { which: "plan", found, needed }
}

impl SavedPlan {
    /// Refuses what no plan says.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let Self { sizes, scale, budget, length, heads, .. } = self;
        sizes.check()?;
        check::scale::<f64>(Some(*scale), sizes.head_dim)?;
        check::at_least_one("budget", budget.of_a_head())?;
        check::at_least_one("length", length.unwrap_or(1))?;
        if heads.len() != sizes.all_heads() {
            let found =
                format!("one of {} heads for {} of the model", heads.len(), sizes.all_heads());
            return Err(refuse(found, "one that has every kv head of every layer"));
        }
        let lengths = |head: &HeadPlan| -> Vec<usize> {
            head.cost_by_length.iter().map(|(length, _)| *length).collect()
        };
        for (i, head) in heads.iter().enumerate() {
            let HeadPlan { layer, kv_head, .. } = head;
            let name = || format!("kv head {kv_head} of layer {layer}");
            if (*layer, *kv_head) != (i / sizes.kv_heads, i % sizes.kv_heads) {
                return Err(refuse(
                    format!("{} at place {i}", name()),
                    "heads in order, each once",
                ));
            }
            let mut costs = head.cost_by_length.iter().map(|(_, cost)| *cost).chain([head.cost]);
            if !costs.all(|cost| cost >= 0.0 && cost.is_finite()) {
                let needed = "costs that are finite and not negative";
                return Err(refuse(format!("a cost of {}", name()), needed));
            }
            if lengths(head) != lengths(&heads[0]) {
                let needed = "costs at the same lengths in every head";
                return Err(refuse(format!("the lengths of {}", name()), needed));
            }
            if let Some(units) = &head.units {
                let found = units.query_squares().len();
                check::size("units", "query_squares", sizes.head_dim, found)?;
            }
        }
        // whatever else a kernel refuses
        let (head_dim, scale, sinks) = (sizes.head_dim, *scale, self.sinks);
        let kernel = KernelOptions { head_dim, scale, sinks, format: self.format };
        heads.iter().try_for_each(|head| {
            kernel.kernel::<f64>(head.setting, head.units.as_ref()).map(|_| ())
        })
    }
}

/// A [`StatePlanner`](crate::StatePlanner) as it is read.
#[derive(serde::Deserialize)]
#[serde(rename = "StatePlanner")]
pub(crate) struct SavedPlanner {
    pub(crate) options: PlanOptions,
    pub(crate) shape: Option<SampleShape>,
    pub(crate) heads: Vec<HeadCosts>,
}

impl SavedPlanner {
    /// Refuses what no planner has measured.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let Self { options, shape, heads } = self;
        options.check()?;
        let refuse =
            |found: String, needed| Err(Error::InvalidOption { which: "planner", found, needed });
        if let Some(SampleShape { group, head_dim, value_dim, .. }) = *shape {
            check::array("planner", group, head_dim)?;
            check::array("planner", group, value_dim)?;
            [group, head_dim, value_dim]
                .into_iter()
                .try_for_each(|size| check::at_least_one("planner", size))?;
        }
        if shape.is_none() && !heads.is_empty() {
            return refuse("without shapes".to_owned(), "the shapes of the samples that it has");
        }
        let in_order = heads.windows(2).all(|pair| pair[0].number() < pair[1].number());
        if !in_order {
            return refuse("of heads in disorder".to_owned(), "heads in order, each once");
        }
        for head in heads {
            let name = || format!("kv head {} of layer {}", head.kv_head, head.layer);
            check::size("planner", "curves", options.grid.len(), head.curves.len())?;
            let head_dim = shape.map_or(0, |shape| shape.head_dim);
            check::size("planner", "query_squares", head_dim, head.query_squares.len())?;
            for (curve, points) in options.grid.iter().zip(&head.curves) {
                let known = points.iter().map(|point| &point.entries);
                if points.is_empty() || !known.eq(curve.entries.iter().take(points.len())) {
                    let needed = "the entries of the grid, from the least on";
                    return refuse(format!("a curve of {}", name()), needed);
                }
                if !points.iter().all(|point| point.sums.keys().eq(head.weights.keys())) {
                    let needed = "costs at the same lengths everywhere";
                    return refuse(format!("the lengths of {}", name()), needed);
                }
            }
            if !head.weights.contains_key(&WHOLE) || head.weights.values().any(|w| *w <= 0.0) {
                let needed = "positive, and one for whole samples";
                return refuse(format!("with weights of {}", name()), needed);
            }
            let sums = head.curves.iter().flatten().flat_map(|point| point.sums.values());
            let sums = sums.chain(head.weights.values()).chain(&head.query_squares);
            if !sums.chain([&head.value_square]).all(|x| *x >= 0.0 && x.is_finite()) {
                return refuse(format!("a cost of {}", name()), "finite and not negative");
            }
        }
        Ok(())
    }
}
