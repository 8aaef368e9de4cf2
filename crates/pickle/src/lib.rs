//! A reader of Python's pickles, protocols 1 to 5, that does not run them.
//!
//! A pickle is a program for a stack machine that can call any function. This reader calls nothing:
//! a call becomes a value with the function's name and its arguments. All values are in one list,
//! and containers hold indices into it. So nothing recurses however deeply values are nested, a
//! value with many references is stored once, and the memory is proportional to the number of
//! instructions, which is bounded. General readers such as serde-pickle do not guarantee this: they
//! recurse as deeply as the input is nested, and copy a value for each reference.

#![forbid(unsafe_code)]

use std::collections::HashMap;

/// The maximum number of instructions, each of which takes at most 256 bytes of memory. The
/// training set of CIFAR-100 has 250,000 instructions, and a checkpoint 30 per tensor.
const MOST_INSTRUCTIONS: usize = 1 << 20;

/// The index of a value in its pickle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place(usize);

/// A value of a pickle. Texts and bytes borrow from the input.
#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    /// `None`, or a value that is not represented here: an integer beyond 64 bits.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer.
    Integer(i64),
    /// A float.
    Float(f64),
    /// A UTF-8 string or bytes, which Python 2 wrote in the same way.
    Text(&'a [u8]),
    /// A function or a class, given by its module and its name.
    Global(&'a [u8], &'a [u8]),
    /// A tuple.
    Tuple(Vec<Place>),
    /// A list or a set.
    List(Vec<Place>),
    /// A dictionary, in the order in which its keys were set.
    Dict(Vec<(Place, Place)>),
    /// A call that is not made.
    Call {
        /// The function or class.
        function: Place,
        /// The arguments, a tuple.
        arguments: Place,
        /// The state that was set on the resulting object.
        state: Option<Place>,
        /// The items that were set on the resulting object, if it is a kind of dictionary.
        items: Vec<(Place, Place)>,
    },
    /// An object outside of the pickle, given by its identifier.
    Persistent(Place),
}

/// The values of a pickle.
#[derive(Debug)]
pub struct Pickle<'a> {
    values: Vec<Value<'a>>,
    top: Place,
}

/// Reads a pickle.
///
/// # Errors
/// A description of the problem; for an instruction that cannot be read it includes the position of
/// the byte.
pub fn read(input: &[u8]) -> Result<Pickle<'_>, String> {
    let mut machine = Machine { input, ..Machine::default() };
    for _ in 0..MOST_INSTRUCTIONS {
        let at = input.len() - machine.input.len();
        match machine.step() {
            Ok(true) => {}
            Ok(false) => {
                return match machine.stack[..] {
                    [top] => Ok(Pickle { values: machine.values, top }),
                    ref stack => {
                        Err(format!("not a pickle that can be read: it ends with {} values", stack.len()))
                    }
                };
            }
            Err(what) => return Err(format!("not a pickle that can be read: {what} (at byte {at})")),
        }
    }
    Err(format!("not a pickle that can be read: it has more than {MOST_INSTRUCTIONS} instructions"))
}

impl<'a> Pickle<'a> {
    /// Returns the value of the whole pickle.
    pub fn top(&self) -> Place {
        self.top
    }

