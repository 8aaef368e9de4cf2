use crate::Ranks;
use std::sync::{Arc, Barrier, Mutex};

/// A rank that is a thread of this process, for tests. If a thread ends early, the other threads
/// wait forever.
#[derive(Debug)]
pub struct Thread {
    rank: usize,
    table: Arc<Table>,
}

/// The shared memory through which the threads exchange data.
#[derive(Debug)]
struct Table {
    given: Vec<Mutex<Vec<u8>>>,
    all: Barrier,
}

/// Creates `size` ranks, one for each thread.
pub fn threads(size: usize) -> Vec<Thread> {
    let table =
        Arc::new(Table { given: (0..size).map(|_| Mutex::default()).collect(), all: Barrier::new(size) });
    (0..size).map(|rank| Thread { rank, table: table.clone() }).collect()
}

impl Thread {
    /// Returns what each rank passes, in the order of the ranks.
    fn exchange(&self, bytes: Vec<u8>) -> Vec<Vec<u8>> {
        let Table { given, all } = &*self.table;
        let of = |rank: usize| given[rank].lock().expect("no rank has failed");
        *of(self.rank) = bytes;
        all.wait();
        let found = (0..given.len()).map(|rank| of(rank).clone()).collect();
        // No rank may write again before all ranks have read.
        all.wait();
        found
    }
}

impl Ranks for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.table.given.len()
    }

    fn sum(&self, values: &mut [f32]) {
        let all = self.exchange(values.iter().flat_map(|value| value.to_le_bytes()).collect());
        values.fill(0.0);
        for bytes in all {
            let (terms, _) = bytes.as_chunks();
            values.iter_mut().zip(terms).for_each(|(sum, term)| *sum += f32::from_le_bytes(*term));
        }
    }

    fn gather(&self, values: &[f64]) -> Vec<f64> {
        let all = self.exchange(values.iter().flat_map(|value| value.to_le_bytes()).collect()).concat();
        all.as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect()
    }

    fn broadcast(&self, bytes: Vec<u8>) -> Vec<u8> {
        self.exchange(bytes).swap_remove(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_gets_the_same() {
        let found: Vec<_> = std::thread::scope(|scope| {
            let of = |ranks: Thread| {
                let mut sums = [ranks.rank() as f32, 0.5];
                ranks.sum(&mut sums);
                let number = ranks.rank() as f64;
                ranks.barrier();
                let said = ranks.broadcast(vec![7; ranks.rank() + 2]);
                (sums, ranks.gather(&[number, -number]), ranks.totals(&[number, 1.0]), said)
            };
            let running: Vec<_> =
                threads(3).into_iter().map(|ranks| scope.spawn(move || of(ranks))).collect();
            running.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let gathered = vec![0.0, -0.0, 1.0, -1.0, 2.0, -2.0];
        assert_eq!(found, vec![([3.0, 1.5], gathered, vec![3.0, 3.0], vec![7; 2]); 3]);
    }
}
