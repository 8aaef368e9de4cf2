//! The results of instructions, computed for the 32 threads of a warp at once.
//!
//! A register holds the bits of a value in the low part of 64 bits; the bits above are not read.
//! Subnormal numbers are never flushed to zero (`.ftz` is ignored), and approximations (`.approx`)
//! are as exact as the type.

use half::{bf16, f16};
use std::cmp::Ordering;

/// A register: one value for each thread of a warp.
pub(crate) type Lanes = [u64; LANES];

/// The number of threads of a warp.
pub(crate) const LANES: usize = 32;

/// A function that computes an instruction's result from up to four operands.
pub(crate) type Op = Box<dyn Fn([&Lanes; 4]) -> Lanes + Send + Sync>;

/// A type of values in registers.
pub(crate) trait Value: Copy + 'static {
    fn of(bits: u64) -> Self;
    fn bits(self) -> u64;
}

macro_rules! integer_values {
    ($($kind:ty as $bits:ty),*) => {
        $(impl Value for $kind {
            fn of(bits: u64) -> Self {
                bits as Self
            }

            fn bits(self) -> u64 {
                self as $bits as u64
            }
        })*
    };
}
integer_values!(u8 as u8, i8 as u8, u16 as u16, i16 as u16, u32 as u32, i32 as u32, u64 as u64, i64 as u64);

macro_rules! float_values {
    ($($kind:ty as $bits:ty),*) => {
        $(impl Value for $kind {
            fn of(bits: u64) -> Self {
                Self::from_bits(bits as $bits)
            }

            fn bits(self) -> u64 {
                self.to_bits() as u64
            }
        })*
    };
}
float_values!(f32 as u32, f64 as u64, f16 as u16, bf16 as u16);

/// A predicate is 0 or 1.
impl Value for bool {
    fn of(bits: u64) -> Self {
        bits != 0
    }

    fn bits(self) -> u64 {
        self.into()
    }
}

/// Applies `f` to each lane.
fn each(f: impl Fn(u64, u64, u64, u64) -> u64 + Send + Sync + 'static) -> Option<Op> {
    Some(Box::new(move |[a, b, c, d]| {
        // The compiler vectorizes a plain loop.
        let mut found = [0; LANES];
        for i in 0..LANES {
            found[i] = f(a[i], b[i], c[i], d[i]);
        }
        found
    }))
}

fn one<A: Value, R: Value>(f: impl Fn(A) -> R + Send + Sync + 'static) -> Option<Op> {
    each(move |a, _, _, _| f(A::of(a)).bits())
}

fn two<A: Value, B: Value, R: Value>(f: impl Fn(A, B) -> R + Send + Sync + 'static) -> Option<Op> {
    each(move |a, b, _, _| f(A::of(a), B::of(b)).bits())
}

fn three<A: Value, B: Value, C: Value, R: Value>(
    f: impl Fn(A, B, C) -> R + Send + Sync + 'static,
) -> Option<Op> {
    each(move |a, b, c, _| f(A::of(a), B::of(b), C::of(c)).bits())
}

/// Picks a type by its name, and evaluates the body with `T` as this type.
macro_rules! typed {
    ($kind:expr, $body:expr, $($($name:literal)|+ => $type:ty),*) => {
        match $kind {
            $($($name)|+ => {
                type T = $type;
                $body
            })*
            _ => None,
        }
    };
}

/// Evaluates a body for an integer type.
macro_rules! integers {
    ($kind:expr, $body:expr) => {
        typed!(
            $kind, $body,
            "u8" | "b8" => u8, "s8" => i8, "u16" | "b16" => u16, "s16" => i16,
            "u32" | "b32" => u32, "s32" => i32, "u64" | "b64" => u64, "s64" => i64
        )
    };
}

/// Evaluates a body for a float type.
macro_rules! floats {
    ($kind:expr, $body:expr) => {
        typed!($kind, $body, "f32" => f32, "f64" => f64)
    };
}

