//! Pictures and CSV tables that were found together in a folder of results.

use maud::{Markup, PreEscaped, html};

use super::table_html;
use crate::canvas;
use crate::text::{Cell, Table, counted};

/// The contents of a folder of results, except those that are read row by row.
#[derive(Clone, Debug, Default)]
pub struct Exhibit {
    /// The heading.
    pub title: String,
    /// The files that a reader may open, by their paths relative to the page.
    pub files: Vec<String>,
    /// The pictures: the path relative to the page, and the text of the SVG file.
    pub drawings: Vec<(String, String)>,
    /// The CSV tables: the path relative to the page, and the lines with the heading first.
    pub tables: Vec<(String, Vec<Vec<String>>)>,
}

/// The numbers of lines above which a table is collapsed, and above which it is not shown.
const LONG: (usize, usize) = (40, 120);

/// The number of columns above which a table is not shown: nobody reads so wide a table on a page.
const WIDE: usize = 16;

impl Exhibit {
    /// Returns whether the exhibit is empty.
    pub fn is_empty(&self) -> bool {
        self.files.is_empty() && self.drawings.is_empty() && self.tables.is_empty()
    }

    /// Renders the pictures inline. `description` adds what their own texts do not say.
    pub(super) fn pictures(&self, description: Option<&str>) -> Markup {
        html! {
            @for (path, text) in &self.drawings {
                @let title = first_text(text);
                @let caption = title.clone().unwrap_or_else(|| name(path));
                figure {
                    @match inline(text, &description.map_or(caption.clone(), |of| format!("{caption}. {of}"))) {
                        Some(svg) => {
                            div.scroll.picture tabindex="0" role="region" aria-label={ "Picture: " (caption) } {
                                (PreEscaped(svg))
                            }
                        },
                        None => p { "The picture is in " a href=(path) { (path) } "." },
                    }
                    figcaption { (caption) }
                }
            }
        }
    }

    /// Renders the CSV tables: short ones open, longer ones collapsed. The longest and the widest are
    /// left out.
    pub(super) fn sheets(&self) -> Markup {
        let sheet = |lines: &[Vec<String>]| {
            let mut lines = lines.iter();
            let head = lines.next().cloned().unwrap_or_default();
            let body: Vec<&Vec<String>> = lines.filter(|line| line.len() == head.len()).collect();
            let number = |column: usize| {
                body.iter().all(|line| line[column].is_empty() || line[column].parse::<f64>().is_ok())
            };
            let rows = body
                .iter()
                .map(|line| line.iter().map(|cell| Cell::from(shortened(cell))).collect())
                .collect();
            let numbers: Vec<bool> = (0..head.len()).map(number).collect();
            (head, numbers, rows)
        };
        let shown = |lines: &[Vec<String>]| {
            lines.len() <= LONG.1 && lines.first().is_none_or(|head| head.len() <= WIDE)
        };
        html! {
            @for (path, lines) in self.tables.iter().filter(|(_, lines)| shown(lines)) {
                @let (head, numbers, rows) = sheet(lines);
                @let head: Vec<String> = head.iter().map(|name| name.replace('_', " ")).collect();
                @let table = Table { head: head.iter().map(String::as_str).zip(numbers).collect(), rows };
                details.long[lines.len() > LONG.0] open[lines.len() <= LONG.0] {
                    summary { (name(path)) " (" (counted(lines.len().saturating_sub(1), "row")) ")" }
                    (table_html(&name(path), &table))
                }
            }
        }
    }

    /// Renders links to the files.
    pub(super) fn links(&self) -> Markup {
        html! {
            @if !self.files.is_empty() {
                p.files { "Files: " @for (index, path) in self.files.iter().enumerate() {
                    @if index > 0 { ", " } a href=(path) { (path.rsplit('/').next().unwrap_or(path)) }
                } "." }
            }
        }
    }
}

/// Returns a title from a file's path: "low variance" for "figure3/reduced/low_variance.svg".
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.rsplit_once('.').map_or(file, |(stem, _)| stem).replace(['_', '-'], " ")
}

/// Shortens a number with more significant figures to four of them.
fn shortened(cell: &str) -> String {
    let long = cell.len() > 7 && cell.contains('.');
    match cell.parse::<f64>() {
        Ok(value) if long && value.is_finite() && value != 0.0 => {
            let size = value.abs().log10().floor() as i32;
            match size {
                -4..=9 => format!("{value:.*}", (3 - size).max(0) as usize),
                _ => format!("{value:.3e}"),
            }
        }
        _ => cell.into(),
    }
}

