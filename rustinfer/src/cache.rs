//! Keys and values of the sequences in flight, laid out for the kernels, and attention over them.

use crate::kernels::{Isa, LANES, PANEL, ROWS};

/// Sizes that attention needs. Letters as in the Python model.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Layers.
    pub n_layer: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads.
    pub n_kv_head: usize,
    /// Channels per head.
    pub head_dim: usize,
    /// Most tokens of a sequence.
    pub context: usize,
}

impl Heads {
    fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    fn padded_context(&self) -> usize {
        self.context.next_multiple_of(PANEL)
    }
}

/// One sequence: keys in panels of 64 tokens, values one token after the other. Empty until used.
#[derive(Clone, Default)]
pub struct Slot {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Slot {
    /// Take memory for a whole context; the system hands it out page by page, when it is first written.
    pub fn open(&mut self, heads: &Heads) {
        if self.keys.is_empty() {
            let n = heads.n_layer * heads.n_kv_head * heads.padded_context();
            self.keys = vec![0.0; n * heads.head_dim];
            self.values = vec![0.0; n * heads.padded_dim()];
        }
    }

    /// Give the memory back, and with it whatever was not finite.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Hold the first `n` tokens of another slot.
    pub fn copy_from(&mut self, other: &Self, heads: &Heads, n: usize) {
        self.open(heads);
        let (key_stride, value_stride) =
            (heads.padded_context() * heads.head_dim, heads.padded_context() * heads.padded_dim());
        let (n_keys, n_values) = (n.next_multiple_of(PANEL) * heads.head_dim, n * heads.padded_dim());
        for (to, from) in self.keys.chunks_exact_mut(key_stride).zip(other.keys.chunks_exact(key_stride)) {
            to[..n_keys].copy_from_slice(&from[..n_keys]);
        }
        for (to, from) in self.values.chunks_exact_mut(value_stride).zip(other.values.chunks_exact(value_stride)) {
            to[..n_values].copy_from_slice(&from[..n_values]);
        }
    }

    /// Store the key and value of one head at a position.
    pub fn write(&mut self, heads: &Heads, layer: usize, head: usize, position: usize, key: &[f32], value: &[f32]) {
        let base = (layer * heads.n_kv_head + head) * heads.padded_context();
        let panel = (base + position / PANEL * PANEL) * heads.head_dim;
        for (d, &k) in key.iter().enumerate() {
            self.keys[panel + d * PANEL + position % PANEL] = k;
        }
        let at = (base + position) * heads.padded_dim();
        self.values[at..at + value.len()].copy_from_slice(value);
    }

    /// Attend from queries at `positions` (ascending, at most [`ROWS`]) of one key head's group.
    ///
    /// `q`: a row of head_dim values per query, scaled. `out`: as many rows. Keys at the query's position and the
    /// `window - 1` before it are seen.
    #[allow(clippy::too_many_arguments)]
    pub fn attend(
        &self,
        isa: Isa,
        heads: &Heads,
        layer: usize,
        head: usize,
        window: usize,
        positions: &[usize],
        q: &[f32],
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let (dim, padded, rows) = (heads.head_dim, heads.padded_dim(), positions.len());
        let base = (layer * heads.n_kv_head + head) * heads.padded_context();
        let first = |position: usize| (position + 1).saturating_sub(window);
        let start = first(positions[0]) / PANEL * PANEL;
        let end = positions[rows - 1] + 1;
        let width = (end - start).next_multiple_of(PANEL);
        scores.clear();
        scores.resize(rows * width, 0.0);
        let mut block = [[0.0; PANEL]; ROWS];
        for at in (start..end).step_by(PANEL) {
            let keys = &self.keys[(base + at) * dim..(base + at + PANEL) * dim];
            isa.float(rows, PANEL, dim, q, dim, keys, PANEL, &mut block);
            for (row, values) in scores.chunks_exact_mut(width).zip(&block) {
                row[at - start..at - start + PANEL].copy_from_slice(values);
            }
        }
        let mut sums = [0.0; ROWS];
        for ((row, &position), sum) in scores.chunks_exact_mut(width).zip(positions).zip(&mut sums) {
            *sum = softmax(isa, row, first(position) - start, position + 1 - start);
        }
        for at in (0..padded).step_by(PANEL) {
            let columns = PANEL.min(padded - at);
            let values = &self.values[(base + start) * padded + at..];
            isa.float(rows, columns, end - start, scores, width, values, padded, &mut block);
            for (m, row) in out.chunks_exact_mut(dim).enumerate() {
                let n = columns.min(dim - at);
                for (o, &y) in row[at..at + n].iter_mut().zip(&block[m]) {
                    *o = y / sums[m];
                }
            }
        }
    }
}

/// Replace scores by e to the score less the largest, zero outside `low..high`; returns their sum.
fn softmax(isa: Isa, row: &mut [f32], low: usize, high: usize) -> f32 {
    row[..low].fill(f32::NEG_INFINITY);
    row[high..].fill(f32::NEG_INFINITY);
    let mut top = [f32::NEG_INFINITY; LANES];
    for lanes in row.chunks_exact(LANES) {
        for (t, &v) in top.iter_mut().zip(lanes) {
            *t = if v > *t { v } else { *t };
        }
    }
    let top = top.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for v in row.iter_mut() {
        *v -= top;
    }
    isa.exp(row);
    row[..low].fill(0.0);
    row[high..].fill(0.0);
    let mut sum = [0.0; LANES];
    for lanes in row.chunks_exact(LANES) {
        for (s, &v) in sum.iter_mut().zip(lanes) {
            *s += v;
        }
    }
    sum.iter().sum()
}
