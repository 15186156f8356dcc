//! A comparison as a page, a table, sentences, a CSV and a picture.

mod axis;
mod charts;
pub mod conversion;
mod facts;
mod findings;
mod heads;
mod labels;
mod numbers;
mod page;
mod picture;
mod plot;
mod records;
mod settings;
mod table;
#[cfg(test)]
mod tests;

pub use findings::findings;
pub use numbers::mib;
pub use page::page;
pub use picture::picture;
pub use records::csv;
pub use reports::text::wrapped;
pub use table::table;
