//! Pairs of neighbouring tokens: how often each occurs, and which one is next.

use std::cmp::Reverse;
use std::collections::binary_heap::{BinaryHeap, PeekMut};

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use crate::memory;
use crate::shard::{Side, AHEAD};
use crate::word::{Slot, Words};

/// Up to this many tokens, pairs are counted in a square table.
const SQUARE_MAX_TOKENS: usize = 1280;

/// Stands for no pair.
pub const NONE: u32 = u32::MAX;

/// A pair of token ids in one number that sorts like the pair.
pub fn key(left: u32, right: u32) -> u64 {
    (u64::from(left) << 32) | u64::from(right)
}

/// The pair of a key.
pub fn halves(key: u64) -> (u32, u32) {
    ((key >> 32) as u32, key as u32)
}

/// Spreads pairs evenly, whatever their ids.
pub fn hash(left: u32, right: u32) -> u64 {
    key(left, right).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32
}

/// A number for each pair of tokens: its count, then its id.
#[derive(Debug, Default)]
pub struct PairMap {
    /// Pairs of tokens below `side`, row by left token: low ids are the frequent ones.
    square: Vec<u64>,
    side: usize,
    /// All others, by key.
    table: HashMap<u64, u64, FxBuildHasher>,
}

impl PairMap {
    /// No counts yet.
    pub fn new(n_tokens: usize) -> Self {
        let side = n_tokens.min(SQUARE_MAX_TOKENS);
        let map = Self { square: vec![0; side * side], side, table: HashMap::default() };
        memory::advise_huge(&map.square);
        map
    }

    /// The count of every pair of neighbours.
    pub fn count<S: Slot>(words: &Words<S>, n_tokens: usize) -> Self {
        let mut map = Self::new(n_tokens);
        words.pairs(|left, right, _, count| *map.entry(left, right) += count);
        map
    }

    #[inline]
    fn entry(&mut self, left: u32, right: u32) -> &mut u64 {
        if (left.max(right) as usize) < self.side {
            &mut self.square[left as usize * self.side + right as usize]
        } else {
            self.table.entry(key(left, right)).or_default()
        }
    }

    /// Adds the counts of another map over as many tokens.
    pub fn absorb(mut self, other: Self) -> Self {
        self.square.iter_mut().zip(other.square).for_each(|(value, other)| *value += other);
        other.table.into_iter().for_each(|(key, count)| *self.table.entry(key).or_default() += count);
        self
    }

    /// Adds to the count of a pair if it is in the square, or its hash is wanted.
    #[inline]
    pub fn add_if(&mut self, left: u32, right: u32, count: u64, wanted: impl Fn(u64) -> bool) {
        if (left.max(right) as usize) < self.side || wanted(hash(left, right)) {
            *self.entry(left, right) += count;
        }
    }

    /// Forgets pairs outside the square that are not wanted by hash.
    pub fn retain(&mut self, wanted: impl Fn(u64) -> bool) {
        self.table.retain(|&pair, _| wanted(hash(halves(pair).0, halves(pair).1)));
    }

    /// Forgets pairs below a count.
    pub fn retain_from(&mut self, cutoff: u64) {
        self.square.iter_mut().filter(|count| **count < cutoff).for_each(|count| *count = 0);
        self.table.retain(|_, &mut count| count >= cutoff);
        self.table.shrink_to_fit();
    }

    /// Pairs outside the square, which are what takes memory.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// The count of a pair.
    #[inline]
    pub fn count_of(&self, left: u32, right: u32) -> u64 {
        if (left.max(right) as usize) < self.side {
            self.square[left as usize * self.side + right as usize]
        } else {
            self.table.get(&key(left, right)).copied().unwrap_or(0)
        }
    }

    /// All pairs that occur, with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let side = self.side.max(1);
        let square = self.square.iter().enumerate().filter(|&(_, &count)| count > 0);
        let square = square.map(move |(i, &count)| (key((i / side) as u32, (i % side) as u32), count));
        square.chain(self.table.iter().map(|(&key, &count)| (key, count)))
    }

    /// Turns the counts into ids from 0 up, or [`NONE`] below the cutoff, and returns the pairs that have one.
    pub fn number(&mut self, cutoff: u64) -> Pairs {
        let mut pairs = Pairs::new(cutoff);
        let mut number = |key, value: &mut u64| {
            *value = if *value < cutoff { NONE.into() } else { pairs.insert(key, *value).into() };
        };
        for (i, value) in self.square.iter_mut().enumerate() {
            number(key((i / self.side) as u32, (i % self.side) as u32), value);
        }
        self.table.iter_mut().for_each(|(&key, value)| number(key, value));
        pairs
    }

    /// The id of a pair, or [`NONE`].
    #[inline]
    pub fn id(&self, left: u32, right: u32) -> u32 {
        if (left.max(right) as usize) < self.side {
            self.square[left as usize * self.side + right as usize] as u32
        } else {
            self.table.get(&key(left, right)).map_or(NONE, |&id| id as u32)
        }
    }
}

