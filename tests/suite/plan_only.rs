mod common;
mod plan;
