//! Tables and numbers for the terminal.

/// Formats columns under a heading: the first one left-aligned, all others right-aligned.
pub(crate) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    let heading: Vec<String> = heading.iter().map(|cell| cell.to_string()).collect();
    let all = || std::iter::once(&heading).chain(rows);
    let wide: Vec<usize> = (0..heading.len())
        .map(|column| all().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in all() {
        for (column, cell) in row.iter().enumerate() {
            let wide = wide[column];
            text += &if column == 0 { format!("{cell:<wide$}") } else { format!("  {cell:>wide$}") };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// Formats a count in millions, with two decimals.
pub(crate) fn millions(count: u64) -> String {
    format!("{:.2}", count as f64 / 1e6)
}

/// Formats a number with three decimals or, if these would hide it or be many digits, in scientific
/// notation.
pub(crate) fn short(value: f32) -> String {
    let plain = value == 0.0 || (1e-3..1e4).contains(&value.abs());
    if plain { format!("{value:.3}") } else { format!("{value:.2e}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other() {
        let rows = [["stem", "32"], ["blocks.0.depthwise", "7"]].map(|row| row.map(String::from).to_vec());
        let expect =
            "layer               filters\nstem                     32\nblocks.0.depthwise        7\n";
        assert_eq!(table(&["layer", "filters"], &rows), expect);
        assert_eq!(millions(300_774_272), "300.77");
    }

    #[test]
    fn small_numbers_keep_their_digits() {
        let shown = [0.0, -0.000_412_3, 0.001, -12.345_6, 20_000.0].map(short);
        assert_eq!(shown, ["0.000", "-4.12e-4", "0.001", "-12.346", "2.00e4"]);
    }
}
