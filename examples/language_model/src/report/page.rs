//! The page: what stands on it.

use super::charts::{
    alike, attention_time, distance, load, looks, memory, off_scale, perplexity, positions,
    recalling, total_time,
};
use super::facts::{lengths, lists, on_scale, recalled, reference};
use super::findings::{cautions, found};
use super::heads;
use super::numbers::{self, count, list, mib, plain, range, shortened};
use super::plot::{Panel, key};
use super::settings;
use super::table;
use crate::compare::{Comparison, Row};
use anyhow::Result;
use reports::page::{Block, Figure};

/// More plans are not drawn.
const MOST_PLANS: usize = 6;
/// Longer names are cut in sentences below plots.
const LONGEST_NAME: usize = 60;

/// The whole page; `command` is what was typed to get it.
pub fn page(comparison: &Comparison, command: &str) -> Result<String> {
    let mut blocks = vec![
        Block::Lead { items: found(comparison) },
        about(comparison, command),
        Block::section("What this does not show"),
        Block::Items { items: cautions(comparison).iter().map(|text| capital(text)).collect() },
        Block::section("Every kernel"),
        table::block(comparison),
        Block::note(&legend(comparison)),
    ];
    quality(&mut blocks, comparison)?;
    recall(&mut blocks, comparison)?;
    cost(&mut blocks, comparison)?;
    planned(&mut blocks, comparison);
    plans(&mut blocks, comparison);
    Ok(reports::page::page(
        "Attention kernels in a language model",
        "What does a language model lose and gain by its attention kernel?",
        &blocks,
    )?)
}

fn about(comparison: &Comparison, command: &str) -> Block {
    let Comparison { model, layers, kv_heads, threads, .. } = comparison;
    let text = format!(
        "{model}: {layers} layers of {kv_heads} kv heads, not trained any further. Texts: {}. \
         Calibration: {}. Windows of {} tokens; {threads} thread{}; {} s in all.",
        list(&comparison.texts),
        comparison.calibration,
        count(comparison.context),
        if *threads == 1 { "" } else { "s" },
        plain(comparison.seconds),
    );
    Block::About { text, command: command.to_owned() }
}

/// What the columns of the table are.
fn legend(comparison: &Comparison) -> String {
    let first = name_of_first(comparison);
    let mut text = format!(
        "The state is of all layers, its share that of {first}. Perplexities are means over the \
         first and the second half of the context; their change is that of the second half \
         against {first}. "
    );
    if !lists(comparison).is_empty() {
        text.push_str(
            "Codes recalled of those asked for, exact in every digit, by pairs of a list. ",
        );
    }
    text.push_str(&format!(
        "Copied: tokens of a text that is given twice. Shaded: {first}; green: the lowest \
         perplexity of constant memory; grey: perplexity more than {} times that of {first}.",
        super::facts::OFF_SCALE
    ));
    text
}

fn quality(blocks: &mut Vec<Block>, comparison: &Comparison) -> Result<()> {
    let first = name_of_first(comparison);
    let far = off_scale(comparison);
    if let Some(panel) = perplexity(comparison) {
        blocks.push(Block::section("Perplexity against memory"));
        let off: Vec<String> = far
            .iter()
            .map(|row| {
                format!(
                    "{} ({} MiB, {})",
                    name(row),
                    plain(mib(row.state_bytes)),
                    numbers::perplexity(row.halves[1])
                )
            })
            .collect();
        let off =
            if off.is_empty() { String::new() } else { format!(" Off the scale: {}.", list(&off)) };
        let caption = format!(
            "Lower is better, further left is smaller: perplexity in the second half of {} tokens \
             against the bytes of the state there, on a logarithmic scale; the dashed line is \
             {first}, thin lines join a kernel to itself with exact heads.{off}",
            count(comparison.context)
        );
        blocks.push(Block::Figures { wide: true, figures: vec![figure(&panel, caption)?] });
    }
    if let Some(panel) = positions(comparison) {
        blocks.push(Block::section("Where in the context it is lost"));
        let drawn =
            looks(comparison).into_iter().skip(1).filter(|(row, _)| on_scale(comparison, row));
        blocks.push(key(drawn.map(|(row, look)| (look, row.kernel.as_str())), Some(&first)));
        let off = left_out(&far, "Off the scale and left out");
        let caption = format!(
            "Nats a token above {first}, each mark the mean over {} positions: a line that rises \
             loses more the longer the context is.{off}",
            count(comparison.bucket)
        );
        blocks.push(Block::Figures { wide: true, figures: vec![figure(&panel, caption)?] });
    }
    Ok(())
}

fn recall(blocks: &mut Vec<Block>, comparison: &Comparison) -> Result<()> {
    let (by_load, by_distance) = (load(comparison), distance(comparison));
    if by_load.is_none() && by_distance.is_none() {
        return Ok(());
    }
    blocks.push(Block::section("Recall of codes"));
    blocks.push(key(
        recalling(comparison).into_iter().map(|(row, look)| (look, row.kernel.as_str())),
        None,
    ));
    let mut figures = Vec::new();
    if let Some((panel, distance)) = by_load {
        let between = if distance == 0 {
            "directly after it".to_owned()
        } else {
            format!("{} tokens later", count(distance))
        };
        let caption = format!(
            "Codes of four digits that are recalled, in percent, from a list of so many names \
             that comes again {between}."
        );
        figures.push(figure(&panel, caption)?);
    }
    if let Some((panel, pairs)) = by_distance {
        let caption = format!(
            "The same in percent for lists of {pairs} names, by tokens of prose between the two \
             lists."
        );
        figures.push(figure(&panel, caption)?);
    }
    let none: Vec<&Row> =
        comparison.rows.iter().filter(|row| recalled(row, 0).right == 0).collect();
    let none = left_out(&none, "Left out, as they recall nothing");
    blocks.push(Block::Figures { wide: false, figures });
    blocks.push(Block::note(&format!(
        "Marks are moved apart where they would hide each other.{none}"
    )));
    Ok(())
}