/// Returns the first text in a picture, unescaped. It is the picture's title.
fn first_text(svg: &str) -> Option<String> {
    let (_, rest) = svg.split_once("<text")?;
    let (text, _) = rest.split_once('>')?.1.split_once("</text>")?;
    let text = text.trim();
    if text.is_empty() || text.contains('<') {
        return None;
    }
    let marks = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&amp;", "&")];
    Some(marks.iter().fold(text.to_string(), |text, (from, to)| text.replace(from, to)))
}

/// Returns the SVG element of a file with a text alternative and the page's colours.
///
/// The result is `None` if there is no SVG element, or if it contains anything active.
fn inline(text: &str, label: &str) -> Option<String> {
    let start = text.find("<svg")?;
    let end = text.rfind("</svg>")? + "</svg>".len();
    let svg = text.get(start..end)?;
    // Elements that could execute or load something must not get into the page.
    let names = ["script", "foreignObject", "image", "style", "iframe", "!", "?"];
    let active = |tag: &str| {
        let attributes = [" on", "\non", "href=", "url("].iter().any(|part| tag.contains(part));
        attributes || names.iter().any(|name| tag.starts_with(name))
    };
    if svg.split('<').skip(1).any(|part| active(part.split('>').next().unwrap_or(part))) {
        return None;
    }
    let label = html! { (label) }.into_string();
    let (class, svg) = match canvas::themed(svg) {
        Some(themed) => ("drawn", themed),
        None => ("drawn on-white", svg.to_string()),
    };
    Some(svg.replacen("<svg", &format!("<svg class=\"{class}\" role=\"img\" aria-label=\"{label}\""), 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_that_could_run_something_stay_outside() {
        fn check(inside: &str, expect: bool) {
            let text = format!("<?xml version=\"1.0\"?>\n<svg width=\"1\" height=\"1\">{inside}</svg>\n");
            let found = inline(&text, "a \"b\" <c>");
            assert_eq!(found.is_some(), expect, "{inside}");
            if let Some(svg) = found {
                assert!(svg.contains("aria-label=\"a &quot;b&quot; &lt;c&gt;\""), "{svg}");
            }
        }
        check("<rect fill=\"#FFFFFF\"/><text fill=\"#222222\">a</text>", true);
        check("<rect onload=\"alert(1)\"/>", false);
        check("<text fill=\"#222222\">speed on a CPU</text>", true);
        check("<script>alert(1)</script>", false);
        check("<image href=\"http://example.org/a.png\"/>", false);
        check("<a href=\"https://example.org\"><text>a</text></a>", false);
        assert_eq!(inline("not a picture", "a"), None);
    }

    #[test]
    fn tables_too_long_or_too_wide_to_be_read_are_left_out() {
        let table = |columns: usize, lines: usize| {
            ("a.csv".into(), vec![(0..columns).map(|column| format!("c{column}")).collect(); lines])
        };
        let shown = |columns, lines| {
            let exhibit = Exhibit { tables: vec![table(columns, lines)], ..Exhibit::default() };
            exhibit.sheets().into_string().contains("<table")
        };
        assert!(shown(WIDE, 5) && !shown(WIDE + 1, 5));
        assert!(shown(5, LONG.1) && !shown(5, LONG.1 + 1));
    }

    #[test]
    fn titles_and_numbers_are_shortened() {
        assert_eq!(
            first_text("<svg><text x=\"1\">\nA &amp; B\n</text><text>C</text></svg>").as_deref(),
            Some("A & B")
        );
        assert_eq!(first_text("<svg><rect/></svg>"), None);
        for (cell, expect) in [
            ("235.7973215", "235.8"),
            ("0.123456789", "0.1235"),
            ("1.0", "1.0"),
            ("-43.239999999999995", "-43.24"),
            ("9.99e-11000", "9.99e-11000"),
            ("1.23456789e-9", "1.235e-9"),
            ("mobilenet_v2", "mobilenet_v2"),
        ] {
            assert_eq!(shortened(cell), expect);
        }
        assert_eq!(name("figure3/reduced/low_variance.svg"), "low variance");
    }
}