/// Returns the operation of a pure instruction, or `None` if it is not supported. Comparisons are
/// in [`comparison`].
pub(crate) fn op(opcode: &[&str]) -> Option<Op> {
    let (name, modifiers) = opcode.split_first()?;
    let kind = *opcode.last()?;
    let has = |modifier: &str| modifiers.contains(&modifier);
    let is_float = matches!(kind, "f32" | "f64");
    match *name {
        "mov" => each(|a, _, _, _| a),
        "add" | "sub" | "mul" | "fma" | "mad" if is_float => float(name, kind, modifiers),
        "add" => integers!(kind, two(|a: T, b: T| a.wrapping_add(b))),
        "sub" => integers!(kind, two(|a: T, b: T| a.wrapping_sub(b))),
        "mul" if has("lo") => integers!(kind, two(|a: T, b: T| a.wrapping_mul(b))),
        "mad" if has("lo") => integers!(kind, three(|a: T, b: T, c: T| a.wrapping_mul(b).wrapping_add(c))),
        "mul" if has("hi") => high(kind, false),
        "mad" if has("hi") => high(kind, true),
        "mul" if has("wide") => wide(kind, false),
        "mad" if has("wide") => wide(kind, true),
        // PTX does not specify the results of a division by zero, which are all ones here, and of
        // the smallest integer by −1, which wrap.
        "div" if is_float => floats!(kind, two(|a: T, b: T| a / b)),
        "div" => integers!(kind, two(|a: T, b: T| if b == 0 { !0 } else { a.wrapping_div(b) })),
        "rem" => integers!(kind, two(|a: T, b: T| if b == 0 { !0 } else { a.wrapping_rem(b) })),
        // If one operand is NaN, the result is the other one.
        "min" if is_float => floats!(kind, two(|a: T, b: T| a.min(b))),
        "max" if is_float => floats!(kind, two(|a: T, b: T| a.max(b))),
        "min" => integers!(kind, two(|a: T, b: T| a.min(b))),
        "max" => integers!(kind, two(|a: T, b: T| a.max(b))),
        "abs" if is_float => floats!(kind, one(|a: T| a.abs())),
        "neg" if is_float => floats!(kind, one(|a: T| -a)),
        "abs" => match kind {
            "s16" => one(i16::wrapping_abs),
            "s32" => one(i32::wrapping_abs),
            "s64" => one(i64::wrapping_abs),
            _ => None,
        },
        "neg" => integers!(kind, one(|a: T| (0 as T).wrapping_sub(a))),
        "and" => each(|a, b, _, _| a & b),
        "or" => each(|a, b, _, _| a | b),
        "xor" => each(|a, b, _, _| a ^ b),
        "not" if kind == "pred" => one(|a: bool| !a),
        "not" => each(|a, _, _, _| !a),
        "shl" => integers!(kind, two(|a: T, by: u32| a.checked_shl(by).unwrap_or(0))),
        // A shift by all bits or more leaves copies of the sign bit of a signed number, and 0 of an
        // unsigned one.
        "shr" => integers!(
            kind,
            two(|a: T, by: u32| a >> by.min(T::BITS - 1) >> u32::from(by >= T::BITS && T::MIN == 0))
        ),
        "selp" => each(|a, b, p, _| if p != 0 { a } else { b }),
        "sqrt" => floats!(kind, one(|a: T| a.sqrt())),
        "rcp" if modifiers == ["approx", "ftz", "f64"] => {
            one(|a: f64| f64::from_bits((1.0 / a).to_bits() >> 32 << 32))
        }
        "rcp" => floats!(kind, one(|a: T| 1.0 / a)),
        "rsqrt" => floats!(kind, one(|a: T| 1.0 / a.sqrt())),
        "ex2" => one(|a: f32| f64::from(a).exp2() as f32),
        "lg2" => one(|a: f32| f64::from(a).log2() as f32),
        "sin" => one(|a: f32| f64::from(a).sin() as f32),
        "cos" => one(|a: f32| f64::from(a).cos() as f32),
        "tanh" => one(|a: f32| f64::from(a).tanh() as f32),
        "copysign" => floats!(kind, two(|sign: T, a: T| a.copysign(sign))),
        "popc" => integers!(kind, one(|a: T| a.count_ones())),
        "clz" => integers!(kind, one(|a: T| a.leading_zeros())),
        "brev" => integers!(kind, one(|a: T| a.reverse_bits())),
        "bfe" => match kind {
            "u32" => three(|a: u32, at: u32, count: u32| bits_of(a.into(), at, count, 32, false) as u32),
            "s32" => three(|a: u32, at: u32, count: u32| bits_of(a.into(), at, count, 32, true) as u32),
            "u64" => three(|a: u64, at: u32, count: u32| bits_of(a, at, count, 64, false)),
            "s64" => three(|a: u64, at: u32, count: u32| bits_of(a, at, count, 64, true)),
            _ => None,
        },
        "bfi" => integers!(
            kind,
            each(|a, b, at, count| {
                let (at, count) = (at as u32 & 255, (count as u32 & 255).min(64));
                let ones = if count == 64 { !0 } else { (1 << count) - 1 };
                let mask = if at < T::BITS { ones << at } else { 0u64 };
                T::of(b & !mask | a.checked_shl(at).unwrap_or(0) & mask).bits()
            })
        ),
        "prmt" if modifiers == ["b32"] => three(permuted),
        "shf" if has("wrap") || has("clamp") => {
            let (left, clamp) = (has("l"), has("clamp"));
            three(move |low: u32, high: u32, by: u32| {
                let by = if clamp { by.min(32) } else { by & 31 };
                let both = u64::from(high) << 32 | u64::from(low);
                if left { ((both << by) >> 32) as u32 } else { (both >> by) as u32 }
            })
        }
        "lop3" => each(|a, b, c, table| {
            (0..8).filter(|i| table >> i & 1 == 1).fold(0, |all, i| {
                let pick = |x: u64, bit: u64| if i & bit != 0 { x } else { !x };
                all | pick(a, 4) & pick(b, 2) & pick(c, 1)
            })
        }),
        "cvt" => conversion(modifiers),
        _ => None,
    }
}

