//! One line for each kernel, as CSV.

use super::facts::{change, decode_at, exact_heads, lengths, lists, score, state_at, state_share};
use crate::compare::{Comparison, Row};
use anyhow::{Result, anyhow};

/// The comparison as CSV. Cells are empty where nothing was measured.
pub fn csv(comparison: &Comparison) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(header(comparison))?;
    for row in &comparison.rows {
        writer.write_record(record(comparison, row))?;
    }
    let bytes = writer.into_inner().map_err(|error| anyhow!("{error}"))?;
    Ok(String::from_utf8(bytes)?)
}

fn header(comparison: &Comparison) -> Vec<String> {
    let fixed = [
        "kernel",
        "exact_heads",
        "context_tokens",
        "state_bytes",
        "state_share_of_first",
        "loss_first_half_nats",
        "loss_second_half_nats",
        "perplexity_first_half",
        "perplexity_second_half",
        "perplexity_change_percent",
        "reading_tokens_per_second",
        "reading_attention_share",
        "copied_right",
        "copied_asked",
    ];
    let mut header: Vec<String> = fixed.map(str::to_owned).to_vec();
    for (pairs, distance) in lists(comparison) {
        header.extend(
            ["right", "asked"]
                .map(|what| format!("recall_{pairs}_pairs_{distance}_tokens_between_{what}")),
        );
    }
    for length in lengths(comparison) {
        header.extend(
            ["state_bytes", "decode_attention_us", "decode_total_us"]
                .map(|what| format!("{what}_at_{length}_tokens")),
        );
    }
    header
}

fn record(comparison: &Comparison, row: &Row) -> Vec<String> {
    let [first, second] = row.halves;
    let text = |value: Option<usize>| value.map_or_else(String::new, |value| value.to_string());
    let mut record =
        vec![row.kernel.clone(), text(exact_heads(row)), comparison.context.to_string()];
    record.push(row.state_bytes.to_string());
    let numbers = [
        state_share(comparison, row),
        first,
        second,
        first.exp(),
        second.exp(),
        100.0 * change(comparison, row),
        row.tokens_per_second,
        row.attention_share,
    ];
    record.extend(numbers.map(|number| number.to_string()));
    record.extend([row.copying.right.to_string(), row.copying.asked.to_string()]);
    for list in lists(comparison) {
        let score = score(row, list);
        record.extend([text(score.map(|score| score.right)), text(score.map(|score| score.asked))]);
    }
    for length in lengths(comparison) {
        let step = decode_at(row, length);
        let time = |time: Option<f64>| time.map_or_else(String::new, |time| time.to_string());
        record.push(text(state_at(comparison, row, length)));
        record.extend([time(step.map(|step| step.attention)), time(step.map(|step| step.total))]);
    }
    record
}
