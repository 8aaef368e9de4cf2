//! A test on the real ImageNet or a part of it, if `PFQ_IMAGENET` names its folder.

use datasets::imagenet::{self, Limit, Options};
use datasets::{Augmentation, Batches, DataSource, Dataset};

#[test]
fn real_pictures_are_read_correctly() {
    let Some(folder) = std::env::var_os("PFQ_IMAGENET").filter(|folder| !folder.is_empty()) else {
        eprintln!("skipped: PFQ_IMAGENET is not set");
        return;
    };
    // The whole set would take an hour.
    let limit = Some(Limit::Total(1000));
    let options = Options { train_limit: limit, test_limit: limit, ..Options::default() };
    let data =
        imagenet::load(&DataSource::Folder(folder.into()), &options, &mut |event| eprintln!("{event}"));
    let data = data.unwrap();
    println!("{data:?}");

    let check = |batches: Batches, images: usize| {
        let (mut found, mut sum, mut squares, mut values) = (0, 0f64, 0f64, 0f64);
        for batch in batches {
            let batch = batch.unwrap();
            let labels = batch.labels.to_vec1::<u32>().unwrap();
            assert_eq!(batch.images.dims(), [labels.len(), 224, 224, 3]);
            assert!(labels.iter().all(|&label| (label as usize) < data.classes()));
            let pixels = batch.images.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            // The bounds are those of normalized black and white.
            assert!(pixels.iter().all(|x| (-2.2..2.7).contains(x)));
            sum += pixels.iter().map(|&x| f64::from(x)).sum::<f64>();
            squares += pixels.iter().map(|&x| f64::from(x * x)).sum::<f64>();
            values += pixels.len() as f64;
            found += labels.len();
        }
        assert!(found + data.skipped().len() >= images && found > 0);
        if images >= 100 {
            // The usual mean and standard deviation are those of this data set.
            let (mean, square) = (sum / values, squares / values);
            assert!(mean.abs() < 0.3 && (0.6..1.6).contains(&square), "{mean} {square}");
        }
    };
    if data.test_images() > 0 {
        check(data.test_batches(32), data.test_images());
    }
    if data.train_images() > 0 {
        let augmentation = Augmentation { pad: 0, flip: true };
        check(data.train_batches(32, augmentation, 0, 0), data.train_images());
    }
    assert!(data.skipped().is_empty(), "{:?}", data.skipped());
}
