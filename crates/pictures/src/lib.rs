//! Pictures as PIL makes them of their files: decoded ([`decode()`]), and parts of them scaled ([`Scaler`]).

#![forbid(unsafe_code)]

mod decode;
mod scale;

pub use decode::decode;
pub use scale::{Crop, Region, Scaler};

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Red, green and blue.
pub const CHANNELS: usize = 3;

/// A decoded picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Columns, at least one.
    pub width: usize,
    /// Rows, at least one.
    pub height: usize,
    /// `[height, width, 3]`: red, green, blue.
    pub pixels: Vec<u8>,
}

/// Runs `decode` on what may be damaged. Decoders have been seen to panic on damaged input, so a panic
/// becomes an error too.
pub fn catch_panic<T>(decode: impl FnOnce() -> T) -> Result<T, String> {
    let message = |payload: Box<dyn Any + Send>| format!("decoding failed: {}", panic_message(&*payload));
    catch_unwind(AssertUnwindSafe(decode)).map_err(message)
}

/// The message of a panic, given its payload.
pub fn panic_message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic")
}
