//! All distinct chunks in one flat array, where merging two neighbours takes constant time and no links.
//!
//! A token occupies as many slots as it has bytes. Its id stands in its first slot and in its last, so the token after
//! it starts `len[id]` slots further on, and the token before it has its id in the slot just before. Slots in between
//! hold nothing that is ever read as a token: the first slot of a right half is overwritten when the halves merge.

use crate::count::ChunkCounts;
use crate::error::TrainError;

/// Stands between chunks.
pub const EDGE: u32 = u32::MAX;
/// Stands where a token used to start.
const DEAD: u32 = u32::MAX - 1;

/// The chunks as token ids, ordered by count, with the length in bytes of every token so far.
#[derive(Debug)]
pub struct Words {
    slots: Vec<u32>,
    token_len: Vec<u32>,
    /// Ascending (first slot after the chunks with this count, count).
    weights: Vec<(u32, u64)>,
}

/// Finds the count of the chunk at ascending positions.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cursor {
    segment: usize,
}

impl Words {
    /// Lays out the chunks as single bytes.
    pub fn new(counts: &ChunkCounts) -> Result<Self, TrainError> {
        let bytes = counts.distinct_bytes();
        let n_slots = bytes + counts.len() + 1;
        if n_slots >= DEAD as usize {
            return Err(TrainError::TooMuchText { bytes });
        }
        // Chunks of equal count side by side: a few thousand boundaries replace a count per slot.
        let mut order: Vec<u32> = (0..counts.len() as u32).collect();
        order.sort_by_key(|&i| counts.get(i as usize).1);
        let mut slots = Vec::with_capacity(n_slots);
        let mut weights: Vec<(u32, u64)> = Vec::new();
        slots.push(EDGE);
        for index in order {
            let (chunk, count) = counts.get(index as usize);
            slots.extend(chunk.iter().map(|&byte| u32::from(byte)));
            slots.push(EDGE);
            let end = slots.len() as u32;
            match weights.last_mut() {
                Some(last) if last.1 == count => last.0 = end,
                _ => weights.push((end, count)),
            }
        }
        Ok(Self { slots, token_len: vec![1; 256], weights })
    }

    /// Calls `visit(left, right, position, count)` for each pair of neighbouring bytes, by ascending position.
    pub fn byte_pairs(&self, mut visit: impl FnMut(u32, u32, u32, u64)) {
        let mut from = 1;
        for &(end, count) in &self.weights {
            for (i, pair) in self.slots[from..end as usize].windows(2).enumerate() {
                if pair[0] != EDGE && pair[1] != EDGE {
                    visit(pair[0], pair[1], (from + i) as u32, count);
                }
            }
            from = end as usize;
        }
    }

    /// Makes room for a token made of `left` and `right` and returns its id.
    pub fn new_token(&mut self, left: u32, right: u32) -> u32 {
        let len = self.token_len[left as usize].saturating_add(self.token_len[right as usize]);
        self.token_len.push(len);
        self.token_len.len() as u32 - 1
    }

    /// Length of a token in bytes.
    #[inline]
    pub fn len_of(&self, token: u32) -> u32 {
        self.token_len[token as usize]
    }

    /// The count of the chunk at `position`. Positions asked of one cursor must ascend.
    #[inline]
    pub fn count_at(&self, cursor: &mut Cursor, position: u32) -> u64 {
        if self.weights[cursor.segment].0 <= position {
            let rest = &self.weights[cursor.segment..];
            cursor.segment += rest.partition_point(|&(end, _)| end <= position);
        }
        self.weights[cursor.segment].1
    }

    /// Whether `left` then `right` still stand at `position`, which was once the start of that pair.
    #[inline]
    pub fn is_pair(&self, position: u32, left: u32, right: u32) -> bool {
        self.slots[position as usize] == left && self.slots[(position + self.len_of(left)) as usize] == right
    }

    /// Merges the pair at `position` into `token`; returns the tokens before and after it, or [`EDGE`].
    #[inline]
    pub fn merge(&mut self, position: u32, left: u32, token: u32) -> (u32, u32) {
        let start = position as usize;
        let middle = start + self.len_of(left) as usize;
        let end = start + self.len_of(token) as usize;
        self.slots[middle] = DEAD;
        self.slots[start] = token;
        self.slots[end - 1] = token;
        (self.slots[start - 1], self.slots[end])
    }
}
