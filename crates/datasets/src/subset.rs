//! The selection of some images of a split.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::error::{Error, Result};
use crate::text::counted;

/// Returns the indices of the first `n` images, taken from the classes in turn, in ascending order.
pub(crate) fn first(labels: &[u16], classes: usize, n: usize) -> Vec<usize> {
    balanced(&Vec::from_iter(0..labels.len()), labels, classes, n)
}

/// Returns the indices of the training images and of `n` held-out images, both ascending.
///
/// `seed` determines the held-out images, which are spread evenly over the classes.
///
/// # Errors
///
/// [`Error::Invalid`] unless `0 < n < labels.len()`.
pub(crate) fn hold_out(labels: &[u16], classes: usize, n: usize, seed: u64) -> Result<[Vec<usize>; 2]> {
    let all = labels.len();
    if n == 0 || n >= all {
        let expected = match all {
            0 | 1 => "expected at least 2 training images".into(),
            _ => format!("expected hold_out from 1 to {}", all - 1),
        };
        let there = counted(all, "training image");
        return Err(Error::Invalid(format!("cannot hold out {n} of {there}: {expected}")));
    }
    let mut order = Vec::from_iter(0..all);
    order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
    let held = balanced(&order, labels, classes, n);
    let kept = (0..all).filter(|i| held.binary_search(i).is_err()).collect();
    Ok([kept, held])
}

/// Returns `n` of the indices in `order`, in ascending order.
///
/// The first index of every class is taken, then the second index of every class, and so on. So the
/// numbers of images of two classes differ by at most one, unless a class runs out of images.
fn balanced(order: &[usize], labels: &[u16], classes: usize, n: usize) -> Vec<usize> {
    let mut seen = vec![0usize; classes];
    let mut ranked: Vec<(usize, usize)> = order
        .iter()
        .map(|&i| {
            let rank = &mut seen[usize::from(labels[i])];
            *rank += 1;
            (*rank, i)
        })
        .collect();
    ranked.sort_by_key(|&(rank, _)| rank);
    let mut taken: Vec<usize> = ranked.into_iter().take(n).map(|(_, i)| i).collect();
    taken.sort_unstable();
    taken
}
