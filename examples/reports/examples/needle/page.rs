//! The page: what was found, then the curves and their numbers.

use crate::kernels::{KERNELS, Kind};
use crate::measure::{Curve, Plan, Results};
use crate::plots;
use crate::table;
use crate::task::Sort;
use reports::page::{Block, Figure, Line, Mark, Table};

/// The whole page.
pub fn page(
    results: &Results,
    plan: &Plan,
    findings: &[String],
) -> Result<String, Box<dyn std::error::Error>> {
    let mut blocks = vec![
        Block::Lead { items: findings.to_vec() },
        Block::About {
            text: format!(
                "dijiang {}. Pairs of a key and a value are planted in a stream of filler, and \
                 asked for later by noisy copies of their keys. An answer is right if the planted \
                 value is the nearest of 64 codes. Nothing marks a planted key: it is made as \
                 every other one, in sizes and shares that were measured on real heads.",
                env!("CARGO_PKG_VERSION")
            ),
            command: plan.command.clone(),
        },
    ];
    for sort in Sort::ALL {
        blocks.push(Block::section(sort.title()));
        let marks = KERNELS.iter().map(|kernel| kernel.shape.key(kernel.colour, kernel.name));
        blocks.push(Block::Key {
            marks: marks.chain([Mark::line("reference", "a guess")]).collect(),
        });
        let mut figures = Vec::new();
        for curve in Curve::ALL {
            let svg = plots::accuracy(results, plan, sort, curve)?;
            figures.push(Figure { svg, caption: String::new() });
        }
        blocks.push(Block::Figures { wide: false, figures });
        for curve in Curve::ALL {
            blocks.push(Block::text(&format!("In %, {}:", curve.fixed(plan))));
            blocks.push(rows(results, plan, sort, curve));
        }
    }
    blocks.push(Block::note(&table::legend(plan)));
    blocks.push(Block::section("The kernels"));
    blocks.push(Block::terms(KERNELS.iter().map(|kernel| (kernel.name, kernel.about))));
    Ok(reports::page::page(
        "Recall of attention kernels",
        "What does a memory of constant size recall?",
        &blocks,
    )?)
}

fn rows(results: &Results, plan: &Plan, sort: Sort, curve: Curve) -> Block {
    let line = |(place, kernel): (usize, &crate::kernels::Kernel)| Line {
        class: if kernel.kind == Kind::Memory { "plain" } else { "baseline" },
        cells: table::line(results, sort, curve, place),
    };
    Block::Table(Table {
        header: table::header(plan, curve),
        names: 1,
        lines: KERNELS.iter().enumerate().map(line).collect(),
        ..Table::default()
    })
}
