//! A reader of the pickles in which CIFAR-100 is published.
//!
//! These are protocol 2 pickles of Python 2: dictionaries, lists, strings, integers and one NumPy array. A
//! NumPy array is pickled as a call of NumPy's own functions, which a general reader of plain data rejects or
//! drops; here such calls are kept as they are, never made, and [`Value::byte_array`] recognizes the one that
//! is needed. Strings are slices of the input, so that the 150 MB of pixels are not copied.

use std::borrow::Cow;
use std::collections::HashMap;

type Result<T> = std::result::Result<T, String>;

/// An object of a pickle.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    /// A string of either kind; text is left as UTF-8.
    Bytes(&'a [u8]),
    List(Vec<Value<'a>>),
    Tuple(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    /// A function or class by module and name.
    Global(&'a [u8], &'a [u8]),
    /// The result of calling `function` with `args`, given the state `state` (or `None`) thereafter.
    Object {
        function: Box<Value<'a>>,
        args: Box<Value<'a>>,
        state: Box<Value<'a>>,
    },
}

impl<'a> Value<'a> {
    /// The entry of a dictionary under a string.
    pub fn get(&self, key: &str) -> Option<&Value<'a>> {
        let Value::Dict(entries) = self else { return None };
        entries.iter().find(|(k, _)| *k == Value::Bytes(key.as_bytes())).map(|(_, value)| value)
    }

    /// The elements, row by row, of a NumPy array of unsigned bytes that has the given shape.
    pub fn byte_array(&self, rows: usize, columns: usize) -> Result<Cow<'a, [u8]>> {
        let Some(("_reconstruct", _, Value::Tuple(state))) = self.numpy_call() else {
            return Err("it is not a NumPy array".into());
        };
        // The format's version, the shape, the element type, whether it is column-major, the elements.
        let [Value::Int(1), Value::Tuple(shape), dtype, Value::Bool(by_column), Value::Bytes(elements)] =
            state.as_slice()
        else {
            return Err("it is not a NumPy array whose format is known".into());
        };
        match dtype.numpy_call() {
            Some(("dtype", [Value::Bytes(b"u1" | b"|u1"), ..], _)) => {}
            _ => return Err("its elements are not unsigned bytes".into()),
        }
        if *shape != [Value::Int(rows as i64), Value::Int(columns as i64)] {
            return Err(format!("its shape is {shape:?} instead of [{rows}, {columns}]"));
        }
        if elements.len() != rows * columns {
            return Err(format!(
                "it holds {} bytes, which do not fill its shape [{rows}, {columns}]",
                elements.len()
            ));
        }
        Ok(match by_column {
            false => Cow::Borrowed(elements),
            true => (0..rows * columns).map(|i| elements[i % columns * rows + i / columns]).collect(),
        })
    }

    /// The name, the arguments and the state of a call of a function of NumPy.
    fn numpy_call(&self) -> Option<(&'a str, &[Value<'a>], &Value<'a>)> {
        let Value::Object { function, args, state } = self else { return None };
        let (Value::Global(module, name), Value::Tuple(args)) = (&**function, &**args) else { return None };
        // The modules were renamed over time; the names were not.
        module.starts_with(b"numpy").then_some((std::str::from_utf8(name).ok()?, args, state))
    }
}

/// Reads the one object of a pickle. The error says at which byte what was wrong.
pub(crate) fn read(input: &[u8]) -> Result<Value<'_>> {
    let mut machine = Machine { input, at: 0, stack: Vec::new(), marks: Vec::new(), memo: HashMap::new() };
    loop {
        let at = machine.at;
        match machine.step() {
            Ok(None) => {}
            Ok(Some(value)) => return Ok(value),
            Err(what) => return Err(format!("not a pickle that can be read: {what} (at byte {at})")),
        }
    }
}

/// The stack machine that a pickle is a program for.
struct Machine<'a> {
    input: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: HashMap<usize, Value<'a>>,
}