/// Returns a sum, difference, product or fused multiply-add of floats, rounded as the modifiers
/// say.
fn float(name: &str, kind: &str, modifiers: &[&str]) -> Option<Op> {
    let direction = modifiers.iter().find_map(|modifier| match *modifier {
        "rz" => Some(Direction::Zero),
        "rm" => Some(Direction::Down),
        "rp" => Some(Direction::Up),
        _ => None,
    });
    let Some(direction) = direction else {
        let op = match name {
            "add" => floats!(kind, two(|a: T, b: T| a + b)),
            "sub" => floats!(kind, two(|a: T, b: T| a - b)),
            "mul" => floats!(kind, two(|a: T, b: T| a * b)),
            _ => floats!(kind, three(|a: T, b: T, c: T| a.mul_add(b, c))),
        };
        let saturate = |op: Op| -> Op {
            Box::new(move |operands| op(operands).map(|bits| saturated(f32::of(bits)).bits()))
        };
        return if modifiers.contains(&"sat") { op.map(saturate) } else { op };
    };
    match (name, kind) {
        ("add", "f32") => two(move |a, b| directed(a, 1.0, b, direction)),
        ("sub", "f32") => two(move |a, b: f32| directed(a, 1.0, -b, direction)),
        ("mul", "f32") => two(move |a, b| directed(a, b, 0.0, direction)),
        ("fma", "f32") => three(move |a, b, c| directed(a, b, c, direction)),
        _ => None,
    }
}

/// A direction of rounding.
#[derive(Clone, Copy)]
enum Direction {
    Zero,
    Down,
    Up,
}

