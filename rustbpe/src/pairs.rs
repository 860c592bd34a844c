//! Pairs of neighbouring tokens: how often each occurs, and which one is next.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use crate::memory;
use crate::shard::Side;
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
fn hash(left: u32, right: u32) -> u64 {
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

    /// Adds to the count of a pair if its hash is wanted.
    #[inline]
    pub fn add_if(&mut self, left: u32, right: u32, count: u64, wanted: impl Fn(u64) -> bool) {
        if wanted(hash(left, right)) {
            *self.entry(left, right) += count;
        }
    }

    /// Keeps the counts that are wanted by hash and count.
    pub fn retain(&mut self, wanted: impl Fn(u64, u64) -> bool) {
        for (i, count) in self.square.iter_mut().enumerate() {
            if !wanted(hash((i / self.side) as u32, (i % self.side) as u32), *count) {
                *count = 0;
            }
        }
        self.table.retain(|&pair, &mut count| wanted(hash(halves(pair).0, halves(pair).1), count));
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

/// All pairs that reach the cutoff, and a heap over them. Counts in the heap may be out of date, but never too low.
#[derive(Debug)]
pub struct Pairs {
    /// Key to (count, id).
    table: HashMap<u64, (u64, u32), FxBuildHasher>,
    heap: BinaryHeap<(u64, Reverse<u64>)>,
    cutoff: u64,
    /// Ids given so far.
    pub n_ids: u32,
}

impl Pairs {
    /// No pairs yet.
    pub fn new(cutoff: u64) -> Self {
        Self { table: HashMap::default(), heap: BinaryHeap::new(), cutoff, n_ids: 0 }
    }

    /// Adds a pair and returns its id.
    pub fn insert(&mut self, key: u64, count: u64) -> u32 {
        let id = self.n_ids;
        self.n_ids += 1;
        self.table.insert(key, (count, id));
        self.heap.push((count, Reverse(key)));
        id
    }

    /// Puts back what `pop` took out.
    pub fn restore(&mut self, (key, count, id): (u64, u64, u32)) {
        self.table.insert(key, (count, id));
        self.heap.push((count, Reverse(key)));
    }

    /// Lowers the count of a pair, if the pair is known.
    pub fn subtract(&mut self, key: u64, lost: u64) {
        if let Some((count, _)) = self.table.get_mut(&key) {
            *count -= lost;
            if *count < self.cutoff {
                self.table.remove(&key);
            }
        }
    }

    /// Takes the most frequent pair out: (key, count, id).
    pub fn pop(&mut self) -> Option<(u64, u64, u32)> {
        while let Some((noted, Reverse(key))) = self.heap.pop() {
            match self.table.get(&key) {
                Some(&(count, id)) if count == noted => {
                    self.table.remove(&key);
                    return Some((key, count, id));
                }
                Some(&(count, _)) => self.heap.push((count, Reverse(key))),
                None => {}
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
            for &neighbour in &side.touched {
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
