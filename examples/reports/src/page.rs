//! Pages of reports: one file that needs no other. A report says what stands on its page, one
//! template says how.

use minijinja::{Environment, context};
use serde::Serialize;

const TEMPLATE: &str = include_str!("templates/page.html");
const STYLE: &str = include_str!("templates/page.css");

/// Something on a page, from top to bottom.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Block {
    Section {
        title: String,
    },
    /// What was measured, and the command that does it again.
    About {
        text: String,
        command: String,
    },
    /// A paragraph of lines.
    Text {
        class: &'static str,
        lines: Vec<String>,
    },
    Items {
        items: Vec<String>,
    },
    /// What to take away, set off.
    Lead {
        items: Vec<String>,
    },
    /// Lists with titles.
    Groups {
        groups: Vec<(String, Vec<String>)>,
    },
    Key {
        marks: Vec<Mark>,
    },
    Dots {
        charts: Vec<Dots>,
    },
    /// Wide ones keep their size, and scroll where there is no room.
    Figures {
        wide: bool,
        figures: Vec<Figure>,
    },
    Table(Table),
    Terms {
        terms: Vec<(String, String)>,
    },
}

impl Block {
    pub fn section(title: impl Into<String>) -> Self {
        Self::Section { title: title.into() }
    }

    pub fn text(lines: &str) -> Self {
        Self::Text { class: "", lines: lines.lines().map(str::to_owned).collect() }
    }

    /// A paragraph that explains.
    pub fn note(lines: &str) -> Self {
        Self::Text { class: "about", lines: lines.lines().map(str::to_owned).collect() }
    }

    pub fn terms<'a>(terms: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        let terms = terms.into_iter().map(|(name, text)| (name.to_owned(), text.to_owned()));
        Self::Terms { terms: terms.collect() }
    }
}

/// A line of a key.
#[derive(Debug, Serialize)]
pub struct Mark {
    /// `reference` and `guide` are lines.
    pub shape: &'static str,
    pub colour: String,
    pub name: String,
}

impl Mark {
    pub fn line(shape: &'static str, name: impl Into<String>) -> Self {
        Self { shape, colour: String::new(), name: name.into() }
    }
}

/// A drawn plot.
#[derive(Debug, Serialize)]
pub struct Figure {
    pub svg: String,
    pub caption: String,
}

/// Rows of numbers; the first `names` columns hold none.
#[derive(Debug, Default, Serialize)]
pub struct Table {
    pub class: &'static str,
    /// Titles above the header, and how many columns each spans.
    pub groups: Vec<(String, usize)>,
    pub header: Vec<String>,
    pub names: usize,
    pub lines: Vec<Line>,
}

#[derive(Debug, Serialize)]
pub struct Line {
    /// `baseline`, `best`, `useless` or `plain`.
    pub class: &'static str,
    pub cells: Vec<String>,
}

/// A chart of dots in rows, one axis for all. It is made of text, so that it can be read on any
/// screen.
#[derive(Debug, Serialize)]
pub struct Dots {
    pub title: String,
    pub label: String,
    pub caption: String,
    /// What is written beside the rows.
    pub value: &'static str,
    ticks: Vec<Place>,
    lines: Vec<Place>,
    rows: Vec<Row>,
    #[serde(skip)]
    axis: Axis,
}

#[derive(Debug, Serialize)]
struct Place {
    at: f64,
    name: String,
    kind: &'static str,
}

#[derive(Debug, Serialize)]
struct Row {
    group: Option<String>,
    name: String,
    value: String,
    kind: &'static str,
    dots: Vec<Place>,
    middle: Option<f64>,
    bar: Option<[f64; 2]>,
}

/// The ends of the axis of [`Dots`].
#[derive(Clone, Copy, Debug)]
pub struct Axis {
    pub low: f64,
    pub high: f64,
    pub logarithmic: bool,
}

impl Axis {
    /// A place in percent from the left; what lies beyond an end is drawn there.
    fn at(self, value: f64) -> f64 {
        let [low, high, value] = [self.low, self.high, value]
            .map(|x| if self.logarithmic { x.max(f64::MIN_POSITIVE).log10() } else { x });
        let place = 100.0 * (value - low) / (high - low);
        if place.is_finite() { (10.0 * place.clamp(0.0, 100.0)).round() / 10.0 } else { 0.0 }
    }
}

/// A row of [`Dots`].
#[derive(Debug, Default)]
pub struct DotRow {
    /// A title above it.
    pub group: Option<String>,
    pub name: String,
    /// What is written beside it.
    pub value: String,
    /// `good`, `bad`, `baseline` or nothing.
    pub kind: &'static str,
    /// Values and what they are of.
    pub dots: Vec<(f64, String)>,
    pub middle: Option<f64>,
    pub bar: Option<[f64; 2]>,
}

impl Dots {
    pub fn new(title: impl Into<String>, label: impl Into<String>, axis: Axis) -> Self {
        let (ticks, lines, rows) = (Vec::new(), Vec::new(), Vec::new());
        let (title, label) = (title.into(), label.into());
        Self { title, label, caption: String::new(), value: "", ticks, lines, rows, axis }
    }

    pub fn ticks(&mut self, ticks: impl IntoIterator<Item = (f64, String)>) {
        let place = |(value, name)| Place { at: self.axis.at(value), name, kind: "" };
        self.ticks.extend(ticks.into_iter().map(place));
    }

    /// An upright line: `reference` or `guide`.
    pub fn line(&mut self, kind: &'static str, value: f64, name: impl Into<String>) {
        self.lines.push(Place { at: self.axis.at(value), name: name.into(), kind });
    }

    pub fn row(&mut self, row: DotRow) {
        let at = |value| self.axis.at(value);
        self.rows.push(Row {
            group: row.group,
            name: row.name,
            value: row.value,
            kind: row.kind,
            dots: row
                .dots
                .into_iter()
                .map(|(value, name)| Place { at: at(value), name, kind: "" })
                .collect(),
            middle: row.middle.map(at),
            // the right end is measured from the right
            bar: row.bar.map(|[from, to]| [at(from), 100.0 - at(to)]),
        });
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// The whole page.
pub fn page(title: &str, heading: &str, blocks: &[Block]) -> Result<String, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_keep_trailing_newline(true);
    // names that end so are escaped
    environment.add_template("page.html", TEMPLATE)?;
    environment
        .get_template("page.html")?
        .render(context! { title, heading, blocks, style => STYLE })
}
