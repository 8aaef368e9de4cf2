//! The profile of a training step.
//!
//! For each operation it gives the share of the time, and how close the operation comes to the
//! machine's peaks, which a large matrix product and a large copy measure in the same run.

use super::case::{Case, What, picked};
use super::ours;
use super::{SETTINGS, machine};
use crate::{output, process};
use anyhow::Result;
use candle_core::{Device, Tensor};
use clap::Parser;
use kernels::norm::{BatchNormalization, Epilogue};
use kernels::pointwise;
use kernels::profiler::{self, Cost};
use models::{HEAD, Kernel, Version};
use rayon::prelude::*;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use train::Arithmetic;

/// Flags of the profile.
#[derive(Debug, Clone, Parser)]
#[command(version, about = "Profiles training steps: each operation, compared with the machine's peaks")]
struct Flags {
    /// Folder for profile.csv and profile.md; results/bench if everything is profiled
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,

    /// Number of images in a step
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(2..=4096))]
    batch: u16,

    /// Number of measured steps, after three steps of warm-up
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    steps: u16,

    /// Profile only these cases, e.g. mobilenet_v2,1.0,bf16; nothing is written without --out
    ///
    /// A case is profiled if it matches a term of every kind that is given.
    #[arg(long, value_name = "TERM,…", value_delimiter = ',')]
    only: Vec<String>,
}

/// The machine's peaks.
#[derive(Clone, Copy)]
struct Peaks {
    /// Multiplications and additions per second in products of maps that are stored in one
    /// arithmetic.
    flops: f64,
    bytes: f64,
}

/// A line of the table.
#[derive(Serialize)]
struct Line {
    network: &'static str,
    width: f64,
    batch: usize,
    precision: &'static str,
    arithmetic: &'static str,
    operation: String,
    calls_per_step: f64,
    ms_per_step: f64,
    share_percent: f64,
    gflop_per_second: f64,
    share_of_peak_product_percent: f64,
    gb_per_second: f64,
    share_of_peak_copy_percent: f64,
    /// The least time that the peaks allow: the larger of the times for the multiplications and for
    /// the bytes.
    least_ms_per_step: f64,
}

/// Runs the profile's binary.
pub fn main() -> Result<()> {
    let flags = Flags::parse();
    process::run(|| run(&flags))
}

/// Returns all kinds of steps that are profiled.
fn cases(batch: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for (network, width) in [(Version::V2, 1.0), (Version::V2, 0.25), (Version::V1, 1.0), (Version::V1, 0.25)]
    {
        for quantized in [false, true] {
            for arithmetic in ARITHMETICS {
                cases.push(Case { network, width, batch, what: What::Train, quantized, arithmetic });
            }
        }
    }
    cases
}

const ARITHMETICS: [Arithmetic; 2] = [Arithmetic::F32, Arithmetic::Bf16];

fn run(flags: &Flags) -> Result<()> {
    let cases = picked(&flags.only, cases(flags.batch.into()))?;
    let folder = flags.out.clone().or_else(|| flags.only.is_empty().then(|| PathBuf::from("results/bench")));
    let mut text = String::from("# Where a training step's time goes\n\nWritten by `just profile`.\n\n");
    for (name, value) in machine::facts(rayon::current_num_threads()) {
        writeln!(text, "- {name}: {value}")?;
    }
    let bytes = copy()?;
    let mut all = Vec::new();
    for arithmetic in ARITHMETICS {
        let peaks = Peaks { flops: product(arithmetic)?, bytes };
        let (name, gigaflops) = (arithmetic.name(), peaks.flops / 1e9);
        writeln!(
            text,
            "- peak of a large matrix product ({name}, 2048 × 1024 × 1024): {gigaflops:.0} GFLOP/s"
        )?;
        all.push(peaks);
    }
    let peaks = |case: &Case| {
        let of_case = ARITHMETICS.iter().zip(&all).find(|(arithmetic, _)| **arithmetic == case.arithmetic);
        of_case.expect("cases are of these").1
    };
    writeln!(text, "- peak of a large copy (256 MiB; bytes read and written): {:.1} GB/s", bytes / 1e9)?;
    text.push_str(
        "\nGFLOP/s count multiplications and additions, GB/s what an operation must read and write at least: each \
         operand and each result once. What stays in cache can exceed the copy. *Other* is what the step does \
         between the operations: small tensors per channel, memory management. In bf16, feature maps and their gradients have two \
         bytes a number.\n",
    );
    let mut lines = Vec::new();
    for case in &cases {
        let from = lines.len();
        step(case, flags.steps, peaks(case), &mut lines)?;
        table(&lines[from..], &mut text)?;
    }
    for case in cases.iter().filter(|case| case.network == Version::V2 && !case.quantized) {
        shapes(case, peaks(case), &mut text)?;
    }
    output::print(text.trim_end());
    let Some(folder) = folder else { return Ok(()) };
    let mut csv = csv::Writer::from_writer(Vec::new());
    for line in &lines {
        csv.serialize(line)?;
    }
    whole_file::write(&folder.join("profile.csv"), &csv.into_inner()?)?;
    whole_file::write(&folder.join("profile.md"), text.as_bytes())?;
    Ok(())
}

