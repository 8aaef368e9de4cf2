//! Values of flags. Every error says what is expected.

use std::ops::RangeInclusive;
use std::str::FromStr;

/// Parses a number of things, at least 1.
pub(super) fn count(text: &str) -> Result<usize, String> {
    number(text, |n: &usize| *n > 0, "a whole number above 0, such as 100")
}

/// Parses a number of epochs.
pub(super) fn epochs(text: &str) -> Result<u16, String> {
    number(text, |n: &u16| *n > 0, "a whole number of epochs, more than 0 and at most 65535")
}

/// Parses a seed.
pub(super) fn seed(text: &str) -> Result<u64, String> {
    number(text, |_| true, "a whole number, such as 0")
}

/// Parses the height and width of an image.
pub(super) fn pixels(text: &str) -> Result<usize, String> {
    number(text, |n| (1..=4096).contains(n), "a whole number of pixels from 1 to 4096")
}

/// Parses a share in percent.
pub(super) fn percent(text: &str) -> Result<f64, String> {
    const ALL: RangeInclusive<f64> = 0.0..=100.0;
    number(text, |n| ALL.contains(n), "a percentage from 0 to 100, such as 1.5")
}

/// Parses a threshold of variances.
pub(super) fn threshold(text: &str) -> Result<f64, String> {
    number(text, |n: &f64| n.is_finite() && *n > 0.0, "a positive number, such as 1e-5")
}

/// Parses a width multiplier.
pub(super) fn width(text: &str) -> Result<f64, String> {
    number(text, |n| *n > 0.0 && *n <= 4.0, "a number above 0, at most 4, such as 0.25")
}

/// Parses the ε of batch normalization.
pub(super) fn epsilon(text: &str) -> Result<f64, String> {
    number(text, |n| *n > 0.0 && *n < 1.0, "a number above 0, less than 1, such as 1e-5")
}

/// Parses one of several numbers.
pub(super) fn one(text: &str) -> Result<f32, String> {
    number(text, |n: &f32| n.is_finite(), "numbers with commas between them, such as -2.1,2.7")
}

fn number<T: FromStr>(text: &str, fits: impl Fn(&T) -> bool, expected: &str) -> Result<T, String> {
    text.trim().parse().ok().filter(fits).ok_or_else(|| format!("expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_value_is_told_what_is_expected() {
        assert_eq!((count("7"), epochs("65535"), pixels("4096")), (Ok(7), Ok(65535), Ok(4096)));
        assert_eq!(
            (percent("0"), threshold("1e-5"), width("4"), one(" -1")),
            (Ok(0.0), Ok(1e-5), Ok(4.0), Ok(-1.0))
        );
        let refused = [
            count("2/class").err(),
            count("0").err(),
            epochs("1.5").err(),
            epochs("65536").err(),
            seed("-1").err(),
            pixels("4097").err(),
            percent("101").err(),
            percent("NaN").err(),
            threshold("inf").err(),
            width("0").err(),
            epsilon("1").err(),
            one("x").err(),
        ];
        assert!(
            refused.iter().flatten().filter(|error| error.starts_with("expected ")).count() == 12,
            "{refused:?}"
        );
    }
}
