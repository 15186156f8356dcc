//! What the reports share: axes of plots, charts and marks, lines of text.

pub mod plots;

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
        limit.0 + (place * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { Vec::new() } else { self.ticks.clone() }
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// A list item in lines of at most 110 characters.
pub fn wrapped(sentence: &str) -> String {
    let (mut text, mut length) = ("-".to_owned(), 1);
    for word in sentence.split_whitespace() {
        let size = word.chars().count() + 1;
        if length + size > 110 {
            text.push_str("\n ");
            length = 1;
        }
        text.push(' ');
        text.push_str(word);
        length += size;
    }
    text.push('\n');
    text
}