    /// Returns the value at a place.
    pub fn get(&self, place: Place) -> &Value<'a> {
        &self.values[place.0]
    }

    /// Returns the keys and values of a dictionary, or of a call whose result is a kind of
    /// dictionary.
    pub fn items(&self, place: Place) -> Option<&[(Place, Place)]> {
        match self.get(place) {
            Value::Dict(items) => Some(items),
            Value::Call { items, .. } if !items.is_empty() => Some(items),
            _ => None,
        }
    }

    /// Returns the value of a key in [`Pickle::items`], or the last value if the key occurs several
    /// times.
    pub fn item(&self, place: Place, key: &str) -> Option<Place> {
        let is_key = |found: Place| matches!(self.get(found), Value::Text(text) if *text == key.as_bytes());
        self.items(place)?.iter().rev().find(|(found, _)| is_key(*found)).map(|&(_, value)| value)
    }

    /// Returns the elements of a tuple.
    pub fn tuple(&self, place: Place) -> Option<&[Place]> {
        if let Value::Tuple(elements) = self.get(place) { Some(elements) } else { None }
    }

    /// Returns the arguments of a call of the given function.
    pub fn call(&self, place: Place, module: &str, name: &str) -> Option<&[Place]> {
        let Value::Call { function, arguments, .. } = self.get(place) else { return None };
        let wanted = Value::Global(module.as_bytes(), name.as_bytes());
        if *self.get(*function) == wanted { self.tuple(*arguments) } else { None }
    }

    /// Returns a text, if it is valid UTF-8.
    pub fn text(&self, place: Place) -> Option<&'a str> {
        if let Value::Text(text) = self.get(place) { std::str::from_utf8(text).ok() } else { None }
    }

    /// Returns an integer, if it is not negative.
    pub fn size(&self, place: Place) -> Option<usize> {
        if let Value::Integer(integer) = self.get(place) { usize::try_from(*integer).ok() } else { None }
    }

    /// Returns a tuple of integers, if none of them is negative.
    pub fn sizes(&self, place: Place) -> Option<Vec<usize>> {
        self.tuple(place)?.iter().map(|&element| self.size(element)).collect()
    }
}

/// The stack machine.
#[derive(Default)]
struct Machine<'a> {
    /// The input that has not been read yet.
    input: &'a [u8],
    values: Vec<Value<'a>>,
    stack: Vec<Place>,
    /// The height of the stack at each mark.
    marks: Vec<usize>,
    memo: HashMap<usize, Place>,
}

