//! Weights in panels, float32 or int8 with one scale per output, and the product with any number of rows.

use std::ops::Range;

use crate::kernels::{bytes_of, Block, Element, Isa, FEW_ROWS, LANES, PANEL, ROWS};

/// Multiply-adds from which a second thread pays for its start.
const THREAD_WORK: usize = 1 << 21;

/// Largest panel that is fetched while another is in use: both stay in a core's second cache.
const FETCH_BYTES: usize = 1 << 18;

/// Part of `k` that is multiplied with all rows before the next.
const PIECE: usize = 128;

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

    /// Keep the first `n` rows of `width` values.
    pub fn truncate(&mut self, n: usize, width: usize) {
        match self {
            Self::Float(values) => values.truncate(n * width),
            Self::Int8(values, scale) => {
                values.truncate(n * width);
                scale.truncate(n);
            }
        }
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
    isa: Isa,
    k: usize,
    columns: usize,
    packed: Packed,
}

impl Matrix {
    /// Pack a tensor of rows of `k` values.
    pub fn new(weights: Weights, k: usize, isa: Isa) -> Self {
        match weights {
            Weights::Float(w) => {
                let columns = w.len() / k;
                let mut packed = vec![0.0; columns.div_ceil(PANEL) * PANEL * k];
                for (c, row) in w.chunks_exact(k).enumerate() {
                    for (i, &value) in row.iter().enumerate() {
                        packed[c / isa.strip() * isa.strip() * k + i * isa.strip() + c % isa.strip()] = value;
                    }
                }
                Self { isa, k, columns, packed: Packed::Float(packed) }
            }
            Weights::Int8(w, scale) => {
                let (columns, padded) = (w.len() / k, k.next_multiple_of(4));
                let panels = columns.div_ceil(PANEL);
                let mut packed = vec![0; panels * PANEL * padded];
                let mut sums = vec![0; panels * PANEL];
                for (c, row) in w.chunks_exact(k).enumerate() {
                    for (i, &value) in row.iter().enumerate() {
                        let strip = isa.byte_strip();
                        let place = c / strip * strip * padded + i / 4 * 4 * strip + c % strip * 4 + i % 4;
                        packed[place] = value;
                        sums[c] += i32::from(value);
                    }
                }
                Self { isa, k, columns, packed: Packed::Int8(packed, scale, sums) }
            }
        }
    }

    /// Outputs per row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Whether the weights are bytes.
    pub fn is_int8(&self) -> bool {
        matches!(self.packed, Packed::Int8(..))
    }