impl<'a> Machine<'a> {
    /// Does one instruction; returns the result after the last one.
    fn step(&mut self) -> Result<Option<Value<'a>>> {
        match self.take(1)?[0] {
            // PROTO, FRAME
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'.' => return self.pop().map(Some),
            b'(' => self.marks.push(self.stack.len()),

            b'N' => self.stack.push(Value::None),
            0x88 => self.stack.push(Value::Bool(true)),
            0x89 => self.stack.push(Value::Bool(false)),
            b'K' => self.int(1)?,
            b'M' => self.int(2)?,
            b'J' => {
                let value = self.unsigned(4)? as u32;
                self.stack.push(Value::Int((value as i32).into()));
            }
            // LONG1: little-endian two's complement of any length
            0x8a => {
                let bytes = self.sized(1)?;
                let Some(&last) = bytes.last().filter(|_| bytes.len() <= 8) else {
                    return Err("an integer of no or of too many bytes".into());
                };
                let mut wide = [if last < 0x80 { 0 } else { 0xff }; 8];
                wide[..bytes.len()].copy_from_slice(bytes);
                self.stack.push(Value::Int(i64::from_le_bytes(wide)));
            }
            // SHORT_BINSTRING, SHORT_BINBYTES, SHORT_BINUNICODE; BINSTRING, BINBYTES, BINUNICODE
            b'U' | b'C' | 0x8c => self.string(1)?,
            b'T' | b'B' | b'X' => self.string(4)?,

            b')' => self.stack.push(Value::Tuple(Vec::new())),
            0x85 => self.tuple(1)?,
            0x86 => self.tuple(2)?,
            0x87 => self.tuple(3)?,
            b't' => {
                let items = self.pop_to_mark()?;
                self.stack.push(Value::Tuple(items));
            }
            b']' => self.stack.push(Value::List(Vec::new())),
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' => {
                let items = self.pop_to_mark()?;
                self.extend(items)?;
            }
            b'}' => self.stack.push(Value::Dict(Vec::new())),
            b's' => {
                let items = self.pop_many(2)?;
                self.insert(items)?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.insert(items)?;
            }

            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.stack.push(Value::Global(module, name));
            }
            b'R' => {
                let (args, function) = (Box::new(self.pop()?), Box::new(self.pop()?));
                self.stack.push(Value::Object { function, args, state: Box::new(Value::None) });
            }
            b'b' => {
                let new = self.pop()?;
                match self.stack.last_mut() {
                    Some(Value::Object { state, .. }) => **state = new,
                    _ => return Err("a state without an object".into()),
                }
            }

            b'q' => self.put(1)?,
            b'r' => self.put(4)?,
            b'h' => self.get(1)?,
            b'j' => self.get(4)?,
            code => return Err(format!("the instruction {code:#04x} is unknown")),
        }
        Ok(None)
    }

    /// The next `n` bytes.
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let bytes = self.input[self.at..].get(..n).ok_or("the input ends early")?;
        self.at += n;
        Ok(bytes)
    }

    /// A little-endian number of `n` <= 4 bytes.
    fn unsigned(&mut self, n: usize) -> Result<usize> {
        Ok(self.take(n)?.iter().rev().fold(0, |value, &byte| value << 8 | usize::from(byte)))
    }

    /// Bytes that follow their number, which has `n` bytes.
    fn sized(&mut self, n: usize) -> Result<&'a [u8]> {
        let length = self.unsigned(n)?;
        self.take(length)
    }

    /// Bytes up to the next newline, which is taken too.
    fn line(&mut self) -> Result<&'a [u8]> {
        let length =
            self.input[self.at..].iter().position(|&byte| byte == b'\n').ok_or("a name does not end")?;
        let line = self.take(length)?;
        self.at += 1;
        Ok(line)
    }

    fn int(&mut self, n: usize) -> Result<()> {
        let value = self.unsigned(n)?;
        self.stack.push(Value::Int(value as i64));
        Ok(())
    }

    fn string(&mut self, n: usize) -> Result<()> {
        let bytes = self.sized(n)?;
        self.stack.push(Value::Bytes(bytes));
        Ok(())
    }

    fn tuple(&mut self, n: usize) -> Result<()> {
        let items = self.pop_many(n)?;
        self.stack.push(Value::Tuple(items));
        Ok(())
    }

    fn pop(&mut self) -> Result<Value<'a>> {
        self.pop_many(1)?.pop().ok_or_else(|| "an object is missing".into())
    }

    fn pop_many(&mut self, n: usize) -> Result<Vec<Value<'a>>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(n).filter(|&start| start >= floor) {
            Some(start) => Ok(self.stack.split_off(start)),
            None => Err("an object is missing".into()),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Value<'a>>> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        Ok(self.stack.split_off(mark))
    }

    /// Appends to the list on top of the stack.
    fn extend(&mut self, items: Vec<Value<'a>>) -> Result<()> {
        match self.stack.last_mut() {
            Some(Value::List(list)) => list.extend(items),
            _ => return Err("items without a list".into()),
        }
        Ok(())
    }

    /// Adds keys and values in turn to the dictionary on top of the stack.
    fn insert(&mut self, items: Vec<Value<'a>>) -> Result<()> {
        let Some(Value::Dict(dict)) = self.stack.last_mut() else {
            return Err("entries without a dictionary".into());
        };
        let mut items = items.into_iter();
        while let Some(key) = items.next() {
            dict.push((key, items.next().ok_or("a key without a value")?));
        }
        Ok(())
    }

    fn put(&mut self, n: usize) -> Result<()> {
        let key = self.unsigned(n)?;
        let value = self.stack.last().ok_or("an object is missing")?.clone();
        self.memo.insert(key, value);
        Ok(())
    }

    fn get(&mut self, n: usize) -> Result<()> {
        let key = self.unsigned(n)?;
        match self.memo.get(&key) {
            // What was noted is a copy from before these were filled.
            Some(Value::List(_) | Value::Dict(_) | Value::Object { .. }) => {
                Err("a list, dictionary or object that occurs twice is not supported".into())
            }
            Some(value) => {
                self.stack.push(value.clone());
                Ok(())
            }
            None => Err(format!("object {key} was never noted")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::PICKLES;

    #[test]
    fn a_published_form_of_pickle_is_read() {
        let root = read(PICKLES[1]).unwrap();
        assert_eq!(root.get("batch_label"), Some(&Value::Bytes(b"test batch 1 of 1")));
        assert_eq!(root.get("fine_labels"), Some(&Value::List(vec![Value::Int(5), Value::Int(42)])));
        let data = root.get("data").unwrap().byte_array(2, 3072).unwrap();
        assert_eq!((data[0], data[1], data[32], data[1024], data[3072]), (0, 3, 7, 57, 91));
        assert_eq!(root.get("absent"), None);
    }

    #[test]
    fn a_column_major_array_is_transposed() {
        let mut input = PICKLES[1].to_vec();
        let elements = input.windows(5).position(|window| window == b"\x89T\x00\x18\x00").unwrap();
        input[elements] = 0x88;
        let data = read(&input).unwrap().get("data").unwrap().byte_array(2, 3072).unwrap().into_owned();
        // What were neighbours are now a row apart.
        assert_eq!((data[0], data[3072], data[1], data[3073]), (0, 3, 6, 9));
    }

    #[test]
    fn other_arrays_are_refused() {
        let root = read(PICKLES[0]).unwrap();
        let data = root.get("data").unwrap();
        assert!(data.byte_array(2, 3072).unwrap_err().contains("shape"));
        assert!(root.byte_array(3, 3072).unwrap_err().contains("not a NumPy array"));
        let mut input = PICKLES[0].to_vec();
        let dtype = input.windows(2).position(|window| window == b"u1").unwrap();
        input[dtype] = b'i';
        let root = read(&input).unwrap();
        assert!(root.get("data").unwrap().byte_array(3, 3072).unwrap_err().contains("unsigned bytes"));
    }

    #[test]
    fn small_instructions_work() {
        // [-2, 300, 65535, None, True, ()] with LONG1, BINGET of a string, APPEND
        let input = b"\x80\x02](\x8a\x01\xfe\x8a\x02\x2c\x01M\xff\xffN\x88)X\x01\x00\x00\x00xq\x05h\x05e\
            J\xff\xff\xff\xffa.";
        let text = Value::Bytes(b"x");
        let expected = vec![
            Value::Int(-2),
            Value::Int(300),
            Value::Int(65535),
            Value::None,
            Value::Bool(true),
            Value::Tuple(vec![]),
            text.clone(),
            text,
            Value::Int(-1),
        ];
        assert_eq!(read(input), Ok(Value::List(expected)));
    }

    #[test]
    fn damaged_input_is_an_error_and_never_a_panic() {
        let whole = PICKLES[1];
        for end in 0..whole.len() {
            assert!(read(&whole[..end]).is_err());
        }
        for at in 0..300 {
            for byte in [0, b'.', b'R', b'b', b'u', b'e', b't', 0x86, 0x8a, 0xff] {
                let mut damaged = whole.to_vec();
                damaged[at] = byte;
                let _ =
                    read(&damaged).map(|root| root.get("data").map(|data| data.byte_array(2, 3072).is_ok()));
            }
        }
        assert!(read(b"]q\x00h\x00.").unwrap_err().contains("occurs twice"));
        assert!(read(b"\x8f.").unwrap_err().contains("0x8f"));
    }
}
