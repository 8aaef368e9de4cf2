//! Runs a kernel over its grid. The processor's threads take the blocks. The warps of a block run
//! one after the other, each up to its next barrier, and the 32 threads of a warp run together.
//!
//! If the threads of a warp have diverged, those at the earliest instruction of the program run
//! first, and threads that are ahead wait until the others reach them. At a barrier or a shuffle,
//! threads wait for all that take part.

use crate::memory::{self, Allocations};
use crate::ops::{LANES, Lanes};
use crate::program::{Action, Given, LOCAL, PARAM, Place, Program, SHARED, Shuffle, Step};
use crate::ptx::Space;
use crate::races::{Shadow, Who};
use crate::{Error, Result};
use rayon::prelude::*;
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// A launch of a kernel.
pub(crate) struct Launch<'a> {
    pub(crate) program: &'a Program,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    /// The bytes of dynamic shared memory. A kernel has either static or dynamic shared memory.
    pub(crate) dynamic: usize,
    /// The kernel's parameters, in the layout that it declares.
    pub(crate) parameters: &'a [u64],
    pub(crate) allocations: &'a Allocations,
    /// Whether unordered accesses are errors.
    pub(crate) races: bool,
}

impl Launch<'_> {
    /// Runs every block.
    pub(crate) fn run(&self) -> Result<()> {
        let blocks: u64 = self.grid.iter().map(|&n| u64::from(n)).product();
        let threads = self.block.iter().map(|&n| n as usize).product::<usize>();
        if blocks == 0 || threads == 0 || threads > 1024 || self.grid[1] > 65_535 || self.grid[2] > 65_535 {
            return Err(self.fail(0, format!("a grid of {:?} blocks of {:?} threads", self.grid, self.block)));
        }
        if self.program.shared + self.dynamic > 48 << 10 {
            return Err(
                self.fail(0, format!("{} bytes of shared memory", self.program.shared + self.dynamic))
            );
        }
        // Each of the processor's threads takes the next free block.
        let next = AtomicU64::new(0);
        // With a search for races, one thread runs all blocks, because they share the shadows of
        // global memory.
        let shares = if self.races { 1 } else { blocks.min(rayon::current_num_threads() as u64) };
        (0..shares).into_par_iter().try_for_each(|_| {
            let mut block = Block::new(self, threads);
            loop {
                match next.fetch_add(1, Ordering::Relaxed) {
                    number if number < blocks => block.run(number)?,
                    _ => return Ok(()),
                }
            }
        })
    }

    fn fail(&self, line: usize, message: String) -> Error {
        Error::Launch { kernel: self.program.name.clone(), line, message }
    }
}

/// The state of a running block, which is reused for other blocks.
struct Block<'a> {
    launch: &'a Launch<'a>,
    warps: Vec<Warp>,
    /// The shared memory, in words because it must be aligned.
    shared: Vec<u64>,
    /// The allocation that each place of the program accessed last.
    last: Vec<(u64, u64)>,
    /// The index of the block in the grid.
    number: u64,
    /// The shadow of the block's shared memory, if races are looked for.
    shadow: Option<Shadow>,
    /// The shadows of allocations, by the address where they begin.
    shadows: HashMap<u64, Shadow>,
    /// The number of barriers that the block has passed.
    barriers: u32,
}

/// The state of 32 threads.
struct Warp {
    number: usize,
    registers: Vec<Lanes>,
    /// The local memory of one thread after the other, in words.
    local: Vec<u64>,
    /// The index of each thread's next instruction.
    at: [usize; LANES],
    /// The threads that have not ended, as bits.
    live: u32,
    /// The live threads that wait for others, at a barrier or a shuffle.
    waiting: u32,
    /// All threads of the warp that exist, as bits.
    all: u32,
}

/// Iterates over the lanes whose bits are set.
fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (lane < 32).then_some(lane as usize)
    })
}

