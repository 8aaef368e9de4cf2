//! How CPU kernels divide their work among threads and write their results.
//!
//! Work is cut into pieces that depend only on the shapes, and the results of the pieces are
//! returned in their order, so the threads have no influence on the result. Results are written to
//! uninitialized memory. If it were zeroed first, kernels that are bound by memory and have
//! scattered stores would take up to 1.4 times as long (measured: 1.3–1.4 for the depthwise
//! convolution, 1.1–1.25 for the normalization). The [`Written`] that a piece returns proves that
//! it has written its whole block.

use rayon::prelude::*;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The number of elements of a chunk: 128 KiB of floats, which fit into a second-level cache, and
/// enough work for a task.
pub(crate) const CHUNK: usize = 32 * 1024;

/// Returns the number of elements of a chunk of whole rows of `channels` elements.
pub(crate) fn whole_rows(channels: usize) -> usize {
    (CHUNK / channels).max(1) * channels
}

/// The largest number of parts of a reduction of any size, because each part leaves sums that are
/// added up in order.
pub(crate) const MAX_PARTS: usize = 32;

/// The smallest number of elements of such a part.
const MIN_PART: usize = 4 * CHUNK;

/// Proof that a block has been written, made from the initialized slice that the block has become.
pub(crate) struct Written<'a> {
    at: *const (),
    bytes: usize,
    block: PhantomData<&'a ()>,
}

impl<'a, T> From<&'a [T]> for Written<'a> {
    fn from(block: &'a [T]) -> Self {
        Self { at: block.as_ptr().cast(), bytes: size_of_val(block), block: PhantomData }
    }
}

impl<'a, T> From<&'a mut [T]> for Written<'a> {
    fn from(block: &'a mut [T]) -> Self {
        Self::from(&*block)
    }
}

/// Calls `write` with a block, and checks that the returned proof is for this block.
#[inline(always)]
fn checked<'a, T, R>(
    block: &'a mut [MaybeUninit<T>],
    write: impl FnOnce(&'a mut [MaybeUninit<T>]) -> (Written<'a>, R),
) -> R {
    let (at, bytes) = (block.as_ptr().cast(), size_of_val(block));
    let (written, found) = write(block);
    assert!(written.at == at && written.bytes == bytes, "a kernel returns the block that it was given");
    found
}

/// Whether kernels check what they take for granted in a release build: in builds of the dev
/// profile (set by `build.rs`, because this crate has no debug assertions there) and in builds with
/// debug assertions.
pub(crate) const CHECKED: bool = cfg!(any(checked, debug_assertions));

/// If [`CHECKED`], fills a block that will be written with NaN, so that tests detect elements that
/// are not written.
#[inline(always)]
pub(crate) fn poison(block: &mut [MaybeUninit<f32>]) {
    if CHECKED {
        block.fill(MaybeUninit::new(f32::NAN));
    }
}

/// Writes `f(i)` to each element `i` of a block, and returns the block.
#[inline(always)]
pub(crate) fn write_with<T: Copy>(block: &mut [MaybeUninit<T>], f: impl Fn(usize) -> T) -> &mut [T] {
    // The loop uses an index because `f` takes one. A loop over references has its own end, and
    // compilers leave its last elements to a scalar loop. Clippy suggests references.
    #[allow(clippy::needless_range_loop)]
    for i in 0..block.len() {
        block[i].write(f(i));
    }
    // SAFETY: the loop has written each element.
    #[allow(unsafe_code)]
    unsafe {
        block.assume_init_mut()
    }
}

/// A way to write floats that are computed one by one.
pub(crate) trait Writer<T> {
    /// The largest number of elements that [`Writer::write`] can write at once.
    const MOST: usize;

    /// Converts and writes `f(i)` as element `i` of a block, and returns the block.
    fn write<'y>(&self, block: &'y mut [MaybeUninit<T>], f: impl Fn(usize) -> f32) -> &'y mut [T];
}

/// Writes a block tile by tile, and each tile in pieces of a size that the writer can write.
///
/// `of_piece([start, at], len)` is called for the piece of `len` elements that begins at `start` in
/// the block and at `at` in its tile. It returns the function from a position in the piece to the
/// float that `writer` converts and writes there. The last tile may be shorter than the others.
#[inline(always)]
pub(crate) fn write_tiles<T: Copy, F: Fn(usize) -> f32, W: Writer<T>>(
    block: &mut [MaybeUninit<T>],
    tile: usize,
    of_piece: impl Fn([usize; 2], usize) -> F,
    writer: W,
) -> &mut [T] {
    let mut start = 0;
    for tile in block.chunks_mut(tile) {
        let mut at = 0;
        for piece in tile.chunks_mut(W::MOST) {
            let len = piece.len();
            // This is the check of [`checked`], whose closure would not be compiled for the
            // caller's instructions.
            let place = piece.as_ptr().cast();
            let written = writer.write(piece, of_piece([start, at], len));
            assert!(written.as_ptr() == place && written.len() == len, "a piece is returned as it was given");
            at += len;
            start += len;
        }
    }
    // SAFETY: the loop has written each piece of each tile.
    #[allow(unsafe_code)]
    unsafe {
        block.assume_init_mut()
    }
}

