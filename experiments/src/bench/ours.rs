//! Our side of the benchmark: a worker that runs this workspace's code as the programs do.

use super::case::{CLASSES, Case, Kind, Layer, Layers, What};
use super::machine::{reset_peak, resident_mib};
use super::worker::{Failure, Hello, Ran, Ready, Run, Settings, Traffic};
use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use datasets::Augmentation;
use kernels::norm::{Epilogue, Running};
use kernels::{Quantizer, depthwise, im2col, norm, pointwise, profiler, quantize};
use models::Step;
use quant_core::Bits;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write};
use std::time::Instant;
use train::{Decay, Trainer, Training};

/// The number of steps before the first timed one, as in PyTorch's worker.
const WARM_UP: usize = 3;

/// The size in bytes of the copy that measures a GPU's memory bandwidth, far more than its caches
/// hold.
const COPIED: usize = 1 << 30;

/// A request to the worker.
#[derive(Deserialize)]
#[serde(untagged)]
enum Request {
    Run(Run),
    Setup { case: Case, settings: Settings },
}

/// A step of a case, which returns a tensor that is finite if all went well.
pub(super) type Work = Box<dyn FnMut() -> Result<Tensor>>;

/// Answers requests until there are no more. Computes on `device`; with `graphs`, training steps
/// are CUDA graphs.
pub(super) fn serve(
    requests: impl BufRead,
    mut answers: impl Write,
    device: &Device,
    graphs: bool,
) -> Result<()> {
    let threads = rayon::current_num_threads();
    say(&mut answers, &Hello { version: env!("CARGO_PKG_VERSION").into(), threads })?;
    let mut work: Option<Work> = None;
    for line in requests.lines() {
        let answer = match serde_json::from_str(&line?)? {
            Request::Setup { case, settings } => {
                set_up(&case, settings, device, graphs).map(|(step, ready)| {
                    work = Some(step);
                    serde_json::to_value(ready)
                })
            }
            Request::Run(Run { run: steps }) => {
                let work = work.as_mut().context("nothing has been set up");
                work.and_then(|work| run(work, steps, device)).map(serde_json::to_value)
            }
        };
        match answer {
            Ok(answer) => say(&mut answers, &answer?)?,
            Err(error) => say(&mut answers, &Failure { error: format!("{error:#}") })?,
        }
    }
    Ok(())
}

fn say(answers: &mut impl Write, value: &impl Serialize) -> Result<()> {
    serde_json::to_writer(&mut *answers, value)?;
    answers.write_all(b"\n")?;
    Ok(answers.flush()?)
}

fn set_up(case: &Case, settings: Settings, device: &Device, graphs: bool) -> Result<(Work, Ready)> {
    let before_mib = resident_mib("VmRSS");
    let (mut work, parameters, quantizers) = match &case.what {
        What::Operation(layer) => {
            (operation(layer, case.batch, settings, device, case.arithmetic.dtype())?, 0, 0)
        }
        _ => network(case, settings, device, graphs)?,
    };
    for _ in 0..WARM_UP {
        work()?;
    }
    let traffic = if device.is_cpu() { None } else { Some(traffic(&mut work, device)?) };
    // On a GPU, this process's memory says nothing about the GPU's.
    let before_mib = before_mib.filter(|_| device.is_cpu());
    reset_peak();
    Ok((work, Ready { before_mib, parameters, quantizers, traffic }))
}

/// Measures the least number of bytes that a step moves, as its operations count them, and the
/// speed of a large copy.
fn traffic(work: &mut Work, device: &Device) -> Result<Traffic> {
    profiler::start();
    work()?;
    let step_bytes = profiler::stop().values().map(|cost| cost.bytes as f64).sum();
    let from = Tensor::zeros(COPIED / 4, DType::F32, device)?;
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        device.synchronize()?;
        let started = Instant::now();
        let to = from.copy()?;
        device.synchronize()?;
        best = best.min(started.elapsed().as_secs_f64());
        drop(to);
    }
    Ok(Traffic { step_bytes, copy_bytes_per_second: 2.0 * COPIED as f64 / best })
}

