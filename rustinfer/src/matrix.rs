//! Weights in panels, float32 or int8 with one scale per output, and the product with any number of rows.

use std::ops::Range;

use crate::kernels::{Isa, FEW_ROWS, LANES, PANEL, ROWS};

/// Multiply-adds from which a second thread pays for its start.
const THREAD_WORK: usize = 1 << 21;

/// Largest panel that is fetched while another is in use: both stay in a core's second cache.
const FETCH_BYTES: usize = 1 << 18;

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
        for at in (first..last).step_by(strip) {
            let columns = at..(at + strip).min(last);
            for row in (0..rows).step_by(ROWS) {
                let few = row..(row + ROWS).min(rows);
                self.block(input, few, columns.clone(), strip, (width, rows), &mut out[row * width + at - first..]);
            }
        }
    }

    /// Compute some rows of `strip` columns, in one panel; `out` begins at their first one and has n rows of `width`.
    fn block(
        &self,
        input: &Input,
        rows: Range<usize>,
        columns: Range<usize>,
        strip: usize,
        (width, n): (usize, usize),
        out: &mut [f32],
    ) {
        let isa = self.isa;
        let out = out.chunks_mut(width).map(|row| &mut row[..columns.len()]);
        match (&self.packed, input) {
            (Packed::Float(w), Input::Float(x)) => {
                let next = share(of_columns(w, columns.start + strip, strip, self.k), &rows, n);
                let (ldw, w) = (isa.strip(), of_columns(w, columns.start, strip, self.k));
                let distances = (ldw, if ldw == PANEL { LANES } else { LANES * self.k });
                let (x, mut block) = (&x[rows.start * self.k..], [[0.0; PANEL]; ROWS]);
                isa.float(rows.len(), strip, self.k, x, self.k, w, distances, &mut block, next);
                for ((out, block), _) in out.zip(&block).zip(rows) {
                    out.copy_from_slice(&block[..columns.len()]);
                }
            }
            (Packed::Int8(w, scales, sums), Input::Int8 { values, wide, scale, zero, k }) => {
                let next = share(of_columns(w, columns.start + strip, strip, *k), &rows, n);
                let w = of_columns(w, columns.start, strip, *k);
                let mut block = [[0; PANEL]; ROWS];
                let wide = wide.get(rows.start * k..).unwrap_or(&[]);
                isa.int8(rows.len(), *k, &values[rows.start * k..], wide, w, &mut block, next);
                let (sums, scales) = (&sums[columns.clone()], &scales[columns.clone()]);
                for ((out, block), row) in out.zip(&block).zip(rows) {
                    isa.dequantize(block, zero[row], scale[row], sums, scales, out);
                }
            }
            _ => unreachable!("the input is made for the matrix"),
        }
    }
}

/// The weights of `n` columns, as many as lie side by side; none after the last.
fn of_columns<T>(weights: &[T], first: usize, n: usize, k: usize) -> &[T] {
    &weights[(first * k).min(weights.len())..((first + n) * k).min(weights.len())]
}

/// What of the next columns some of `n` rows fetch meanwhile. A single block waits for memory anyway, and columns that
/// would drive these out of the cache are left alone.
fn share<'a, T>(next: &'a [T], rows: &Range<usize>, n: usize) -> &'a [T] {
    if n <= ROWS || size_of_val(next) > FETCH_BYTES {
        return &[];
    }
    &next[next.len() * rows.start / n..next.len() * rows.end / n]
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
