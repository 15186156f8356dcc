//! A budget for every head: window, entries and decay of each kv head of a model, chosen from
//! measured costs at a fixed total.

pub(crate) mod choose;
pub(crate) mod costs;
pub(crate) mod options;
pub(crate) mod planner;
pub(crate) mod sample;
#[cfg(feature = "serde")]
mod saved;
pub(crate) mod setting;
pub(crate) mod state_plan;
mod table;
