//! What the package promises, against dijiang itself and against tensor operations of burn.

mod attention;
mod common;
mod linear;
mod module;
mod parameters;
mod state;
