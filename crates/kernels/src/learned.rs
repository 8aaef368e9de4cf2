//! What the operations of learned quantizers have in common: their gradients are a tensor and a few
//! sums over all elements.

pub(crate) mod gpu;

use crate::elements::Element;
use crate::work::{CHUNK, generate};
use std::ops::Range;

/// The number of independent sums of a loop, which let it vectorize.
pub(crate) const LANES: usize = 16;

/// The independent sums of a loop.
pub(crate) type Lanes = [f64; LANES];

/// Returns `len` elements and `N` sums over all of them.
///
/// `f(range, elements)` computes the elements of a chunk and returns its share of the sums. The shares
/// are added up in order, so that the result does not depend on the number of threads.
pub(crate) fn map_and_sum<T: Element, const N: usize>(
    len: usize,
    f: impl Fn(Range<usize>, &mut [T]) -> [f64; N] + Sync + Send,
) -> (Vec<T>, [f64; N]) {
    let (elements, shares) = generate(len, CHUNK, || (), |(), range, elements| f(range, elements));
    let mut sums = [0.0; N];
    for share in shares {
        for (sum, share) in sums.iter_mut().zip(share) {
            *sum += share;
        }
    }
    (elements, sums)
}
