//! A parser of PTX text as nvcc writes it.
//!
//! It keeps only what is needed to run a module, and skips directives for debuggers and for
//! performance. The language is NVIDIA's *PTX ISA*; section numbers refer to version 9.0.

use crate::{Error, Result};
use std::collections::HashMap;

/// A module: the definitions of one text.
#[derive(Debug, Default)]
pub(crate) struct Module {
    /// Kernels and functions that have a body, by name.
    pub(crate) functions: HashMap<String, Function>,
    /// The variables outside of functions.
    pub(crate) globals: Vec<Variable>,
}

/// A kernel (`.entry`) or a function (`.func`).
#[derive(Debug, Default)]
pub(crate) struct Function {
    pub(crate) kernel: bool,
    /// The results, as variables in the parameter space.
    pub(crate) returns: Vec<Variable>,
    pub(crate) parameters: Vec<Variable>,
    pub(crate) body: Vec<Statement>,
}

/// A state space (5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// Any space: the address says which.
    Generic,
    Global,
    Shared,
    Local,
    Param,
}

/// A declared piece of memory.
#[derive(Debug, Clone)]
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) space: Space,
    pub(crate) align: usize,
    /// The size in bytes, or `None` if a launch decides it (`.extern .shared`).
    pub(crate) size: Option<usize>,
    /// The values of the first bytes; the other bytes are 0.
    pub(crate) init: Vec<u8>,
}

/// An element of a function's body.
#[derive(Debug)]
pub(crate) enum Statement {
    Label(String),
    /// A `.reg` declaration of `name` or, with a count, of `name0`, `name1` and so on.
    Registers {
        name: String,
        count: Option<usize>,
    },
    Variable(Variable),
    /// `{` and `}`: names that are declared in between are visible only there.
    Open,
    Close,
    Instruction(Instruction),
}

/// `@guard opcode operands;`
#[derive(Debug)]
pub(crate) struct Instruction {
    /// A predicate, and whether it must be false.
    pub(crate) guard: Option<(String, bool)>,
    /// The parts between the dots, such as `["ld", "global", "v4", "f32"]`.
    pub(crate) opcode: Vec<String>,
    pub(crate) operands: Vec<Operand>,
    /// The line of the text, from 1.
    pub(crate) line: usize,
}

/// An operand (6).
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Operand {
    /// A register, a variable, a function or a label.
    Name(String),
    /// `!name`
    Not(String),
    /// `name|name`: two results.
    Pair(String, String),
    /// The bits of a constant. Integers are sign-extended to 64 bits.
    Constant(u64),
    /// `{a, b}`
    Vector(Vec<Operand>),
    /// `[base + offset]`
    Address { base: Box<Operand>, offset: i64 },
    /// `(a, b)`: arguments.
    List(Vec<Operand>),
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Number(u64),
    Sign(char),
}

/// Parses a module.
pub(crate) fn parse(text: &str) -> Result<Module> {
    Parser { tokens: tokens(text)?, next: 0 }.module()
}

fn tokens(text: &str) -> Result<Vec<(Token, usize)>> {
    let bytes = text.as_bytes();
    let (mut tokens, mut at, mut line) = (Vec::new(), 0, 1);
    let in_word = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'$' | b'%' | b'.');
    while at < bytes.len() {
        let start = at;
        match bytes[at] {
            b'\n' => {
                line += 1;
                at += 1;
            }
            b if b.is_ascii_whitespace() || b == 0 => at += 1,
            b'/' if bytes[at..].starts_with(b"//") => {
                at += bytes[at..].iter().position(|&b| b == b'\n').unwrap_or(bytes.len() - at);
            }
            b'/' if bytes[at..].starts_with(b"/*") => {
                let end = text[at..].find("*/").ok_or_else(|| Error::ptx(line, "a comment has no end"))?;
                line += text[at..at + end].matches('\n').count();
                at += end + 2;
            }
            b'"' => {
                let end = text[at + 1..].find('"').ok_or_else(|| Error::ptx(line, "a string has no end"))?;
                at += end + 2;
                tokens.push((Token::Word(text[start..at].into()), line));
            }
            b if b.is_ascii_digit() => {
                while at < bytes.len() && in_word(bytes[at]) {
                    at += 1;
                }
                let number = number(&text[start..at]);
                let number =
                    number.ok_or_else(|| Error::ptx(line, format!("a number, {}", &text[start..at])))?;
                tokens.push((Token::Number(number), line));
            }
            b if in_word(b) => {
                while at < bytes.len() && (in_word(bytes[at]) || bytes[at..].starts_with(b"::")) {
                    at += if bytes[at] == b':' { 2 } else { 1 };
                }
                tokens.push((Token::Word(text[start..at].into()), line));
            }
            b => {
                tokens.push((Token::Sign(b.into()), line));
                at += 1;
            }
        }
    }
    Ok(tokens)
}

