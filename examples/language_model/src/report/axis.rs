//! Axes of the plots.

use super::numbers::{count, extremes};
use reports::axes::Scale;
use reports::axes::{log_ends, log_ticks};

/// An axis in the units that are drawn: logarithms where [`log`](Self::log).
#[derive(Clone, Debug)]
pub struct Axis {
    /// What it shows, with its unit.
    pub label: String,
    /// Where it begins.
    pub low: f64,
    /// Where it ends.
    pub high: f64,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// A logarithmic axis around the values, with ticks at 1, 2, 5 or at powers of ten; `None`
    /// where nothing is positive.
    pub fn log(label: &str, values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let (low, high) = extremes(values.into_iter().filter(|x| *x > 0.0).map(f64::log10))?;
        let (low, high) = log_ends(low, high);
        let ticks = log_ticks(low, high, 2.5)
            .into_iter()
            .map(|value| (value.log10(), tick(value)))
            .collect();
        Some(Self { label: label.to_owned(), low, high, ticks })
    }

    /// A logarithmic axis with ticks at the given contexts.
    pub fn contexts(label: &str, contexts: &[usize]) -> Option<Self> {
        let mut axis = Self::log(label, contexts.iter().map(|n| *n as f64))?;
        if (2..=9).contains(&contexts.len()) {
            axis.ticks = contexts
                .iter()
                .filter(|n| **n > 0)
                .map(|n| ((*n as f64).log10(), count(*n)))
                .collect();
        }
        Some(axis)
    }

    /// A linear axis around the values.
    pub fn linear(label: &str, values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let (low, high) = extremes(values.into_iter().filter(|x| x.abs() < 1e12))?;
        let margin = if high > low { 0.06 * (high - low) } else { 0.5 };
        let from_zero = low == 0.0;
        Some(Self::between(label, if from_zero { 0.0 } else { low - margin }, high + margin))
    }

    /// A linear axis from here to there.
    pub fn between(label: &str, low: f64, high: f64) -> Self {
        let rough = (high - low) / 7.0;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0]
            .map(|step| step * power)
            .into_iter()
            .find(|step| *step >= rough);
        let step = step.filter(|step| step.is_finite() && *step > 0.0).unwrap_or(1.0);
        let first = (low / step - 1e-9).ceil();
        let ticks =
            (0..12).map(|i| (first + f64::from(i)) * step).take_while(|x| *x <= high + 1e-9 * step);
        Self { label: label.to_owned(), low, high, ticks: ticks.map(|x| (x, tick(x))).collect() }
    }

    /// Places side by side, at 0, 1, 2 and so on.
    pub fn places(label: &str, names: &[usize]) -> Self {
        let ticks = names.iter().enumerate().map(|(i, name)| (i as f64, count(*name))).collect();
        Self { label: label.to_owned(), low: -0.4, high: names.len() as f64 - 0.6, ticks }
    }

    /// For plotters.
    pub fn scale(&self) -> Scale {
        Scale { range: self.low..self.high, ticks: self.ticks.iter().map(|(x, _)| *x).collect() }
    }

    /// Whether a place is on the axis, or close to its ends.
    pub fn holds(&self, x: f64) -> bool {
        let close = 0.05 * (self.high - self.low);
        (self.low - close..=self.high + close).contains(&x)
    }

    /// The text of a tick.
    pub fn text(&self, x: f64) -> String {
        let near = |(a, _): &&(f64, String)| (a - x).abs() < 1e-9 * (self.high - self.low).max(1.0);
        self.ticks.iter().find(near).map_or_else(String::new, |(_, text)| text.clone())
    }
}

fn tick(x: f64) -> String {
    if x.abs() < 1e-9 {
        return "0".to_owned();
    }
    if x.abs() >= 1e7 || x.abs() < 1e-3 {
        return format!("{x:.0e}").replace('-', "−");
    }
    if x >= 1e4 {
        return count(x.round() as usize);
    }
    let text = format!("{x:.3}");
    text.trim_end_matches('0').trim_end_matches('.').replace('-', "−")
}
