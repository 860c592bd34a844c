//! Keys and values of the sequences in flight, laid out for the kernels, and attention over them.

use crate::kernels::{bytes_of, Element, Isa, LANES, PANEL, ROWS};

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
    /// Key heads, the first ones, whose keys belong one place later.
    pub offset_heads: usize,
}

impl Heads {
    fn padded_dim(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    fn padded_context(&self) -> usize {
        self.context.next_multiple_of(PANEL)
    }

    /// Where the tokens of a head begin.
    fn base(&self, layer: usize, head: usize) -> usize {
        (layer * self.n_kv_head + head) * self.padded_context()
    }
}

/// One sequence, as float32 or as bytes with a scale for each key and value of a head.
#[derive(Clone)]
pub enum Slot {
    /// Exact.
    Float(Cache<f32>),
    /// A quarter of the memory to read at every step.
    Int8(Cache<i8>),
}

macro_rules! with_cache {
    ($slot:expr, $cache:ident => $body:expr) => {
        match $slot {
            Slot::Float($cache) => $body,
            Slot::Int8($cache) => $body,
        }
    };
}

impl Slot {
    /// An empty slot.
    pub fn new(int8: bool) -> Self {
        if int8 {
            Self::Int8(Cache::default())
        } else {
            Self::Float(Cache::default())
        }
    }

    /// Take memory for a whole context; the system hands it out page by page, when it is first written.
    pub fn open(&mut self, heads: &Heads) {
        with_cache!(self, cache => cache.open(heads));
    }

    /// Give the memory back, and with it whatever was not finite.
    pub fn clear(&mut self) {
        with_cache!(self, cache => *cache = Cache::default());
    }

    /// Hold the first `n` tokens of another slot of the same kind.
    pub fn copy_from(&mut self, other: &Self, heads: &Heads, n: usize) {
        match (self, other) {
            (Self::Float(to), Self::Float(from)) => to.copy_from(from, heads, n),
            (Self::Int8(to), Self::Int8(from)) => to.copy_from(from, heads, n),
            _ => unreachable!("the slots of a model are of one kind"),
        }
    }

    /// Store the key and value of one head at a position.
    pub fn write(
        &mut self,
        isa: Isa,
        heads: &Heads,
        place: (usize, usize),
        position: usize,
        key: &[f32],
        value: &[f32],
    ) {
        with_cache!(self, cache => cache.write(isa, heads, place, position, key, value));
    }

    /// Attend from queries at `positions` (ascending, at most [`ROWS`]) of one key head's group.
    ///
    /// `place`: layer and key head. `q`: a row of head_dim values per query, scaled. `out`: as many rows. Keys at the
    /// query's position and the `window - 1` before it are seen. `ahead`: the keys that are needed next.
    #[allow(clippy::too_many_arguments)]
    pub fn attend(
        &self,
        isa: Isa,
        heads: &Heads,
        place: (usize, usize),
        window: usize,
        positions: &[usize],
        q: &[f32],
        ahead: &[u8],
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let base = heads.base(place.0, place.1);
        with_cache!(self, cache => cache.attend(isa, heads, base, window, positions, q, ahead, scores, out));
    }

    /// The first keys that a query at `position` sees.
    pub fn first_keys(&self, heads: &Heads, place: (usize, usize), window: usize, position: usize) -> &[u8] {
        let start = heads.base(place.0, place.1) + first_panel(position, window);
        with_cache!(self, cache => bytes_of(&cache.keys[start * heads.head_dim..][..PANEL * heads.head_dim]))
    }
}

/// Keys in panels of 64 tokens, values one token after the other, the scales of both. Empty until used.
///
/// `late`: for every place, the exact key of the token before, for heads whose keys belong one place later.
#[derive(Clone, Default)]
pub struct Cache<T> {
    keys: Vec<T>,
    values: Vec<T>,
    key_scales: Vec<f32>,
    value_scales: Vec<f32>,
    late: Vec<f32>,
    line: Vec<T>,
}

impl<T: Element> Cache<T> {
    fn open(&mut self, heads: &Heads) {
        if self.keys.is_empty() {
            let n = heads.base(heads.n_layer, 0);
            self.keys = vec![T::default(); n * heads.head_dim];
            self.values = vec![T::default(); n * heads.padded_dim()];
            (self.key_scales, self.value_scales) = (vec![0.0; n], vec![0.0; n]);
            self.late = vec![0.0; heads.n_layer * heads.offset_heads * heads.padded_context() * heads.head_dim];
            self.line = vec![T::default(); heads.head_dim];
        }
    }

