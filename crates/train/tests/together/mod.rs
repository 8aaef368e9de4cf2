//! Several ranks, here threads, train one network together.

use super::*;
use ranks::{Ranks, threads};
use train::{dismiss, follow};

/// The number of steps of runs that are compared with one process. It is small because rounding
/// errors grow from step to step.
const STEPS: usize = 5;

/// Returns settings for one epoch.
fn short() -> Training {
    Training { warmup_epochs: 0.0, cosine_epochs: 1.0, ..training() }
}

/// Trains with `size` ranks.
fn run_together(
    size: usize,
    network: Network,
    data: &Arc<InMemoryDataset>,
    training: &Training,
    folder: &Path,
    limit: Option<&TimeLimit>,
) -> train::Result<Trained> {
    let mut all = threads(size).into_iter();
    let first = all.next().unwrap();
    std::thread::scope(|scope| {
        for rank in all {
            // A rank that fails would leave the other ranks waiting.
            scope.spawn(move || {
                if let Err(error) = follow(&rank, data, &Device::Cpu) {
                    eprintln!("{rank:?}: {error}");
                    std::process::abort();
                }
            });
        }
        let run = TrainingRun { limit, ranks: Some(&first), ..the_run(data, training, folder) };
        let trained = fit(network, &run, &mut |_| ());
        dismiss(&first);
        trained
    })
}

fn whole_run_together(
    size: usize,
    network: Network,
    data: &Arc<InMemoryDataset>,
    training: &Training,
) -> Trained {
    run_together(size, network, data, training, tempfile::tempdir().unwrap().path(), None).unwrap()
}

/// Returns the largest difference between two networks' elements, and the name of its tensor.
///
/// Differences are relative to the root mean square of the tensor, or to 0.01 if that is larger:
/// the means of units whose inputs are normalized are 0 except for rounding.
fn difference(found: &Network, expected: &Network) -> (f64, String) {
    let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let of = |((name, found), (_, expected)): ((String, &Tensor), (String, &Tensor))| {
        let (found, expected) = (values(found), values(expected));
        let size = expected.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / expected.len() as f64;
        let difference = found.iter().zip(&expected).map(|(a, b)| f64::from((a - b).abs()));
        (difference.fold(0.0, f64::max) / size.sqrt().max(0.01), name)
    };
    let all = found.tensors().into_iter().zip(expected.tensors()).map(of);
    all.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
}

/// With statistics over all images, two and three ranks (4 and 4, or 2, 3 and 3 of 8 images) train
/// the same network as one process, except for the order in which gradients and statistics are
/// summed. The relative rounding error of a sum is 6e-8. It grows from step to step because
/// normalization divides by small deviations, and reaches 5e-6 here on every machine.
#[test]
fn with_common_statistics_ranks_train_what_one_process_trains() {
    let data = data(BATCH * STEPS, 50);
    const TOLERANCE: f64 = 3e-5;
    for network in
        [network as fn() -> Network, quantized, || quantized_with(Fold::FloatStatistics, Method::Uniform)]
    {
        let (alone, common) = (short(), Training { sync_norm: true, ..short() });
        let (folder, same) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let one = run(network(), &data, &alone, 3, folder.path(), &mut |_| ()).unwrap();
        let also = run(network(), &data, &common, 3, same.path(), &mut |_| ()).unwrap();
        check_same(&bits(&also.network), &bits(&one.network), "one process has all images anyway");
        for size in [2, 3] {
            let found = whole_run_together(size, network(), &data, &common);
            let (worst, place) = difference(&found.network, &one.network);
            assert!(worst < TOLERANCE, "{size} ranks: {worst:.1e} in {place}");
            let (found, expected) = (found.metrics[0], one.metrics[0]);
            assert!((found.train_loss - expected.train_loss).abs() < TOLERANCE, "{found:?}, {expected:?}");
            // Without common statistics each rank normalizes by its own images, which makes a
            // visible difference.
            let own = whole_run_together(size, network(), &data, &alone);
            let (least, _) = difference(&own.network, &one.network);
            assert!(least > 100.0 * TOLERANCE, "{size} ranks with statistics of their own: {least:.1e}");
        }
    }
}

/// A run that is interrupted after every epoch gives the same bits as one that is not, and a run
/// can be resumed by another number of ranks.
#[test]
fn a_run_in_pieces_is_gone_on_with_by_any_number_of_ranks() {
    let data = data(TRAIN / 2, 50);
    for sync_norm in [false, true] {
        let training = Training { sync_norm, ..training() };
        let whole = whole_run_together(2, quantized(), &data, &training);
        let folder = tempfile::tempdir().unwrap();
        let piece = |size| {
            let limit = TimeLimit::after(Duration::ZERO);
            run_together(size, quantized(), &data, &training, folder.path(), Some(&limit))
        };
        for _ in 1..EPOCHS {
            assert!(matches!(piece(2).unwrap_err(), Error::TimeLimit { .. }));
        }
        let resumed = piece(2).unwrap();
        check_same(&bits(&resumed.network), &bits(&whole.network), "resumed by as many");
        check_metrics(&resumed.metrics, &whole.metrics);

        Network::remove(&folder.path().join("checkpoint.safetensors")).unwrap();
        for size in [1, 3] {
            assert!(matches!(piece(size).unwrap_err(), Error::TimeLimit { .. }), "{size} ranks");
        }
        let last = run(quantized(), &data, &training, 3, folder.path(), &mut |_| ()).unwrap();
        assert_eq!(last.metrics.len(), EPOCHS);
        let [found, expected] = [&last, &whole].map(|run| run.metrics[EPOCHS - 1].train_loss);
        assert!((found - expected).abs() < 0.3, "a loss of {found} by other ranks, {expected} by two");
    }
}

/// Learned quantizers are initialized from the first images, which differ between ranks. The ranks
/// still train the same network, which is checked after every epoch.
#[test]
fn learned_quantizers_are_the_same_on_all_ranks() {
    for method in [Method::Lsq, Method::Pact, Method::Dsq] {
        let network = quantized_with(Fold::Unfolded, method);
        let trained = whole_run_together(2, network, &data(BATCH * STEPS, 50), &short());
        assert!(trained.metrics[0].train_loss.is_finite(), "{method:?}");
    }
}

#[test]
fn a_step_has_an_image_for_every_rank() {
    let data = data(BATCH * STEPS + 1, 50);
    let error = run_together(2, network(), &data, &short(), tempfile::tempdir().unwrap().path(), None);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("batch = 8, with 1 images in the smallest step"), "{error}");
}

#[test]
fn ranks_with_other_data_are_refused() {
    let [theirs, ours] = [data(BATCH * STEPS, 50), data(BATCH * STEPS, 49)];
    let mut all = threads(2).into_iter();
    let (first, second) = (all.next().unwrap(), all.next().unwrap());
    // This thread waits for the other rank until the process ends.
    std::thread::spawn(move || {
        let (folder, training) = (tempfile::tempdir().unwrap(), short());
        let run = TrainingRun { ranks: Some(&first), ..the_run(&theirs, &training, folder.path()) };
        fit(network(), &run, &mut |_| ()).map(drop)
    });
    let error = follow(&second, &ours, &Device::Cpu).unwrap_err().to_string();
    assert!(error.starts_with("rank 1 has data of the fingerprint"), "{error}");
    assert_eq!(second.size(), 2);
}
