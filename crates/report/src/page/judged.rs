//! Claims with their verdicts: the summary and the evidence for each claim.

use maud::{Markup, html};

use crate::claims::{Claim, Comparison, PaperSays};
use crate::names::table_label;
use crate::stats::{MOST_NEEDED, Verdict};
use crate::text::{interval, signed};

/// A claim and its comparisons in every profile that was run.
pub(super) struct Judged<'a> {
    pub(super) claim: &'a Claim,
    pub(super) by_profile: Vec<(&'a str, Vec<Comparison>)>,
}

/// Returns the verdict on a claim from all its comparisons.
pub(super) fn verdict(comparisons: &[Comparison]) -> Verdict {
    Verdict::all(&comparisons.iter().map(|of| of.verdict).collect::<Vec<_>>())
}

/// Renders a verdict by a sign and words in addition to colour.
pub(super) fn badge(verdict: Verdict) -> Markup {
    let (class, sign) = match verdict {
        Verdict::Holds => ("holds", "✓"),
        Verdict::Fails => ("fails", "✗"),
        Verdict::NotDecided => ("undecided", "?"),
        Verdict::NotRun => ("missing", "–"),
    };
    html! { span.verdict.(class) { span aria-hidden="true" { (sign) " " } (verdict.label()) } }
}

/// Returns the number of comparisons with each verdict as text; empty for fewer than two.
fn counts(comparisons: &[Comparison]) -> String {
    let all = [Verdict::Holds, Verdict::Fails, Verdict::NotDecided, Verdict::NotRun];
    let count = |verdict: Verdict| comparisons.iter().filter(|of| of.verdict == verdict).count();
    let word = |verdict: Verdict| match (verdict, count(verdict)) {
        (_, 0) => None,
        (Verdict::Holds, 1) | (Verdict::Fails, 1) => Some(format!("1 {}", verdict.label())),
        (Verdict::Holds, many) => Some(format!("{many} hold")),
        (Verdict::Fails, many) => Some(format!("{many} fail")),
        (_, many) => Some(format!("{many} {}", verdict.label())),
    };
    match comparisons.len() {
        0 | 1 => String::new(),
        many if all.into_iter().any(|verdict| count(verdict) == many) => format!("all {many}"),
        many => format!("of {many}: {}", all.into_iter().filter_map(word).collect::<Vec<_>>().join(", ")),
    }
}

fn source(claim: &Claim) -> String {
    claim.table.as_deref().map_or("First pruning".into(), table_label)
}

/// Renders a summary of all claims.
pub(super) fn summary(judged: &[Judged], profiles: &[&str]) -> Markup {
    let tally = |profile: &str, verdict: Verdict| {
        let of = |judged: &&Judged| {
            judged
                .by_profile
                .iter()
                .any(|(of, comparisons)| *of == profile && self::verdict(comparisons) == verdict)
        };
        judged.iter().filter(of).count()
    };
    html! {
        p {
            "Statements of the paper that can fail, in our words, and what our runs say about them. "
            a href="#reading" { "How a verdict is reached" } "."
        }
        @for profile in profiles {
            p.tally {
                strong { "Profile " (profile) ":" }
                @for verdict in [Verdict::Holds, Verdict::Fails, Verdict::NotDecided, Verdict::NotRun] {
                    " " span.pair { (tally(profile, verdict)) " " (badge(verdict)) }
                }
            }
        }
        div.scroll tabindex="0" role="region" aria-label="Claims and verdicts" {
            table.claims {
                caption { "Claims and verdicts" }
                thead {
                    tr {
                        th scope="col" { "statement" }
                        @for profile in profiles { th scope="col" { "profile " (profile) } }
                        @if profiles.is_empty() { th scope="col" { "verdict" } }
                    }
                }
                tbody {
                    @for Judged { claim, by_profile } in judged {
                        tr {
                            th scope="row" {
                                a href={ "#claim-" (claim.id) } { (claim.says) }
                                @if claim.paper == PaperSays::Contradicts {
                                    " " span.flag { "The paper’s own figures contradict it." }
                                }
                                " " small { (source(claim)) }
                            }
                            @for (profile, comparisons) in by_profile {
                                td.words {
                                    (badge(verdict(comparisons))) " " small { (counts(comparisons)) }
                                    @if claim.forced(profile).is_some() { " " span.flag { "forced by the design" } }
                                }
                            }
                            @if by_profile.is_empty() { td.words { (badge(Verdict::NotRun)) } }
                        }
                    }
                }
            }
        }
    }
}

