//! The dictionaries of CIFAR-100 as Python 2 and NumPy pickled them: strings, lists of integers,
//! and one array.

use std::borrow::Cow;

use ::pickle::{Pickle, Place, Value};

type Result<T> = std::result::Result<T, String>;

/// The dictionary in a pickle.
#[derive(Debug)]
pub(crate) struct Dictionary<'a>(Pickle<'a>);

/// Reads a pickle. The error names the byte at which the input is wrong.
pub(crate) fn read(input: &[u8]) -> Result<Dictionary<'_>> {
    pickle::read(input).map(Dictionary)
}

impl<'a> Dictionary<'a> {
    fn get(&self, key: &str) -> Result<Place> {
        let Self(pickle) = self;
        pickle.item(pickle.top(), key).ok_or_else(|| format!("there is no {key:?} in its dictionary"))
    }

    /// Returns the list of `n` integers under `key`.
    pub fn integers(&self, key: &str, n: usize) -> Result<Vec<i64>> {
        let Self(pickle) = self;
        let Value::List(elements) = pickle.get(self.get(key)?) else {
            return Err(format!("{key} is no list"));
        };
        if elements.len() != n {
            return Err(format!("{key} has {} entries instead of {n}", elements.len()));
        }
        let integer = |&element: &Place| match pickle.get(element) {
            Value::Integer(integer) => Ok(*integer),
            other => Err(format!("{key} holds {other:?} instead of an integer")),
        };
        elements.iter().map(integer).collect()
    }

    /// Returns the NumPy array `[rows, columns]` of unsigned bytes under `key`, in row-major order.
    pub fn bytes(&self, key: &str, rows: usize, columns: usize) -> Result<Cow<'a, [u8]>> {
        let array = self.array(self.get(key)?).filter(|(shape, ..)| *shape == [rows, columns]);
        let Some((_, by_column, elements)) = array else {
            return Err(format!("{key} is not a NumPy array [{rows}, {columns}] of unsigned bytes"));
        };
        if elements.len() != rows * columns {
            let found = elements.len();
            return Err(format!("{key} has {found} bytes, which do not fill its shape [{rows}, {columns}]"));
        }
        Ok(match by_column {
            false => Cow::Borrowed(elements),
            true => (0..rows * columns).map(|i| elements[i % columns * rows + i / columns]).collect(),
        })
    }

    /// Returns the shape, the column-major flag and the bytes of a NumPy array of unsigned bytes.
    fn array(&self, place: Place) -> Option<(Vec<usize>, bool, &'a [u8])> {
        let Self(pickle) = self;
        let Value::Call { state: Some(state), .. } = pickle.get(place) else { return None };
        let &[_version, shape, kind, by_column, elements] = pickle.tuple(*state)? else { return None };
        let &[kind, ..] = pickle.call(kind, "numpy", "dtype")? else { return None };
        match (pickle.text(kind)?, pickle.get(by_column), pickle.get(elements)) {
            ("u1", &Value::Bool(by_column), &Value::Text(elements)) => {
                Some((pickle.sizes(shape)?, by_column, elements))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::PICKLES;

    #[test]
    fn the_published_form_is_read() {
        let dictionary = read(PICKLES[1]).unwrap();
        let label = dictionary.0.text(dictionary.get("batch_label").unwrap());
        assert_eq!(label, Some("test batch 1 of 1"));
        assert_eq!(dictionary.integers("fine_labels", 2).unwrap(), [5, 42]);
        let data = dictionary.bytes("data", 2, 3072).unwrap();
        assert_eq!((data[0], data[1], data[32], data[1024], data[3072]), (0, 3, 7, 57, 91));
    }

    #[test]
    fn a_column_major_array_is_transposed() {
        let mut input = PICKLES[1].to_vec();
        let elements = input.windows(5).position(|window| window == b"\x89T\x00\x18\x00").unwrap();
        input[elements] = 0x88;
        let data = read(&input).unwrap().bytes("data", 2, 3072).unwrap().into_owned();
        // Adjacent bytes of the input are one row apart in the result.
        assert_eq!((data[0], data[3072], data[1], data[3073]), (0, 3, 6, 9));
    }

    #[test]
    fn other_contents_are_refused() {
        let dictionary = read(PICKLES[0]).unwrap();
        let refused = |result: Result<Cow<[u8]>>, expected: &str| {
            let error = result.unwrap_err();
            assert!(error.contains(expected), "{error}");
        };
        refused(dictionary.bytes("data", 2, 3072), "not a NumPy array [2, 3072]");
        refused(dictionary.bytes("fine_labels", 3, 3072), "not a NumPy array");
        refused(dictionary.bytes("labels", 3, 3072), "there is no \"labels\"");
        assert!(dictionary.integers("fine_labels", 2).unwrap_err().contains("3 entries instead of 2"));
        assert!(dictionary.integers("batch_label", 1).unwrap_err().contains("no list"));
        assert!(dictionary.integers("filenames", 3).unwrap_err().contains("instead of an integer"));
        let mut input = PICKLES[0].to_vec();
        let dtype = input.windows(2).position(|window| window == b"u1").unwrap();
        input[dtype] = b'i';
        refused(read(&input).unwrap().bytes("data", 3, 3072), "of unsigned bytes");
    }

    #[test]
    fn damaged_input_is_an_error_and_never_a_panic() {
        let whole = PICKLES[1];
        for end in 0..whole.len() {
            assert!(read(&whole[..end]).is_err());
        }
        for at in 0..300 {
            for byte in [0, b'.', b'U', b'T', b'K', b'J', b'c', 0x89, 0x86, 0xff] {
                let mut damaged = whole.to_vec();
                damaged[at] = byte;
                if let Ok(dictionary) = read(&damaged) {
                    let _ = (dictionary.bytes("data", 2, 3072), dictionary.integers("fine_labels", 2));
                }
            }
        }
    }
}
