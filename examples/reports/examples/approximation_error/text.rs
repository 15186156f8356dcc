//! Numbers as text.

/// Three significant digits.
pub fn short(x: f64) -> String {
    let size = x.abs();
    if !x.is_finite() {
        "inf".to_owned()
    } else if size >= 9999.5 || (size < 9.95e-3 && size > 0.0) {
        format!("{x:.1e}")
    } else if size >= 99.95 {
        format!("{x:.0}")
    } else if size >= 9.995 {
        format!("{x:.1}")
    } else if size >= 0.9995 || size == 0.0 {
        format!("{x:.2}")
    } else {
        format!("{x:.3}")
    }
}

/// The same, or a dash.
pub fn short_or_dash(x: Option<f64>) -> String {
    x.map_or_else(|| "-".to_owned(), short)
}

/// A count with thin spaces between thousands.
pub fn count(x: f64) -> String {
    let digits = format!("{x:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Slopes and their intervals: two digits, a real minus sign.
pub fn slope(x: f64) -> String {
    // no negative zero
    format!("{:.2}", (100.0 * x).round() / 100.0 + 0.0).replace('-', "−")
}

/// A share as a percentage.
pub fn percent(x: f64) -> String {
    let x = 100.0 * x;
    if x < 9.95 { format!("{x:.1} %") } else { format!("{x:.0} %") }
}
