//! The state of a hybrid kernel as numbers, to be saved and restored.

use crate::attention::fingerprint::Fingerprint;
use crate::attention::hybrid::config::{Config, FarKind, Weighing};
use crate::attention::hybrid::far::features::FarFeatures;
use crate::attention::hybrid::far_memory::Seen;
use crate::attention::hybrid::scores::{ExpectedAttention, StaticScore};
use crate::attention::hybrid::state::HybridState;
use crate::error::Error;
use crate::memory::merged::rule::Distance;
use crate::memory::scoring::SoftCap;
use crate::scalar::Scalar;
use ndarray::ArrayView1;

impl<T: Scalar> Config<T> {
    /// What tells this kernel from others of the same sizes.
    pub(super) fn fingerprint(&self) -> Result<Fingerprint, Error> {
        let own = Fingerprint::new()
            .with("scale", [self.scale])
            .with("soft cap", self.soft_cap.map(SoftCap::cap))
            .with("sink logits", self.sink_logits.iter().copied());
        let own =
            self.format.mark().into_iter().fold(own, |own, mark| own.with("state format", [mark]));
        let own = match (&self.scores, &self.expected) {
            (None, None) => own,
            (scores, expected) => {
                let scores = scores.iter().flat_map(StaticScore::parameters);
                let expected = expected.iter().flat_map(ExpectedAttention::parameters);
                own.with("calibration", scores.chain(expected))
            }
        };
        match &self.far {
            FarKind::None | FarKind::Own(_) => Ok(own),
            FarKind::Linear(FarFeatures { map, log_decay, .. }) => {
                let own = match log_decay {
                    Some(decay) => own.with("log decay", decay.parameters()),
                    None => own,
                };
                own.with_map(&***map)
            }
            FarKind::Merged { rule, weighing } => {
                let weighing = match *weighing {
                    Weighing::One => vec![0.0],
                    Weighing::Expected => vec![1.0],
                    #[allow(clippy::cast_precision_loss)]
                    Weighing::Received { decay, min_age } => vec![2.0, decay, min_age as f64],
                };
                let metric = match &rule.metric {
                    Distance::Identity => vec![0.0],
                    Distance::QueryDiagonal => vec![1.0],
                    Distance::Matrix(matrix) => matrix.iter().copied().collect(),
                };
                let own = own.with("weights of entries", weighing).with("metric", metric);
                let units = rule.query_squares.iter().flat_map(|all| all.iter().copied());
                let own = own.with("units", units.chain(rule.value_square));
                Ok(own.with("cost", rule.cost.parameters()))
            }
        }
    }
}

impl<T: Scalar> HybridState<T> {
    /// What has to be kept to go on from here: for each head the sinks, the window from its oldest
    /// token on, the heavy keys, the far memory.
    pub(super) fn numbers(&self, config: &Config<T>) -> Option<Vec<T>> {
        let mut out = Vec::new();
        for (head, near) in self.near.iter().enumerate() {
            let mut token = |slot: usize| {
                out.extend(near.slots.key(slot));
                out.extend(near.slots.value(slot));
                out.push(near.received[slot]);
            };
            (0..config.sinks.min(self.tokens)).for_each(&mut token);
            config.held(self.tokens).map(|position| config.slot(position)).for_each(&mut token);
            (0..near.heavy_scores.len())
                .map(|i| config.sinks + config.ring + i)
                .for_each(&mut token);
            out.extend(&near.heavy_scores);
            if !self.far.numbers(head, &mut out) {
                return None;
            }
        }
        Some(out)
    }

    /// The inverse; `false` if the numbers are not as many as they should be. The state is then
    /// unspecified.
    pub(super) fn set_numbers(
        &mut self,
        config: &Config<T>,
        tokens: usize,
        mut numbers: &[T],
    ) -> bool {
        self.clear(config);
        self.tokens = tokens;
        let (d, dv) = (config.head_dim, self.value_dim);
        let gone = tokens.saturating_sub(config.sinks) - config.held(tokens).len();
        let heavy = if config.is_window_only() { 0 } else { gone.min(config.heavy) };
        for (head, near) in self.near.iter_mut().enumerate() {
            let sinks = 0..config.sinks.min(tokens);
            let ring = config.held(tokens).map(|position| config.slot(position));
            let heavy_slots = (0..heavy).map(|i| config.sinks + config.ring + i);
            for slot in sinks.chain(ring).chain(heavy_slots) {
                let Some((token, rest)) = numbers.split_at_checked(d + dv + 1) else {
                    return false;
                };
                let (key, value) = token.split_at(d);
                near.put(config, slot, ArrayView1::from(key), ArrayView1::from(&value[..dv]));
                near.received[slot] = token[d + dv];
                if near.received[slot] < T::zero() {
                    return false;
                }
                numbers = rest;
            }
            let Some((scores, rest)) = numbers.split_at_checked(heavy) else { return false };
            near.heavy_scores.extend_from_slice(scores);
            numbers = rest;
            let observed = tokens.saturating_sub(config.sinks);
            let seen = Seen { absorbed: gone - heavy, observed };
            match self.far.set_numbers(head, seen, numbers) {
                Some(rest) => numbers = rest,
                None => return false,
            }
            near.make_room(config, config.near_used(tokens, gone > 0));
            near.measure();
            let [key, value] = self.far.largest(head);
            near.largest_key = near.largest_key.max(key);
            near.largest_value = near.largest_value.max(value);
        }
        numbers.is_empty() && self.far.is_complete(gone - heavy)
    }
}
