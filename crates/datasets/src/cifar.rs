//! CIFAR-100: the official files and their record formats.

use md5::{Digest, Md5};

use crate::error::{Error, Result};
use crate::event::Event;
use crate::memory::{CHANNELS, Images, InMemoryDataset};
use crate::pickled;

/// The number of rows and of columns of an image.
pub(crate) const SIDE: usize = 32;
/// The number of bytes of an image.
pub(crate) const PIXELS: usize = SIDE * SIDE * CHANNELS;
/// The number of fine classes, which are the ones that networks learn.
pub(crate) const CLASSES: usize = 100;
/// The number of coarse classes. Their labels are checked but not used.
pub(crate) const COARSE: usize = 20;

/// The length and the checksum of an official file.
#[derive(Clone, Debug)]
pub(crate) struct Expected {
    /// The length in bytes, if it is published. A wrong length tells more than a wrong checksum.
    pub bytes: Option<u64>,
    /// The MD5 as lower-case hex digits.
    pub md5: String,
}

impl Expected {
    fn new(bytes: Option<u64>, md5: &str) -> Expected {
        Expected { bytes, md5: md5.into() }
    }

    /// Checks the length of `file`.
    pub fn check_size(&self, file: &str, found: u64) -> Result<()> {
        match self.bytes {
            Some(expected) if expected != found => {
                Err(Error::WrongSize { file: file.into(), found, expected })
            }
            _ => Ok(()),
        }
    }

    /// Checks the MD5 of `file`.
    pub fn check_md5(&self, file: &str, hash: Md5) -> Result<()> {
        let found = format!("{:x}", hash.finalize());
        match found == self.md5 {
            true => Ok(()),
            false => Err(Error::Checksum { file: file.into(), found, expected: self.md5.clone() }),
        }
    }

    /// Checks the length and the MD5 of `file`, whose bytes are `contents`.
    pub fn check(&self, file: &str, contents: &[u8]) -> Result<()> {
        self.check_size(file, contents.len() as u64)?;
        self.check_md5(file, Md5::new_with_prefix(contents))
    }
}

/// A published format: the official archive and its members for training and testing.
#[derive(Clone, Debug)]
pub(crate) struct Release {
    pub archive: Expected,
    pub members: [Expected; 2],
}

/// The expected official files. Tests use a manifest of a small data set.
#[derive(Clone, Debug)]
pub(crate) struct Manifest {
    /// The number of training and of test images.
    pub records: [usize; 2],
    pub binary: Release,
    pub python: Release,
    /// [`InMemoryDataset::fingerprint`] of the official files.
    pub fingerprint: String,
}

