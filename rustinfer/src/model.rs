//! The network: the same steps as the Python model's, over rows that may belong to different sequences.

use std::collections::HashMap;

use crate::cache::{Heads, Slot};
use crate::kernels::{Isa, LANES, ROWS};
use crate::matrix::{Matrix, Table, Weights};

/// Epsilon of the norm: that of float32, as in PyTorch.
const EPSILON: f32 = f32::EPSILON;

/// Tensors by the names of the Python model.
pub type Tensors = HashMap<String, Weights>;

/// Sizes and constants of the Python model.
#[derive(Clone, Debug)]
pub struct Config {
    /// Sizes of attention.
    pub heads: Heads,
    /// Channels of the stream.
    pub n_embd: usize,
    /// Tokens; rows of the tables beyond them are padding.
    pub vocab_size: usize,
    /// Tokens that each layer's attention sees.
    pub windows: Vec<usize>,
    /// Channels that a gate looks at.
    pub gate_channels: usize,
    /// Factor on normalised queries and keys; 0 = they are not normalised.
    pub qk_scale: f32,
    /// Logits are squeezed into plus or minus this; 0 = not at all.
    pub softcap: f32,
}

struct Layer {
    qkv: Matrix,
    proj: Matrix,
    fc: Matrix,
    down: Matrix,
    resid: f32,
    first: f32,
    /// The table of value embeddings and the gate's rows, one per key head.
    value: Option<(Table, Vec<f32>)>,
}

/// A model ready to run. `rope`: cosines and sines, (context, head_dim / 2) each.
pub struct Model {
    config: Config,
    isa: Isa,
    threads: usize,
    embedding: Table,
    layers: Vec<Layer>,
    head: Matrix,
    cos: Vec<f32>,
    sin: Vec<f32>,
    smear: Option<(Vec<f32>, f32)>,
    backout: f32,
}

/// Tokens to append to a slot. Logits are wanted after the last `wanted` of them.
pub struct Part<'a> {
    /// The sequence.
    pub slot: usize,
    /// Tokens that it holds.
    pub held: usize,
    /// The last of those.
    pub previous: Option<u32>,
    /// Tokens to append.
    pub ids: &'a [u32],
    /// Places at the end for which logits are wanted.
    pub wanted: usize,
}

struct Row {
    slot: usize,
    position: usize,
    token: usize,
    previous: Option<usize>,
    wanted: bool,
}

/// Takes tensors by name and says which one is missing.
struct Source(Tensors);

impl Source {
    fn get(&mut self, name: &str) -> Result<Weights, String> {
        self.0.remove(name).ok_or_else(|| format!("tensor {name} is missing"))
    }

    fn floats(&mut self, name: &str) -> Result<Vec<f32>, String> {
        match self.get(name)? {
            Weights::Float(values) => Ok(values),
            Weights::Int8(..) => Err(format!("tensor {name} must be float32")),
        }
    }
}

