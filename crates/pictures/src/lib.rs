//! Pictures as PIL reads them: files are decoded ([`decode()`]), and parts of pictures are scaled
//! ([`Scaler`]).

#![forbid(unsafe_code)]

mod decode;
mod scale;

pub use decode::decode;
pub use scale::{Crop, Region, Scaler};

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The number of channels: red, green and blue.
pub const CHANNELS: usize = 3;

/// A decoded picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// The number of columns, at least one.
    pub width: usize,
    /// The number of rows, at least one.
    pub height: usize,
    /// The values of the pixels, `[height, width, 3]`: red, green, blue.
    pub pixels: Vec<u8>,
}

/// Runs `decode` and turns a panic into an error, because some decoders panic on damaged input.
pub fn catch_panic<T>(decode: impl FnOnce() -> T) -> Result<T, String> {
    let message = |payload: Box<dyn Any + Send>| format!("decoding failed: {}", panic_message(&*payload));
    catch_unwind(AssertUnwindSafe(decode)).map_err(message)
}

/// Returns the message of a panic, given its payload.
pub fn panic_message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic")
}