    fn copy_from(&mut self, other: &Self, heads: &Heads, n: usize) {
        self.open(heads);
        let context = heads.padded_context();
        copy_heads(&mut self.keys, &other.keys, context * heads.head_dim, n.next_multiple_of(PANEL) * heads.head_dim);
        copy_heads(&mut self.values, &other.values, context * heads.padded_dim(), n * heads.padded_dim());
        copy_heads(&mut self.key_scales, &other.key_scales, context, n);
        copy_heads(&mut self.value_scales, &other.value_scales, context, n);
        let places = (n + 1).min(context);
        copy_heads(&mut self.late, &other.late, context * heads.head_dim, places * heads.head_dim);
    }

    fn write(&mut self, isa: Isa, heads: &Heads, place: (usize, usize), position: usize, key: &[f32], value: &[f32]) {
        let base = heads.base(place.0, place.1);
        let at = base + position;
        if place.1 < heads.offset_heads {
            let late = (place.0 * heads.offset_heads + place.1) * heads.padded_context() + position;
            let (now, next) = self.late[late * heads.head_dim..].split_at_mut(heads.head_dim);
            self.key_scales[at] = T::store(isa, now, &mut self.line);
            if position + 1 < heads.context {
                next[..heads.head_dim].copy_from_slice(key);
            }
        } else {
            self.key_scales[at] = T::store(isa, key, &mut self.line);
        }
        let panel = &mut self.keys[(base + position / PANEL * PANEL) * heads.head_dim..];
        for (row, &k) in panel.chunks_exact_mut(PANEL).zip(&self.line) {
            row[position % PANEL] = k;
        }
        let start = at * heads.padded_dim();
        self.value_scales[at] = T::store(isa, value, &mut self.values[start..start + value.len()]);
    }

    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        isa: Isa,
        heads: &Heads,
        base: usize,
        window: usize,
        positions: &[usize],
        q: &[f32],
        ahead: &[u8],
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let (dim, padded, rows) = (heads.head_dim, heads.padded_dim(), positions.len());
        let first = |position: usize| (position + 1).saturating_sub(window);
        let start = first_panel(positions[0], window);
        let end = positions[rows - 1] + 1;
        let width = (end - start).next_multiple_of(PANEL);
        scores.resize(rows * width, 0.0);
        for at in (start..end).step_by(PANEL) {
            let keys = &self.keys[(base + at) * dim..(base + at + PANEL) * dim];
            let values = &self.values[(base + at) * padded..(base + end.min(at + PANEL)) * padded];
            let mut block = [[0.0; PANEL]; ROWS];
            isa.float(rows, PANEL, dim, q, dim, keys, (PANEL, LANES), &mut block, bytes_of(values));
            for (row, values) in scores.chunks_exact_mut(width).zip(&block) {
                row[at - start..at - start + PANEL].copy_from_slice(values);
            }
        }
        let mut sums = [0.0; ROWS];
        let scales = base + start..base + start + width;
        let (key_scales, value_scales) = (&self.key_scales[scales.clone()], &self.value_scales[scales]);
        for ((row, &position), sum) in scores.chunks_exact_mut(width).zip(positions).zip(&mut sums) {
            *sum = isa.softmax(row, first(position) - start, position + 1 - start, key_scales, value_scales);
        }
        for at in (0..padded).step_by(PANEL) {
            let columns = PANEL.min(padded - at);
            let values = &self.values[(base + start) * padded + at..];
            let mut block = [[0.0; PANEL]; ROWS];
            isa.float(rows, columns, end - start, scores, width, values, (padded, LANES), &mut block, ahead);
            for (m, row) in out.chunks_exact_mut(dim).enumerate() {
                let n = columns.min(dim - at);
                for (o, &y) in row[at..at + n].iter_mut().zip(&block[m]) {
                    *o = y / sums[m];
                }
            }
        }
    }
}

/// Where the panel begins that holds the first key seen from a position.
fn first_panel(position: usize, window: usize) -> usize {
    (position + 1).saturating_sub(window) / PANEL * PANEL
}

/// Copy the first `n` of every `stride` elements.
fn copy_heads<T: Copy>(to: &mut [T], from: &[T], stride: usize, n: usize) {
    for (to, from) in to.chunks_exact_mut(stride).zip(from.chunks_exact(stride)) {
        to[..n].copy_from_slice(&from[..n]);
    }
}