impl Model {
    /// Pack the tensors; every one given must be used. Fails with the name of a tensor that is missing or left over.
    pub fn new(config: Config, tensors: Tensors, isa: Isa, threads: usize) -> Result<Self, String> {
        let mut source = Source(tensors);
        let c = config.n_embd;
        let kv = config.heads.n_kv_head * config.heads.head_dim;
        let resid = source.floats("resid_lambdas")?;
        let first = source.floats("x0_lambdas")?;
        let mut layers = Vec::new();
        for i in 0..config.heads.n_layer {
            let mut qkv = source.get(&format!("h.{i}.attn.c_q.weight"))?;
            qkv.stack(source.get(&format!("h.{i}.attn.c_k.weight"))?)?;
            qkv.stack(source.get(&format!("h.{i}.attn.c_v.weight"))?)?;
            let value = match source.get(&format!("value_embeds.{i}.weight")) {
                Ok(table) => Some((Table::new(table, kv), source.floats(&format!("h.{i}.attn.ve_gate.weight"))?)),
                Err(_) => None,
            };
            let proj = source.get(&format!("h.{i}.attn.c_proj.weight"))?;
            let fc = Matrix::new(source.get(&format!("h.{i}.mlp.c_fc.weight"))?, c);
            let down = Matrix::new(source.get(&format!("h.{i}.mlp.c_proj.weight"))?, fc.columns());
            let (qkv, proj) = (Matrix::new(qkv, c), Matrix::new(proj, c));
            layers.push(Layer { qkv, proj, fc, down, resid: resid[i], first: first[i], value });
        }
        let smear = match source.floats("smear_gate.weight") {
            Ok(gate) => Some((gate, source.floats("smear_lambda")?[0])),
            Err(_) => None,
        };
        let model = Self {
            isa,
            threads: threads.max(1),
            embedding: Table::new(source.get("wte.weight")?, c),
            layers,
            head: Matrix::new(source.get("lm_head.weight")?, c),
            cos: source.floats("rope.cos")?,
            sin: source.floats("rope.sin")?,
            smear,
            backout: source.floats("backout_lambda").map_or(0.0, |v| v[0]),
            config,
        };
        match source.0.keys().next() {
            Some(name) => Err(format!("tensor {name} is not known here")),
            None => Ok(model),
        }
    }

    /// The model's sizes.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Append every part to its slot; returns logits, `vocab_size` per wanted place, in order.
    ///
    /// Fails when a part does not fit the context, names an unknown token or slot, or when a slot is named twice.
    pub fn forward(&self, slots: &mut [Slot], parts: &[Part]) -> Result<Vec<f32>, String> {
        let rows = self.rows(slots.len(), parts)?;
        for part in parts {
            slots[part.slot].open(&self.config.heads);
        }
        let (c, n) = (self.config.n_embd, rows.len());
        let mut x = self.embed(&rows);
        let x0 = x.clone();
        let mut middle = Vec::new();
        let mut normed = vec![0.0; n * c];
        for (i, layer) in self.layers.iter().enumerate() {
            for (x, x0) in x.iter_mut().zip(&x0) {
                *x = layer.resid * *x + layer.first * x0;
            }
            rms_norm(&x, c, &mut normed);
            let y = self.attention(i, &normed, &rows, slots);
            add(&mut x, &layer.proj.multiply(self.isa, self.threads, &y, n));
            rms_norm(&x, c, &mut normed);
            let mut hidden = layer.fc.multiply(self.isa, self.threads, &normed, n);
            for h in &mut hidden {
                let positive = h.max(0.0);
                *h = if h.is_nan() { *h } else { positive * positive };
            }
            add(&mut x, &layer.down.multiply(self.isa, self.threads, &hidden, n));
            if i == (self.layers.len() - 1) / 2 {
                middle.clone_from(&x);
            }
        }
        let mut last = Vec::new();
        for ((row, x), middle) in rows.iter().zip(x.chunks_exact(c)).zip(middle.chunks_exact(c)) {
            if row.wanted {
                last.extend(x.iter().zip(middle).map(|(x, m)| x - self.backout * m));
            }
        }
        Ok(self.logits(&last))
    }

    fn rows(&self, n_slots: usize, parts: &[Part]) -> Result<Vec<Row>, String> {
        let mut rows: Vec<Row> = Vec::new();
        let mut seen = vec![false; n_slots];
        for part in parts {
            if part.slot >= n_slots || std::mem::replace(&mut seen[part.slot], true) {
                return Err(format!("slot {} does not exist or is named twice", part.slot));
            }
            if part.held + part.ids.len() > self.config.heads.context {
                let (n, context) = (part.held + part.ids.len(), self.config.heads.context);
                return Err(format!("{n} tokens do not fit the context of {context}"));
            }
            let mut previous = part.previous;
            for (i, &token) in part.ids.iter().enumerate() {
                if token as usize >= self.config.vocab_size {
                    return Err(format!("token {token} is not below {}", self.config.vocab_size));
                }
                let wanted = i + part.wanted >= part.ids.len();
                let before = previous.map(|id| id as usize);
                rows.push(Row {
                    slot: part.slot,
                    position: part.held + i,
                    token: token as usize,
                    previous: before,
                    wanted,
                });
                previous = Some(token);
            }
        }
        Ok(rows)
    }

