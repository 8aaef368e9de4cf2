//! Images in memory, and a data set of two splits with its statistics and its fingerprint.

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::subset;
use crate::text::counted;

/// The number of channels of every image: red, green, blue.
pub(crate) use pictures::CHANNELS;

/// Labelled images of the same size, stored as bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Images {
    /// The pixels, `[n, height, width, 3]`, row-major, red, green and blue from 0 to 255.
    pub pixels: Vec<u8>,
    /// The class of each image, `[n]`.
    pub labels: Vec<u16>,
    /// The number of rows of an image.
    pub height: usize,
    /// The number of columns of an image.
    pub width: usize,
}

impl Images {
    /// Returns the number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Returns whether there is no image.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// Returns the bytes of image `i`, `[height, width, 3]`.
    ///
    /// # Panics
    ///
    /// If there is no image `i`.
    pub fn image(&self, i: usize) -> &[u8] {
        let size = self.image_size();
        &self.pixels[i * size..(i + 1) * size]
    }

    /// Copies the images with the given indices, in the order of `indices`.
    ///
    /// # Panics
    ///
    /// If an index is out of range.
    pub fn subset(&self, indices: &[usize]) -> Images {
        let mut pixels = Vec::with_capacity(indices.len() * self.image_size());
        for &i in indices {
            pixels.extend_from_slice(self.image(i));
        }
        Images {
            pixels,
            labels: indices.iter().map(|&i| self.labels[i]).collect(),
            height: self.height,
            width: self.width,
        }
    }

    /// Returns the number of bytes of one image.
    pub(crate) fn image_size(&self) -> usize {
        self.height * self.width * CHANNELS
    }

    /// Checks that the fields agree with each other and that the labels lie in `0..classes`.
    fn check(&self, what: &str, classes: usize) -> Result<()> {
        let invalid = |why: String| Err(Error::Invalid(format!("the {what} images are inconsistent: {why}")));
        if self.height == 0 || self.width == 0 {
            return invalid(format!(
                "{}x{} pixels each, expected at least one pixel",
                self.height, self.width
            ));
        }
        if self.pixels.len() != self.len() * self.image_size() {
            return invalid(format!(
                "{} bytes of pixels for {} labels and {} bytes an image",
                self.pixels.len(),
                self.len(),
                self.image_size()
            ));
        }
        match self.labels.iter().find(|&&label| usize::from(label) >= classes) {
            Some(label) => invalid(format!("label {label} of {classes} classes")),
            None => Ok(()),
        }
    }
}

/// A data set in memory, with its origin and its statistics.
#[derive(Clone, Debug, PartialEq)]
pub struct InMemoryDataset {
    /// The name, `"cifar100"` or `"synthetic"` as loaded.
    pub name: String,
    /// The origin and the selected part of the data, as text for users: the folder, the hub's
    /// repository and revision, or `synthetic (seed ..)`.
    pub source: String,
    /// The number of classes. Labels lie in `0..classes`.
    pub classes: usize,
    /// The training images.
    pub train: Images,
    /// The test images.
    pub test: Images,
    /// The mean of each channel over all pixels of `train`, where black is 0 and full intensity is 1.
    pub mean: [f32; 3],
    /// The standard deviation of each channel over all pixels of `train` (divided by the number of
    /// pixels), in the same units. It is 1 for a constant channel, so that the channel is
    /// normalized to zero.
    pub std: [f32; 3],
    /// A SHA-256 in lower-case hex digits that identifies the pictures.
    ///
    /// It covers `train` and then `test`: the number of images (u64), height, width and channels
    /// (u32 each), then for every image its label (u16) and its pixels in row-major order, with the
    /// red, green and blue of a pixel together. Integers are little-endian.
    ///
    /// The same pictures, labels and order have the same fingerprint in every file format.
    pub fingerprint: String,
}

