//! Prepares a kernel to run: inlines function calls, resolves names, and puts operands into
//! registers.

use crate::ops::{self, Op};
use crate::ptx::{Function, Instruction, Module, Operand, Space, Statement, Variable, size_of};
use crate::{Error, Result};
use std::collections::HashMap;

/// The top byte of a generic address that names its space; any other value means global memory. The
/// low 32 bits are the offset in the space. An address that is used with one space only has no top
/// byte.
pub(crate) const PARAM: u64 = 0x7d << 56;
pub(crate) const SHARED: u64 = 0x7e << 56;
pub(crate) const LOCAL: u64 = 0x7f << 56;

/// A kernel that is ready to run.
pub(crate) struct Program {
    pub(crate) name: String,
    pub(crate) code: Vec<Step>,
    /// The number of registers.
    pub(crate) registers: usize,
    /// The registers that hold a value before the first instruction.
    pub(crate) given: HashMap<Given, Register>,
    /// The bytes of a block's static shared memory. A kernel has either static or dynamic shared
    /// memory.
    pub(crate) shared: usize,
    /// The bytes of a thread's local memory.
    pub(crate) local: usize,
    /// The offset and the size of each parameter.
    pub(crate) parameters: Vec<(usize, usize)>,
    /// The number of instructions that access memory.
    pub(crate) places: usize,
}

pub(crate) type Register = u32;

/// A value that a register holds from the start: a constant, or a special register (PTX ISA, 10).
/// The number is the axis x, y or z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Given {
    Constant(u64),
    Thread(usize),
    Threads(usize),
    Block(usize),
    Blocks(usize),
    Lane,
    Warp,
}

/// An instruction.
pub(crate) struct Step {
    /// A predicate, and whether it must be false.
    pub(crate) guard: Option<(Register, bool)>,
    pub(crate) action: Action,
    /// The line in the text of the module.
    pub(crate) line: usize,
}

/// What an instruction does.
pub(crate) enum Action {
    Compute {
        op: Op,
        to: Register,
        from: [Register; 4],
    },
    Load {
        at: Place,
        to: Vec<Register>,
        signed: bool,
    },
    Store {
        at: Place,
        from: Vec<Register>,
    },
    Atomic {
        at: Place,
        update: fn(u64, u64, u64) -> u64,
        to: Option<Register>,
        from: [Register; 2],
    },
    /// Reads `value` of the lane that `lane` names according to `mode`. The bits of `members` are
    /// the lanes that take part.
    Shuffle {
        mode: Shuffle,
        to: Register,
        valid: Option<Register>,
        value: Register,
        lane: Register,
        clamp: Register,
        members: Register,
    },
    Branch(usize),
    Exit,
    Barrier,
    Trap(&'static str),
}

/// The memory that an instruction reads or writes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) space: Space,
    pub(crate) address: Register,
    pub(crate) offset: i64,
    /// The bytes of one element.
    pub(crate) size: usize,
    /// The bytes of all elements: a power of two. The address must be a multiple of it.
    pub(crate) bytes: usize,
    /// The index of this place in the program.
    pub(crate) number: usize,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Shuffle {
    Xor,
    Down,
    Up,
    Index,
}

/// Prepares the kernel `name` of a module. `globals` are the addresses of the module's variables.
pub(crate) fn link(module: &Module, globals: &HashMap<String, u64>, name: &str) -> Result<Program> {
    let kernel = module.functions.get(name).filter(|function| function.kernel);
    let kernel = kernel.ok_or_else(|| Error::NoKernel(name.into()))?;
    let mut linker = Linker {
        module,
        program: Program {
            name: name.into(),
            code: Vec::new(),
            registers: 0,
            given: HashMap::new(),
            shared: 0,
            local: 0,
            parameters: Vec::new(),
            places: 0,
        },
        names: vec![HashMap::new()],
        calls: Vec::new(),
    };
    let names = globals.iter().map(|(name, &address)| (name.clone(), Name::Constant(address)));
    linker.names[0].extend(names);
    // The module's shared variables come first. An `.extern` one has size 0 here.
    for variable in module.globals.iter().filter(|variable| variable.space == Space::Shared) {
        linker.declare(variable)?;
    }
    linker.names.push(HashMap::new());
    let mut end = 0usize;
    for parameter in &kernel.parameters {
        let size = parameter.size.unwrap_or(0);
        let start = end.next_multiple_of(parameter.align);
        linker.name(&parameter.name, Name::Constant(PARAM + start as u64));
        linker.program.parameters.push((start, size));
        end = start + size;
    }
    linker.function(kernel, name)?;
    linker.step(None, Action::Exit, 0);
    // Dynamic shared memory begins at 0 here, where it would overlap static shared memory.
    let mut shared = module.globals.iter().filter(|variable| variable.space == Space::Shared);
    if linker.program.shared > 0 && shared.any(|variable| variable.size.is_none()) {
        return Err(Error::NotSupported(format!("{name}, which has static and dynamic shared memory")));
    }
    Ok(linker.program)
}

/// The meaning of a name.
#[derive(Debug, Clone, Copy)]
enum Name {
    Register(Register),
    Constant(u64),
}

struct Linker<'a> {
    module: &'a Module,
    program: Program,
    /// The names in each scope, from the module's own to the innermost.
    names: Vec<HashMap<String, Name>>,
    /// The functions that are being inlined, to detect recursion.
    calls: Vec<String>,
}

