//! A reader of the pickles in which CIFAR-100 is published.
//!
//! A pickle is a program for a stack machine. These programs (protocol 2, written by Python 2) build one
//! dictionary of strings, lists of integers and strings, and one NumPy array. So it is enough to list the
//! strings and numbers in their order and to cut the list at the dictionary's keys. No object is built, so no
//! input can exhaust the stack, and the memory stays proportional to the input. A general reader such as
//! serde-pickle promises neither: it recurses as deep as the input is nested and copies an object at each
//! reference to it.

use std::borrow::Cow;

type Result<T> = std::result::Result<T, String>;

/// The keys of the dictionary.
const KEYS: [&[u8]; 5] = [b"filenames", b"batch_label", b"fine_labels", b"coarse_labels", b"data"];

/// A value that an instruction of the program holds.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Token<'a> {
    Bool(bool),
    Integer(i64),
    Text(&'a [u8]),
}

/// The dictionary of a pickle: each key with the tokens of its value.
#[derive(Debug, PartialEq)]
pub(crate) struct Dictionary<'a>(Vec<(&'a [u8], Vec<Token<'a>>)>);

/// Reads a pickle. The error names the byte where the input is wrong.
pub(crate) fn read(input: &[u8]) -> Result<Dictionary<'_>> {
    let mut entries = Vec::<(&[u8], Vec<Token>)>::new();
    let mut rest = input;
    while !rest.starts_with(b".") {
        let at = input.len() - rest.len();
        match next(&mut rest)
            .map_err(|what| format!("not a pickle that can be read: {what} (at byte {at})"))?
        {
            Some(Token::Text(key)) if KEYS.contains(&key) => entries.push((key, Vec::new())),
            Some(token) => entries.last_mut().into_iter().for_each(|(_, value)| value.push(token)),
            None => {}
        }
    }
    Ok(Dictionary(entries))
}

/// Takes the next instruction from the input; `None` if it holds no value that matters here.
fn next<'a>(input: &mut &'a [u8]) -> Result<Option<Token<'a>>> {
    let code = take(input, 1)?[0];
    let token = match code {
        0x88 => Token::Bool(true),
        0x89 => Token::Bool(false),
        b'K' => Token::Integer(unsigned(input, 1)?.into()),
        b'M' => Token::Integer(unsigned(input, 2)?.into()),
        b'J' => Token::Integer((unsigned(input, 4)? as i32).into()),
        b'U' => Token::Text(sized(input, 1)?),
        b'T' => Token::Text(sized(input, 4)?),
        // The version, a function's module and name, and the numbers of objects that are referred to.
        0x80 | b'q' | b'h' => return take(input, 1).map(|_| None),
        b'r' | b'j' => return take(input, 4).map(|_| None),
        b'c' => return line(input).and_then(|_| line(input)).map(|_| None),
        // None, marks, and how objects are put together.
        b'N' | b'(' | b')' | b']' | b'}' | 0x85..=0x87 | b't' | b'a' | b'e' | b's' | b'u' | b'R' | b'b' => {
            return Ok(None);
        }
        _ => return Err(format!("the instruction {code:#04x} is unknown")),
    };
    Ok(Some(token))
}

/// Takes `n` bytes from the input.
fn take<'a>(input: &mut &'a [u8], n: usize) -> Result<&'a [u8]> {
    input.split_off(..n).ok_or_else(|| "the input ends early".into())
}

/// Takes a little-endian number of `n` <= 4 bytes.
fn unsigned(input: &mut &[u8], n: usize) -> Result<u32> {
    Ok(take(input, n)?.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte)))
}

/// Takes a text that follows its length, which has `n` bytes.
fn sized<'a>(input: &mut &'a [u8], n: usize) -> Result<&'a [u8]> {
    let length = unsigned(input, n)?;
    take(input, length as usize)
}

/// Takes a text that a newline ends.
fn line<'a>(input: &mut &'a [u8]) -> Result<&'a [u8]> {
    let length = input.iter().position(|&byte| byte == b'\n').ok_or("a name does not end")?;
    take(input, length + 1)
}

impl<'a> Dictionary<'a> {
    fn get(&self, key: &str) -> Result<&[Token<'a>]> {
        let entry = self.0.iter().find(|(found, _)| *found == key.as_bytes());
        entry.map(|(_, value)| &value[..]).ok_or_else(|| format!("there is no {key:?} in its dictionary"))
    }

    /// The list of `n` integers under `key`.
    pub fn integers(&self, key: &str, n: usize) -> Result<Vec<i64>> {
        let value = self.get(key)?;
        if value.len() != n {
            return Err(format!("{key} has {} entries instead of {n}", value.len()));
        }
        let integer = |token: &Token| match token {
            Token::Integer(integer) => Ok(*integer),
            other => Err(format!("{key} holds {other:?} instead of an integer")),
        };
        value.iter().map(integer).collect()
    }

    /// The NumPy array `[rows, columns]` of unsigned bytes under `key`, row by row.
    pub fn bytes(&self, key: &str, rows: usize, columns: usize) -> Result<Cow<'a, [u8]>> {
        let value = self.get(key)?;
        let described = [Token::Integer(rows as i64), Token::Integer(columns as i64), Token::Text(b"u1")];
        let (true, [.., Token::Bool(by_column), Token::Text(elements)]) =
            (value.windows(3).any(|window| window == described), value)
        else {
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::PICKLES;

    #[test]
    fn the_published_form_is_read() {
        let dictionary = read(PICKLES[1]).unwrap();
        assert_eq!(dictionary.get("batch_label").unwrap(), [Token::Text(b"test batch 1 of 1")]);
        assert_eq!(dictionary.integers("fine_labels", 2).unwrap(), [5, 42]);
        let data = dictionary.bytes("data", 2, 3072).unwrap();
        assert_eq!((data[0], data[1], data[32], data[1024], data[3072]), (0, 3, 7, 57, 91));
        // The shorter and the longer form of each kind of value.
        let text = b"\x80\x02}(U\x04dataT\x02\x00\x00\x00xyK\x07M\xff\xffJ\xfe\xff\xff\xffNe.";
        let [short, long, negative] = [7, 65535, -2].map(Token::Integer);
        assert_eq!(read(text).unwrap().get("data").unwrap(), [Token::Text(b"xy"), short, long, negative]);
    }

    #[test]
    fn a_column_major_array_is_transposed() {
        let mut input = PICKLES[1].to_vec();
        let elements = input.windows(5).position(|window| window == b"\x89T\x00\x18\x00").unwrap();
        input[elements] = 0x88;
        let data = read(&input).unwrap().bytes("data", 2, 3072).unwrap().into_owned();
        // Neighbours in the input are a row apart in the result.
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
        assert!(dictionary.integers("batch_label", 1).unwrap_err().contains("instead of an integer"));
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
        assert!(read(b"\x8f.").unwrap_err().contains("0x8f"));
    }

    /// What exhausts the stack or the memory of a reader that builds the objects is one pass here.
    #[test]
    fn nesting_and_repetition_cost_nothing() {
        let nested = [&b"\x80\x02)"[..], &[0x85; 1_000_000], b"."].concat();
        assert_eq!(read(&nested).unwrap(), Dictionary(Vec::new()));
        let doubled = [&b"\x80\x02)q\x00"[..], &b"h\x00h\x00\x86q\x00".repeat(100_000), b"."].concat();
        assert_eq!(read(&doubled).unwrap(), Dictionary(Vec::new()));
    }
}
