//! The network: the same steps as the Python model's, over rows that may belong to different sequences.

use std::collections::HashMap;

use crate::cache::{Heads, Slot};
use crate::kernels::{Isa, ROWS};
use crate::loops::dot;
use crate::matrix::{Matrix, Table, Weights};

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
            let fc = Matrix::new(source.get(&format!("h.{i}.mlp.c_fc.weight"))?, c, isa);
            let down = Matrix::new(source.get(&format!("h.{i}.mlp.c_proj.weight"))?, fc.columns(), isa);
            let (qkv, proj) = (Matrix::new(qkv, c, isa), Matrix::new(proj, c, isa));
            layers.push(Layer { qkv, proj, fc, down, resid: resid[i], first: first[i], value });
        }
        let smear = match source.floats("smear_gate.weight") {
            Ok(gate) => Some((gate, source.floats("smear_lambda")?[0])),
            Err(_) => None,
        };
        let mut head = source.get("lm_head.weight")?;
        head.truncate(config.vocab_size, c);
        let model = Self {
            isa,
            threads: threads.max(1),
            embedding: Table::new(source.get("wte.weight")?, c),
            layers,
            head: Matrix::new(head, c, isa),
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

    /// An empty slot for this model: bytes if its weights are.
    pub fn slot(&self) -> Slot {
        Slot::new(self.layers.first().is_some_and(|layer| layer.qkv.is_int8()))
    }

    /// Append every part to its slot; returns logits, `vocab_size` per wanted place, in order.
    ///
    /// Fails when a part does not fit the context, names an unknown token or slot, or when a slot is named twice.
    pub fn forward<'a>(&self, slots: &mut [Slot], parts: &[Part], work: &'a mut Work) -> Result<&'a [f32], String> {
        let rows = self.rows(slots.len(), parts)?;
        for part in parts {
            slots[part.slot].open(&self.config.heads);
        }
        let (isa, threads) = (self.isa, self.threads);
        let (c, n) = (self.config.n_embd, rows.len());
        let Work { x, first, middle, normed, qkv, y, hidden, more, logits, attention } = work;
        self.embed(&rows, x);
        first.clone_from(x);
        normed.resize(n * c, 0.0);
        for (i, layer) in self.layers.iter().enumerate() {
            isa.mix(x, layer.resid, first, layer.first);
            isa.rms_norm(x, c, normed);
            layer.qkv.multiply(threads, normed, n, qkv);
            self.store(i, normed, &rows, qkv, slots);
            y.resize(n * c, 0.0);
            self.attend(i, &rows, qkv, slots, attention, y);
            layer.proj.multiply(threads, y, n, more);
            isa.add(x, more);
            isa.rms_norm(x, c, normed);
            layer.fc.multiply(threads, normed, n, hidden);
            isa.relu_squared(hidden);
            layer.down.multiply(threads, hidden, n, more);
            isa.add(x, more);
            if i == (self.layers.len() - 1) / 2 {
                middle.clone_from(x);
            }
        }
        y.clear();
        for ((row, x), middle) in rows.iter().zip(x.chunks_exact(c)).zip(middle.chunks_exact(c)) {
            if row.wanted {
                y.extend(x.iter().zip(middle).map(|(x, m)| x - self.backout * m));
            }
        }
        normed.resize(y.len(), 0.0);
        isa.rms_norm(y, c, normed);
        self.head.multiply(threads, normed, y.len() / c, logits);
        if self.config.softcap > 0.0 {
            isa.squeeze(logits, self.config.softcap);
        }
        Ok(logits)
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
    fn embed(&self, rows: &[Row], x: &mut Vec<f32>) {
        let c = self.config.n_embd;
        let mut raw = vec![0.0; c];
        let mut look_up = |token: usize, out: &mut [f32]| {
            self.embedding.read(token, &mut raw);
            self.isa.rms_norm(&raw, c, out);
        };
        x.resize(rows.len() * c, 0.0);
        let mut before = vec![0.0; c];
        for (row, x) in rows.iter().zip(x.chunks_exact_mut(c)) {
            look_up(row.token, x);
            if let (Some(previous), Some((gate, lambda))) = (row.previous, &self.smear) {
                look_up(previous, &mut before);
                let share = lambda * 2.0 * sigmoid(dot(gate, &x[..gate.len()]));
                self.isa.mix(x, 1.0, &before, share);
            }
        }
    }

    /// Rotate and norm queries and keys, store keys and values.
    fn store(&self, i: usize, normed: &[f32], rows: &[Row], qkv: &mut [f32], slots: &mut [Slot]) {
        let (heads, c) = (&self.config.heads, self.config.n_embd);
        let (d, kv) = (heads.head_dim, heads.n_kv_head * heads.head_dim);
        let scale = 1.0 / (d as f32).sqrt();
        let mut value = vec![0.0; kv];
        for ((row, qkv), normed) in rows.iter().zip(qkv.chunks_exact_mut(c + 2 * kv)).zip(normed.chunks_exact(c)) {
            let (q, rest) = qkv.split_at_mut(c);
            let (k, v) = rest.split_at_mut(kv);
            let place = row.position * (d / 2)..(row.position + 1) * (d / 2);
            let (cos, sin) = (&self.cos[place.clone()], &self.sin[place]);
            let norm = self.config.qk_scale;
            q.chunks_exact_mut(d).for_each(|head| self.isa.rotate(head, cos, sin, norm, scale));
            k.chunks_exact_mut(d).for_each(|head| self.isa.rotate(head, cos, sin, norm, 1.0));
            if let Some((table, gates)) = &self.layers[i].value {
                table.read(row.token, &mut value);
                for (h, gate) in gates.chunks_exact(self.config.gate_channels).enumerate() {
                    let share = 2.0 * sigmoid(dot(gate, &normed[..gate.len()]));
                    let place = h * d..(h + 1) * d;
                    self.isa.mix(&mut v[place.clone()], 1.0, &value[place], share);
                }
            }
            for (h, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
                slots[row.slot].write(self.isa, heads, (i, h), row.position, k, v);
            }
        }
    }

    /// Attend from all rows; `y` becomes the input of the output projection.
    fn attend(&self, i: usize, rows: &[Row], qkv: &[f32], slots: &[Slot], scratch: &mut Scratch, y: &mut [f32]) {
        let (heads, c, window) = (&self.config.heads, self.config.n_embd, self.config.windows[i]);
        let (d, group) = (heads.head_dim, heads.n_head / heads.n_kv_head);
        let stride = c + 2 * heads.n_kv_head * d;
        let Scratch { q, positions, scores, out } = scratch;
        let all = blocks(rows, group).into_iter().flat_map(|(start, end)| {
            let n = (end - start) * group; // queries of a key head
            (0..heads.n_kv_head)
                .flat_map(move |h| (0..n).step_by(ROWS).map(move |few| (start, h, few..(few + ROWS).min(n))))
        });
        let mut all = all.peekable();
        while let Some((start, h, queries)) = all.next() {
            let place = |j: usize| (start + j / group, (h * group + j % group) * d); // row, first channel
            q.clear();
            positions.clear();
            for (r, at) in queries.clone().map(place) {
                q.extend_from_slice(&qkv[r * stride + at..][..d]);
                positions.push(rows[r].position);
            }
            out.resize(queries.len() * d, 0.0);
            let ahead = all.peek().map_or(&[][..], |&(next, h, _)| {
                slots[rows[next].slot].first_keys(heads, (i, h), window, rows[next].position)
            });
            slots[rows[start].slot].attend(self.isa, heads, (i, h), window, positions, q, ahead, scores, out);
            for ((r, at), out) in queries.map(place).zip(out.chunks_exact(d)) {
                y[r * c + at..][..d].copy_from_slice(out);
            }
        }
    }
}

/// Memory of a pass, kept for the next.
#[derive(Default)]
pub struct Work {
    x: Vec<f32>,
    first: Vec<f32>,
    middle: Vec<f32>,
    normed: Vec<f32>,
    qkv: Vec<f32>,
    y: Vec<f32>,
    hidden: Vec<f32>,
    more: Vec<f32>,
    logits: Vec<f32>,
    attention: Scratch,
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

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