/// All pairs that reach the cutoff, and those that did. A pair is new once, so none is ever removed.
#[derive(Debug)]
pub struct Pairs {
    /// (key, id). Open addressing, at most half full.
    slots: Vec<(u64, u32)>,
    /// Counts by id; 0 of a pair that was taken out.
    counts: Vec<u64>,
    /// (count, key, id). Counts here may be out of date, but never too low.
    heap: BinaryHeap<(u64, Reverse<u64>, u32)>,
    cutoff: u64,
}

impl Pairs {
    /// No pairs yet.
    pub fn new(cutoff: u64) -> Self {
        Self { slots: vec![(0, NONE); 1 << 10], counts: Vec::new(), heap: BinaryHeap::new(), cutoff }
    }

    /// Ids given so far.
    pub fn n_ids(&self) -> usize {
        self.counts.len()
    }

    fn slot_of(&self, key: u64) -> usize {
        (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - self.slots.len().trailing_zeros())) as usize
    }

    /// Adds a pair and returns its id.
    pub fn insert(&mut self, key: u64, count: u64) -> u32 {
        let id = self.counts.len() as u32;
        self.counts.push(count);
        self.heap.push((count, Reverse(key), id));
        if 2 * self.counts.len() > self.slots.len() {
            let twice = vec![(0, NONE); 2 * self.slots.len()];
            memory::advise_huge(&twice);
            let old = std::mem::replace(&mut self.slots, twice);
            old.into_iter().filter(|slot| slot.1 != NONE).for_each(|(key, id)| self.place(key, id));
        }
        self.place(key, id);
        id
    }

    fn place(&mut self, key: u64, id: u32) {
        let mut at = self.slot_of(key);
        while self.slots[at].1 != NONE {
            at = (at + 1) & (self.slots.len() - 1);
        }
        self.slots[at] = (key, id);
    }

    /// Puts back what `pop` took out.
    pub fn restore(&mut self, (key, count, id): (u64, u64, u32)) {
        self.counts[id as usize] = count;
        self.heap.push((count, Reverse(key), id));
    }

    /// Lowers the count of a pair, if the pair is known and not taken out.
    #[inline]
    pub fn subtract(&mut self, key: u64, lost: u64) {
        let mut at = self.slot_of(key);
        loop {
            match self.slots[at] {
                (_, NONE) => return,
                (found, id) if found == key => {
                    let count = &mut self.counts[id as usize];
                    *count = count.saturating_sub(lost);
                    return;
                }
                _ => at = (at + 1) & (self.slots.len() - 1),
            }
        }
    }

    /// Takes the most frequent pair out: (key, count, id).
    pub fn pop(&mut self) -> Option<(u64, u64, u32)> {
        while let Some(mut top) = self.heap.peek_mut() {
            let (noted, Reverse(key), id) = *top;
            let count = self.counts[id as usize];
            if count < noted && count >= self.cutoff {
                top.0 = count;
                continue;
            }
            PeekMut::pop(top);
            if count == noted {
                self.counts[id as usize] = 0;
                return Some((key, count, id));
            }
        }
        None
    }

    /// Books what the merge into `token` did on one side of it, in all shards. `keys(neighbour)` gives the pairs that
    /// lost and gained; `half` is the neighbour that a token next to itself is first taken for. Leaves in `filed` the
    /// (neighbour, id) of the new pairs that reach the cutoff, ids ascending.
    pub fn book(
        &mut self,
        sides: &[&Side],
        token: u32,
        half: u32,
        keys: impl Fn(u32) -> (u64, u64),
        filed: &mut Vec<(u32, u32)>,
    ) {
        filed.clear();
        let overlap: u64 = sides.iter().map(|side| side.overlap).sum();
        for (index, side) in sides.iter().enumerate() {
            for (i, &neighbour) in side.touched.iter().enumerate() {
                if let Some(&later) = side.touched.get(i + AHEAD) {
                    memory::prefetch(&self.slots, self.slot_of(keys(later).0));
                }
                let seen = |side: &&Side| side.seen[neighbour as usize];
                if sides[..index].iter().any(|side| seen(side) > 0) {
                    continue; // booked with that shard
                }
                let lost = sides[index..].iter().map(seen).sum();
                let (loser, gainer) = keys(neighbour);
                self.subtract(loser, lost);
                let gained = if neighbour == half { lost - overlap } else { lost };
                if gained >= self.cutoff {
                    filed.push((neighbour, self.insert(gainer, gained)));
                }
            }
        }
        if overlap >= self.cutoff {
            filed.push((token, self.insert(keys(token).1, overlap)));
        }
    }
}