/// A block that is written from its start, some elements at a time.
pub(crate) struct Progress<'a, T> {
    block: &'a mut [MaybeUninit<T>],
    written: usize,
}

impl<'a, T: Copy> Progress<'a, T> {
    pub(crate) fn new(block: &'a mut [MaybeUninit<T>]) -> Self {
        Self { block, written: 0 }
    }

    /// Writes the next `len` elements with `write` and returns them.
    #[inline(always)]
    pub(crate) fn next(
        &mut self,
        len: usize,
        write: impl for<'b> FnOnce(&'b mut [MaybeUninit<T>]) -> Written<'b>,
    ) -> &[T] {
        let block = &mut self.block[self.written..][..len];
        checked(block, |block| (write(block), ()));
        self.written += len;
        // SAFETY: `checked` shows that `write` has written these elements.
        #[allow(unsafe_code)]
        unsafe {
            self.block[self.written - len..self.written].assume_init_ref()
        }
    }

    /// Returns the block, which must have been written up to its end.
    #[inline(always)]
    pub(crate) fn finish(self) -> &'a mut [T] {
        assert_eq!(self.written, self.block.len(), "a kernel writes all of its block");
        // SAFETY: `next` has checked all elements before `written`.
        #[allow(unsafe_code)]
        unsafe {
            self.block.assume_init_mut()
        }
    }
}

/// Appends `len` elements that `write` writes, and returns them.
pub(crate) fn append<T: Copy>(
    elements: &mut Vec<T>,
    len: usize,
    write: impl for<'a> FnOnce(&'a mut [MaybeUninit<T>]) -> Written<'a>,
) -> &[T] {
    elements.reserve(len);
    checked(&mut elements.spare_capacity_mut()[..len], |block| (write(block), ()));
    let start = elements.len();
    // SAFETY: `checked` shows that `write` has written these elements.
    #[allow(unsafe_code)]
    unsafe {
        elements.set_len(start + len);
    }
    &elements[start..]
}

/// Cuts `rows` rows into parts of `per_part` rows (the last may have fewer), each with the number
/// of elements that it writes.
fn cut(rows: usize, per_part: usize, len: &dyn Fn(&Range<usize>) -> usize) -> Vec<(Range<usize>, usize)> {
    let per_part = per_part.max(1);
    let part = |start: usize| start..rows.min(start + per_part);
    (0..rows).step_by(per_part).map(part).map(|rows| (rows.clone(), len(&rows))).collect()
}

/// Calls `f(i)` for each `i < count` on all threads, in tasks of at most `per_task` successive
/// indices. This is not generic because Rayon's own code would be compiled for each kernel, which
/// was most of the compile time.
fn for_each(count: usize, per_task: usize, f: &(dyn Fn(usize) + Sync)) {
    (0..count).into_par_iter().with_max_len(per_task).for_each(f);
}

/// Locks a mutex, even if a thread has panicked while it held it. That panic is reported, and a
/// second panic must not replace it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A part of some work: its rows, the block that it writes, and its result once it has run.
struct Part<'a, T, R> {
    rows: Range<usize>,
    block: &'a mut [MaybeUninit<T>],
    found: Option<R>,
}

/// Runs the parts of some work on all threads.
///
/// Each part gives its rows and the number of elements that it writes. Returns the elements of all
/// parts and the results of `f(state, rows, block)`, both in order. `state` is scratch memory made
/// by `init` and is used for one part after the other. A task takes at most `per_task` parts.
fn write_parts<T: Copy + Send, S: Send, R: Send>(
    parts: Vec<(Range<usize>, usize)>,
    per_task: usize,
    init: impl Fn() -> S + Sync + Send,
    f: impl for<'a> Fn(&mut S, Range<usize>, &'a mut [MaybeUninit<T>]) -> (Written<'a>, R) + Sync + Send,
) -> (Vec<T>, Vec<R>) {
    let len = parts.iter().map(|(_, len)| len).sum();
    let mut elements = Vec::with_capacity(len);
    let mut rest = &mut elements.spare_capacity_mut()[..len];
    let mut shares = Vec::with_capacity(parts.len());
    for (rows, len) in parts {
        let (block, others) = std::mem::take(&mut rest).split_at_mut(len);
        shares.push(Mutex::new(Part { rows, block, found: None }));
        rest = others;
    }
    // Tasks reuse the states of other tasks, whose memory is in cache.
    let states = Mutex::new(Vec::new());
    let run = |i: usize| {
        let kept = lock(&states).pop();
        let mut state = kept.unwrap_or_else(&init);
        let mut part = lock(&shares[i]);
        let Part { rows, block, found } = &mut *part;
        *found = Some(checked(block, |block| f(&mut state, rows.clone(), block)));
        lock(&states).push(state);
    };
    if shares.len() <= 1 || (1..=CHUNK).contains(&len) {
        (0..shares.len()).for_each(run);
    } else {
        for_each(shares.len(), per_task, &run);
    }
    let found = |part: Mutex<Part<T, R>>| part.into_inner().ok()?.found;
    let results = shares.into_iter().map(|part| found(part).expect("each part has run")).collect();
    // SAFETY: the blocks cover the first `len` elements, and `checked` shows that each block was
    // written.
    #[allow(unsafe_code)]
    unsafe {
        elements.set_len(len);
    }
    (elements, results)
}

