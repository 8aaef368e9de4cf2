//! Tests that cross crates; see the files next to this one.

#![forbid(unsafe_code)]
