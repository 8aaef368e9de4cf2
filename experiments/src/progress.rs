//! Progress: bars if the output is a terminal, plain lines otherwise.

use crate::process::one_line;
use crate::{output, signals};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use train::{EpochMetrics, Progress, Training};
use workflow::{Event, Outcome};

/// A display of the progress on standard error.
pub struct Display {
    bar: Option<ProgressBar>,
    terminal: bool,
    told_of_locks: bool,
    /// The number of the stage that runs next, and the number of all stages to run, if known.
    stages: Option<(usize, usize)>,
}

impl Display {
    /// Creates a display that fits where standard error goes.
    pub fn new() -> Self {
        Self { bar: None, terminal: std::io::stderr().is_terminal(), told_of_locks: false, stages: None }
    }

    /// Sets the number of the stage that runs next and the number of all stages to run, which are
    /// shown when it starts, or `None` if they are not known.
    pub fn count(&mut self, stages: Option<(usize, usize)>) {
        self.stages = stages;
    }

    /// Prints a line above the bar, if one is shown.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::tell(text)),
            None => output::tell(text),
        }
    }

    /// Shows an event of loading the data.
    pub fn data(&mut self, event: &datasets::Event) {
        match event {
            datasets::Event::Download { file, done, total } if self.terminal => {
                let bar = self.bar.get_or_insert_with(|| {
                    let style = "{msg} {bar:40} {bytes}/{total_bytes} {bytes_per_sec}";
                    ProgressBar::new(*total)
                        .with_style(ProgressStyle::with_template(style).expect("a valid template"))
                });
                bar.set_message(file.clone());
                bar.set_length(*total);
                bar.set_position(*done);
            }
            datasets::Event::Download { .. } => {}
            datasets::Event::FellBack { .. } => {
                let line = "!".repeat(80);
                self.line(&format!("{line}\n{event}\n{line}"));
            }
            other => self.line(&other.to_string()),
        }
    }

    /// Shows an event of a stage.
    pub fn stage(&mut self, event: Event) {
        match event {
            Event::Found(_) => {}
            Event::Waiting(stage) => {
                self.line(&format!("{}: waiting for another process that runs this stage", stage.label()))
            }
            Event::NoLocks(error) if !self.told_of_locks => {
                self.told_of_locks = true;
                self.line(&format!(
                    "the store's file system has no locks ({error}): do not run two programs on this store \
                     at once"
                ));
            }
            Event::NoLocks(_) => {}
            Event::SetAside(stage, why, place) => self.line(&format!(
                "{}: {why}; set aside in {}; the stage is run again",
                stage.label(),
                place.display()
            )),
            Event::Started(stage) => {
                signals::note(Some(format!("nothing of {} is kept yet", stage.label())));
                let count = self.stages.map_or(String::new(), |(number, all)| format!("[{number}/{all}] "));
                self.line(&format!("{count}{} …", stage.label()));
            }
            Event::Progress(stage, progress) => {
                let kept = match &progress {
                    Progress::Resumed { epoch } => Some(*epoch),
                    Progress::Epoch { metrics, .. } => Some(metrics.epoch),
                    Progress::Steps { .. } | Progress::NoGraphs(_) => None,
                };
                if let Some(epoch) = kept {
                    let epochs = stage.training().map_or(epoch, Training::epochs);
                    signals::note(Some(format!("{} is kept up to epoch {epoch} of {epochs}", stage.label())));
                }
                self.progress(progress);
            }
            Event::Finished(outcome) => {
                signals::note(None);
                self.finished(outcome);
            }
        }
    }

    /// Removes the bar.
    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn progress(&mut self, progress: Progress) {
        match progress {
            Progress::Resumed { epoch } => {
                self.line(&format!("  going on from the checkpoint after epoch {epoch}"));
            }
            Progress::NoGraphs(problem) => {
                let problem = one_line(&problem.into());
                self.line(&format!(
                    "  steps are launched kernel by kernel, because they can't be recorded as a CUDA graph: \
                     {problem}"
                ));
            }
            Progress::Steps { epoch, epochs, step, steps, loss, images_per_second } => {
                if self.terminal {
                    let bar = self.bar.get_or_insert_with(|| {
                        let style = "  {bar:30} {pos}/{len} steps, {msg}, {eta} left";
                        let style = ProgressStyle::with_template(style).expect("a valid template");
                        ProgressBar::new((epochs * steps) as u64)
                            .with_style(style)
                            .with_position(((epoch - 1) * steps) as u64)
                    });
                    bar.set_message(format!(
                        "epoch {epoch}/{epochs}, loss {loss:.3}, {images_per_second:.0} images/s"
                    ));
                    bar.set_position(((epoch - 1) * steps + step) as u64);
                }
            }
            Progress::Epoch { epochs, metrics } => {
                let EpochMetrics { epoch, train_loss, test_top1_percent, seconds, .. } = metrics;
                let left = seconds * (epochs - epoch) as f64;
                self.line(&format!(
                    "  epoch {epoch}/{epochs}: training loss {train_loss:.3}, test top-1 {test_top1_percent:.2} %, \
                     {} (this stage: {} left)",
                    report::duration(seconds),
                    report::duration(left)
                ));
                if epoch == epochs {
                    self.clear();
                }
            }
        }
    }

    fn finished(&mut self, outcome: &Outcome) {
        self.clear();
        self.line(&format!(
            "{}: top-1 {:.2} %, {:.2} M MACs, {}",
            outcome.label,
            outcome.evaluation.top1_percent,
            outcome.macs as f64 / 1e6,
            report::duration(outcome.seconds)
        ));
    }
}
