//! Ticks at round numbers along an axis.

/// Returns a round distance with at most `most` ticks above zero and up to `highest`.
pub(crate) fn tick_step(highest: f64, most: f64) -> f64 {
    let least = highest / most;
    if !(least > 0.0 && least.is_finite()) {
        return 1.0;
    }
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * power)
        .into_iter()
        .find(|step| least <= *step)
        .unwrap_or(power)
}

/// Returns the ticks from zero to `highest`, with their labels.
pub(crate) fn ticks(highest: f64, most: f64) -> Vec<(f64, String)> {
    let step = tick_step(highest, most);
    // The tolerance keeps rounding errors from removing the last tick.
    let count = (highest.max(0.0) / step + 1e-9).floor() as usize;
    (0..=count.min(most as usize + 1))
        .map(|index| (index as f64 * step, text(index as f64 * step, step)))
        .collect()
}

/// Returns ticks that begin at or below `low` and end at or above `high`, with their labels.
///
/// The result is empty unless both are finite and `low <= high`.
pub(crate) fn round_range(low: f64, high: f64, most: f64) -> Vec<(f64, String)> {
    if !(low.is_finite() && high.is_finite() && low <= high) {
        return Vec::new();
    }
    let step = tick_step(high - low, most);
    let (first, last) = ((low / step + 1e-9).floor() as i64, (high / step - 1e-9).ceil() as i64);
    (first..=last.max(first + 1))
        .map(|index| (index as f64 * step, text(index as f64 * step, step)))
        .collect()
}

fn text(tick: f64, step: f64) -> String {
    let decimals = if step < 1.0 { (-step.log10().floor()) as usize } else { 0 };
    format!("{tick:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        fn check(highest: f64, expect: &[&str]) {
            let found: Vec<String> = ticks(highest, 5.0).into_iter().map(|(_, text)| text).collect();
            assert_eq!(found, expect, "{highest}");
        }
        check(0.9, &["0.0", "0.2", "0.4", "0.6", "0.8"]);
        check(1.0, &["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        check(0.04, &["0.00", "0.01", "0.02", "0.03", "0.04"]);
        check(9.0, &["0", "2", "4", "6", "8"]);
        check(60.0, &["0", "20", "40", "60"]);
        check(240.0, &["0", "50", "100", "150", "200"]);
        check(5100.0, &["0", "2000", "4000"]);
        check(0.0, &["0"]);
        check(f64::NAN, &["0"]);
    }

    #[test]
    fn ranges_are_round_and_hold_everything() {
        fn check(low: f64, high: f64, expect: &[&str]) {
            let found: Vec<String> = round_range(low, high, 4.0).into_iter().map(|(_, text)| text).collect();
            assert_eq!(found, expect, "{low} to {high}");
        }
        check(2.44, 4.24, &["2.0", "2.5", "3.0", "3.5", "4.0", "4.5"]);
        check(0.0, 35.9, &["0", "10", "20", "30", "40"]);
        check(-0.1, 0.1, &["-0.10", "-0.05", "0.00", "0.05", "0.10"]);
        check(3.0, 3.0, &["3", "4"]);
        check(f64::INFINITY, f64::NEG_INFINITY, &[]);
    }
}