fn random(dims: &[usize]) -> Result<Tensor> {
    ours::random(dims, &Device::Cpu)
}

/// Returns the shortest time of several runs.
fn best(mut operation: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..7 {
        let started = Instant::now();
        operation()?;
        best = best.min(started.elapsed());
    }
    Ok(best)
}

/// Measures a large product of a map that is stored in `arithmetic`; returns multiplications and
/// additions per second.
fn product(arithmetic: Arithmetic) -> Result<f64> {
    let (a, b) = (random(&[2048, 1024])?.to_dtype(arithmetic.dtype())?, random(&[1024, 1024])?);
    let product = best(|| {
        std::hint::black_box(pointwise::forward(&a, &b)?);
        Ok(())
    })?;
    Ok(2.0 * (2048.0 * 1024.0 * 1024.0) / product.as_secs_f64())
}

/// Measures a large copy; returns the bytes per second, read and written.
fn copy() -> Result<f64> {
    let from = vec![1.0f32; 64 << 20];
    let mut to = vec![0.0f32; 64 << 20];
    let copy = best(|| {
        let part = 1 << 18;
        to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
        Ok(())
    })?;
    Ok(8.0 * from.len() as f64 / copy.as_secs_f64())
}

/// Profiles a case over `steps` steps, after a warm-up, and adds its lines.
fn step(case: &Case, steps: u16, peaks: &Peaks, lines: &mut Vec<Line>) -> Result<()> {
    let (mut step, ..) = ours::network(case, SETTINGS, &Device::Cpu, false)?;
    for _ in 0..3 {
        step()?;
    }
    profiler::start();
    let started = Instant::now();
    for _ in 0..steps {
        step()?;
    }
    let whole = started.elapsed();
    let mut costs: BTreeMap<&str, Cost> = profiler::stop();
    let noted: Duration = costs.values().map(|cost| cost.time).sum();
    costs.insert("other", Cost { time: whole.saturating_sub(noted), ..Cost::default() });
    let mut costs: Vec<_> = costs.into_iter().collect();
    costs.sort_by_key(|(_, cost)| std::cmp::Reverse(cost.time));
    costs.push(("whole step", Cost { time: whole, ..Cost::default() }));
    let mut least_of_all = 0.0;
    for (operation, cost) in costs {
        let seconds = cost.time.as_secs_f64().max(1e-9);
        let (flops, bytes) = (cost.operations as f64 / seconds, cost.bytes as f64 / seconds);
        let least = (cost.operations as f64 / peaks.flops).max(cost.bytes as f64 / peaks.bytes);
        least_of_all += least;
        lines.push(Line {
            network: case.network.name(),
            width: case.width,
            batch: case.batch,
            precision: case.precision(),
            arithmetic: case.arithmetic.name(),
            operation: operation.into(),
            calls_per_step: cost.calls as f64 / f64::from(steps),
            ms_per_step: 1e3 * seconds / f64::from(steps),
            share_percent: 100.0 * seconds / whole.as_secs_f64(),
            gflop_per_second: flops / 1e9,
            share_of_peak_product_percent: 100.0 * flops / peaks.flops,
            gb_per_second: bytes / 1e9,
            share_of_peak_copy_percent: 100.0 * bytes / peaks.bytes,
            least_ms_per_step: 1e3 * if operation == "whole step" { least_of_all } else { least }
                / f64::from(steps),
        });
    }
    Ok(())
}