    /// Multiply `rows` rows of k values; `out` becomes `rows` rows of [`Matrix::columns`] values.
    pub fn multiply(&self, threads: usize, x: &[f32], rows: usize, out: &mut Vec<f32>) {
        let input = match &self.packed {
            Packed::Float(_) => Input::Float(x),
            Packed::Int8(..) => Input::int8(self.isa, x, rows, self.k),
        };
        let panels = self.columns.div_ceil(PANEL);
        let work = rows * self.k * self.columns;
        out.resize(rows * self.columns, 0.0);
        if rows == 0 {
            return;
        }
        if threads == 1 || work < THREAD_WORK {
            self.panels(&input, rows, 0..panels, out);
            return;
        }
        let share = panels.div_ceil(threads);
        let strip = |panels: Range<usize>| {
            let width = (panels.end * PANEL).min(self.columns) - panels.start * PANEL;
            let mut part = vec![0.0; rows * width];
            self.panels(&input, rows, panels.clone(), &mut part);
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
    }

    /// Compute the columns of some panels; `out` has rows of just these columns.
    fn panels(&self, input: &Input, rows: usize, panels: Range<usize>, out: &mut [f32]) {
        let (first, last) = (panels.start * PANEL, (panels.end * PANEL).min(self.columns));
        let width = out.len() / rows;
        // Few rows take all columns of a panel at once: more sums at a time, which wait less for each other.
        let strip = if rows > FEW_ROWS && !self.is_int8() { self.isa.strip() } else { PANEL };
        let mut blocks = Vec::new();
        for at in (first..last).step_by(strip) {
            let columns = at..(at + strip).min(last);
            let out = &mut out[at - first..];
            match (&self.packed, input) {
                (Packed::Float(w), Input::Float(x)) => {
                    self.floats(w, x, rows, strip, &columns, &mut blocks);
                    for (row, out) in out.chunks_mut(width).enumerate() {
                        out[..columns.len()].copy_from_slice(&blocks[row / ROWS][row % ROWS][..columns.len()]);
                    }
                }
                (Packed::Int8(w, scales, sums), _) => {
                    self.bytes(w, (sums, scales), input, rows, &columns, (width, out));
                }
                _ => unreachable!("the input is made for the matrix"),
            }
        }
    }

    /// Compute all rows of `strip` columns, in one panel, a piece of `k` after the other: a piece of the weights stays
    /// in the nearest cache while all rows pass.
    fn floats(
        &self,
        w: &[f32],
        x: &[f32],
        rows: usize,
        strip: usize,
        columns: &Range<usize>,
        out: &mut Vec<Block<f32>>,
    ) {
        let (isa, k) = (self.isa, self.k);
        let (ldw, w) = (isa.strip(), &w[columns.start * k..]);
        let distances = (ldw, if ldw == PANEL { LANES } else { LANES * k });
        let n_blocks = rows.div_ceil(ROWS);
        out.clear();
        out.resize(n_blocks, [[0.0; PANEL]; ROWS]);
        // A single block reads the weights once, and waits for memory anyway.
        let piece = if n_blocks == 1 { k } else { PIECE };
        for at in (0..k).step_by(piece) {
            let size = piece.min(k - at);
            let next = if n_blocks == 1 { &[] } else { after(w, (at + size) * ldw, piece * ldw) };
            for (block, row) in out.iter_mut().zip((0..rows).step_by(ROWS)) {
                let few = row..(row + ROWS).min(rows);
                let (x, ahead) = (&x[few.start * k + at..], share(next, &few, rows));
                isa.float(few.len(), strip, size, x, k, &w[at * ldw..], distances, block, ahead);
            }
        }
    }

    /// Compute all rows of a panel of bytes; `out` begins at its first column and has rows of `width`.
    fn bytes(
        &self,
        w: &[i8],
        (sums, scales): (&[i32], &[f32]),
        input: &Input,
        rows: usize,
        columns: &Range<usize>,
        (width, out): (usize, &mut [f32]),
    ) {
        let Input::Int8 { values, wide, scale, zero, k } = input else {
            unreachable!("the input is made for the matrix")
        };
        let (isa, sums, scales) = (self.isa, &sums[columns.clone()], &scales[columns.clone()]);
        let (w, next) = (after(w, columns.start * k, PANEL * k), after(w, (columns.start + PANEL) * k, PANEL * k));
        // What would drive these columns out of the cache is left alone.
        let next = if rows <= ROWS || next.len() > FETCH_BYTES { &[] } else { next };
        let mut block = [[0; PANEL]; ROWS];
        for row in (0..rows).step_by(ROWS) {
            let few = row..(row + ROWS).min(rows);
            let wide = wide.get(row * k..).unwrap_or(&[]);
            isa.int8(few.len(), *k, &values[row * k..], wide, w, &mut block, share(next, &few, rows));
            for (row, block) in few.zip(&block) {
                let out = &mut out[row * width..][..columns.len()];
                isa.dequantize(block, zero[row], scale[row], sums, scales, out);
            }
        }
    }
}

/// `n` weights from a place on, as many as there are.
fn after<T>(weights: &[T], start: usize, n: usize) -> &[T] {
    &weights[start.min(weights.len())..(start + n).min(weights.len())]
}

/// What of the next weights some of `n` rows fetch meanwhile.
fn share<'a, T: Element>(next: &'a [T], rows: &Range<usize>, n: usize) -> &'a [u8] {
    bytes_of(&next[next.len() * rows.start / n..next.len() * rows.end / n])
}

/// Rows as a matrix wants them: as they are, or as bytes with a scale and a zero point per row.
enum Input<'a> {
    Float(&'a [f32]),
    Int8 { values: Vec<u8>, wide: Vec<i16>, scale: Vec<f32>, zero: Vec<i32>, k: usize },
}

impl Input<'_> {
    fn int8(isa: Isa, x: &[f32], rows: usize, width: usize) -> Self {
        let k = width.next_multiple_of(4);
        let (mut values, mut wide) = (vec![0; rows * k], Vec::new());
        let widens = isa.widens(rows);
        let rows = x.chunks_exact(width).zip(values.chunks_exact_mut(k));
        let (scale, zero) = rows.map(|(from, to)| isa.quantize(from, to)).unzip();
        if widens {
            wide.extend(values.iter().map(|&value| i16::from(value)));
        }
        Self::Int8 { values, wide, scale, zero, k }
    }
}