/// Renders the claims about one table, with links to their evidence.
pub(super) fn links(judged: &[Judged], table: &str) -> Markup {
    let about: Vec<_> = judged.iter().filter(|of| of.claim.table.as_deref() == Some(table)).collect();
    html! {
        @if !about.is_empty() {
            h4 { "Claims about " (table_label(table)) }
            ul.plain {
                @for Judged { claim, by_profile } in about {
                    li {
                        @for (profile, comparisons) in by_profile {
                            span.pair { (badge(verdict(comparisons))) " " small { (profile) } } " "
                        }
                        a href={ "#claim-" (claim.id) } { (claim.says) }
                    }
                }
            }
        }
    }
}

/// Renders every claim with all its comparisons.
pub(super) fn evidence(judged: &[Judged]) -> Markup {
    html! {
        p { (explanation()) }
        @for of in judged { (one(of)) }
    }
}

fn explanation() -> Markup {
    html! {
        "In the drawings a dot is our mean, the line its 95 % interval, a hollow diamond the paper’s figure, and the "
        "shaded part is where the claim says that the mean lies. Each claim has a scale of its own."
    }
}

fn one(Judged { claim, by_profile }: &Judged) -> Markup {
    let all: Vec<&Comparison> = by_profile.iter().flat_map(|(_, of)| of).collect();
    let scale = Scale::of(&all);
    let number = |value: f64| if claim.signed() { signed(value) } else { format!("{value:.2}") };
    // Without any run, the paper's figures are still shown.
    let nothing = [("–", claim.judge(&[], &[]))];
    // A profile that ran nothing of it is left out if another one did.
    let ran: Vec<_> =
        by_profile.iter().filter(|(_, all)| all.iter().any(|of| of.verdict != Verdict::NotRun)).collect();
    let shown: Vec<&(&str, Vec<Comparison>)> = match (by_profile.is_empty(), ran.is_empty()) {
        (true, _) => nothing.iter().collect(),
        (false, true) => by_profile.iter().collect(),
        (false, false) => ran,
    };
    let several = shown.len() > 1;
    html! {
        article.claim #{ "claim-" (claim.id) } {
            h3 { (claim.says) }
            p.source {
                (source(claim)) ". "
                @match claim.paper {
                    PaperSays::Agrees => "The paper’s figures agree.",
                    PaperSays::Contradicts => span.flag { "The paper’s own figures contradict it." },
                    PaperSays::Silent => "The paper publishes no figures for it.",
                }
                @if let Some(note) = &claim.note { " " (note) }
                @for (profile, comparisons) in by_profile {
                    @if let Some(why) = claim.forced(profile).filter(|_| verdict(comparisons) != Verdict::NotRun) {
                        " " span.flag { "Profile " (profile) ": forced by the design." } " " (why)
                    }
                    @if let Some(why) = claim.explained(profile).filter(|_| verdict(comparisons) == Verdict::Fails) {
                        " " span.flag { "Profile " (profile) ": our best explanation." } " " (why)
                    }
                }
            }
            div.scroll tabindex="0" role="region" aria-label={ "Comparisons: " (claim.says) } {
                table {
                    caption { "In " (claim.unit()) }
                    thead {
                        tr {
                            th scope="col" { "network and bits" }
                            @if several { th scope="col" { "profile" } }
                            th scope="col" { "compared" }
                            th.number scope="col" { "ours" }
                            th.number scope="col" { "95 % interval" }
                            th.number scope="col" { "values" }
                            th.number scope="col" { "networks" }
                            th.number scope="col" { "p, corrected" }
                            th.number scope="col" { "paper" }
                            th scope="col" { "verdict" }
                            th scope="col" { span.unseen { "drawing" } }
                        }
                    }
                    tbody {
                        @for (index, (profile, comparisons)) in shown.iter().enumerate() {
                            @for (place, of) in comparisons.iter().enumerate() {
                                tr class=[(index > 0 && place == 0).then_some("begins")] {
                                    th scope="row" { (of.cell) }
                                    @if several { td.words { (profile) } }
                                    td.words.what { (of.what) }
                                    td { (of.estimate.map_or("–".into(), |of| number(of.mean))) }
                                    td { (of.estimate.and_then(|of| of.interval).map_or("–".into(), interval_of(claim))) }
                                    td { (of.estimate.map_or(0, |of| of.count)) }
                                    td { (of.networks.map_or("–".into(), |of| of.to_string())) }
                                    td { (of.p_value.map_or("–".into(), p_value)) }
                                    td { (of.paper.map_or("–".into(), number)) }
                                    td.words {
                                        (badge(of.verdict))
                                        @if let Some(needs) = needs(of) { " " small { (needs) } }
                                    }
                                    td.words { (scale.draw(of)) }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn p_value(value: f64) -> String {
    if value < 0.001 { "< 0.001".into() } else { format!("{value:.3}") }
}

/// Says how many more values an undecided comparison would need.
fn needs(of: &Comparison) -> Option<String> {
    let estimate = of.estimate.filter(|_| of.verdict == Verdict::NotDecided)?;
    Some(match (of.needed, estimate.count) {
        (Some(needed), count) if needed > count => format!("{needed} values like these would decide it"),
        // `needed` uses Bonferroni's level, stricter than Holm's, so only rounding leads here.
        (Some(_), _) => "one value more would decide it".into(),
        (None, 1) => "a second value is needed for an interval".into(),
        (None, _) => format!("more than {MOST_NEEDED} values like these would be needed"),
    })
}

fn interval_of(claim: &Claim) -> impl Fn((f64, f64)) -> String {
    let with_sign = claim.signed();
    move |(low, high)| match with_sign {
        _ if low == high => "the same".into(),
        true => interval((low, high)),
        false => format!("{low:.2} … {high:.2}"),
    }
}

/// The horizontal scale that the drawings of one claim share.
struct Scale {
    low: f64,
    high: f64,
}

const WIDE: f64 = 130.0;
const HIGH: f64 = 18.0;

impl Scale {
    /// Returns a scale from the lowest to the highest value that is drawn.
    fn of(comparisons: &[&Comparison]) -> Self {
        let values = comparisons.iter().flat_map(|of| {
            let ours = of.estimate.iter().flat_map(|of| {
                let (low, high) = of.interval.unwrap_or((of.mean, of.mean));
                [low, of.mean, high]
            });
            ours.chain(of.paper).chain([of.range.from, of.range.to]).collect::<Vec<_>>()
        });
        let (low, high) = values
            .filter(|value| value.is_finite())
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        // A claim without any figures has an empty scale, on which nothing is drawn.
        let (low, high) = if low <= high { (low, high) } else { (0.0, 0.0) };
        let margin = 0.06 * (high - low).max(1e-9);
        Self { low: low - margin, high: high + margin }
    }

    /// Returns the position of a value. A value beyond the scale is placed at its end.
    fn x(&self, value: f64) -> f64 {
        WIDE * ((value.clamp(self.low, self.high) - self.low) / (self.high - self.low))
    }

    fn draw(&self, of: &Comparison) -> Markup {
        let place = |value: f64| format!("{:.1}", self.x(value));
        let (from, to) = (self.x(of.range.from), self.x(of.range.to));
        let middle = HIGH / 2.0;
        html! {
            svg.mark viewBox={ "0 0 " (WIDE) " " (HIGH) } width=(WIDE) height=(HIGH) aria-hidden="true" {
                rect.where x=(format!("{from:.1}")) y="0" width=(format!("{:.1}", to - from)) height=(HIGH) {}
                @if self.low < 0.0 && self.high > 0.0 {
                    line.zero x1=(place(0.0)) x2=(place(0.0)) y1="0" y2=(HIGH) {}
                }
                @if let Some((low, high)) = of.estimate.and_then(|of| of.interval) {
                    line.interval x1=(place(low)) x2=(place(high)) y1=(middle) y2=(middle) {}
                }
                @if let Some(paper) = of.paper {
                    path.paper d={ "M" (place(paper)) " " (middle - 5.0) "l5 5l-5 5l-5 -5z" } {}
                }
                @if let Some(ours) = of.estimate.filter(|of| of.mean.is_finite()) {
                    circle.mean cx=(place(ours.mean)) cy=(middle) r="3.5" {}
                }
            }
        }
    }
}