/// Returns `a·b + c`, rounded in a direction.
fn directed(a: f32, b: f32, c: f32, direction: Direction) -> f32 {
    let (product, c) = (f64::from(a) * f64::from(b), f64::from(c));
    // The product is exact, and the rounding error of the sum is also known exactly (Knuth's
    // two-sum).
    let sum = product + c;
    let part = sum - product;
    let lost = (product - (sum - part)) + (c - part);
    let nearest = sum as f32;
    let found = f64::from(nearest);
    let above = found > sum || found == sum && lost < 0.0;
    let below = found < sum || found == sum && lost > 0.0;
    match direction {
        Direction::Down if above => nearest.next_down(),
        Direction::Up if below => nearest.next_up(),
        Direction::Zero if above && sum > 0.0 => nearest.next_down(),
        Direction::Zero if below && sum < 0.0 => nearest.next_up(),
        _ => nearest,
    }
}

/// Clamps to [0, 1]. NaN becomes 0.
fn saturated(x: f32) -> f32 {
    if x.is_nan() { 0.0 } else { x.clamp(0.0, 1.0) }
}

/// Returns the high half of a product, plus a third operand if `add` is set.
fn high(kind: &str, add: bool) -> Option<Op> {
    macro_rules! high {
        ($narrow:ty, $wide:ty) => {
            three(move |a: $narrow, b: $narrow, c: $narrow| {
                let high = (<$wide>::from(a) * <$wide>::from(b)) >> <$narrow>::BITS;
                (high as $narrow).wrapping_add(if add { c } else { 0 })
            })
        };
    }
    match kind {
        "u32" => high!(u32, u64),
        "s32" => high!(i32, i64),
        "u64" => high!(u64, u128),
        "s64" => high!(i64, i128),
        _ => None,
    }
}

/// Returns a product of twice the width, plus a third operand if `add` is set.
fn wide(kind: &str, add: bool) -> Option<Op> {
    macro_rules! wide {
        ($narrow:ty, $wide:ty) => {
            three(move |a: $narrow, b: $narrow, c: $wide| {
                (<$wide>::from(a) * <$wide>::from(b)).wrapping_add(if add { c } else { 0 })
            })
        };
    }
    match kind {
        "u16" => wide!(u16, u32),
        "s16" => wide!(i16, i32),
        "u32" => wide!(u32, u64),
        "s32" => wide!(i32, i64),
        _ => None,
    }
}

/// Returns `count` bits from bit `at` on. Beyond the value's `width` they are zeros, or copies of
/// the sign.
fn bits_of(value: u64, at: u32, count: u32, width: u32, signed: bool) -> u64 {
    let (at, count) = (at & 255, count & 255);
    if count == 0 {
        return 0;
    }
    let value = if signed { ((value << (64 - width)) as i64 >> (64 - width)) as u64 } else { value };
    let shift = |value: u64| {
        if signed { (value as i64 >> at.min(63)) as u64 } else { value.checked_shr(at).unwrap_or(0) }
    };
    let moved = shift(value);
    if count >= 64 {
        return moved;
    }
    // If there are fewer bits than asked for, the last one is the sign.
    let kept = count.min(width.saturating_sub(at).max(1));
    let low = moved & ((1 << kept) - 1);
    if signed { ((low << (64 - kept)) as i64 >> (64 - kept)) as u64 } else { moved & ((1 << count) - 1) }
}

/// Picks four of eight bytes. Four bits of `selector` choose each: three for its index, one to
/// replicate its sign.
fn permuted(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
    u32::from_le_bytes(std::array::from_fn(|i| {
        let choice = selector >> (4 * i) & 15;
        let byte = bytes[(choice & 7) as usize];
        match choice & 8 {
            0 => byte,
            _ if byte >= 128 => 255,
            _ => 0,
        }
    }))
}

