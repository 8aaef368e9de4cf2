//! Times the preparation of ImageNet's batches: reading, decoding, cropping, scaling, normalizing.
//!
//! `PFQ_IMAGENET=folder cargo bench -p datasets` prints images/s for one thread and for one thread
//! per core. The speed is that of the best of several rounds, because other work on the machine
//! only slows a round down. The CPU time of an image is averaged over all rounds. If
//! `PFQ_IMAGENET_CACHE=folder` is set, the pictures are read from a cache of shrunk pictures.

use std::path::PathBuf;
use std::time::Instant;

use datasets::imagenet::{self, ImageNet, Options};
use datasets::{Augmentation, Batches, DataSource, Dataset};

const BATCH: usize = 64;
const ROUNDS: usize = 5;

fn main() {
    let Some(folder) = std::env::var_os("PFQ_IMAGENET").filter(|folder| !folder.is_empty()) else {
        eprintln!("skipped: PFQ_IMAGENET does not name a folder with ImageNet");
        return;
    };
    let source = DataSource::Folder(folder.into());
    let cache = std::env::var_os("PFQ_IMAGENET_CACHE").map(PathBuf::from);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for threads in [1, cores] {
        let options = Options { threads: Some(threads), cache: cache.clone(), ..Options::default() };
        let data = imagenet::load(&source, &options, &mut |_| {}).expect("readable data");
        measure("evaluation", threads, &data, |data, _| data.test_batches(BATCH));
        if data.train_images() > 0 {
            let augmentation = Augmentation { pad: 0, flip: true };
            measure("training", threads, &data, |data, epoch| {
                data.train_batches(BATCH, augmentation, 0, epoch)
            });
        }
    }
}

fn measure(what: &str, threads: usize, data: &ImageNet, batches: impl Fn(&ImageNet, usize) -> Batches) {
    let (mut best, mut all, before) = (0f64, 0, processor_seconds());
    for epoch in 0..ROUNDS {
        let (start, mut images) = (Instant::now(), 0);
        for batch in batches(data, epoch) {
            images += batch.expect("usable images").labels.elem_count();
        }
        best = best.max(images as f64 / start.elapsed().as_secs_f64());
        all += images;
    }
    let took = 1e3 * (processor_seconds() - before) / all as f64;
    println!(
        "{what:<10} {threads:3} threads {best:8.0} images/s {:8.0} a thread {took:8.3} ms of a processor an image",
        best / threads as f64
    );
}

/// Returns the CPU seconds of this process, in Linux's clock ticks of 1/100 s; NaN elsewhere.
fn processor_seconds() -> f64 {
    let status = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Fields 3 and later follow the process's name, which may contain spaces. The CPU times are
    // fields 14 and 15.
    let fields = status.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: Vec<f64> = fields.skip(11).take(2).filter_map(|ticks| ticks.parse().ok()).collect();
    if ticks.len() == 2 { ticks.iter().sum::<f64>() / 100.0 } else { f64::NAN }
}