impl<'a> Block<'a> {
    fn new(launch: &'a Launch<'a>, threads: usize) -> Self {
        let program = launch.program;
        let warps = (0..threads.div_ceil(LANES)).map(|warp| {
            let mut registers = vec![[0; LANES]; program.registers];
            let [x, y, _] = launch.block.map(|n| n as usize);
            for (&given, &register) in &program.given {
                registers[register as usize] = std::array::from_fn(|lane| {
                    let thread = warp * LANES + lane;
                    match given {
                        Given::Constant(value) => value,
                        Given::Thread(axis) => [thread % x, thread / x % y, thread / x / y][axis] as u64,
                        Given::Threads(axis) => launch.block[axis].into(),
                        Given::Blocks(axis) => launch.grid[axis].into(),
                        Given::Lane => lane as u64,
                        Given::Warp => warp as u64,
                        // This value is set for each block.
                        Given::Block(_) => 0,
                    }
                });
            }
            let threads = (threads - warp * LANES).min(LANES);
            let all = u32::MAX >> (LANES - threads);
            Warp {
                number: warp,
                registers,
                local: vec![0; LANES * program.local.div_ceil(8)],
                at: [0; LANES],
                live: 0,
                waiting: 0,
                all,
            }
        });
        let warps = warps.collect();
        let shared = vec![0; (program.shared + launch.dynamic).div_ceil(8)];
        let last = vec![(0, 0); program.places];
        Self { launch, warps, shared, last, number: 0, shadow: None, shadows: HashMap::new(), barriers: 0 }
    }

    fn run(&mut self, number: u64) -> Result<()> {
        self.number = number;
        let place = self.place();
        // Memory is NaN at first, so that reads of memory that nobody wrote are noticed.
        self.shared.fill(u64::MAX);
        self.shadow = self.launch.races.then(|| Shadow::new(8 * self.shared.len()));
        self.barriers = 0;
        let mut warps = std::mem::take(&mut self.warps);
        for warp in &mut warps {
            for (&given, &register) in &self.launch.program.given {
                if let Given::Block(axis) = given {
                    warp.registers[register as usize] = [place[axis]; LANES];
                }
            }
            warp.local.fill(u64::MAX);
            warp.at = [0; LANES];
            (warp.live, warp.waiting) = (warp.all, 0);
        }
        while warps.iter().any(|warp| warp.live != 0) {
            // After this loop, all warps that have not ended are at a barrier.
            for warp in warps.iter_mut().filter(|warp| warp.live != 0) {
                self.warp(warp)?;
            }
            self.barriers += 1;
        }
        self.warps = warps;
        Ok(())
    }

    /// Returns the block's position in the grid.
    fn place(&self) -> [u64; 3] {
        let [x, y, _] = self.launch.grid.map(u64::from);
        [self.number % x, self.number / x % y, self.number / x / y]
    }