/// Returns a conversion (`cvt`). The last two modifiers are the types.
fn conversion(modifiers: &[&str]) -> Option<Op> {
    let [rounding @ .., to, from] = modifiers else { return None };
    let has = |modifier: &str| rounding.contains(&modifier);
    let whole = ["rni", "rzi", "rmi", "rpi"].into_iter().find(|modifier| has(modifier));
    let is_float = |kind: &str| matches!(kind, "f16" | "bf16" | "f32" | "f64");
    match (is_float(from), is_float(to)) {
        (false, false) if !has("sat") => {
            integers!(*from, {
                type F = T;
                integers!(*to, one(|a: F| a as T))
            })
        }
        (false, true) => integers!(*from, {
            type F = T;
            floats!(*to, one(|a: F| a as T))
        }),
        (true, false) => {
            let whole = rounding_to_whole(whole?);
            match *from {
                "f16" => integers!(*to, one(move |a: f16| whole(a.into()) as T)),
                "bf16" => integers!(*to, one(move |a: bf16| whole(a.into()) as T)),
                "f32" => integers!(*to, one(move |a: f32| whole(a.into()) as T)),
                _ => integers!(*to, one(move |a: f64| whole(a) as T)),
            }
        }
        (true, true) => match (*from, *to) {
            ("f32", "f32") if has("sat") => one(saturated),
            ("f32", "f32") if whole.is_some() => {
                let whole = rounding_to_whole(whole?);
                one(move |a: f32| whole(a.into()) as f32)
            }
            ("f64", "f64") if whole.is_some() => one(rounding_to_whole(whole?)),
            _ if has("rz") || has("rm") || has("rp") || has("sat") || whole.is_some() => None,
            ("f32", "f64") => one(|a: f32| f64::from(a)),
            ("f64", "f32") => one(|a: f64| a as f32),
            ("f16", "f32") => one(|a: f16| f32::from(a)),
            ("f32", "f16") => one(f16::from_f32),
            ("f16", "f64") => one(|a: f16| f64::from(a)),
            ("f64", "f16") => one(f16::from_f64),
            ("bf16", "f32") => one(|a: bf16| f32::from(a)),
            ("f32", "bf16") => one(bf16::from_f32),
            _ => None,
        },
        _ => None,
    }
}

fn rounding_to_whole(modifier: &str) -> fn(f64) -> f64 {
    match modifier {
        "rni" => f64::round_ties_even,
        "rzi" => f64::trunc,
        "rmi" => f64::floor,
        _ => f64::ceil,
    }
}

/// Returns a comparison (`setp`), combined with a third operand, a predicate, as the modifiers say.
///
/// With `other`, it is the instruction's second result, which uses the opposite of the comparison.
pub(crate) fn comparison(modifiers: &[&str], other: bool) -> Option<Op> {
    let kind = *modifiers.last()?;
    let combine = modifiers.iter().find_map(|modifier| match *modifier {
        "and" => Some((|a, b| a & b) as fn(bool, bool) -> bool),
        "or" => Some(|a, b| a | b),
        "xor" => Some(|a, b| a ^ b),
        _ => None,
    });
    let combine = combine.unwrap_or(|a, _| a);
    let how = modifiers[0];
    macro_rules! compared {
        ($test:expr) => {
            three(move |a: T, b: T, c: bool| combine($test(a, b) != other, c))
        };
    }
    if matches!(kind, "f32" | "f64") {
        // With a trailing `u`, the comparison also holds if an operand is NaN.
        let (how, unordered) = match how.strip_suffix('u') {
            Some(how) => (how, true),
            None => (how, how == "nan"),
        };
        let holds: fn(Ordering) -> bool = match how {
            "eq" => Ordering::is_eq,
            "ne" => Ordering::is_ne,
            "lt" => Ordering::is_lt,
            "le" => Ordering::is_le,
            "gt" => Ordering::is_gt,
            "ge" => Ordering::is_ge,
            "num" => |_| true,
            "nan" => |_| false,
            _ => return None,
        };
        return floats!(kind, compared!(|a: T, b: T| a.partial_cmp(&b).map_or(unordered, holds)));
    }
    integers!(
        kind,
        match how {
            "eq" => compared!(|a: T, b: T| a == b),
            "ne" => compared!(|a: T, b: T| a != b),
            "lt" | "lo" => compared!(|a: T, b: T| a < b),
            "le" | "ls" => compared!(|a: T, b: T| a <= b),
            "gt" | "hi" => compared!(|a: T, b: T| a > b),
            "ge" | "hs" => compared!(|a: T, b: T| a >= b),
            _ => None,
        }
    )
}