impl Linker<'_> {
    /// Inlines the body of a function, whose parameters already have names.
    fn function(&mut self, function: &Function, name: &str) -> Result<()> {
        if self.calls.iter().any(|call| call == name) {
            return Err(Error::NotSupported(format!("recursion, of {name}")));
        }
        self.calls.push(name.into());
        let (mut labels, mut jumps) = (HashMap::new(), Vec::new());
        for statement in &function.body {
            match statement {
                Statement::Label(label) => {
                    labels.insert(label.as_str(), self.program.code.len());
                }
                Statement::Registers { name, count: None } => {
                    let register = self.register();
                    self.name(name, Name::Register(register));
                }
                Statement::Registers { name, count: Some(count) } => {
                    for i in 0..*count {
                        let register = self.register();
                        self.name(&format!("{name}{i}"), Name::Register(register));
                    }
                }
                Statement::Variable(variable) => self.declare(variable)?,
                Statement::Open => self.names.push(HashMap::new()),
                Statement::Close => drop(self.names.pop()),
                Statement::Instruction(instruction) => {
                    self.instruction(instruction, &mut jumps).map_err(|e| e.at(instruction))?;
                }
            }
        }
        // `ret` jumps to the end of the body.
        labels.insert("", self.program.code.len());
        for (step, label) in jumps {
            let target = labels.get(label.as_str());
            let target = *target
                .ok_or_else(|| Error::ptx(self.program.code[step].line, format!("no label {label}")))?;
            self.program.code[step].action = Action::Branch(target);
        }
        self.calls.pop();
        Ok(())
    }

    fn register(&mut self) -> Register {
        self.program.registers += 1;
        (self.program.registers - 1) as Register
    }

    /// Returns the register that holds a value from the start.
    fn given(&mut self, given: Given) -> Register {
        if let Some(&register) = self.program.given.get(&given) {
            return register;
        }
        let register = self.register();
        self.program.given.insert(given, register);
        register
    }

    fn constant(&mut self, value: u64) -> Register {
        self.given(Given::Constant(value))
    }

    fn name(&mut self, name: &str, value: Name) {
        self.names.last_mut().expect("the module's own").insert(name.into(), value);
    }

    fn find(&self, name: &str) -> Option<Name> {
        self.names.iter().rev().find_map(|names| names.get(name)).copied()
    }

    /// Allocates memory for a variable.
    fn declare(&mut self, variable: &Variable) -> Result<()> {
        let place = |end: &mut usize| {
            let start = end.next_multiple_of(variable.align);
            *end = start + variable.size.unwrap_or(0);
            start as u64
        };
        let address = match variable.space {
            Space::Shared => place(&mut self.program.shared),
            Space::Local => place(&mut self.program.local),
            // These are the parameters of a call.
            Space::Param => LOCAL + place(&mut self.program.local),
            space => {
                return Err(Error::NotSupported(format!(
                    "{}, a variable of a function in {space:?}",
                    variable.name
                )));
            }
        };
        self.name(&variable.name, Name::Constant(address));
        Ok(())
    }

    fn step(&mut self, guard: Option<(Register, bool)>, action: Action, line: usize) {
        self.program.code.push(Step { guard, action, line });
    }

    /// Returns the register of an operand that is read.
    fn source(&mut self, operand: &Operand) -> Result<Register> {
        match operand {
            &Operand::Constant(value) => Ok(self.constant(value)),
            Operand::Name(name) => match self.find(name) {
                Some(Name::Register(register)) => Ok(register),
                Some(Name::Constant(value)) => Ok(self.constant(value)),
                None => match special(name) {
                    Some(special) => Ok(self.given(special)),
                    None => Err(Error::NotSupported(format!("the name {name}"))),
                },
            },
            Operand::Not(name) => {
                let from = self.source(&Operand::Name(name.clone()))?;
                let (to, zero) = (self.register(), self.constant(0));
                let op = ops::op(&["not", "pred"]).expect("known");
                self.step(None, Action::Compute { op, to, from: [from, zero, zero, zero] }, 0);
                Ok(to)
            }
            other => Err(Error::NotSupported(format!("the operand {other:?}"))),
        }
    }

    /// Returns the register of an operand that is written. `_` becomes a register that nobody
    /// reads.
    fn target(&mut self, operand: &Operand) -> Result<Register> {
        match operand {
            Operand::Name(name) if name == "_" => Ok(self.register()),
            Operand::Name(name) => match self.find(name) {
                Some(Name::Register(register)) => Ok(register),
                _ => Err(Error::NotSupported(format!("{name}, no register"))),
            },
            other => Err(Error::NotSupported(format!("a result in {other:?}"))),
        }
    }

    /// Returns the registers of `first|second`, or of the first alone.
    fn targets(&mut self, operand: &Operand) -> Result<(Register, Option<Register>)> {
        match operand {
            Operand::Pair(first, second) => {
                let [first, second] = [first, second].map(|name| self.target(&Operand::Name(name.clone())));
                Ok((first?, Some(second?)))
            }
            first => Ok((self.target(first)?, None)),
        }
    }

    /// Returns the place of an instruction's `count` elements.
    fn place(&mut self, operand: &Operand, space: Space, size: usize, count: usize) -> Result<Place> {
        match operand {
            Operand::Address { base, offset } if (size * count).is_power_of_two() => {
                let address = self.source(base)?;
                self.program.places += 1;
                let (bytes, number) = (size * count, self.program.places - 1);
                Ok(Place { space, address, offset: *offset, size, bytes, number })
            }
            other => Err(Error::NotSupported(format!("the address {other:?}"))),
        }
    }

    /// Returns the elements of `{a, b}`, or the single operand.
    fn elements(operand: &Operand) -> &[Operand] {
        match operand {
            Operand::Vector(elements) => elements,
            alone => std::slice::from_ref(alone),
        }
    }

    fn instruction(&mut self, instruction: &Instruction, jumps: &mut Vec<(usize, String)>) -> Result<()> {
        let opcode: Vec<&str> = instruction.opcode.iter().map(String::as_str).collect();
        let (operands, line) = (&instruction.operands[..], instruction.line);
        let guard = match &instruction.guard {
            Some((name, negated)) => Some((self.source(&Operand::Name(name.clone()))?, *negated)),
            None => None,
        };
        let kind = opcode.last().copied().unwrap_or_default();
        let size = || size_of(kind).ok_or_else(|| Error::NotSupported(format!("the type {kind}")));
        let space = || match opcode.get(1).copied() {
            Some("shared" | "shared::cta") => Space::Shared,
            Some("local") => Space::Local,
            Some("global" | "const") => Space::Global,
            // These are a kernel's parameters, or a function's parameters in local memory. The
            // address says which.
            _ => Space::Generic,
        };
        match (opcode[0], operands) {
            ("bra", [Operand::Name(label)]) => {
                jumps.push((self.program.code.len(), label.clone()));
                self.step(guard, Action::Exit, line);
            }
            ("ret", []) => {
                jumps.push((self.program.code.len(), String::new()));
                self.step(guard, Action::Exit, line);
            }
            ("exit", []) => self.step(guard, Action::Exit, line),
            ("trap", []) => self.step(guard, Action::Trap("trap"), line),
            // These are hints of the compiler, and orderings of memory accesses that always hold
            // here.
            ("membar" | "fence" | "nanosleep", _) => {}
            ("bar" | "barrier", _) if opcode.contains(&"warp") => {}
            ("bar" | "barrier", [Operand::Constant(0)]) if opcode.contains(&"sync") => {
                if guard.is_some() {
                    return Err(Error::NotSupported("a barrier under a guard".into()));
                }
                self.step(None, Action::Barrier, line);
            }
            ("call", _) => self.call(guard, operands, line)?,
            ("ld" | "ldu", [to, from]) => {
                let to = Self::elements(to);
                let at = self.place(from, space(), size()?, to.len())?;
                let to = to.iter().map(|to| self.target(to)).collect::<Result<_>>()?;
                self.step(guard, Action::Load { at, to, signed: kind.starts_with('s') }, line);
            }
            ("st", [to, from]) => {
                let from = Self::elements(from);
                let at = self.place(to, space(), size()?, from.len())?;
                let from = from.iter().map(|from| self.source(from)).collect::<Result<_>>()?;
                self.step(guard, Action::Store { at, from }, line);
            }
            ("atom" | "red", _) => {
                let name = opcode
                    .iter()
                    .find(|part| ["add", "min", "max", "exch", "cas", "and", "or"].contains(part));
                let update = name.and_then(|name| ops::atomic(name, kind));
                let update = update.ok_or_else(|| Error::NotSupported("the instruction".into()))?;
                let (to, rest) = match (opcode[0], operands) {
                    ("atom", [to, rest @ ..]) => (Some(self.target(to)?), rest),
                    _ => (None, operands),
                };
                let [at, from @ ..] = rest else { return Err(Error::NotSupported("its operands".into())) };
                let at = self.place(at, space(), size()?, 1)?;
                let first = self.source(&from[0])?;
                let second = if let Some(second) = from.get(1) { self.source(second)? } else { first };
                self.step(guard, Action::Atomic { at, update, to, from: [first, second] }, line);
            }
            ("shfl", [to, value, lane, clamp, members]) => {
                let mode = match opcode.get(2).copied() {
                    Some("bfly") => Shuffle::Xor,
                    Some("down") => Shuffle::Down,
                    Some("up") => Shuffle::Up,
                    Some("idx") => Shuffle::Index,
                    _ => return Err(Error::NotSupported("the instruction".into())),
                };
                let (to, valid) = self.targets(to)?;
                let [value, lane, clamp, members] =
                    [value, lane, clamp, members].map(|operand| self.source(operand));
                let (value, lane, clamp, members) = (value?, lane?, clamp?, members?);
                let action = Action::Shuffle { mode, to, valid, value, lane, clamp, members };
                self.step(guard, action, line);
            }
            ("setp", [results, operands @ ..]) => {
                let from = self.sources(operands)?;
                let compare = |other| {
                    let op = ops::comparison(&opcode[1..], other);
                    op.ok_or_else(|| Error::NotSupported("the instruction".into()))
                };
                let (first, second) = self.targets(results)?;
                let Some(second) = second else {
                    self.step(guard, Action::Compute { op: compare(false)?, to: first, from }, line);
                    return Ok(());
                };
                // The operands may include one of the results.
                let kept = self.register();
                self.step(guard, Action::Compute { op: compare(true)?, to: kept, from }, line);
                self.step(guard, Action::Compute { op: compare(false)?, to: first, from }, line);
                self.copy(guard, kept, second, line);
            }
            // These split a value, and combine one from parts.
            ("mov", [Operand::Vector(to), from]) => {
                let (from, width) = (self.source(from)?, 8 * size()? as u64 / to.len() as u64);
                // The source may be one of the results.
                let kept = self.register();
                self.copy(guard, from, kept, line);
                for (i, to) in to.iter().enumerate() {
                    let (to, by) = (self.target(to)?, self.constant(width * i as u64));
                    self.compute(guard, &["shr", "u64"], to, [kept, by, by, by], line)?;
                }
            }
            ("mov", [to, Operand::Vector(from)]) => {
                let width = 8 * size()? as u64 / from.len() as u64;
                let kept = self.register();
                let zero = self.constant(0);
                self.copy(guard, zero, kept, line);
                for (i, from) in from.iter().enumerate() {
                    let (from, at, count) =
                        (self.source(from)?, self.constant(width * i as u64), self.constant(width));
                    self.compute(guard, &["bfi", "b64"], kept, [from, kept, at, count], line)?;
                }
                let to = self.target(to)?;
                self.copy(guard, kept, to, line);
            }
            ("cvta", [to, from]) => {
                let (from, to) = (self.source(from)?, self.target(to)?);
                let (back, space) = match opcode[1..] {
                    ["to", space, ..] => (true, space),
                    [space, ..] => (false, space),
                    [] => (false, ""),
                };
                let space = match space {
                    "shared" => SHARED,
                    "local" => LOCAL,
                    // The address of a parameter already has its space in the top byte, and global
                    // memory has none.
                    _ => 0,
                };
                let space = self.constant(space);
                self.compute(
                    guard,
                    &[if back { "sub" } else { "add" }, "u64"],
                    to,
                    [from, space, space, space],
                    line,
                )?;
            }
            (_, [to, from @ ..]) => {
                let (from, to) = (self.sources(from)?, self.target(to)?);
                self.compute(guard, &opcode, to, from, line)?;
            }
            _ => return Err(Error::NotSupported("the instruction".into())),
        }
        Ok(())
    }

    /// Returns the registers of up to four operands. A missing operand is 0.
    fn sources(&mut self, operands: &[Operand]) -> Result<[Register; 4]> {
        if operands.len() > 4 {
            return Err(Error::NotSupported("so many operands".into()));
        }
        let mut all = [self.constant(0); 4];
        for (register, operand) in all.iter_mut().zip(operands) {
            *register = self.source(operand)?;
        }
        Ok(all)
    }

    fn compute(
        &mut self,
        guard: Option<(Register, bool)>,
        opcode: &[&str],
        to: Register,
        from: [Register; 4],
        line: usize,
    ) -> Result<()> {
        let op = ops::op(opcode).ok_or_else(|| Error::NotSupported("the instruction".into()))?;
        self.step(guard, Action::Compute { op, to, from }, line);
        Ok(())
    }

    fn copy(&mut self, guard: Option<(Register, bool)>, from: Register, to: Register, line: usize) {
        self.compute(guard, &["mov", "b64"], to, [from; 4], line).expect("known");
    }

    /// Inlines the function of a call. Its parameters are the caller's variables. If the call has a
    /// guard, threads for which it is false skip the body.
    fn call(&mut self, guard: Option<(Register, bool)>, operands: &[Operand], line: usize) -> Result<()> {
        let (results, name, arguments) = match operands {
            [Operand::List(results), Operand::Name(name), Operand::List(arguments)] => {
                (&results[..], name, &arguments[..])
            }
            [Operand::Name(name), Operand::List(arguments)] => (&[][..], name, &arguments[..]),
            [Operand::Name(name)] => (&[][..], name, &[][..]),
            _ => return Err(Error::NotSupported("the call".into())),
        };
        if name == "__assertfail" {
            self.step(guard, Action::Trap("an assertion failed"), line);
            return Ok(());
        }
        let function = self.module.functions.get(name);
        let function = function.ok_or_else(|| Error::NotSupported(format!("the function {name}")))?;
        let around = self.program.code.len();
        if let Some((predicate, negated)) = guard {
            self.step(Some((predicate, !negated)), Action::Exit, line);
        }
        let mut names = HashMap::new();
        let formal = function.returns.iter().zip(results).chain(function.parameters.iter().zip(arguments));
        for (formal, actual) in formal {
            let actual = match actual {
                Operand::Name(actual) => self.find(actual),
                _ => None,
            };
            let Some(actual @ Name::Constant(_)) = actual else {
                return Err(Error::NotSupported(format!("an argument of {name} that is no variable")));
            };
            names.insert(formal.name.clone(), actual);
        }
        // Inside the function, only the module's names and its own are visible.
        let outside = self.names.split_off(1);
        self.names.push(names);
        self.function(function, name)?;
        self.names.truncate(1);
        self.names.extend(outside);
        if guard.is_some() {
            self.program.code[around].action = Action::Branch(self.program.code.len());
        }
        Ok(())
    }
}

/// Returns the value of a special register.
fn special(name: &str) -> Option<Given> {
    match name {
        "%laneid" => return Some(Given::Lane),
        "%warpid" => return Some(Given::Warp),
        _ => {}
    }
    let (name, axis) = name.split_once('.')?;
    let axis = ["x", "y", "z"].iter().position(|&known| known == axis)?;
    Some(match name {
        "%tid" => Given::Thread(axis),
        "%ntid" => Given::Threads(axis),
        "%ctaid" => Given::Block(axis),
        "%nctaid" => Given::Blocks(axis),
        _ => return None,
    })
}