/// Returns the bits of a constant (4.5). `0f` and `0d` with hexadecimal digits are floats.
fn number(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches('U');
    match digits.get(..2) {
        Some("0f" | "0F" | "0d" | "0D" | "0x" | "0X") => u64::from_str_radix(&digits[2..], 16).ok(),
        Some("0b" | "0B") => u64::from_str_radix(&digits[2..], 2).ok(),
        _ => digits.parse().ok().or_else(|| digits.parse().ok().map(f64::to_bits)),
    }
}

struct Parser {
    tokens: Vec<(Token, usize)>,
    next: usize,
}

impl Parser {
    fn line(&self) -> usize {
        self.tokens.get(self.next).or(self.tokens.last()).map_or(1, |(_, line)| *line)
    }

    fn fail<T>(&self, expected: &str) -> Result<T> {
        let found = self.tokens.get(self.next).map(|(token, _)| token);
        Err(Error::ptx(self.line(), format!("expected {expected}, found {found:?}")))
    }

    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.next).map(|(token, _)| token)
    }

    fn sign(&mut self, sign: char) -> bool {
        let found = self.peek() == Some(&Token::Sign(sign));
        self.next += usize::from(found);
        found
    }

    fn expect(&mut self, sign: char) -> Result<()> {
        if self.sign(sign) { Ok(()) } else { self.fail(&format!("{sign:?}")) }
    }

    fn word(&mut self) -> Result<String> {
        match self.peek() {
            Some(Token::Word(word)) => {
                let word = word.clone();
                self.next += 1;
                Ok(word)
            }
            _ => self.fail("a word"),
        }
    }

    /// Parses a constant with an optional sign.
    fn number(&mut self) -> Result<u64> {
        let negative = self.sign('-');
        match self.peek() {
            Some(&Token::Number(number)) => {
                self.next += 1;
                Ok(if negative { number.wrapping_neg() } else { number })
            }
            _ => self.fail("a number"),
        }
    }

    fn skip_past(&mut self, sign: char) {
        while self.next < self.tokens.len() && !self.sign(sign) {
            self.next += 1;
        }
    }

    fn skip_line(&mut self) {
        let line = self.line();
        while self.peek().is_some() && self.line() == line {
            self.next += 1;
        }
    }

    fn module(mut self) -> Result<Module> {
        let mut module = Module::default();
        while self.peek().is_some() {
            if self.sign(';') {
                continue;
            }
            match self.word()?.as_str() {
                ".version" | ".target" | ".address_size" => {
                    self.skip_line();
                }
                ".file" | ".pragma" | ".alias" => self.skip_past(';'),
                ".visible" | ".weak" | ".common" | ".extern" => {}
                kind @ (".entry" | ".func") => {
                    let kernel = kind == ".entry";
                    if let Some((name, function)) = self.function(kernel)? {
                        module.functions.insert(name, function);
                    }
                }
                space @ (".global" | ".const" | ".shared") => {
                    let space = if space == ".shared" { Space::Shared } else { Space::Global };
                    module.globals.extend(self.variables(space)?);
                }
                _ => {
                    self.next -= 1;
                    return self.fail("a directive");
                }
            }
        }
        Ok(module)
    }

    /// Parses a function. Returns `None` for a declaration, which has no body.
    fn function(&mut self, kernel: bool) -> Result<Option<(String, Function)>> {
        let returns = if self.sign('(') { self.parameters()? } else { Vec::new() };
        let name = self.word()?;
        let parameters = if self.sign('(') { self.parameters()? } else { Vec::new() };
        // Directives for performance, such as .maxntid 256, 1, 1.
        while !matches!(self.peek(), Some(Token::Sign('{' | ';')) | None) {
            self.next += 1;
        }
        if self.sign(';') {
            return Ok(None);
        }
        self.expect('{')?;
        Ok(Some((name, Function { kernel, returns, parameters, body: self.body()? })))
    }

    fn parameters(&mut self) -> Result<Vec<Variable>> {
        let mut parameters = Vec::new();
        while !self.sign(')') {
            match self.word()?.as_str() {
                ".param" => parameters.push(self.variable(Space::Param)?),
                other => return Err(Error::ptx(self.line(), format!("a parameter in the space {other}"))),
            }
            self.sign(',');
        }
        Ok(parameters)
    }

    fn variables(&mut self, space: Space) -> Result<Vec<Variable>> {
        let mut variables = vec![self.variable(space)?];
        while self.sign(',') {
            let like = &variables[0];
            let (align, name) = (like.align, self.word()?);
            variables.push(Variable { name, space, align, size: like.size, init: Vec::new() });
        }
        self.expect(';')?;
        Ok(variables)
    }

    /// Parses `.align 8 .b8 name[16] = {1, 2}`, starting after the state space.
    fn variable(&mut self, space: Space) -> Result<Variable> {
        let (mut align, mut element) = (None, None);
        let name = loop {
            let word = self.word()?;
            match word.as_str() {
                ".align" => align = Some(self.number()? as usize),
                ".ptr" | ".global" | ".const" | ".local" | ".shared" | ".managed" => {}
                ".v2" | ".v4" => return self.fail("no vectors of variables"),
                word if word.starts_with('.') => {
                    element = Some(size_of(&word[1..]).ok_or(()).or_else(|()| self.fail("a type"))?)
                }
                _ => break word,
            }
        };
        let Some(element) = element else { return self.fail("the type of a variable") };
        let mut size = Some(element);
        while self.sign('[') {
            if self.sign(']') {
                size = None;
            } else {
                let count = self.number()? as usize;
                size = size.map(|size| size * count);
                self.expect(']')?;
            }
        }
        let mut init = Vec::new();
        if self.sign('=') {
            let listed = self.sign('{');
            loop {
                init.extend_from_slice(&self.number()?.to_le_bytes()[..element]);
                if !listed || !self.sign(',') {
                    break;
                }
            }
            if listed {
                self.expect('}')?;
            }
        }
        Ok(Variable { name, space, align: align.unwrap_or(element), size, init })
    }

    /// Parses a body up to its closing brace.
    fn body(&mut self) -> Result<Vec<Statement>> {
        let (mut body, mut depth) = (Vec::new(), 0);
        loop {
            if self.sign('{') {
                depth += 1;
                body.push(Statement::Open);
            } else if self.sign('}') {
                if depth == 0 {
                    return Ok(body);
                }
                depth -= 1;
                body.push(Statement::Close);
            } else if self.sign(';') {
                // An empty statement.
            } else if self.peek() == Some(&Token::Sign('@')) {
                body.push(self.instruction()?);
            } else {
                let word = self.word()?;
                if self.sign(':') {
                    body.push(Statement::Label(word));
                    continue;
                }
                match word.as_str() {
                    ".reg" => {
                        self.word()?;
                        self.registers(&mut body)?;
                    }
                    // Hand-written assembly may omit the space before the type.
                    word if word.starts_with(".reg.") => self.registers(&mut body)?,
                    ".local" => {
                        body.extend(self.variables(Space::Local)?.into_iter().map(Statement::Variable))
                    }
                    ".param" => {
                        body.extend(self.variables(Space::Param)?.into_iter().map(Statement::Variable))
                    }
                    ".shared" => {
                        body.extend(self.variables(Space::Shared)?.into_iter().map(Statement::Variable))
                    }
                    ".loc" => self.skip_line(),
                    ".pragma" => self.skip_past(';'),
                    word if word.starts_with('.') => {
                        return self.fail(&format!("a known directive before it, not {word}"));
                    }
                    _ => {
                        self.next -= 1;
                        body.push(self.instruction()?);
                    }
                }
            }
        }
    }

    /// Parses `%p<7>, %q;`.
    fn registers(&mut self, body: &mut Vec<Statement>) -> Result<()> {
        loop {
            let name = self.word()?;
            let count = if self.sign('<') {
                let count = self.number()? as usize;
                self.expect('>')?;
                Some(count)
            } else {
                None
            };
            body.push(Statement::Registers { name, count });
            if !self.sign(',') {
                return self.expect(';');
            }
        }
    }

    fn instruction(&mut self) -> Result<Statement> {
        let line = self.line();
        let guard = if self.sign('@') {
            let negated = self.sign('!');
            Some((self.word()?, negated))
        } else {
            None
        };
        let opcode = self.word()?.split('.').map(String::from).collect();
        let mut operands = Vec::new();
        while !self.sign(';') {
            operands.push(self.operand()?);
            self.sign(',');
        }
        Ok(Statement::Instruction(Instruction { guard, opcode, operands, line }))
    }

    fn operand(&mut self) -> Result<Operand> {
        if self.sign('{') {
            return Ok(Operand::Vector(self.list('}')?));
        }
        if self.sign('(') {
            return Ok(Operand::List(self.list(')')?));
        }
        if self.sign('!') {
            return Ok(Operand::Not(self.word()?));
        }
        if self.sign('[') {
            let base = Box::new(self.operand()?);
            let offset = match self.peek() {
                Some(Token::Sign('+')) => {
                    self.next += 1;
                    self.number()? as i64
                }
                Some(Token::Sign('-')) => self.number()? as i64,
                _ => 0,
            };
            self.expect(']')?;
            return Ok(Operand::Address { base, offset });
        }
        if matches!(self.peek(), Some(Token::Number(_) | Token::Sign('-'))) {
            return Ok(Operand::Constant(self.number()?));
        }
        let name = self.word()?;
        Ok(if self.sign('|') { Operand::Pair(name, self.word()?) } else { Operand::Name(name) })
    }

    fn list(&mut self, end: char) -> Result<Vec<Operand>> {
        let mut all = Vec::new();
        while !self.sign(end) {
            all.push(self.operand()?);
            self.sign(',');
        }
        Ok(all)
    }
}

