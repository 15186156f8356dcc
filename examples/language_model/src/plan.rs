//! Which kv heads stay exact: measured on a text, kept as JSON; and whatever else a file says of
//! heads.

use crate::capture::Capture;
use crate::kernels::Kernel;
use crate::model::{Config, Model};
use crate::state_plan;
use crate::texts::Text;
use anyhow::{Context, Result, ensure};
use dijiang::{Attention, ExactHeads, HeadErrors, SoftmaxAttention, StatePlan};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs;
use std::path::Path;

/// A choice of exact heads, and what it was made from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The model, as its file names it.
    pub model: String,
    /// The kernel of the heads that are not exact.
    pub kernel: String,
    /// The text it was measured on.
    pub text: String,
    /// Tokens of that text.
    pub tokens: usize,
    /// The first tokens, which do not count: a window still holds them.
    pub warm_up: usize,
    /// The choice, and the error of every head.
    pub heads: ExactHeads,
}

/// What a file says of the heads of a model.
#[derive(Clone, Debug, PartialEq)]
pub enum Choice {
    /// Which stay exact, whatever the kernel of the others.
    Exact(Plan),
    /// All of it: a setting for every head.
    Settings(StatePlan),
}

impl Choice {
    /// Reads a file of either kind, for this model.
    pub fn load(path: &Path, model: &Model) -> Result<Self> {
        let text = match path.to_str().and_then(state_plan::built_in) {
            Some(text) => text.to_owned(),
            None => fs::read_to_string(path)
                .with_context(|| format!("cannot read {}", path.display()))?,
        };
        let not_a_plan = || format!("{} is not a plan", path.display());
        let json: serde_json::Value = serde_json::from_str(&text).with_context(not_a_plan)?;
        if json.get("budget").is_none() {
            return Ok(Self::Exact(Plan::load(path, model.config())?));
        }
        let plan: StatePlan = serde_json::from_value(json).with_context(not_a_plan)?;
        state_plan::check(&plan, &path.display().to_string(), model)?;
        Ok(Self::Settings(plan))
    }
}

/// Tokens of the calibration text that do not count.
pub const WARM_UP: usize = 256;

/// Measures a kernel in every kv head, alone, against exact attention.
pub fn measure(
    kernel: &Kernel,
    config: &Config,
    capture: &Capture,
    warm_up: usize,
) -> Result<HeadErrors> {
    let exact = SoftmaxAttention::<f32>::new(config.head_dim)?;
    let kernels = kernel.alone().heads(config, Some(capture))?;
    let of = |head: &dijiang::HeadSample<'_, f32>| -> &dyn Attention<f32> {
        &*kernels[head.layer][head.kv_head]
    };
    HeadErrors::measure_each(&exact, of, &capture.samples(), warm_up)
        .with_context(|| format!("measuring `{}` in every head", kernel.alone()))
}

impl Plan {
    /// A choice made from errors measured on this text.
    #[must_use]
    pub fn new(
        config: &Config,
        kernel: &Kernel,
        text: &Text,
        warm_up: usize,
        heads: ExactHeads,
    ) -> Self {
        Self {
            model: config.name.clone(),
            kernel: kernel.alone().name().to_owned(),
            text: text.name.clone(),
            tokens: text.tokens.len(),
            warm_up,
            heads,
        }
    }

    /// Writes it as JSON.
    pub fn save(&self, path: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self)?;
        fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))
    }

    /// Reads what [`save`](Self::save) wrote, for a model of these sizes.
    pub fn load(path: &Path, config: &Config) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let plan: Self = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a plan", path.display()))?;
        let inside = |layer, kv_head| layer < config.layers && kv_head < config.kv_heads;
        let ranked = plan.heads.errors().ranked();
        // each head once, too: a person may have changed the file
        let heads: HashSet<_> =
            ranked.iter().map(|e| (e.layer, e.kv_head)).filter(|&(l, kv)| inside(l, kv)).collect();
        let fits = [ranked.len(), heads.len()] == [config.layers * config.kv_heads; 2];
        ensure!(
            fits,
            "{} is a plan for `{}`, a model of other sizes: `{}` has {} layers of {} kv heads",
            path.display(),
            plan.model,
            config.name,
            config.layers,
            config.kv_heads
        );
        Ok(plan)
    }
}