fn table(lines: &[Line], text: &mut String) -> Result<()> {
    let first = &lines[0];
    let last = lines.last().expect("the whole step is there");
    let (whole, least) = (last.ms_per_step, last.least_ms_per_step);
    let rate = first.batch as f64 / whole * 1e3;
    writeln!(
        text,
        "\n## {}, width {}, batch {}, {}, {}: {whole:.1} ms, {rate:.0} images/s\n",
        first.network, first.width, first.batch, first.precision, first.arithmetic
    )?;
    writeln!(
        text,
        "At the peaks its operations would take {least:.1} ms, {:.0} % of that: {:.0} images/s.\n",
        100.0 * least / whole,
        first.batch as f64 / least * 1e3
    )?;
    text.push_str(
        "| operation | calls | ms | share | GFLOP/s | of peak | GB/s | of copy | at the peaks, ms |\n",
    );
    text.push_str("|---|--:|--:|--:|--:|--:|--:|--:|--:|\n");
    for line in &lines[..lines.len() - 1] {
        let or_none = |value: f64, text: String| if value > 0.0 { text } else { String::new() };
        let (flops, bytes) = (line.gflop_per_second, line.gb_per_second);
        writeln!(
            text,
            "| {} | {} | {:.2} | {:.1} % | {} | {} | {} | {} | {} |",
            line.operation,
            or_none(line.calls_per_step, format!("{:.0}", line.calls_per_step)),
            line.ms_per_step,
            line.share_percent,
            or_none(flops, format!("{flops:.0}")),
            or_none(flops, format!("{:.0} %", line.share_of_peak_product_percent)),
            or_none(bytes, format!("{bytes:.1}")),
            or_none(bytes, format!("{:.0} %", line.share_of_peak_copy_percent)),
            or_none(line.least_ms_per_step, format!("{:.2}", line.least_ms_per_step)),
        )?;
    }
    Ok(())
}

/// Writes the pointwise products of a case's network, MobileNetV2, shape by shape, compared with
/// what bounds them.
fn shapes(case: &Case, peaks: &Peaks, text: &mut String) -> Result<()> {
    let &Case { width, batch, arithmetic, .. } = case;
    let (name, dtype) = (arithmetic.name(), arithmetic.dtype());
    writeln!(
        text,
        "\n## Pointwise products of mobilenet_v2, width {width}, batch {batch}, float, {name}, shape by shape\n\n\
         *Bound* is the least time that the peaks above allow: the larger of the multiplications at the product's and \
         the bytes at the copy's. The backward pass computes the gradient of its own output as it goes, from two \
         tensors of its size, so it moves twice the bytes of a plain product.\n\n\
         | channels | rows | forward + statistics | of peak | of bound | backward | of peak | of bound |\n\
         |---|--:|--:|--:|--:|--:|--:|--:|"
    )?;
    let network = case.build()?;
    let mut seen = Vec::new();
    for (node, [h, w, n]) in network.nodes.iter().zip(network.shapes()) {
        let Some(unit) = node.unit().filter(|unit| unit.kernel == Kernel::Pointwise && unit.name != HEAD)
        else {
            continue;
        };
        let (k, rows) = (unit.input_channels(), batch * h * w);
        if seen.contains(&(k, n, rows)) {
            continue;
        }
        seen.push((k, n, rows));
        let (x, gy) = (random(&[rows, k])?.to_dtype(dtype)?, random(&[rows, n])?.to_dtype(dtype)?);
        let zeros = random(&[n])?.zeros_like()?;
        let ones = zeros.ones_like()?;
        let (z, stats) = pointwise::forward_stats(&x, &unit.weight)?;
        let forward = best(|| {
            std::hint::black_box(pointwise::forward_stats(&x, &unit.weight)?);
            Ok(())
        })?;
        let act = unit.activation;
        let batch = BatchNormalization::new(&stats, &ones, &zeros, 1e-5)?;
        let gz = Epilogue::batch(&z, &batch, act, None)?.backward(&gy.into())?.z;
        let backward = best(|| {
            std::hint::black_box(pointwise::backward(&x, &unit.weight, &gz, None)?);
            Ok(())
        })?;
        let flops = (2 * rows * k * n) as f64;
        let cell = |time: Duration, flops: f64, of_maps: usize, of_weights: usize| {
            let seconds = time.as_secs_f64();
            let bytes = dtype.size_in_bytes() * of_maps + 4 * of_weights;
            let bound = (flops / peaks.flops).max(bytes as f64 / peaks.bytes);
            let share = 100.0 * flops / seconds / peaks.flops;
            format!("{:.2} ms | {share:.0} % | {:.0} %", 1e3 * seconds, 100.0 * bound / seconds)
        };
        writeln!(
            text,
            "| {k} → {n} | {rows} | {} | {} |",
            cell(forward, flops, rows * (k + n), k * n),
            cell(backward, 2.0 * flops, rows * (2 * k + 2 * n), 2 * k * n)
        )?;
    }
    Ok(())
}