/// Returns the bytes of a fundamental type (5.2), by its name without the dot.
pub(crate) fn size_of(kind: &str) -> Option<usize> {
    Some(match kind {
        "b8" | "u8" | "s8" => 1,
        "b16" | "u16" | "s16" | "f16" | "bf16" => 2,
        "b32" | "u32" | "s32" | "f32" | "f16x2" | "bf16x2" => 4,
        "b64" | "u64" | "s64" | "f64" => 8,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants() {
        for (text, bits) in [
            ("42", 42),
            ("0x10U", 16),
            ("0f3F800000", 0x3f80_0000),
            ("0d3FF0000000000000", 0x3ff0_0000_0000_0000),
            ("0b101", 5),
            ("1.5", 1.5f64.to_bits()),
        ] {
            assert_eq!(number(text), Some(bits), "{text}");
        }
        assert_eq!(number("12monkeys"), None);
    }

    #[test]
    fn a_function_and_its_statements() {
        let module = parse(
            "// a comment\n.version 9.0\n.target sm_75\n.address_size 64\n\
             .global .align 4 .b32 table[3] = {1, -2};\n\
             .func (.param .b32 back) half(.param .b32 x);\n\
             .visible .entry run(.param .u64 run_param_0, .param .align 8 .b8 run_param_1[24])\n.maxntid 256, 1, 1\n{\n\
             .reg .pred %p<2>;\n.shared .align 4 .b8 tile[1024];\n{ .reg .b32 inner; }\n\
             $L__BB0_1:\n@!%p1 ld.global.v2.f32 {%f1, %f2}, [%rd1+-8]; setp.lt.and.u32 %p1|%p0, %r1, 3, !%p0;\n}",
        )
        .unwrap();
        assert_eq!(module.globals[0].init, [1i32.to_le_bytes(), (-2i32).to_le_bytes()].concat());
        assert_eq!(module.globals[0].size, Some(12));
        assert_eq!(module.functions.len(), 1);
        let run = &module.functions["run"];
        assert!(run.kernel);
        assert_eq!(run.parameters[1].size, Some(24));
        let instructions: Vec<&Instruction> = run
            .body
            .iter()
            .filter_map(|statement| match statement {
                Statement::Instruction(instruction) => Some(instruction),
                _ => None,
            })
            .collect();
        assert_eq!(instructions[0].guard, Some(("%p1".into(), true)));
        assert_eq!(instructions[0].opcode, ["ld", "global", "v2", "f32"]);
        let name = |name: &str| Operand::Name(name.into());
        assert_eq!(instructions[0].operands[0], Operand::Vector(vec![name("%f1"), name("%f2")]));
        assert_eq!(
            instructions[0].operands[1],
            Operand::Address { base: Box::new(name("%rd1")), offset: -8 }
        );
        assert_eq!(instructions[1].operands[0], Operand::Pair("%p1".into(), "%p0".into()));
        assert_eq!(instructions[1].operands[3], Operand::Not("%p0".into()));
    }

    #[test]
    fn what_is_no_ptx_is_an_error_with_its_line() {
        let error = parse(".version 9.0\n.visible .entry run(\n.reg x)").err().unwrap().to_string();
        assert!(error.contains("line 3"), "{error}");
    }
}