fn cost(blocks: &mut Vec<Block>, comparison: &Comparison) -> Result<()> {
    let panels = [
        (
            memory(comparison),
            "Bytes of the states of all layers in MiB against the tokens of the context, both \
             axes logarithmic: flat lines are constant memory.",
        ),
        (
            attention_time(comparison),
            "Milliseconds a token spent in attention while decoding, against the context, both \
             axes logarithmic.",
        ),
        (
            total_time(comparison),
            "Milliseconds of a whole decode step, on a linear scale from zero: what the attention \
             saves beside the rest of the model.",
        ),
    ];
    if panels.iter().all(|(panel, _)| panel.is_none()) {
        return Ok(());
    }
    blocks.push(Block::section("Memory and time against context"));
    blocks.push(key(
        looks(comparison).into_iter().map(|(row, look)| (look, row.kernel.as_str())),
        None,
    ));
    let mut figures = Vec::new();
    for (panel, caption) in panels {
        if let Some(mut panel) = panel {
            panel.spread(0.007);
            figures.push(figure(&panel, caption.to_owned())?);
        }
    }
    let alike = alike(comparison).map(|(rows, least, most)| {
        let names: Vec<String> = rows.iter().map(|row| name(row)).collect();
        format!(
            " {} keep {} MiB each, and lie on one line.",
            list(&names),
            range(mib(least), mib(most))
        )
    });
    blocks.push(Block::Figures { wide: false, figures });
    blocks.push(Block::note(&format!(
        "Marks are moved apart where they would hide each other.{}{}",
        alike.unwrap_or_default(),
        if lengths(comparison).is_empty() { " No decode steps were timed." } else { "" }
    )));
    Ok(())
}

/// What every head was given, by plans.
fn planned(blocks: &mut Vec<Block>, comparison: &Comparison) {
    let mut figures = Vec::new();
    for (row, plan) in settings::plans(comparison).into_iter().take(MOST_PLANS) {
        let Some(svg) = settings::picture(plan) else { continue };
        let heads = settings::merged(plan).count();
        let slots: usize =
            settings::merged(plan).map(|(window, entries, _)| window + entries).sum();
        let exact = plan.exact_heads().len();
        let predicted = match plan.has_sensitivities() {
            true => format!(
                " It predicts a loss of {:.4} nats a token more than exact attention has.",
                plan.cost()
            ),
            false => String::new(),
        };
        let caption = format!(
            "{}: the area of a disc is the number of merged entries of a kv head, its colour the \
             window; on average {} slots, window and entries together, and {}.{predicted}",
            name(row),
            plain(slots as f64 / heads.max(1) as f64),
            match exact {
                0 => "no exact heads".to_owned(),
                1 => "1 exact head besides, drawn as a square".to_owned(),
                count => format!("{count} exact heads besides, drawn as squares"),
            }
        );
        figures.push(Figure { svg, caption });
    }
    if !figures.is_empty() {
        blocks.push(Block::section("What every head is given"));
        blocks.push(Block::Figures { wide: true, figures });
    }
}

fn plans(blocks: &mut Vec<Block>, comparison: &Comparison) {
    let mut figures = Vec::new();
    for (names, plan) in heads::plans(comparison).into_iter().take(MOST_PLANS) {
        let Some(svg) = heads::picture(comparison, plan) else { continue };
        let names: Vec<String> = names.iter().map(|name| shortened(name, LONGEST_NAME)).collect();
        let worst = heads::worst(plan).map(|(error, layer, kv_head)| {
            format!("; the largest is {} in kv head {kv_head} of layer {layer}", plain(error))
        });
        let caption = format!(
            "{}: each cell is a kv head, its colour the relative error of its output on the \
             calibration text if it does not stay exact{}; the {} outlined stay exact.",
            list(&names),
            worst.unwrap_or_default(),
            plan.exact.len()
        );
        figures.push(Figure { svg, caption });
    }
    if !figures.is_empty() {
        blocks.push(Block::section("Which heads stay exact"));
        blocks.push(Block::Figures { wide: true, figures });
    }
}

fn figure(panel: &Panel, caption: String) -> Result<Figure> {
    Ok(Figure { svg: panel.svg()?, caption })
}

fn left_out(rows: &[&Row], why: &str) -> String {
    let names: Vec<String> = rows.iter().map(|row| name(row)).collect();
    if names.is_empty() { String::new() } else { format!(" {why}: {}.", list(&names)) }
}

fn name(row: &Row) -> String {
    shortened(&row.kernel, LONGEST_NAME)
}

fn name_of_first(comparison: &Comparison) -> String {
    reference(comparison).map_or_else(|| "nothing".to_owned(), name)
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}
