use crate::Error;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A quantizer's bit width, 2 to 8: `b` bits give `2^b` levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Bits(u8);

impl Bits {
    /// Returns a width of `bits` bits.
    ///
    /// # Errors
    /// If `bits` is outside 2…8.
    pub fn new(bits: u32) -> Result<Self, Error> {
        if (2..=8).contains(&bits) { Ok(Self(bits as u8)) } else { Err(Error::Bits(bits)) }
    }

    /// Returns the width in bits, 2…8.
    pub fn get(self) -> u32 {
        u32::from(self.0)
    }

    /// Returns the largest level, `2^b − 1`. The smallest is 0.
    pub fn max_level(self) -> u32 {
        (1 << self.0) - 1
    }
}

impl TryFrom<u32> for Bits {
    type Error = Error;
    fn try_from(bits: u32) -> Result<Self, Error> {
        Self::new(bits)
    }
}

impl From<Bits> for u32 {
    fn from(bits: Bits) -> u32 {
        bits.get()
    }
}

/// The precision of a tensor: quantized to a number of bits, or float.
///
/// Settings write it as a number. 32 means float, as in the paper's tables.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Precision {
    /// Not quantized.
    #[default]
    Float,
    /// Quantized to this many bits.
    Quantized(Bits),
}

impl Precision {
    /// Returns the bit width, or `None` for float.
    pub fn bits(self) -> Option<Bits> {
        match self {
            Self::Float => None,
            Self::Quantized(bits) => Some(bits),
        }
    }
}

impl TryFrom<u32> for Precision {
    type Error = Error;
    fn try_from(bits: u32) -> Result<Self, Error> {
        if bits == 32 { Ok(Self::Float) } else { Bits::new(bits).map(Self::Quantized) }
    }
}

impl From<Precision> for u32 {
    fn from(precision: Precision) -> u32 {
        precision.bits().map_or(32, Bits::get)
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        u32::from(*self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_outside_two_to_eight_are_errors() {
        for bits in [0, 1, 9, 16, 33] {
            assert_eq!(Precision::try_from(bits), Err(Error::Bits(bits)));
        }
        assert_eq!(Precision::try_from(32), Ok(Precision::Float));
        assert_eq!(Bits::new(4).map(Bits::max_level), Ok(15));
    }
}
