//! What the package promises, against dijiang itself and against tensor operations of burn.

mod attention;
mod common;
mod layers;
mod linear;
mod masks;
mod module;
mod parameters;
mod state;
#[cfg(feature = "wgpu")]
mod wgpu;

/// The guide shows the program that is compiled here.
#[test]
fn the_guide_shows_an_example_that_runs() {
    let guide = include_str!("../../../../docs/guide/frameworks.md");
    assert!(guide.contains(include_str!("../../examples/two_layers.rs")));
}