    /// Runs a warp up to its next barrier or its end.
    fn warp(&mut self, warp: &mut Warp) -> Result<()> {
        let code = &self.launch.program.code;
        while warp.live != 0 {
            // Run the threads that are furthest behind, up to the next other threads.
            let going = warp.live & !warp.waiting;
            let Some(mut at) = lanes(going).map(|lane| warp.at[lane]).min() else {
                let line = code[warp.at[warp.live.trailing_zeros() as usize]].line;
                return Err(self
                    .launch
                    .fail(line, "threads wait at a barrier or a shuffle that others don't reach".into()));
            };
            let mut together =
                lanes(going).filter(|&lane| warp.at[lane] == at).fold(0, |mask, lane| mask | 1 << lane);
            let next = lanes(going & !together).map(|lane| warp.at[lane]).min().unwrap_or(usize::MAX);
            loop {
                let step = &code[at];
                if let Action::Barrier | Action::Shuffle { .. } = step.action {
                    let arrived = lanes(warp.waiting).filter(|&lane| warp.at[lane] == at);
                    let arrived = arrived.fold(together, |mask, lane| mask | 1 << lane);
                    if warp.live & self.members(warp, step, arrived) & !arrived != 0 {
                        lanes(together).for_each(|lane| warp.at[lane] = at);
                        warp.waiting |= together;
                        break;
                    }
                    warp.waiting &= !arrived;
                    together = arrived;
                }
                let active = match step.guard {
                    None => together,
                    Some((predicate, negated)) => {
                        let holds = &warp.registers[predicate as usize];
                        let holds =
                            (0..LANES).fold(0, |mask, lane| mask | u32::from(holds[lane] != 0) << lane);
                        together & if negated { !holds } else { holds }
                    }
                };
                at += 1;
                match &step.action {
                    Action::Branch(target) if active == together => at = *target,
                    Action::Branch(target) => {
                        if active != 0 {
                            lanes(together & !active).for_each(|lane| warp.at[lane] = at);
                            lanes(active).for_each(|lane| warp.at[lane] = *target);
                            break;
                        }
                    }
                    Action::Exit => {
                        warp.live &= !active;
                        lanes(together & !active).for_each(|lane| warp.at[lane] = at);
                        break;
                    }
                    Action::Barrier => {
                        lanes(together).for_each(|lane| warp.at[lane] = at);
                        return Ok(());
                    }
                    _ if active == 0 => {}
                    action => self.act(warp, action, active, step)?,
                }
                if at >= next {
                    lanes(together).for_each(|lane| warp.at[lane] = at);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Returns the threads that must take part in a barrier or a shuffle, as bits.
    fn members(&self, warp: &Warp, step: &Step, arrived: u32) -> u32 {
        match step.action {
            Action::Shuffle { members, .. } => {
                warp.registers[members as usize][arrived.trailing_zeros() as usize] as u32
            }
            _ => u32::MAX,
        }
    }

    /// Executes an instruction that is not control flow, for the threads in `active`.
    fn act(&mut self, warp: &mut Warp, action: &Action, active: u32, step: &Step) -> Result<()> {
        match action {
            Action::Compute { op, to, from } => {
                let found = op(from.map(|register| &warp.registers[register as usize]));
                put(&mut warp.registers[*to as usize], &found, active);
            }
            Action::Load { at, to, signed } => {
                for lane in lanes(active) {
                    let address = self.locate(warp, at, lane, step)?;
                    self.look_for_races(warp, at, lane, address, false, step)?;
                    for (i, &to) in to.iter().enumerate() {
                        // SAFETY: `locate` has checked that the address is aligned and in memory of
                        // an allocation, the block or the thread.
                        #[allow(unsafe_code)]
                        let bits = unsafe { memory::load(address + (i * at.size) as u64, at.size) };
                        let above = 64 - 8 * at.size as u32;
                        warp.registers[to as usize][lane] =
                            if *signed { ((bits << above) as i64 >> above) as u64 } else { bits };
                    }
                }
            }
            Action::Store { at, from } => {
                for lane in lanes(active) {
                    let address = self.locate(warp, at, lane, step)?;
                    self.look_for_races(warp, at, lane, address, true, step)?;
                    for (i, &from) in from.iter().enumerate() {
                        let bits = warp.registers[from as usize][lane];
                        // SAFETY: `locate` has checked the address, as for a load.
                        #[allow(unsafe_code)]
                        unsafe {
                            memory::store(address + (i * at.size) as u64, at.size, bits);
                        }
                    }
                }
            }
            Action::Atomic { at, update, to, from } => {
                static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
                let _guard = ONE_AT_A_TIME.lock();
                for lane in lanes(active) {
                    let address = self.locate(warp, at, lane, step)?;
                    let [a, b] = from.map(|from| warp.registers[from as usize][lane]);
                    // SAFETY: `locate` has checked the address, as for a load.
                    #[allow(unsafe_code)]
                    let old = unsafe {
                        let old = memory::load(address, at.size);
                        memory::store(address, at.size, update(old, a, b));
                        old
                    };
                    if let Some(to) = to {
                        warp.registers[*to as usize][lane] = old;
                    }
                }
            }
            Action::Shuffle { mode, to, valid, value, lane: by, clamp, members: _ } => {
                let [value, by, clamp] =
                    [value, by, clamp].map(|&register| warp.registers[register as usize]);
                let (mut found, mut is_valid) = ([0; LANES], [0; LANES]);
                for lane in lanes(active) {
                    let (by, clamp, segment) = (by[lane] & 31, clamp[lane] & 31, clamp[lane] >> 8 & 31);
                    let here = lane as u64;
                    let most = here & segment | clamp & !segment;
                    let (source, inside) = match mode {
                        Shuffle::Up => (here.wrapping_sub(by), here >= by && here - by >= most),
                        Shuffle::Down => (here + by, here + by <= most),
                        Shuffle::Xor => (here ^ by, here ^ by <= most),
                        Shuffle::Index => {
                            let source = here & segment | by & !segment;
                            (source, source <= most)
                        }
                    };
                    let source = if inside { source as usize } else { lane };
                    if active >> source & 1 == 0 {
                        let message = format!("a shuffle reads lane {source}, which takes no part in it");
                        return Err(self.launch.fail(step.line, message));
                    }
                    found[lane] = value[source];
                    is_valid[lane] = u64::from(inside);
                }
                put(&mut warp.registers[*to as usize], &found, active);
                if let Some(valid) = valid {
                    put(&mut warp.registers[*valid as usize], &is_valid, active);
                }
            }
            Action::Trap(what) => return Err(self.launch.fail(step.line, (*what).into())),
            Action::Branch(_) | Action::Exit | Action::Barrier => unreachable!("control flow"),
        }
        Ok(())
    }

    /// Returns the host address of a place's elements.
    fn locate(&mut self, warp: &mut Warp, place: &Place, lane: usize, step: &Step) -> Result<u64> {
        let address = warp.registers[place.address as usize][lane].wrapping_add(place.offset as u64);
        let bytes = place.bytes;
        let (space, offset) = match (place.space, address & (0xff << 56)) {
            (Space::Shared, _) | (_, SHARED) => (Space::Shared, address as u32 as usize),
            (Space::Local, _) | (_, LOCAL) => (Space::Local, address as u32 as usize),
            (_, PARAM) => (Space::Param, address as u32 as usize),
            _ => (Space::Global, address as usize),
        };
        let inside = |start: *const u64, words: usize| {
            (offset.saturating_add(bytes) <= 8 * words).then_some(start as u64 + offset as u64)
        };
        let words = self.launch.program.local.div_ceil(8);
        let found = match space {
            Space::Shared => inside(self.shared.as_mut_ptr(), self.shared.len()),
            Space::Local => inside(warp.local[lane * words..][..words].as_mut_ptr(), words),
            Space::Param => inside(self.launch.parameters.as_ptr(), self.launch.parameters.len()),
            _ => {
                let last = &mut self.last[place.number];
                if address < last.0 || address.saturating_add(bytes as u64) > last.1 {
                    *last = self.launch.allocations.find(address, bytes).unwrap_or((0, 0));
                }
                (last.1 != 0).then_some(address)
            }
        };
        match found {
            Some(found) if offset & (bytes - 1) == 0 => Ok(found),
            found => {
                let what = if found.is_some() { "not aligned" } else { "of no allocation" };
                let message = format!(
                    "block {:?}, lane {lane}: {bytes} bytes at {address:#x} ({:?}), {what}",
                    self.place(),
                    place.space
                );
                Err(self.launch.fail(step.line, message))
            }
        }
    }

    /// Checks that an access is ordered with all other accesses of the launch.
    fn look_for_races(
        &mut self,
        warp: &Warp,
        place: &Place,
        lane: usize,
        address: u64,
        writes: bool,
        step: &Step,
    ) -> Result<()> {
        let Some(shared) = &mut self.shadow else { return Ok(()) };
        let (start, end) = self.last[place.number];
        let (shadow, at) = if (start..end).contains(&address) {
            let size = (end - start) as usize;
            (self.shadows.entry(start).or_insert_with(|| Shadow::new(size)), (address - start) as usize)
        } else {
            let start = self.shared.as_ptr() as u64;
            if !(start..start + 8 * self.shared.len() as u64).contains(&address) {
                // The access is to the thread's own memory, or to parameters, which nobody writes.
                return Ok(());
            }
            (shared, (address - start) as usize)
        };
        let who = Who {
            block: self.number as u32,
            thread: (warp.number * LANES + lane) as u32,
            barriers: self.barriers,
        };
        match shadow.access(at, place.bytes, who, writes) {
            None => Ok(()),
            Some(other) => {
                let what = if writes { "writes" } else { "reads" };
                let message =
                    format!("{who:?} {what} at {address:#x} ({:?}) what {other:?} accesses", place.space);
                Err(self.launch.fail(step.line, message))
            }
        }
    }
}

/// Writes a register for the threads in `active`.
fn put(to: &mut Lanes, found: &Lanes, active: u32) {
    if active == u32::MAX {
        *to = *found;
    } else {
        lanes(active).for_each(|lane| to[lane] = found[lane]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program;
    use crate::ptx;

    /// Runs a kernel with this body, with and without the search for races.
    ///
    /// The kernel's name is `run`. Its two parameters are the addresses of `input` and of an output
    /// with the same number of words.
    fn run(head: &str, body: &str, grid: u32, block: u32, input: &[u32]) -> Result<Vec<u32>> {
        let found = run_as(head, body, grid, block, input, true)?;
        assert_eq!(found, run_as(head, body, grid, block, input, false)?);
        Ok(found)
    }

    /// Does the same as [`run`], with or without the search for races.
    fn run_as(head: &str, body: &str, grid: u32, block: u32, input: &[u32], races: bool) -> Result<Vec<u32>> {
        let text = format!(
            ".version 9.0\n.target sm_75\n.address_size 64\n{head}\n\
             .visible .entry run(.param .u64 run_param_0, .param .u64 run_param_1)\n{{\n{body}\n}}"
        );
        let module = ptx::parse(&text)?;
        let program = program::link(&module, &Default::default(), "run")?;
        // Copies on the heap are aligned for words of 64 bits.
        let (input, output) = (input.to_vec(), vec![0u32; input.len()]);
        let bytes = 4 * input.len() as u64;
        let [from, to] = [&input, &output].map(|words| words.as_ptr() as u64);
        let mut bounds = [(from, from + bytes), (to, to + bytes)];
        bounds.sort_unstable();
        Launch {
            program: &program,
            grid: [grid, 1, 1],
            block: [block, 1, 1],
            dynamic: 0,
            parameters: &[from, to],
            allocations: &Allocations::new(bounds.into_iter()),
            races,
        }
        .run()?;
        Ok(output)
    }

    /// `%rd3` and `%rd4` are the addresses of this thread's input and output; `%r1` is its index.
    const PLACES: &str = ".reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<16>; .reg .f32 %f<8>;
        ld.param.u64 %rd1, [run_param_0]; ld.param.u64 %rd2, [run_param_1];
        mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ntid.x; mov.u32 %r4, %tid.x; mad.lo.s32 %r1, %r2, %r3, %r4;
        mul.wide.u32 %rd5, %r1, 4; add.s64 %rd3, %rd1, %rd5; add.s64 %rd4, %rd2, %rd5;";

    #[test]
    fn threads_that_part_and_meet() {
        // Odd numbers are halved until they are even, then 100 is added to all.
        let body = format!(
            "{PLACES} ld.global.u32 %r5, [%rd3];
            $again: and.b32 %r6, %r5, 1; setp.eq.u32 %p1, %r6, 0; @%p1 bra $done;
            shr.u32 %r5, %r5, 1; bra.uni $again;
            $done: add.s32 %r5, %r5, 100; st.global.u32 [%rd4], %r5; ret;"
        );
        let input: Vec<u32> = (1..=80).collect();
        let halved = |mut n: u32| {
            while n % 2 == 1 {
                n /= 2;
            }
            n + 100
        };
        let expected: Vec<u32> = input.iter().map(|&n| halved(n)).collect();
        assert_eq!(run("", &body, 2, 40, &input).unwrap(), expected);
    }

    #[test]
    fn a_block_shares_memory_across_warps() {
        let body = format!(
            "{PLACES} .shared .align 4 .b8 tile[256];
            ld.global.u32 %r5, [%rd3]; mov.u32 %r6, tile; shl.b32 %r7, %r4, 2; add.s32 %r8, %r6, %r7;
            st.shared.u32 [%r8], %r5; bar.sync 0;
            sub.s32 %r9, %r3, %r4; add.s32 %r9, %r9, -1; shl.b32 %r9, %r9, 2; add.s32 %r9, %r9, %r6;
            ld.shared.u32 %r10, [%r9]; st.global.u32 [%rd4], %r10; ret;"
        );
        let input: Vec<u32> = (0..64).collect();
        let expected: Vec<u32> = (0..64).rev().collect();
        assert_eq!(run("", &body, 1, 64, &input).unwrap(), expected);
    }

    #[test]
    fn static_and_dynamic_shared_memory_exclude_each_other() {
        let dynamic = ".extern .shared .align 4 .b8 more[];";
        let body = |tile: &str| format!("{PLACES} {tile} st.global.u32 [%rd4], %r4; ret;");
        assert_eq!(run(dynamic, &body(""), 1, 2, &[0; 2]).unwrap(), [0, 1]);
        let error = run(dynamic, &body(".shared .align 4 .b8 tile[8];"), 1, 2, &[0; 2]).unwrap_err();
        assert!(error.to_string().contains("run, which has static and dynamic shared memory"), "{error}");
    }

    #[test]
    fn a_function_with_local_memory_and_a_shuffle() {
        let head = ".func (.param .b32 back) twice(.param .b32 x) {
            .local .align 8 .b8 kept[16]; .reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .pred %p<2>;
            ld.param.u32 %r1, [x]; mov.u64 %rd1, kept; cvta.local.u64 %rd2, %rd1;
            setp.gt.u32 %p1, %r1, 5; @%p1 bra $big;
            st.u32 [%rd2+8], %r1; ld.local.u32 %r2, [kept+8]; add.s32 %r2, %r2, %r1; st.param.b32 [back], %r2; ret;
            $big: st.param.b32 [back], 99; ret; }";
        let body = format!(
            "{PLACES} ld.global.u32 %r5, [%rd3];
            {{ .param .b32 given; st.param.b32 [given], %r5; .param .b32 got;
               call.uni (got), twice, (given); ld.param.b32 %r6, [got]; }}
            shfl.sync.bfly.b32 %r7|%p1, %r6, 1, 31, -1; st.global.u32 [%rd4], %r7; ret;"
        );
        let twice = |n: u32| if n > 5 { 99 } else { 2 * n };
        let expected: Vec<u32> = (0..32).map(|n| twice(n ^ 1)).collect();
        assert_eq!(run(head, &body, 1, 32, &(0..32).collect::<Vec<_>>()).unwrap(), expected);
    }

    /// The second half of the warp reaches the shuffle first, because the code of the first half
    /// comes after it.
    #[test]
    fn a_shuffle_waits_for_all() {
        let body = format!(
            "{PLACES} mov.u32 %r5, %r4; setp.lt.u32 %p1, %r4, 16; @%p1 bra $long;
            $meet: shfl.sync.bfly.b32 %r6, %r5, 16, 31, -1; st.global.u32 [%rd4], %r6; ret;
            $long: add.s32 %r5, %r5, 100; bra.uni $meet;"
        );
        let expected: Vec<u32> = (0..32).map(|n| if n < 16 { n + 16 } else { n - 16 + 100 }).collect();
        assert_eq!(run("", &body, 1, 32, &[0; 32]).unwrap(), expected);
    }

    #[test]
    fn values_in_parts_and_at_once() {
        let body = format!(
            "{PLACES} setp.lt.u32 %p1|%p2, %r4, 1; @%p2 bra $end;
            ld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd1]; mov.b64 %rd6, {{%r5, %r6}}; mov.b64 {{%r9, %r10}}, %rd6;
            st.global.v2.u32 [%rd2], {{%r10, %r9}}; st.global.u32 [%rd2+8], %r8; atom.global.add.u32 %r11, [%rd2+8], %r7;
            st.global.u32 [%rd2+12], %r11;
            $end: ret;"
        );
        assert_eq!(run("", &body, 1, 2, &[1, 2, 30, 4]).unwrap(), [2, 1, 34, 4]);
    }

    /// Tests a missing barrier, and an address that two blocks write.
    #[test]
    fn races_are_errors() {
        let shared = |barrier: &str| {
            let body = format!(
                "{PLACES} .shared .align 4 .b8 tile[256]; mov.u32 %r6, tile; shl.b32 %r7, %r4, 2; add.s32 %r8, %r6, %r7;
                st.shared.u32 [%r8], %r4; {barrier} xor.b32 %r7, %r7, 4; add.s32 %r8, %r6, %r7;
                ld.shared.u32 %r9, [%r8]; st.global.u32 [%rd4], %r9; ret;"
            );
            run("", &body, 1, 64, &[0; 64])
        };
        assert_eq!(shared("bar.sync 0;").unwrap()[..4], [1, 0, 3, 2]);
        let error = shared("").unwrap_err().to_string();
        assert!(error.contains("reads") && error.contains("Shared"), "{error}");
        let blocks = format!(
            "{PLACES} mul.wide.u32 %rd6, %r2, 4; add.s64 %rd7, %rd2, %rd6; st.global.u32 [%rd7], %r4; ret;"
        );
        assert!(run("", &blocks, 4, 1, &[0; 4]).is_ok());
        let same = format!("{PLACES} st.global.u32 [%rd2], %r2; ret;");
        assert_eq!(run_as("", &same, 1, 1, &[0; 4], true).unwrap()[0], 0);
        let error = run("", &same, 2, 1, &[0; 4]).unwrap_err().to_string();
        assert!(error.contains("writes"), "{error}");
    }

    #[test]
    fn wrong_accesses_and_barriers_are_errors() {
        let fails = |body: &str, expected: &str| {
            let error = run("", &format!("{PLACES} {body}"), 1, 2, &[1, 2]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        fails("ld.global.u32 %r5, [%rd3+4];", "of no allocation");
        fails("st.global.u32 [%rd3+-4096], %r5;", "of no allocation");
        fails("ld.global.u16 %r5, [%rd3+1];", "not aligned");
        fails("ld.shared.u32 %r5, [%r4];", "of no allocation");
        fails("setp.eq.u32 %p1, %r4, 0; @%p1 bra $skip; bar.sync 0; $skip: ret;", "others don't reach");
        fails("wgmma.fence;", "wgmma.fence");
        fails("trap;", "trap");
    }
}