/// Computes `rows` rows of `width` elements in blocks of `per_block` rows (the last may have fewer)
/// on all threads.
///
/// Returns the rows and the results of `f(state, rows, block)` in order; see [`write_parts`].
/// `width` may be 0 if only the results are needed.
pub(crate) fn blocks<T: Copy + Send, S: Send, R: Send>(
    (rows, width): (usize, usize),
    per_block: usize,
    init: impl Fn() -> S + Sync + Send,
    f: impl for<'a> Fn(&mut S, Range<usize>, &'a mut [MaybeUninit<T>]) -> (Written<'a>, R) + Sync + Send,
) -> (Vec<T>, Vec<R>) {
    write_parts(cut(rows, per_block, &|rows| rows.len() * width), 1, init, f)
}

/// Computes `len` elements in chunks of `chunk` on all threads, for kernels that need zeroed
/// elements.
///
/// Each chunk is zeroed just before its kernel brings it into cache anyway.
/// `f(state, range, elements)` gets the positions of its elements.
pub(crate) fn generate<T: Copy + Default + Send, S: Send, R: Send>(
    len: usize,
    chunk: usize,
    init: impl Fn() -> S + Sync + Send,
    f: impl Fn(&mut S, Range<usize>, &mut [T]) -> R + Sync + Send,
) -> (Vec<T>, Vec<R>) {
    write_parts(cut(len, chunk, &|range| range.len()), usize::MAX, init, |state, range, block| {
        let elements = write_with(block, |_| T::default());
        let found = f(state, range, elements);
        (elements.into(), found)
    })
}

/// Computes `len` elements in chunks with `f(range, elements)`; see [`generate`].
pub(crate) fn fill<T: Copy + Default + Send>(
    len: usize,
    chunk: usize,
    f: impl Fn(Range<usize>, &mut [T]) + Sync + Send,
) -> Vec<T> {
    generate(len, chunk, || (), |(), range, elements| f(range, elements)).0
}

/// Cuts `rows` rows of `width` elements into parts that depend only on these numbers, and returns
/// the results of `f(rows of the part)` in order.
pub(crate) fn parts<R: Send>(
    rows: usize,
    width: usize,
    f: impl Fn(Range<usize>) -> R + Sync + Send,
) -> Vec<R> {
    parts_writing(
        (rows, width),
        |_| 0,
        |rows, block: &mut [MaybeUninit<f32>]| (write_with(block, |_| 0.0).into(), f(rows)),
    )
    .1
}

/// Does the same as [`parts`], but each part also writes its share of the elements, those from
/// `position(start)` to `position(end)`.
pub(crate) fn parts_writing<T: Copy + Send, R: Send>(
    (rows, width): (usize, usize),
    position: impl Fn(usize) -> usize,
    f: impl for<'a> Fn(Range<usize>, &'a mut [MaybeUninit<T>]) -> (Written<'a>, R) + Sync + Send,
) -> (Vec<T>, Vec<R>) {
    let per_part = rows.div_ceil(MAX_PARTS).max(MIN_PART.div_ceil(width.max(1)));
    let parts = cut(rows, per_part, &|rows| position(rows.end) - position(rows.start));
    write_parts(parts, 1, || (), |(), rows, block| f(rows, block))
}

/// Changes elements in place with `f(range, elements)`, in chunks on all threads.
pub(crate) fn change(elements: &mut [f32], f: &(dyn Fn(Range<usize>, &mut [f32]) + Sync)) {
    let run = |(i, elements): (usize, &mut [f32])| f(i * CHUNK..i * CHUNK + elements.len(), elements);
    if elements.len() <= CHUNK {
        run((0, elements));
    } else {
        elements.par_chunks_mut(CHUNK).enumerate().for_each(run);
    }
}