    /// Embed tokens, norm, and let each mix in a learned share of the one before it.
    fn embed(&self, rows: &[Row]) -> Vec<f32> {
        let c = self.config.n_embd;
        let look_up = |token: usize, out: &mut [f32]| {
            let mut raw = vec![0.0; c];
            self.embedding.read(token, &mut raw);
            rms_norm(&raw, c, out);
        };
        let mut x = vec![0.0; rows.len() * c];
        let mut before = vec![0.0; c];
        for (row, x) in rows.iter().zip(x.chunks_exact_mut(c)) {
            look_up(row.token, x);
            if let (Some(previous), Some((gate, lambda))) = (row.previous, &self.smear) {
                look_up(previous, &mut before);
                let share = lambda * 2.0 * sigmoid(dot(gate, &x[..gate.len()]));
                x.iter_mut().zip(&before).for_each(|(x, b)| *x += share * b);
            }
        }
        x
    }

    /// Project, rotate and norm, store keys and values, attend. Returns the input of the output projection.
    fn attention(&self, i: usize, normed: &[f32], rows: &[Row], slots: &mut [Slot]) -> Vec<f32> {
        let (heads, c) = (&self.config.heads, self.config.n_embd);
        let (d, kv) = (heads.head_dim, heads.n_kv_head * heads.head_dim);
        let layer = &self.layers[i];
        let mut qkv = layer.qkv.multiply(self.isa, self.threads, normed, rows.len());
        let scale = 1.0 / (d as f32).sqrt();
        let mut value = vec![0.0; kv];
        for ((row, qkv), normed) in rows.iter().zip(qkv.chunks_exact_mut(c + 2 * kv)).zip(normed.chunks_exact(c)) {
            let (q, rest) = qkv.split_at_mut(c);
            let (k, v) = rest.split_at_mut(kv);
            q.chunks_exact_mut(d).for_each(|head| self.rotate(head, row.position, scale));
            k.chunks_exact_mut(d).for_each(|head| self.rotate(head, row.position, 1.0));
            if let Some((table, gates)) = &layer.value {
                table.read(row.token, &mut value);
                for (h, gate) in gates.chunks_exact(self.config.gate_channels).enumerate() {
                    let share = 2.0 * sigmoid(dot(gate, &normed[..gate.len()]));
                    let place = h * d..(h + 1) * d;
                    v[place.clone()].iter_mut().zip(&value[place]).for_each(|(v, e)| *v += share * e);
                }
            }
            for (h, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
                slots[row.slot].write(heads, i, h, row.position, k, v);
            }
        }
        let mut y = vec![0.0; rows.len() * c];
        let slots: &[Slot] = slots;
        let jobs: Vec<(usize, usize)> = blocks(rows, heads.n_head / heads.n_kv_head);
        let mut scratch = Scratch::default();
        for (start, end) in jobs {
            for h in 0..heads.n_kv_head {
                self.attend(
                    i,
                    h,
                    &rows[start..end],
                    &qkv[start * (c + 2 * kv)..],
                    slots,
                    &mut scratch,
                    &mut y[start * c..],
                );
            }
        }
        y
    }