impl InMemoryDataset {
    /// Makes a data set of the given images. Computes the statistics and the fingerprint.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if there is no training image, if the images differ in size or have
    /// no pixels, or if a label is not in `0..classes`.
    pub fn new(
        name: impl Into<String>,
        source: impl Into<String>,
        classes: usize,
        train: Images,
        test: Images,
    ) -> Result<InMemoryDataset> {
        train.check("training", classes)?;
        test.check("test", classes)?;
        if train.is_empty() {
            return Err(Error::Invalid("a data set needs at least one training image".into()));
        }
        if (train.height, train.width) != (test.height, test.width) {
            return Err(Error::Invalid(format!(
                "the training images have {}x{} pixels and the test images {}x{}",
                train.height, train.width, test.height, test.width
            )));
        }
        let (mean, std) = channel_statistics(&train.pixels);
        let fingerprint = fingerprint(&[&train, &test]);
        Ok(InMemoryDataset {
            name: name.into(),
            source: source.into(),
            classes,
            train,
            test,
            mean,
            std,
            fingerprint,
        })
    }

    /// Holds out training images, to choose settings without looking at the test set.
    ///
    /// `n` training images, drawn with `seed` and spread over the classes as evenly as possible,
    /// become `test`. The other training images stay in `train`. Both keep their order. The result
    /// does not contain the real test set. It keeps the name. The statistics (of the remaining
    /// training images) and the fingerprint are computed anew.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] unless `0 < n < train.len()`.
    pub fn hold_out(&self, n: usize, seed: u64) -> Result<InMemoryDataset> {
        let [kept, held] = subset::hold_out(&self.train.labels, self.classes, n, seed)?;
        let count = counted(n, "training image");
        let source = format!("{}; {count} held out as test (seed {seed})", self.source);
        InMemoryDataset::new(
            &self.name,
            source,
            self.classes,
            self.train.subset(&kept),
            self.train.subset(&held),
        )
    }

    /// Limits the data set to the first `train` training images and the first `test` test images.
    ///
    /// The images are taken from the classes in turn, so that the classes stay balanced, and they
    /// keep their order. `None`, or a limit that is not below the number of images, keeps all of
    /// them. If an image is left out, the statistics and the fingerprint are computed anew, and
    /// `_part` is appended to the name.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] if a limit is 0.
    pub fn limit(&self, train: Option<usize>, test: Option<usize>) -> Result<InMemoryDataset> {
        if train == Some(0) || test == Some(0) {
            return Err(Error::Invalid("a limit on the number of images must be at least 1".into()));
        }
        let first = |images: &Images, n: Option<usize>| match n {
            Some(n) if n < images.len() => images.subset(&subset::first(&images.labels, self.classes, n)),
            _ => images.clone(),
        };
        let (train, test) = (first(&self.train, train), first(&self.test, test));
        if (train.len(), test.len()) == (self.train.len(), self.test.len()) {
            return Ok(self.clone());
        }
        let test_images = counted(test.len(), "test image");
        let source = format!("{}; limited to {} training and {test_images}", self.source, train.len());
        InMemoryDataset::new(format!("{}_part", self.name), source, self.classes, train, test)
    }
}

/// Computes the mean and the standard deviation of each channel of interleaved pixels, where full
/// intensity is 1. The sums are integers, so the result does not depend on their order.
fn channel_statistics(pixels: &[u8]) -> ([f32; 3], [f32; 3]) {
    let (mut sum, mut squares) = ([0u64; CHANNELS], [0u64; CHANNELS]);
    for pixel in pixels.chunks_exact(CHANNELS) {
        for (c, &value) in pixel.iter().enumerate() {
            let value = u64::from(value);
            sum[c] += value;
            squares[c] += value * value;
        }
    }
    let n = (pixels.len() / CHANNELS) as f64;
    let mean = sum.map(|s| s as f64 / n);
    let std = std::array::from_fn(|c| {
        let variance = (squares[c] as f64 / n - mean[c] * mean[c]).max(0.0);
        if variance > 0.0 { (variance.sqrt() / 255.0) as f32 } else { 1.0 }
    });
    (mean.map(|m| (m / 255.0) as f32), std)
}