/// Returns the function that computes an atomic operation's new value from the old value and the
/// operands.
pub(crate) fn atomic(name: &str, kind: &str) -> Option<fn(u64, u64, u64) -> u64> {
    macro_rules! atomic {
        ($kind:ty, $f:expr) => {
            Some(|old, a, _| {
                let f: fn($kind, $kind) -> $kind = $f;
                f(<$kind>::of(old), <$kind>::of(a)).bits()
            })
        };
    }
    match (name, kind) {
        ("add", "f32") => atomic!(f32, |a, b| a + b),
        ("add", "f64") => atomic!(f64, |a, b| a + b),
        ("add", "u32" | "s32") => atomic!(u32, u32::wrapping_add),
        ("add", "u64" | "s64") => atomic!(u64, u64::wrapping_add),
        ("min", "u32") => atomic!(u32, Ord::min),
        ("max", "u32") => atomic!(u32, Ord::max),
        ("min", "s32") => atomic!(i32, Ord::min),
        ("max", "s32") => atomic!(i32, Ord::max),
        ("exch", _) => Some(|_, a, _| a),
        ("cas", "b32" | "u32") => Some(|old, a, b| if old as u32 == a as u32 { b } else { old }),
        ("cas", "b64" | "u64") => Some(|old, a, b| if old == a { b } else { old }),
        ("and", _) => Some(|old, a, _| old & a),
        ("or", _) => Some(|old, a, _| old | a),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(opcode: &str) -> Vec<&str> {
        opcode.split('.').collect()
    }

    /// Returns the result of an instruction in one lane.
    fn run(opcode: &str, operands: [u64; 4]) -> u64 {
        let opcode = parts(opcode);
        let op = match opcode[0] {
            "setp" => comparison(&opcode[1..], false),
            _ => op(&opcode),
        };
        let lanes = operands.map(|value| [value; LANES]);
        op.expect("known")([&lanes[0], &lanes[1], &lanes[2], &lanes[3]])[7]
    }

    #[track_caller]
    fn check(opcode: &str, operands: &[u64], expected: u64) {
        let mut all = [0; 4];
        all[..operands.len()].copy_from_slice(operands);
        let found = run(opcode, all);
        assert_eq!(found, expected, "{opcode} {operands:x?}: {found:#x}, expected {expected:#x}");
    }

    fn f(x: f32) -> u64 {
        x.bits()
    }

    /// The expected values are worked out by hand from the PTX ISA.
    #[test]
    fn integers() {
        check("add.s32", &[0xffff_ffff, 2], 1);
        check("sub.u16", &[1, 2], 0xffff);
        check("mul.hi.u32", &[0x8000_0000, 4], 2);
        check("mul.hi.s32", &[0xffff_ffff, 1], 0xffff_ffff);
        check("mul.wide.s32", &[0xffff_ffff, 3], (-3i64) as u64);
        check("mad.wide.u16", &[0xffff, 2, 1], 0x1_ffff);
        check("div.s32", &[(-7i32).bits(), 2], (-3i32).bits());
        check("rem.s32", &[(-7i32).bits(), 2], (-1i32).bits());
        check("shl.b32", &[1, 32], 0);
        check("shr.u32", &[0x8000_0000, 31], 1);
        check("shr.u32", &[0x8000_0000, 40], 0);
        check("shr.s32", &[0x8000_0000, 40], 0xffff_ffff);
        check("bfe.u32", &[0xabcd, 4, 8], 0xbc);
        check("bfe.s32", &[0x80, 4, 4], 0xffff_fff8);
        check("bfi.b32", &[0xf, 0, 8, 4], 0xf00);
        check("prmt.b32", &[0x4433_2211, 0x8877_6655, 0x7531], 0x8866_4422);
        check("prmt.b32", &[0x0000_0080, 0, 0x8888], 0xffff_ffff);
        check("shf.l.wrap.b32", &[0x8000_0000, 1, 1], 3);
        check("shf.r.wrap.b32", &[0x8000_0000, 1, 31], 3);
        check("lop3.b32", &[0b1100, 0b1010, 0b0110, 0x96], 0b1100 ^ 0b1010 ^ 0b0110);
        check("clz.b32", &[1], 31);
        check("selp.b32", &[5, 6, 1], 5);
        check("cvt.s32.s8", &[0x80], 0xffff_ff80);
        check("cvt.u64.u32", &[0xdead_beef_0000_0001], 1);
    }

    #[test]
    fn floats() {
        check(
            "fma.rn.f32",
            &[f(1.0 + f32::EPSILON), f(1.0 + f32::EPSILON), f(-1.0)],
            f(2.0 * f32::EPSILON + f32::EPSILON * f32::EPSILON),
        );
        check("min.f32", &[f(f32::NAN), f(2.0)], f(2.0));
        check("cvt.rni.f32.f32", &[f(2.5)], f(2.0));
        check("cvt.rmi.f32.f32", &[f(-2.5)], f(-3.0));
        check("cvt.rzi.u32.f32", &[f(-1.0)], 0);
        check("cvt.rzi.s32.f32", &[f(f32::NAN)], 0);
        check("cvt.rzi.u32.f32", &[f(1e20)], 0xffff_ffff);
        check("cvt.rn.f32.u16", &[0xffff], f(65535.0));
        check("cvt.sat.f32.f32", &[f(1.5)], f(1.0));
        check("cvt.sat.f32.f32", &[f(f32::NAN)], f(0.0));
        check("cvt.rpi.f64.f64", &[1.5f64.bits()], 2f64.bits());
        check("cvt.rn.bf16.f32", &[f(1.0 + 1.0 / 256.0)], 0x3f80);
        check("rcp.approx.ftz.f64", &[3f64.bits()], 0x3fd5_5555_0000_0000);
        // The exact sum is a quarter of an ulp above 1.
        let little = f(f32::EPSILON / 4.0);
        check("fma.rm.f32", &[f(1.0), f(1.0), little], f(1.0));
        check("fma.rp.f32", &[f(1.0), f(1.0), little], f(1.0 + f32::EPSILON));
        check("add.rz.f32", &[f(-1.0), f(-3.0 * f32::EPSILON / 4.0)], f(-1.0));
        // The exact sum differs from 1 by less than double precision can hold.
        check("fma.rm.f32", &[f(1.0), f(1.0), f(-1e-30)], f(1f32.next_down()));
    }

    #[test]
    fn comparisons() {
        check("setp.lt.s32", &[0xffff_ffff, 0], 1);
        check("setp.lt.u32", &[0xffff_ffff, 0], 0);
        check("setp.ltu.f32", &[f(f32::NAN), f(0.0)], 1);
        check("setp.ne.f32", &[f(f32::NAN), f(0.0)], 0);
        check("setp.neu.f32", &[f(f32::NAN), f(0.0)], 1);
        check("setp.num.f32", &[f(f32::NAN), f(0.0)], 0);
        check("setp.nan.f64", &[f64::NAN.bits(), 1f64.bits()], 1);
        check("setp.geu.f64", &[2f64.bits(), 1f64.bits()], 1);
        check("setp.eq.and.u32", &[1, 1, 0], 0);
        let other = comparison(&parts("eq.or.u32"), true).unwrap();
        assert_eq!(other([&[1; LANES], &[1; LANES], &[0; LANES], &[0; LANES]])[0], 0);
    }

    #[test]
    fn what_is_not_known_is_said() {
        for opcode in ["wmma.mma", "cvt.rz.f32.f64", "add.rm.f64", "sad.u32", "add.f16"] {
            assert!(op(&parts(opcode)).is_none(), "{opcode}");
        }
    }
}