fn run(work: &mut Work, steps: usize, device: &Device) -> Result<Ran> {
    // Work that was launched before must not count, and work that is launched here must. On a CPU,
    // nothing is asynchronous.
    device.synchronize()?;
    let started = Instant::now();
    let mut last = None;
    for _ in 0..steps {
        last = Some(work()?);
    }
    device.synchronize()?;
    let seconds = started.elapsed().as_secs_f64();
    let peak_mib = resident_mib("VmHWM").filter(|_| device.is_cpu());
    if let Some(last) = last
        // A GPU can't sum a tensor without dimensions, such as a loss.
        && !last.to_dtype(DType::F32)?.flatten_all()?.sum_all()?.to_scalar::<f32>()?.is_finite()
    {
        bail!("the result is not finite");
    }
    Ok(Ran { seconds, peak_mib })
}

pub(super) fn random(dims: &[usize], device: &Device) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1.0, dims, &Device::Cpu)?.to_device(device)?)
}

/// Returns a step of a whole network, its number of parameters, and its number of quantizers.
pub(super) fn network(
    case: &Case,
    settings: Settings,
    device: &Device,
    graphs: bool,
) -> Result<(Work, usize, usize)> {
    let mut network = case.build()?.to_device(device)?;
    let parameters = network.parameters().iter().map(|p| p.tensor.elem_count()).sum();
    let quantizers = Layers::of(&network).quantizers();
    let [h, w, channels] = network.input;
    let images = random(&[case.batch, h, w, channels], device)?.to_dtype(case.arithmetic.dtype())?;
    let labels: Vec<u32> = (0..case.batch).map(|i| (i % CLASSES) as u32).collect();
    let labels = Tensor::from_vec(labels, case.batch, device)?;
    let Settings { rate, momentum, weight_decay, range_momentum } = settings;
    let work: Work = if case.what == What::Train {
        let training = Training {
            warmup_epochs: 0.0,
            cosine_epochs: 1.0,
            learning_rate: rate,
            batch: case.batch,
            momentum,
            weight_decay,
            decay_norm: true,
            label_smoothing: 0.0,
            range_momentum,
            augmentation: Augmentation::none(),
            decay: Decay::Cosine,
            arithmetic: case.arithmetic,
            sync_norm: false,
        };
        let mut trainer = Trainer::new(network, &training, graphs)?;
        Box::new(move || {
            let loss = trainer.step(&images, &labels, rate)?.loss;
            match trainer.no_graphs() {
                Some(problem) => Err(problem).context("a training step can't be recorded as a CUDA graph"),
                None => Ok(loss),
            }
        })
    } else {
        if case.quantized {
            // This sets the ranges, from few images because the pages that a training pass takes
            // stay resident.
            network.forward_train(&images.narrow(0, 0, case.batch.min(2))?, Step::alone(range_momentum))?;
        }
        Box::new(move || Ok(network.forward(&images)?))
    };
    Ok((work, parameters, quantizers))
}

