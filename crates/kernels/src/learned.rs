//! What the operations of learned quantizers share: their gradients are a tensor and some sums over all elements.

pub(crate) mod gpu;

use crate::elements::Element;
use crate::work::{CHUNK, generate};
use std::ops::Range;

/// Independent sums that a loop keeps, so that it vectorizes.
pub(crate) const LANES: usize = 16;

/// Sums that a loop keeps lane by lane.
pub(crate) type Lanes = [f64; LANES];

/// `len` elements and `N` sums over all of them. `f(range, elements)` computes the elements of a chunk, and its share
/// of the sums; the shares are added up in order, so that the threads do not show.
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
