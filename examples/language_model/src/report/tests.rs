use super::*;
use crate::compare::{Chosen, Comparison, Recall, Row};
use crate::decode::Decode;
use crate::recall::Score;
use anyhow::Result;

fn row(kernel: &str, loss: f64, per_token: usize) -> Row {
    let bytes = |tokens: usize| 1000 + per_token * tokens;
    let score = Score { right: if loss < 3.2 { 9 } else { 1 }, asked: 10 };
    let recall =
        [(5, 0), (10, 0), (10, 64)].map(|(pairs, distance)| Recall { pairs, distance, score });
    let step = |tokens| Decode {
        tokens,
        attention: 10.0 + tokens as f64,
        total: 900.0 + tokens as f64,
        bytes: bytes(tokens),
    };
    Row {
        kernel: kernel.to_owned(),
        halves: [loss, loss + 0.01],
        by_position: vec![loss; 4],
        attention_share: 0.2,
        tokens_per_second: 100.0,
        recall: recall.to_vec(),
        copying: score,
        decode: [128, 256, 512].map(step).to_vec(),
        state_bytes: bytes(256),
        state: [128, 256, 512].map(|tokens| (tokens, bytes(tokens))).to_vec(),
        plan: None,
        settings: None,
    }
}

fn chosen() -> Result<Chosen> {
    let heads: Vec<_> = [(0, 0, 0.5), (1, 1, 0.25), (0, 1, 0.1)]
        .map(|(layer, kv_head, error)| {
            serde_json::json!({"layer": layer, "kv_head": kv_head, "output_error": error})
        })
        .to_vec();
    let errors = serde_json::from_value(serde_json::json!({"ranked": heads, "value_dim": 8}))?;
    Ok(Chosen { exact: vec![(0, 0), (7, 7)], errors })
}

/// Two layers of two kv heads, one of them exact.
fn settings() -> Result<dijiang::StatePlan> {
    let head = |layer: usize, kv_head: usize| {
        let entries = 4 << (6 * kv_head);
        let merged = serde_json::json!({"window": 16 << layer, "entries": entries, "decay": 0.98});
        let setting = match (layer, kv_head) {
            (1, 1) => serde_json::json!("exact"),
            _ => serde_json::json!({"merged": merged}),
        };
        serde_json::json!({
            "layer": layer, "kv_head": kv_head, "setting": setting, "cost": 0.01,
            "cost_by_length": [[256, 0.01]], "metric": null, "value_norm_squared": null
        })
    };
    let heads: Vec<_> = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(l, h)| head(l, h)).to_vec();
    Ok(serde_json::from_value(serde_json::json!({
        "sizes": {"layers": 2, "query_heads": 4, "kv_heads": 2, "head_dim": 8, "value_dim": 8},
        "fingerprint": "x", "sinks": 4, "scale": 0.35, "budget": {"slots": 64}, "length": null,
        "sensitivities": true, "heads": heads
    }))?)
}

fn comparison(rows: Vec<Row>) -> Comparison {
    Comparison {
        model: "small & <good>".to_owned(),
        layers: 2,
        kv_heads: 2,
        context: 256,
        texts: vec!["A".to_owned(), "B".to_owned()],
        calibration: "C".to_owned(),
        threads: 1,
        bucket: 64,
        rows,
        seconds: 3.0,
    }
}

fn usual() -> Result<Comparison> {
    let mut exact = row("merged:8,exact=1", 3.02, 100);
    exact.plan = Some(chosen()?);
    let mut planned = row("merged,plan=x.json", 3.015, 100);
    planned.settings = Some(settings()?);
    let rows = vec![
        row("softmax", 3.0, 400),
        row("window:16", 3.3, 0),
        row("merged:8", 3.2, 0),
        row("dct:64", 7.0, 0),
        exact,
        planned,
    ];
    Ok(comparison(rows))
}

/// Everything there is, and that nothing reads like a number that is none.
fn all(comparison: &Comparison) -> Result<String> {
    let page = page(comparison, "model --kernel \"<x>\"")?;
    let picture = picture(comparison)?;
    let csv = csv(comparison)?;
    let mut reader = ::csv::Reader::from_reader(csv.as_bytes());
    let columns = reader.headers()?.len();
    let mut names = Vec::new();
    for record in reader.records() {
        let record = record?;
        assert_eq!(record.len(), columns);
        names.push(record[0].to_owned());
    }
    assert_eq!(names, comparison.rows.iter().map(|row| row.kernel.clone()).collect::<Vec<_>>());
    let table = table(comparison);
    assert!(table.lines().all(|line| line.chars().count() <= 140), "{table}");
    assert!(!findings(comparison).is_empty());
    assert!(page.ends_with("</html>\n") && picture.ends_with("</svg>\n"));
    for text in [&page, &picture] {
        assert!(!text.contains("NaN") && !text.contains("=\"inf"), "{text}");
        assert_eq!(text.matches("<svg").count(), text.matches("</svg>").count());
    }
    assert!(page.contains("&lt;x&gt;") && page.contains("small &amp; &lt;good&gt;"));
    Ok(page)
}