/// Returns the forward and backward pass of one operation as a step.
fn operation(layer: &Layer, batch: usize, settings: Settings, device: &Device, dtype: DType) -> Result<Work> {
    let random = |dims: &[usize]| random(dims, device);
    let &Layer { size, stride, inputs, outputs, input_size: [h, w], output_size: [ho, wo], .. } = layer;
    let maps = |h: usize, w: usize, channels: usize| -> Result<Tensor> {
        Ok(random(&[batch, h, w, channels])?.to_dtype(dtype)?)
    };
    let (x, gy) = (maps(h, w, inputs)?, maps(ho, wo, outputs)?);
    Ok(match layer.kind {
        Kind::Stem => {
            let weight = random(&[size * size * inputs, outputs])?;
            // Patches are gathered twice, as in the network.
            let patches = move |x: &Tensor| im2col::forward(x, size, stride);
            Box::new(move || {
                std::hint::black_box(pointwise::forward(&patches(&x)?, &weight)?);
                Ok(pointwise::grad_weight(&patches(&x)?, &gy)?)
            })
        }
        Kind::Depthwise => {
            let weight = random(&[3, 3, outputs])?;
            Box::new(move || {
                std::hint::black_box(depthwise::forward(&x, &weight, stride)?);
                std::hint::black_box(depthwise::grad_input(&gy, &weight, stride, (h, w))?);
                Ok(depthwise::grad_weight(&x, &gy, stride)?)
            })
        }
        Kind::Pointwise => {
            let weight = random(&[inputs, outputs])?;
            Box::new(move || {
                std::hint::black_box(pointwise::forward(&x, &weight)?);
                std::hint::black_box(pointwise::grad_input(&gy, &weight)?);
                Ok(pointwise::grad_weight(&x, &gy)?)
            })
        }
        Kind::Norm => {
            let ones = Tensor::ones(outputs, DType::F32, device)?;
            let zeros = ones.zeros_like()?;
            let running = Running { mean: zeros.clone(), variance: ones.clone() };
            let rows = x.elem_count() / ones.elem_count();
            let bits = layer.output_bits.map(Bits::new).transpose()?;
            let range = Tensor::new(&[0f32, 6.0], device)?;
            let (act, gy) = (layer.activation, gy.into());
            Box::new(move || {
                let stats = norm::channel_stats(&x)?;
                let batch = norm::prepare(&stats, &ones, &zeros, 1e-5, &running, 0.1, rows)?;
                let (scale, shift) = (&batch.scale, &batch.shift);
                if bits.is_some() {
                    let extremes = norm::output_range(&stats, scale, shift, act)?;
                    quantize::update_range(&range, &extremes, settings.range_momentum)?;
                }
                let quantizer = bits.map(|bits| Quantizer { range: &range, bits });
                std::hint::black_box(norm::forward(&x, scale, shift, act, quantizer)?);
                Ok(Epilogue::batch(&x, &batch, act, quantizer)?.backward(&gy)?.z.tensor()?)
            })
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn answers(requests: &[Value]) -> Vec<Value> {
        let requests: Vec<String> = requests.iter().map(Value::to_string).collect();
        let mut answers = Vec::new();
        serve(requests.join("\n").as_bytes(), &mut answers, &Device::Cpu, false).unwrap();
        String::from_utf8(answers).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn the_worker_answers_every_request() {
        let settings = json!({"rate": 1e-3, "momentum": 0.9, "weight_decay": 1e-3, "range_momentum": 0.01});
        let setup = |what: Value| {
            let case = json!({
                "network": "mobilenet_v2", "width": 0.25, "batch": 1, "what": what, "quantized": true
            });
            json!({"case": case, "layers": null, "settings": settings})
        };
        let said = answers(&[
            json!({"run": 1}),
            setup(json!("train")),
            json!({"run": 2}),
            setup(json!("eval")),
            json!({"run": 1}),
        ]);
        assert_eq!(said.len(), 6);
        assert!(said[0]["threads"].as_u64() > Some(0));
        assert!(said[1]["error"].as_str().is_some_and(|error| error.contains("set up")));
        assert_eq!((&said[2]["parameters"], &said[2]["quantizers"]), (&json!(366_292), &json!(109)));
        assert!(said[3]["seconds"].as_f64() > Some(0.0) && said[5]["seconds"].as_f64() > Some(0.0));
    }

    #[test]
    fn every_operation_runs() {
        for case in
            Case::all(&[1], &[train::Arithmetic::F32]).unwrap().iter().filter(|case| !case.of_network())
        {
            let settings = Settings { rate: 1e-3, momentum: 0.9, weight_decay: 1e-3, range_momentum: 0.01 };
            let (mut work, _) = set_up(case, settings, &Device::Cpu, false).unwrap();
            assert!(run(&mut work, 1, &Device::Cpu).unwrap().seconds > 0.0, "{}", case.name());
        }
    }
}
