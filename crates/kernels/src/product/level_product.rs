//! The operands of a product of quantization levels.

use super::{GROUP, LANES, Line};

/// Integer weights as the right-hand operand: 16 columns at a time, the depth in groups of four,
/// with zeros for missing weights.
pub(crate) struct IntegerPanels {
    pub(super) lines: Vec<Line<[i8; GROUP]>>,
    /// The number of groups of a column, including those that fill up a matrix tile.
    pub(super) groups: usize,
    pub(super) columns: usize,
    /// The sum of each column.
    pub(super) sums: Vec<i32>,
    /// The largest absolute value of a weight.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    pub(super) largest: u32,
}

impl IntegerPanels {
    /// Packs `w[depth, columns]`.
    pub(crate) fn new(w: &[i8], depth: usize, columns: usize) -> Self {
        let groups = groups(depth);
        let mut lines = vec![Line([[0; GROUP]; LANES]); columns.div_ceil(LANES) * groups];
        let mut sums = vec![0; columns.next_multiple_of(LANES)];
        for (p, row) in w.chunks_exact(columns).enumerate() {
            for (panel, (row, sums)) in row.chunks(LANES).zip(sums.chunks_exact_mut(LANES)).enumerate() {
                let vector = &mut lines[panel * groups + p / GROUP];
                for ((slot, w), sum) in vector.0.iter_mut().zip(row).zip(sums) {
                    slot[p % GROUP] = *w;
                    *sum += i32::from(*w);
                }
            }
        }
        let largest = w.iter().map(|w| u32::from(w.unsigned_abs())).max().unwrap_or(0);
        Self { lines, groups, columns, sums, largest }
    }
}

/// Returns the number of groups of a column, filled up to whole matrix tiles.
pub(super) fn groups(depth: usize) -> usize {
    depth.div_ceil(GROUP).next_multiple_of(LANES)
}

/// The operands of [`set_levels`](super::set_levels). Each column's sums begin with `shift`.
pub(super) struct LevelProduct<'a> {
    pub(super) x: &'a [u8],
    /// An upper bound of the elements of `x`.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code))]
    pub(super) highest: u32,
    pub(super) depth: usize,
    pub(super) w: &'a IntegerPanels,
    pub(super) shift: &'a [i32],
    pub(super) scale: &'a [f32],
}

impl LevelProduct<'_> {
    /// Returns the number of groups whose sums fit in 16 bits. AVX2 adds half of a group's products
    /// to each 16-bit sum.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn groups_in_16_bits(&self) -> usize {
        let most_of_a_group = 2 * self.highest * self.w.largest;
        (i16::MAX as u32).checked_div(most_of_a_group).map_or(usize::MAX, |groups| groups as usize)
    }
}