#[test]
fn findings_follow_from_the_numbers() -> Result<()> {
    let found = findings(&usual()?);
    let has = |parts: &[&str]| {
        assert!(
            found.iter().any(|text| parts.iter().all(|part| text.contains(part))),
            "{parts:?} {found:#?}"
        )
    };
    has(&["Of 3 kernels of constant memory merged:8 has the lowest perplexity", "+22.1 %"]);
    has(&["The window that costs as much, window:16 (+35.0 %)", "lower in merged:8"]);
    has(&["2 exact of 4 kv heads", "from +22.1 % to +2.0 %", "from 3 to 27 of 30", "softmax: 27"]);
    has(&["Feature maps alone", "1108 (dct:64)"]);
    has(&["softmax recalls 27 of 30", "nine tenths of that: merged:8,exact=1 (27)"]);
    has(&["At 512 tokens, softmax keeps", "times less"]);
    has(&["a decode step takes 1.41 ms with softmax"]);
    has(&["Not shown: recall in real use", "1 to 2 prompts a point", "calibration text"]);
    let mut swapped = usual()?;
    swapped.rows[1].halves[1] = 3.1;
    assert!(findings(&swapped)[0].contains("window:16 has the lowest"), "{:?}", findings(&swapped));
    assert!(findings(&swapped)[1].contains("no lower in merged:8"), "{:?}", findings(&swapped));
    Ok(())
}

#[test]
fn the_page_has_every_picture() -> Result<()> {
    let page = all(&usual()?)?;
    for title in [
        "Perplexity against the size",
        "Loss by position",
        "Recall against load",
        "Recall against distance",
        "Memory against",
        "Time in attention",
        "Time of a whole",
    ] {
        assert!(page.contains(&format!("aria-label=\"{title}")), "{title}");
    }
    assert!(page.contains("Off the scale: dct:64"));
    assert!(page.contains("layer 0, kv head 0: error 0.50, exact"));
    assert!(page.contains("layer 1, kv head 0: error unknown"));
    for title in [
        "layer 0, kv head 1: window 16, 256 entries, decay 0.98",
        "layer 1, kv head 0: window 32, 4 entries",
        "layer 1, kv head 1: exact",
        "on average 109 slots, window and entries together, and 1 exact head besides",
        "a loss of 0.0400 nats a token",
    ] {
        assert!(page.contains(title), "{title}");
    }
    assert!(!page.contains("http://") && !page.contains("https://"));
    Ok(())
}

#[test]
fn odd_comparisons_render() -> Result<()> {
    all(&comparison(vec![]))?;
    all(&comparison(vec![row("softmax", 3.0, 400)]))?;
    let names = ["<b>&\"", "a,b", "", &"merged:8,".repeat(60), "ü\u{0}\n"];
    all(&comparison(names.map(|name| row(name, 3.0, 1)).to_vec()))?;
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 0.0, -1e300, 1e300] {
        let mut of_others = usual()?;
        let mut of_first = usual()?;
        let spoil = |row: &mut Row| {
            (row.halves, row.by_position[1], row.tokens_per_second) = ([value; 2], value, value);
            (row.decode[1].attention, row.decode[1].total) = (value, value);
        };
        of_others.rows[1..].iter_mut().for_each(spoil);
        of_first.rows[..1].iter_mut().for_each(spoil);
        all(&of_others)?;
        all(&of_first)?;
        of_others.seconds = value;
        all(&of_others)?;
    }
    Ok(())
}

#[test]
fn what_is_missing_is_left_out() -> Result<()> {
    let mut bare = usual()?;
    for row in &mut bare.rows {
        (row.by_position, row.recall, row.decode, row.state) = (vec![], vec![], vec![], vec![]);
        (row.copying, row.state_bytes) = (Score::default(), 0);
    }
    all(&bare)?;
    for (layers, kv_heads) in [(0, 0), (1, 1), (500, 1), (usize::MAX, 3)] {
        let mut sized = usual()?;
        (sized.layers, sized.kv_heads, sized.context, sized.bucket) = (layers, kv_heads, 0, 0);
        all(&sized)?;
    }
    let mut unlike = usual()?;
    unlike.rows[1].recall.truncate(1);
    unlike.rows[2].decode.truncate(1);
    unlike.rows[3].by_position.clear();
    all(&unlike)?;
    Ok(())
}