impl<'a> Machine<'a> {
    /// Executes an instruction; returns whether another one follows.
    fn step(&mut self) -> Result<bool, String> {
        let code = self.take(1)?[0];
        let value = match code {
            b'.' => return Ok(false),
            // The protocol version, and the length of a frame.
            0x80 => return self.take(1).map(|_| true),
            0x95 => return self.take(8).map(|_| true),
            b'(' => {
                self.marks.push(self.stack.len());
                return Ok(true);
            }
            b'0' => return self.pop().map(|_| true),
            b'1' => return self.pop_to_mark().map(|_| true),
            b'2' => {
                self.stack.push(self.last()?);
                return Ok(true);
            }
            b'q' | b'r' | 0x94 => {
                let number = match code {
                    b'q' => self.number(1)?,
                    b'r' => self.number(4)?,
                    _ => self.memo.len(),
                };
                self.memo.insert(number, self.last()?);
                return Ok(true);
            }
            b'h' | b'j' => {
                let number = self.number(if code == b'h' { 1 } else { 4 })?;
                let place = *self.memo.get(&number).ok_or_else(|| format!("object {number} is not there"))?;
                self.stack.push(place);
                return Ok(true);
            }
            b'a' | b'e' | 0x90 => {
                let added = if code == b'a' { vec![self.pop()?] } else { self.pop_to_mark()? };
                let last = self.last()?;
                match &mut self.values[last.0] {
                    Value::List(elements) => elements.extend(added),
                    // A call may give a kind of list, whose elements are not needed.
                    Value::Call { .. } => {}
                    other => return Err(format!("elements are added to {}", kind(other))),
                }
                return Ok(true);
            }
            b's' | b'u' => {
                let added = match code {
                    b's' => {
                        let value = self.pop()?;
                        vec![self.pop()?, value]
                    }
                    _ => self.pop_to_mark()?,
                };
                let added = pairs(&added)?;
                let last = self.last()?;
                match &mut self.values[last.0] {
                    Value::Dict(items) | Value::Call { items, .. } => items.extend(added),
                    other => return Err(format!("keys are set in {}", kind(other))),
                }
                return Ok(true);
            }
            b'b' => {
                let new = self.pop()?;
                let last = self.last()?;
                match &mut self.values[last.0] {
                    Value::Call { state, .. } => *state = Some(new),
                    // An instance of a class may be represented by a dictionary or a list.
                    Value::Dict(_) | Value::List(_) => {}
                    other => return Err(format!("a state is given to {}", kind(other))),
                }
                return Ok(true);
            }
            b'N' => Value::None,
            0x88 => Value::Bool(true),
            0x89 => Value::Bool(false),
            b'K' => Value::Integer(self.number(1)? as i64),
            b'M' => Value::Integer(self.number(2)? as i64),
            b'J' => Value::Integer(i64::from(self.number(4)? as u32 as i32)),
            0x8a | 0x8b => {
                let length = self.number(if code == 0x8a { 1 } else { 4 })?;
                integer(self.take(length)?)
            }
            // Protocol 1 writes truth values and long integers as text.
            b'I' => match self.line()? {
                b"00" => Value::Bool(false),
                b"01" => Value::Bool(true),
                text => decimal(text)?,
            },
            b'L' => {
                let text = self.line()?;
                decimal(text.strip_suffix(b"L").unwrap_or(text))?
            }
            b'G' => {
                let bytes = self.take(8)?.try_into().expect("eight bytes");
                Value::Float(f64::from_be_bytes(bytes))
            }
            b'U' | b'C' | 0x8c => self.sized(1)?,
            b'T' | b'B' | b'X' => self.sized(4)?,
            0x8d | 0x8e | 0x96 => self.sized(8)?,
            b'c' => Value::Global(self.line()?, self.line()?),
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (&self.values[module.0], &self.values[name.0]) {
                    (&Value::Text(module), &Value::Text(name)) => Value::Global(module, name),
                    _ => return Err("a function's name is no text".into()),
                }
            }
            b')' => Value::Tuple(Vec::new()),
            b']' | 0x8f => Value::List(Vec::new()),
            b'}' => Value::Dict(Vec::new()),
            b't' => Value::Tuple(self.pop_to_mark()?),
            0x85..=0x87 => {
                let mut elements = Vec::new();
                for _ in 0x84..code {
                    elements.push(self.pop()?);
                }
                elements.reverse();
                Value::Tuple(elements)
            }
            b'l' | 0x91 => Value::List(self.pop_to_mark()?),
            b'd' => Value::Dict(pairs(&self.pop_to_mark()?)?),
            b'R' | 0x81 | 0x92 => {
                if code == 0x92 {
                    self.pop()?; // keyword arguments
                }
                let (arguments, function) = (self.pop()?, self.pop()?);
                Value::Call { function, arguments, state: None, items: Vec::new() }
            }
            b'Q' => Value::Persistent(self.pop()?),
            _ => return Err(format!("the instruction {code:#04x} is unknown")),
        };
        self.stack.push(Place(self.values.len()));
        self.values.push(value);
        Ok(true)
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        self.input.split_off(..n).ok_or_else(|| "the input ends early".into())
    }

    /// Reads a little-endian number of `n` <= 8 bytes.
    fn number(&mut self, n: usize) -> Result<usize, String> {
        let number = self.take(n)?.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte));
        usize::try_from(number).map_err(|_| format!("the length {number} is too large"))
    }

    /// Reads a text that is preceded by its length in `n` bytes.
    fn sized(&mut self, n: usize) -> Result<Value<'a>, String> {
        let length = self.number(n)?;
        self.take(length).map(Value::Text)
    }

    /// Reads a text up to a newline.
    fn line(&mut self) -> Result<&'a [u8], String> {
        let length = self.input.iter().position(|&byte| byte == b'\n').ok_or("a name does not end")?;
        let line = self.take(length)?;
        self.take(1)?;
        Ok(line)
    }

    /// Returns the lowest stack index that may be popped: values below the last mark stay.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn last(&self) -> Result<Place, String> {
        self.stack[self.floor()..].last().copied().ok_or_else(|| "a value is missing".into())
    }

    fn pop(&mut self) -> Result<Place, String> {
        let last = self.last()?;
        self.stack.pop();
        Ok(last)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Place>, String> {
        let mark = self.marks.pop().ok_or("a mark is missing")?;
        Ok(self.stack.split_off(mark))
    }
}

