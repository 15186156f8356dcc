//! Numbers and names as text.

pub use reports::text::shortened;

/// A count, with narrow spaces between thousands from 10 000 on.
pub fn count(n: usize) -> String {
    let digits = n.to_string();
    if digits.len() < 5 {
        return digits;
    }
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// A positive number to three or four digits.
pub fn plain(x: f64) -> String {
    let size = x.abs();
    match size {
        _ if x.is_nan() => "–".to_owned(),
        _ if x.is_infinite() => "∞".to_owned(),
        _ if size >= 1e12 => format!("{x:.1e}"),
        _ if size >= 999.5 => count(size.round() as usize),
        _ if size >= 99.5 => format!("{x:.0}"),
        _ if size >= 9.95 => format!("{x:.1}"),
        _ => format!("{x:.2}"),
    }
}

/// A perplexity: one digit more than [`plain`] where models differ by little.
pub fn perplexity(nats: f64) -> String {
    let x = nats.exp();
    if x < 100.0 { format!("{x:.2}") } else { plain(x) }
}

/// A change in percent, with its sign.
pub fn change(x: f64) -> String {
    let percent = 100.0 * x;
    let size = percent.abs();
    match size {
        _ if percent.is_nan() => "–".to_owned(),
        _ if percent.is_infinite() => "∞".to_owned(),
        _ if size >= 99.95 => format!("{}{} %", if x < 0.0 { "−" } else { "+" }, plain(size)),
        _ => format!("{percent:+.1} %").replace('-', "−"),
    }
}

/// A share in percent.
pub fn share(x: f64) -> String {
    let percent = 100.0 * x;
    match percent {
        _ if !percent.is_finite() => "–".to_owned(),
        _ if percent < 9.95 => format!("{percent:.1} %"),
        _ => format!("{percent:.0} %"),
    }
}

/// Bytes in MiB.
pub fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Two numbers, or one where they read alike.
pub fn range(least: f64, most: f64) -> String {
    let (from, to) = (plain(least), plain(most));
    if from == to { from } else { format!("{from} to {to}") }
}

/// The least and the most of the finite values.
pub fn extremes(values: impl IntoIterator<Item = f64>) -> Option<(f64, f64)> {
    values.into_iter().filter(|x| x.is_finite()).fold(None, |found, x| {
        let (least, most) = found.unwrap_or((x, x));
        Some((least.min(x), most.max(x)))
    })
}

/// Names in a sentence.
pub fn list<S: AsRef<str>>(names: &[S]) -> String {
    match names {
        [] => String::new(),
        [one] => one.as_ref().to_owned(),
        [first @ .., last] => {
            let first: Vec<&str> = first.iter().map(AsRef::as_ref).collect();
            format!(
                "{} and {}",
                first.join(if names.iter().any(|n| n.as_ref().contains(", ")) {
                    "; "
                } else {
                    ", "
                }),
                last.as_ref()
            )
        }
    }
}
