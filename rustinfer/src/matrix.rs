//! Weights in panels, float32 or int8 with one scale per output, and the product with any number of rows.

use crate::kernels::{Block, Isa, PANEL, ROWS};

/// Multiply-adds from which a second thread pays for its start.
const THREAD_WORK: usize = 1 << 21;

/// A tensor as it comes: row-major float32, or int8 with a scale per row.
pub enum Weights {
    /// Values.
    Float(Vec<f32>),
    /// Values and the scale of each row.
    Int8(Vec<i8>, Vec<f32>),
}

impl Weights {
    /// Append the rows of another tensor of the same kind and width.
    pub fn stack(&mut self, other: Self) -> Result<(), String> {
        match (self, other) {
            (Self::Float(a), Self::Float(b)) => a.extend(b),
            (Self::Int8(a, s), Self::Int8(b, t)) => {
                a.extend(b);
                s.extend(t);
            }
            _ => return Err("tensors of one layer differ in kind".to_owned()),
        }
        Ok(())
    }
}

/// Rows looked up by token id.
pub struct Table {
    weights: Weights,
    width: usize,
}

impl Table {
    /// Make a table of rows of `width` values.
    pub fn new(weights: Weights, width: usize) -> Self {
        Self { weights, width }
    }

    /// Copy row `i` to `out`.
    pub fn read(&self, i: usize, out: &mut [f32]) {
        let place = i * self.width..(i + 1) * self.width;
        match &self.weights {
            Weights::Float(w) => out.copy_from_slice(&w[place]),
            Weights::Int8(w, scale) => {
                for (o, &q) in out.iter_mut().zip(&w[place]) {
                    *o = f32::from(q) * scale[i];
                }
            }
        }
    }
}

enum Packed {
    Float(Vec<f32>),
    /// Values, scale of each column, sum of each column's values.
    Int8(Vec<i8>, Vec<f32>, Vec<i32>),
}

/// A (columns, k) weight matrix: row x becomes W x.
pub struct Matrix {
    k: usize,
    columns: usize,
    packed: Packed,
}

impl Matrix {
    /// Pack a tensor of rows of `k` values.
    pub fn new(weights: Weights, k: usize) -> Self {
        match weights {
            Weights::Float(w) => {
                let columns = w.len() / k;
                let mut packed = vec![0.0; columns.div_ceil(PANEL) * PANEL * k];
                for (c, row) in w.chunks_exact(k).enumerate() {
                    for (i, &value) in row.iter().enumerate() {
                        packed[c / PANEL * PANEL * k + i * PANEL + c % PANEL] = value;
                    }
                }
                Self { k, columns, packed: Packed::Float(packed) }
            }
            Weights::Int8(w, scale) => {
                let (columns, padded) = (w.len() / k, k.next_multiple_of(4));
                let panels = columns.div_ceil(PANEL);
                let mut packed = vec![0; panels * PANEL * padded];
                let mut sums = vec![0; panels * PANEL];
                for (c, row) in w.chunks_exact(k).enumerate() {
                    for (i, &value) in row.iter().enumerate() {
                        let place = c / PANEL * PANEL * padded + i / 4 * 4 * PANEL + c % PANEL * 4 + i % 4;
                        packed[place] = value;
                        sums[c] += i32::from(value);
                    }
                }
                Self { k, columns, packed: Packed::Int8(packed, scale, sums) }
            }
        }
    }

    /// Outputs per row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Multiply `rows` rows of k values; returns `rows` rows of [`Matrix::columns`] values.
    pub fn multiply(&self, isa: Isa, threads: usize, x: &[f32], rows: usize) -> Vec<f32> {
        let input = match &self.packed {
            Packed::Float(_) => Input::Float(x),
            Packed::Int8(..) => Input::int8(isa, x, rows, self.k),
        };
        let panels = self.columns.div_ceil(PANEL);
        let work = rows * self.k * self.columns;
        let mut out = vec![0.0; rows * self.columns];
        if rows == 0 {
            return out;
        }
        if threads == 1 || work < THREAD_WORK {
            self.strip(isa, &input, rows, 0..panels, &mut out);
            return out;
        }
        let share = panels.div_ceil(threads);
        let strip = |panels: std::ops::Range<usize>| {
            let width = (panels.end * PANEL).min(self.columns) - panels.start * PANEL;
            let mut part = vec![0.0; rows * width];
            self.strip(isa, &input, rows, panels.clone(), &mut part);
            (panels.start * PANEL, width, part)
        };
        let strip = &strip;
        std::thread::scope(|scope| {
            let begin = |start: usize| scope.spawn(move || strip(start..(start + share).min(panels)));
            let crew: Vec<_> = (0..panels).step_by(share).map(begin).collect();
            for worker in crew {
                let (at, width, part) = worker.join().expect("a worker does not panic");
                for (to, from) in out.chunks_exact_mut(self.columns).zip(part.chunks_exact(width)) {
                    to[at..at + width].copy_from_slice(from);
                }
            }
        });
        out
    }

    /// Compute the columns of some panels; `out` has rows of just these columns.
    fn strip(&self, isa: Isa, input: &Input, rows: usize, panels: std::ops::Range<usize>, out: &mut [f32]) {
        let first = panels.start * PANEL;
        let width = out.len() / rows;
        for panel in panels {
            let at = panel * PANEL;
            let columns = PANEL.min(self.columns - at);
            for row in (0..rows).step_by(ROWS) {
                let n = ROWS.min(rows - row);
                let mut block = [[0.0; PANEL]; ROWS];
                self.block(isa, input, row, n, panel, columns, &mut block);
                for (m, values) in block.iter().enumerate().take(n) {
                    let place = (row + m) * width + at - first;
                    out[place..place + columns].copy_from_slice(&values[..columns]);
                }
            }
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn block(&self, isa: Isa, input: &Input, row: usize, n: usize, panel: usize, columns: usize, out: &mut Block<f32>) {
        match (&self.packed, input) {
            (Packed::Float(w), Input::Float(x)) => {
                let w = &w[panel * PANEL * self.k..(panel + 1) * PANEL * self.k];
                isa.float(n, PANEL, self.k, &x[row * self.k..], self.k, w, PANEL, out);
            }
            (Packed::Int8(w, scales, sums), Input::Int8 { values, scale, zero, k }) => {
                let mut sum = [[0; PANEL]; ROWS];
                isa.int8(n, *k, &values[row * k..], &w[panel * PANEL * k..(panel + 1) * PANEL * k], &mut sum);
                let at = panel * PANEL;
                let place = at..at + columns;
                for m in 0..n {
                    let (zero, scale) = (zero[row + m], scale[row + m]);
                    isa.dequantize(&sum[m], zero, scale, &sums[place.clone()], &scales[place.clone()], &mut out[m]);
                }
            }
            _ => unreachable!("the input is made for the matrix"),
        }
    }
}

/// Rows as a matrix wants them: as they are, or as bytes with a scale and a zero point per row.
enum Input<'a> {
    Float(&'a [f32]),
    Int8 { values: Vec<u8>, scale: Vec<f32>, zero: Vec<i32>, k: usize },
}

impl Input<'_> {
    fn int8(isa: Isa, x: &[f32], rows: usize, width: usize) -> Self {
        let k = width.next_multiple_of(4);
        let mut values = vec![0; rows * k];
        let rows = x.chunks_exact(width).zip(values.chunks_exact_mut(k));
        let (scale, zero) = rows.map(|(from, to)| isa.quantize(from, to)).unzip();
        Self::Int8 { values, scale, zero, k }
    }
}
