//! Linear and logarithmic axes.

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use std::ops::Range;

/// A linear scale with ticks at chosen places.
pub struct Scale {
    pub range: Range<f64>,
    pub ticks: Vec<f64>,
}

impl Ranged for Scale {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let place = (value - self.range.start) / (self.range.end - self.range.start);
        // far beyond the frame all places are alike
        let place = place.clamp(-2.0, 3.0);
        limit.0 + (place * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// The ends of a logarithmic axis around logarithms from `low` to `high`: at least half a decade,
/// since a flat line is to look flat.
pub fn log_ends(low: f64, high: f64) -> (f64, f64) {
    let margin = (0.06 * (high - low)).max(0.25 - 0.5 * (high - low));
    (low - margin, high + margin)
}

/// The values at the ticks of a logarithmic axis between two logarithms: 1, 2, 5 on axes below
/// `dense` decades, powers of ten beyond.
pub fn log_ticks(low: f64, high: f64, dense: f64) -> Vec<f64> {
    let decades = high - low;
    let steps: &[f64] = match decades {
        d if d < 0.8 => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
        d if d < dense => &[1.0, 2.0, 5.0],
        _ => &[1.0],
    };
    let stride = ((decades / 6.0).floor() as i32).max(1);
    let powers =
        (low.floor() as i32..=high.ceil() as i32).filter(|power| power.rem_euclid(stride) == 0);
    let values = powers.flat_map(|power| steps.iter().map(move |step| step * 10_f64.powi(power)));
    values.filter(|value| (low..=high).contains(&value.log10())).collect()
}