/// Computes [`InMemoryDataset::fingerprint`].
fn fingerprint(splits: &[&Images]) -> String {
    let mut hash = Sha256::new();
    for images in splits {
        hash.update((images.len() as u64).to_le_bytes());
        for size in [images.height, images.width, CHANNELS] {
            hash.update((size as u32).to_le_bytes());
        }
        for (label, pixels) in images.labels.iter().zip(images.pixels.chunks_exact(images.image_size())) {
            hash.update(label.to_le_bytes());
            hash.update(pixels);
        }
    }
    format!("{:x}", hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns `n` images of 2x1 pixels whose labels cycle through the classes. Image `i` holds the
    /// byte `i` six times.
    fn numbered(n: usize, classes: usize) -> Images {
        Images {
            pixels: (0..n).flat_map(|i| [i as u8; 6]).collect(),
            labels: (0..n).map(|i| (i % classes) as u16).collect(),
            height: 2,
            width: 1,
        }
    }

    fn data(train: usize, test: usize, classes: usize) -> InMemoryDataset {
        InMemoryDataset::new("d", "here", classes, numbered(train, classes), numbered(test, classes)).unwrap()
    }

    fn numbers(images: &Images) -> Vec<u8> {
        (0..images.len()).map(|i| images.image(i)[0]).collect()
    }

    fn per_class(images: &Images, classes: usize) -> Vec<usize> {
        let mut counts = vec![0; classes];
        images.labels.iter().for_each(|&label| counts[usize::from(label)] += 1);
        counts
    }

    #[test]
    fn a_subset_keeps_the_order_asked_for() {
        let subset = numbered(9, 4).subset(&[7, 0, 7]);
        assert_eq!((subset.len(), subset.is_empty()), (3, false));
        assert_eq!(numbers(&subset), [7, 0, 7]);
        assert_eq!(subset.labels, [3, 0, 3]);
        assert_eq!((subset.height, subset.width), (2, 1));
        assert!(numbered(9, 4).subset(&[]).is_empty());
    }

    #[test]
    fn statistics_are_those_of_the_training_images() {
        let train = Images { pixels: vec![0, 51, 9, 255, 51, 9, 255, 102, 9, 0, 102, 9], ..numbered(2, 2) };
        let data = InMemoryDataset::new("d", "here", 2, train, numbered(1, 2)).unwrap();
        assert_eq!(data.mean, [0.5, 0.3, 9.0 / 255.0]);
        assert_eq!((data.std[0], data.std[2]), (0.5, 1.0));
        assert!((data.std[1] - 0.1).abs() < 1e-7);
    }

    #[test]
    fn the_fingerprint_is_the_documented_one_and_tells_everything_apart() {
        let fingerprint =
            |train: Images, test: Images| InMemoryDataset::new("d", "x", 4, train, test).unwrap().fingerprint;
        let mut bytes = Vec::new();
        for n in [2u64, 1] {
            bytes.extend(n.to_le_bytes());
            [2u32, 1, 3].iter().for_each(|size| bytes.extend(size.to_le_bytes()));
            (0..n as u8).for_each(|i| bytes.extend([i, 0, i, i, i, i, i, i]));
        }
        let base = fingerprint(numbered(2, 4), numbered(1, 4));
        assert_eq!(base, format!("{:x}", Sha256::digest(&bytes)));
        let mut relabelled = numbered(2, 4);
        relabelled.labels[1] = 3;
        let mut repainted = numbered(2, 4);
        repainted.pixels[11] ^= 1;
        let reshaped = |images: Images| Images { height: 1, width: 2, ..images };
        assert_ne!(base, fingerprint(relabelled, numbered(1, 4)));
        assert_ne!(base, fingerprint(repainted, numbered(1, 4)));
        assert_ne!(base, fingerprint(numbered(2, 4).subset(&[1, 0]), numbered(1, 4)));
        assert_ne!(base, fingerprint(reshaped(numbered(2, 4)), reshaped(numbered(1, 4))));
        assert_ne!(fingerprint(numbered(3, 4), numbered(2, 4)), fingerprint(numbered(2, 4), numbered(3, 4)));
    }

    #[test]
    fn held_out_images_are_disjoint_balanced_and_drawn() {
        let data = data(100, 7, 5);
        let held = data.hold_out(20, 1).unwrap();
        assert_eq!((held.train.len(), held.test.len()), (80, 20));
        assert_eq!((per_class(&held.train, 5), per_class(&held.test, 5)), (vec![16; 5], vec![4; 5]));
        let mut all = [numbers(&held.train), numbers(&held.test)].concat();
        assert!(
            held.train.labels.iter().zip(numbers(&held.train)).all(|(&label, i)| label == u16::from(i) % 5)
        );
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<u8>>());
        assert!(numbers(&held.train).is_sorted() && numbers(&held.test).is_sorted());

        assert_eq!(held, data.hold_out(20, 1).unwrap());
        assert_ne!(held.test, data.hold_out(20, 2).unwrap().test);
        assert_ne!(held.fingerprint, data.fingerprint);
        assert_eq!((held.name.as_str(), held.classes), ("d", 5));
        assert!(held.source.starts_with("here; 20 training images held out"), "{}", held.source);
        // The statistics are those of the remaining training images.
        assert_eq!(held.mean, channel_statistics(&held.train.pixels).0);

        let uneven = per_class(&data.hold_out(13, 3).unwrap().test, 5);
        assert!(
            uneven.iter().all(|n| (2..=3).contains(n)) && uneven.iter().sum::<usize>() == 13,
            "{uneven:?}"
        );
    }

    #[test]
    fn limits_take_the_first_of_every_class() {
        let data = data(30, 10, 5);
        let limited = data.limit(Some(10), Some(7)).unwrap();
        assert_eq!(numbers(&limited.train), (0..10).collect::<Vec<u8>>());
        assert_eq!(numbers(&limited.test), (0..7).collect::<Vec<u8>>());
        assert_ne!(limited.fingerprint, data.fingerprint);
        assert_eq!(data.limit(None, None).unwrap(), data);
        assert_eq!(data.limit(Some(30), Some(99)).unwrap(), data);

        // If images are sorted by class, the first images of each class are not a prefix.
        let mut sorted = numbered(30, 1);
        sorted.labels = (0..30).map(|i| i / 10).collect();
        let data = InMemoryDataset::new("d", "x", 3, sorted, numbered(1, 1)).unwrap();
        assert_eq!(numbers(&data.limit(Some(6), None).unwrap().train), [0, 1, 10, 11, 20, 21]);
        assert_eq!(numbers(&data.limit(Some(4), None).unwrap().train), [0, 1, 10, 20]);
    }

    #[test]
    fn unusable_arguments_are_refused() {
        let data = data(10, 10, 5);
        for n in [0, 10, 11] {
            let error = data.hold_out(n, 0).unwrap_err();
            assert!(
                matches!(error, Error::Invalid(_))
                    && error.to_string().contains("expected hold_out from 1 to 9"),
                "{error}"
            );
        }
        assert!(matches!(data.limit(Some(0), None), Err(Error::Invalid(_))));
        assert!(matches!(data.limit(None, Some(0)), Err(Error::Invalid(_))));

        let refused =
            |train: Images| InMemoryDataset::new("d", "x", 5, train, numbered(1, 5)).unwrap_err().to_string();
        assert!(refused(numbered(0, 5)).contains("at least one training image"));
        assert!(refused(numbered(6, 6)).contains("label 5 of 5 classes"));
        // Pictures of one channel.
        assert!(
            refused(Images { pixels: vec![0; 6], ..numbered(3, 5) })
                .contains("6 bytes of pixels for 3 labels")
        );
        assert!(refused(Images { height: 0, ..numbered(3, 5) }).contains("at least one pixel"));
        assert!(refused(Images { width: 2, ..numbered(3, 5) }).contains("18 bytes of pixels for 3 labels"));
        assert!(
            refused(Images { width: 2, height: 1, ..numbered(3, 5) })
                .contains("1x2 pixels and the test images 2x1")
        );
    }
}