    /// Attend from some rows of one sequence with the query heads of one key head.
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        i: usize,
        h: usize,
        rows: &[Row],
        qkv: &[f32],
        slots: &[Slot],
        scratch: &mut Scratch,
        y: &mut [f32],
    ) {
        let (heads, c) = (&self.config.heads, self.config.n_embd);
        let (d, group) = (heads.head_dim, heads.n_head / heads.n_kv_head);
        let stride = c + 2 * heads.n_kv_head * d;
        let pairs =
            rows.iter().enumerate().flat_map(|(r, row)| (0..group).map(move |g| (r, row.position, h * group + g)));
        let pairs: Vec<_> = pairs.collect();
        for few in pairs.chunks(ROWS) {
            scratch.q.clear();
            scratch.positions.clear();
            for &(r, position, head) in few {
                scratch.q.extend_from_slice(&qkv[r * stride + head * d..r * stride + (head + 1) * d]);
                scratch.positions.push(position);
            }
            scratch.out.resize(few.len() * d, 0.0);
            let Scratch { q, positions, scores, out } = scratch;
            let window = self.config.windows[i];
            slots[rows[0].slot].attend(self.isa, heads, i, h, window, positions, q, scores, &mut out[..few.len() * d]);
            for (&(r, _, head), out) in few.iter().zip(out.chunks_exact(d)) {
                y[r * c + head * d..r * c + (head + 1) * d].copy_from_slice(out);
            }
        }
    }

    /// Rotate one head by position (arXiv 2104.09864), norm it and scale it.
    fn rotate(&self, head: &mut [f32], position: usize, scale: f32) {
        let half = head.len() / 2;
        let (cos, sin) = (&self.cos[position * half..][..half], &self.sin[position * half..][..half]);
        let (a, b) = head.split_at_mut(half);
        for j in 0..half {
            (a[j], b[j]) = (a[j] * cos[j] + b[j] * sin[j], b[j] * cos[j] - a[j] * sin[j]);
        }
        let norm = if self.config.qk_scale > 0.0 { inverse_rms(head) * self.config.qk_scale } else { 1.0 };
        let factor = norm * scale;
        head.iter_mut().for_each(|v| *v *= factor);
    }

    fn logits(&self, hidden: &[f32]) -> Vec<f32> {
        if hidden.is_empty() {
            return Vec::new();
        }
        let mut normed = vec![0.0; hidden.len()];
        rms_norm(hidden, self.config.n_embd, &mut normed);
        let n = hidden.len() / self.config.n_embd;
        let raw = self.head.multiply(self.isa, self.threads, &normed, n);
        let mut out = Vec::with_capacity(n * self.config.vocab_size);
        for raw in raw.chunks_exact(self.head.columns()) {
            out.extend_from_slice(&raw[..self.config.vocab_size]);
        }
        if self.config.softcap > 0.0 {
            self.squeeze(&mut out);
        }
        out
    }

    /// softcap * tanh(x / softcap), by way of tanh(a) = 1 - 2 / (e to the 2a + 1).
    fn squeeze(&self, logits: &mut [f32]) {
        let cap = self.config.softcap;
        logits.iter_mut().for_each(|v| *v *= 2.0 / cap);
        self.isa.exp(logits);
        logits.iter_mut().for_each(|v| *v = cap - 2.0 * cap / (*v + 1.0));
    }
}

#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    positions: Vec<usize>,
    scores: Vec<f32>,
    out: Vec<f32>,
}

/// Cut rows into runs of one sequence, each short enough that its queries fill one block of the kernel.
fn blocks(rows: &[Row], group: usize) -> Vec<(usize, usize)> {
    let most = (ROWS / group).max(1);
    let mut out: Vec<(usize, usize)> = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        match out.last_mut() {
            Some((start, end)) if rows[*start].slot == row.slot && *end - *start < most => *end = i + 1,
            _ => out.push((i, i + 1)),
        }
    }
    out
}

fn inverse_rms(x: &[f32]) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + EPSILON).sqrt()
}

/// Scale each row of `width` values to unit root mean square.
fn rms_norm(x: &[f32], width: usize, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let factor = inverse_rms(x);
        x.iter().zip(out).for_each(|(x, out)| *out = x * factor);
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = [0.0; LANES];
    let (a, b) = (a.chunks(LANES), b.chunks(LANES));
    for (a, b) in a.zip(b) {
        for ((s, a), b) in sum.iter_mut().zip(a).zip(b) {
            *s += a * b;
        }
    }
    sum.iter().sum()
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