/// Splits a sequence of alternating keys and values.
fn pairs(places: &[Place]) -> Result<Vec<(Place, Place)>, String> {
    match places.as_chunks() {
        (pairs, []) => Ok(pairs.iter().map(|&[key, value]| (key, value)).collect()),
        _ => Err("a key has no value".into()),
    }
}

/// Parses a little-endian integer in two's complement; an integer beyond 64 bits is
/// [`Value::None`].
fn integer<'a>(bytes: &[u8]) -> Value<'a> {
    let Some((&highest, _)) = bytes.split_last() else { return Value::Integer(0) };
    let mut whole = [if highest < 128 { 0 } else { 255 }; 8];
    match whole.get_mut(..bytes.len()) {
        Some(low) => {
            low.copy_from_slice(bytes);
            Value::Integer(i64::from_le_bytes(whole))
        }
        None => Value::None,
    }
}

/// Parses a decimal integer; an integer beyond 64 bits is [`Value::None`].
fn decimal<'a>(text: &[u8]) -> Result<Value<'a>, String> {
    let digits = text.strip_prefix(b"-").unwrap_or(text);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err("a number is not written in digits".into());
    }
    let number = std::str::from_utf8(text).ok().and_then(|text| text.parse().ok());
    Ok(number.map_or(Value::None, Value::Integer))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::None => "None",
        Value::Bool(_) => "a truth value",
        Value::Integer(_) | Value::Float(_) => "a number",
        Value::Text(_) => "a text",
        Value::Global(..) => "a function",
        Value::Tuple(_) => "a tuple",
        Value::List(_) => "a list",
        Value::Dict(_) => "a dictionary",
        Value::Call { .. } => "an object",
        Value::Persistent(_) => "something outside",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    /// Formats a value as Python would print it, down to some depth.
    fn show(pickle: &Pickle, place: Place, depth: usize) -> String {
        let list = |elements: &[Place]| {
            elements.iter().map(|&element| show(pickle, element, depth - 1)).collect::<Vec<_>>().join(", ")
        };
        let dict = |items: &[(Place, Place)]| {
            items.iter().fold(String::new(), |mut text, &(key, value)| {
                let (key, value) = (show(pickle, key, depth - 1), show(pickle, value, depth - 1));
                write!(text, "{key}: {value}, ").unwrap();
                text
            })
        };
        if depth == 0 {
            return "…".into();
        }
        match pickle.get(place) {
            Value::Text(text) => format!("'{}'", text.escape_ascii()),
            Value::Global(module, name) => format!("{}.{}", module.escape_ascii(), name.escape_ascii()),
            Value::Tuple(elements) => format!("({})", list(elements)),
            Value::List(elements) => format!("[{}]", list(elements)),
            Value::Dict(items) => format!("{{{}}}", dict(items)),
            Value::Call { function, arguments, state, items } => {
                let state =
                    state.map_or(String::new(), |state| format!(" state {}", show(pickle, state, depth - 1)));
                let (function, arguments) =
                    (show(pickle, *function, depth - 1), show(pickle, *arguments, depth - 1));
                format!("{function}{arguments}{state} {{{}}}", dict(items))
            }
            Value::Persistent(place) => format!("@{}", show(pickle, *place, depth - 1)),
            other => format!("{other:?}"),
        }
    }

    #[track_caller]
    fn check(input: &[u8], expected: &str) {
        let pickle = read(input).unwrap();
        assert_eq!(show(&pickle, pickle.top(), 8), expected);
    }

    #[track_caller]
    fn refused(input: &[u8], expected: &str) {
        let message = read(input).unwrap_err();
        assert!(message.contains(expected), "{message}");
    }

    /// Checks pickles as Python's `pickle.dumps` writes them.
    #[test]
    fn values_of_every_protocol() {
        // {'a': [1, -2, 70000, 2.5], 'b': (True, None)}
        let two = b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01]q\x02(K\x01J\xfe\xff\xff\xffJp\x11\x01\x00G@\x04\x00\x00\x00\x00\x00\x00eX\x01\x00\x00\x00bq\x03\x88N\x86q\x04u.";
        let expected =
            "{'a': [Integer(1), Integer(-2), Integer(70000), Float(2.5)], 'b': (Bool(true), None), }";
        check(two, expected);
        let four = b"\x80\x04\x95(\x00\x00\x00\x00\x00\x00\x00}\x94(\x8c\x01a\x94]\x94(K\x01J\xfe\xff\xff\xffJp\x11\x01\x00G@\x04\x00\x00\x00\x00\x00\x00e\x8c\x01b\x94\x88N\x86\x94u.";
        check(four, expected);
        // Strings as Python 2 wrote them, and integers beyond 32 bits.
        check(b"\x80\x02(U\x02abT\x01\x00\x00\x00cM\xff\xfft.", "('ab', 'c', Integer(65535))");
        check(
            b"\x80\x02\x8a\x00\x8a\x02\x00\xff\x8a\x05\x00\x00\x00\x00\x01\x87.",
            "(Integer(0), Integer(-256), Integer(4294967296))",
        );
        // Protocol 1: (1, 1099511627776, -1099511627776, 2 ** 64, True, False, -3).
        check(
            b"(K\x01L1099511627776L\nL-1099511627776L\nL18446744073709551616L\nI01\nI00\nI-3\nt.",
            "(Integer(1), Integer(1099511627776), Integer(-1099511627776), None, Bool(true), Bool(false), Integer(-3))",
        );
        check(b"\x80\x02\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01.", "None");
    }

    #[test]
    fn nothing_is_called() {
        check(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.", "os.system('ls') {}");
        check(
            b"\x80\x02ccollections\nOrderedDict\n)R(K\x01K\x02uK\x03b.",
            "collections.OrderedDict() state Integer(3) {Integer(1): Integer(2), }",
        );
        check(b"\x80\x04\x8c\x01m\x8c\x01f\x93)\x81.", "m.f() {}");
        check(b"\x80\x02X\x01\x00\x00\x00kQ.", "@'k'");
    }

    #[test]
    fn a_list_that_holds_itself_is_no_circle_to_run_in() {
        check(b"\x80\x02]q\x00h\x00a.", "[[[[[[[[…]]]]]]]]");
    }

    /// Input that exhausts the stack or the memory of a reader that builds objects takes one pass
    /// here.
    #[test]
    fn nesting_and_repetition_cost_nothing() {
        let nested = [&b"\x80\x02)"[..], &[0x85; 900_000], b"."].concat();
        assert_eq!(read(&nested).unwrap().values.len(), 900_001);
        let doubled = [&b"\x80\x02)q\x00"[..], &b"h\x00h\x00\x86q\x00".repeat(100_000), b"."].concat();
        refused(&doubled, "100001 values");
        refused(&[b'N'; MOST_INSTRUCTIONS + 1], "more than");
    }

    #[test]
    fn damaged_input_is_an_error_and_never_a_panic() {
        for (input, expected) in [
            (&b""[..], "ends early"),
            (b"\x80\x02.", "0 values"),
            (b"NN.", "2 values"),
            (b"X\xff\xff\xff\xffab.", "ends early"),
            (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffab.", "ends early"),
            (b"\x95\x00", "ends early"),
            (b"\x8a\xff.", "ends early"),
            (b"cos", "does not end"),
            (b"h\x00.", "object 0"),
            (b"q\x00.", "missing"),
            (b"a.", "missing"),
            (b"e.", "mark"),
            (b"N(N\x85", "ends early"),
            (b"N(\x85.", "missing"),
            (b"}(K.", "at byte 4"),
            (b"}(NuN.", "no value"),
            (b"NNa.", "added to None"),
            (b")NNs.", "set in a tuple"),
            (b"NNb.", "given to None"),
            (b"NN\x93.", "no text"),
            (b"F1\n.", "0x46"),
            (b"I1.5\n.", "digits"),
            (b"L-L\n.", "digits"),
            (b"L1L", "does not end"),
        ] {
            refused(input, expected);
        }
    }
}
