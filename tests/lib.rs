//! Tests that cross crates; see the files beside this one.

#![forbid(unsafe_code)]
