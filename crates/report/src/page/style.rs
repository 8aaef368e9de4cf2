//! The style of the page.

/// The style sheet.
pub(super) const CSS: &str = include_str!("style.css");

#[cfg(test)]
mod tests {
    use super::CSS;
    use std::collections::BTreeMap;

    /// Returns the colours of the first block of variables after `start`.
    fn palette(start: &str) -> BTreeMap<&'static str, [f64; 3]> {
        let block = CSS.split_once(start).unwrap().1.split_once('}').unwrap().0;
        let of = |line: &'static str| {
            let (name, value) = line.split_once(':')?;
            let hex = u32::from_str_radix(value.trim().strip_prefix('#')?, 16).ok()?;
            let part = |shift: u32| f64::from(hex >> shift & 255) / 255.0;
            Some((name.trim().strip_prefix("--")?, [part(16), part(8), part(0)]))
        };
        block.split(';').filter_map(of).collect()
    }

    /// Returns the contrast of two colours as defined by WCAG 2.
    fn contrast(a: [f64; 3], b: [f64; 3]) -> f64 {
        let light = |colour: [f64; 3]| {
            let part = |c: f64| if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) };
            0.2126 * part(colour[0]) + 0.7152 * part(colour[1]) + 0.0722 * part(colour[2])
        };
        let (a, b) = (light(a), light(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    /// A rule for all lines of the page would change those of the pictures, which have their own width.
    #[test]
    fn lines_of_pictures_keep_their_width() {
        let drawn = ["line", "polyline", "path", "rect", "circle", "text"];
        for rule in CSS.split('}').filter_map(|rule| rule.split_once('{')) {
            let of_all = rule.0.split(',').map(str::trim).find(|selector| drawn.contains(selector));
            assert_eq!(of_all, None, "{}", rule.1);
        }
    }

    #[test]
    fn contrasts_are_enough_to_read() {
        assert!((contrast([0.0; 3], [1.0; 3]) - 21.0).abs() < 1e-9);
        for start in [":root {", "dark) {\n  :root {", "print {\n  :root {"] {
            let palette = palette(start);
            let check = |text: &str, ground: &str, least: f64| {
                let found = contrast(palette[text], palette[ground]);
                assert!(found >= least, "{start} {text} on {ground}: {found:.2}");
            };
            for text in ["ink", "soft", "link", "alarm"] {
                check(text, "card", 4.5);
                check(text, "page", 4.5);
            }
            for kind in ["holds", "fails", "undecided", "missing", "alarm"] {
                check(kind, &format!("{kind}-back"), 4.5);
            }
            // Lines and dots need less contrast than text.
            for drawn in ["test", "train", "ink", "soft"] {
                check(drawn, "card", 3.0);
                check(drawn, "shade", 3.0);
            }
        }
    }
}