impl Manifest {
    /// Returns the manifest of CIFAR-100 as its authors published it.
    pub fn official() -> Manifest {
        Manifest {
            records: [50_000, 10_000],
            binary: Release {
                archive: Expected::new(Some(168_513_733), "03b5dce01913d631647c71ecec9e9cb8"),
                members: [
                    Expected::new(Some(153_700_000), "6172c7755cfe09b2fe270c85cebc1b15"),
                    Expected::new(Some(30_740_000), "4499cfba6c016c1be1438163640a0898"),
                ],
            },
            python: Release {
                archive: Expected::new(Some(169_001_437), "eb9058c3a382ffc7106e4002c42a8d85"),
                members: [
                    Expected::new(Some(155_249_918), "16019d7e3df5f24257cddd939b257f8d"),
                    Expected::new(None, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
                ],
            },
            fingerprint: "1465f6dce7af2ddf02526af1c2774137ae118fdb11dc8d28a714b4fd619a771e".into(),
        }
    }

    /// Returns the data set of the given images.
    ///
    /// Reports [`Event::Unverified`] if they are not the official images in their official order,
    /// which is possible only for files that have no official checksum.
    pub fn dataset(
        &self,
        source: String,
        [train, test]: [Images; 2],
        on_event: &mut dyn FnMut(Event),
    ) -> Result<InMemoryDataset> {
        let data = InMemoryDataset::new("cifar100", source, CLASSES, train, test)?;
        if data.fingerprint != self.fingerprint {
            let why = format!(
                "{} decodes to fingerprint {}, while the official files have {}: the pictures, the labels or \
                 their order differ",
                data.source, data.fingerprint, self.fingerprint
            );
            on_event(Event::Unverified { why });
        }
        Ok(data)
    }
}

/// Returns an empty set of images with capacity for `n`.
pub(crate) fn with_capacity(n: usize) -> Images {
    Images {
        pixels: Vec::with_capacity(n * PIXELS),
        labels: Vec::with_capacity(n),
        height: SIDE,
        width: SIDE,
    }
}

/// Checks the two labels of record `i` of `file` and returns the fine one.
pub(crate) fn check_labels(file: &str, i: usize, coarse: i64, fine: i64) -> Result<u16> {
    for (what, label, classes) in [("coarse", coarse, COARSE), ("fine", fine, CLASSES)] {
        if !(0..classes as i64).contains(&label) {
            let what = format!("record {i} has the {what} label {label} instead of one below {classes}");
            return Err(Error::malformed(file, what));
        }
    }
    Ok(fine as u16)
}

/// Appends an image that is given as three row-major planes: red, green, blue.
fn push_planes(planes: &[u8], pixels: &mut Vec<u8>) {
    let plane = SIDE * SIDE;
    pixels.extend((0..plane).flat_map(|i| [planes[i], planes[plane + i], planes[2 * plane + i]]));
}

/// Reads `records` records of the binary format: a coarse label, a fine label, three planes.
pub(crate) fn parse_binary(file: &str, contents: &[u8], records: usize) -> Result<Images> {
    const RECORD: usize = 2 + PIXELS;
    if contents.len() != records * RECORD {
        let what = format!("it has {} bytes instead of {records} records of {RECORD}", contents.len());
        return Err(Error::malformed(file, what));
    }
    let mut images = with_capacity(records);
    for (i, record) in contents.chunks_exact(RECORD).enumerate() {
        images.labels.push(check_labels(file, i, record[0].into(), record[1].into())?);
        push_planes(&record[2..], &mut images.pixels);
    }
    Ok(images)
}

/// Reads the Python format.
///
/// It is a pickled dictionary with the NumPy array `data`, `[records, 3072]`, whose rows hold three
/// planes, and with the lists `fine_labels` and `coarse_labels`.
pub(crate) fn parse_python(file: &str, contents: &[u8], records: usize) -> Result<Images> {
    let bad = |what: String| Error::malformed(file, what);
    let dictionary = pickled::read(contents).map_err(bad)?;
    let coarse = dictionary.integers("coarse_labels", records).map_err(bad)?;
    let fine = dictionary.integers("fine_labels", records).map_err(bad)?;
    let data = dictionary.bytes("data", records, PIXELS).map_err(bad)?;

    let mut images = with_capacity(records);
    for (i, planes) in data.chunks_exact(PIXELS).enumerate() {
        images.labels.push(check_labels(file, i, coarse[i], fine[i])?);
        push_planes(planes, &mut images.pixels);
    }
    Ok(images)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{PICKLES, binary, images};

    #[test]
    fn planes_become_pixels() {
        let mut record = vec![7, 42];
        record.extend((0..PIXELS).map(|i| (i / 1024 * 100 + i % 1024 / 32 + i % 32) as u8));
        let images = parse_binary("x", &record, 1).unwrap();
        assert_eq!(images.labels, [42]);
        assert_eq!((images.height, images.width), (32, 32));
        // At row 3, column 5, red is 3 + 5, green is larger by 100, and blue by 200.
        assert_eq!(images.image(0)[(3 * 32 + 5) * 3..][..3], [8, 108, 208]);
        assert_eq!(images.image(0)[..6], [0, 100, 200, 1, 101, 201]);
    }

    #[test]
    fn both_forms_hold_the_same_images() {
        assert_eq!(parse_binary("x", &binary(3), 3).unwrap(), images(3));
        assert_eq!(parse_python("x", PICKLES[0], 3).unwrap(), images(3));
    }

    #[test]
    fn wrong_records_are_refused() {
        let refused = |contents: &[u8]| parse_binary("the file", contents, 2).unwrap_err().to_string();
        assert!(
            refused(&binary(2)[1..])
                .contains("the file cannot be used: it has 6147 bytes instead of 2 records")
        );
        let mut contents = binary(2);
        contents[3074] = 20;
        assert!(refused(&contents).contains("record 1 has the coarse label 20"));
        contents[3074..3076].copy_from_slice(&[19, 100]);
        assert!(refused(&contents).contains("record 1 has the fine label 100"));
        assert!(check_labels("x", 0, 0, -1).is_err());
    }

    #[test]
    fn wrong_pickles_are_refused() {
        let refused = |contents: &[u8], n| parse_python("the file", contents, n).unwrap_err().to_string();
        assert!(refused(PICKLES[0], 2).contains("labels has 3 entries instead of 2"));
        assert!(refused(b"}.", 2).contains("no \"coarse_labels\""));
        assert!(refused(b"junk", 2).contains("not a pickle"));
        let mut contents = PICKLES[0].to_vec();
        let at = contents.windows(4).position(|window| window == [b'K', 5, b'K', 42]).unwrap();
        contents[at + 1] = 100;
        assert!(refused(&contents, 3).contains("record 0 has the fine label 100"));
        contents[at..at + 2].copy_from_slice(b")N");
        assert!(refused(&contents, 3).contains("fine_labels has 4 entries"));
    }

    #[test]
    fn files_are_compared_with_what_is_known_of_them() {
        let expected = Expected::new(Some(3), "900150983cd24fb0d6963f7d28e17f72");
        expected.check("f", b"abc").unwrap();
        assert!(matches!(expected.check("f", b"abcd"), Err(Error::WrongSize { found: 4, expected: 3, .. })));
        assert!(matches!(expected.check("f", b"abd"), Err(Error::Checksum { .. })));
        let unknown = Expected { bytes: None, ..expected };
        assert!(matches!(unknown.check("f", b"abcd"), Err(Error::Checksum { .. })));
    }
}
