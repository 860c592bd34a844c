//! The merge loop: take the most frequent pair, make it a token, update the counts around it.
//!
//! Ties: the highest count wins, then the lowest pair (left id, then right id). So the merges depend on nothing but the
//! counts of the chunks.
//!
//! Two different merges never give the same bytes. Boundaries between tokens only ever disappear, so a stretch of bytes
//! that starts and ends at boundaries now did so at every earlier step, and went through the same merges as every other
//! such stretch with these bytes: at any step all of them are cut the same way. Once one is a token, all are. Byte
//! strings of tokens are therefore unique without looking any of them up.
//!
//! Each pair keeps the list of positions where it stood when it came into being. A pair comes into being only while its
//! newer half is being made, so lists never grow; positions that have gone stale are recognised when visited.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use crate::count::ChunkCounts;
use crate::error::TrainError;
use crate::word::{Cursor, Words, EDGE};

/// Lists may be rebuilt once this many positions are on file and most belong to pairs that are gone.
const COMPACT_FROM: usize = 1 << 20;

/// Merges in order: the first makes token 256.
pub type Merges = Vec<(u32, u32)>;

/// A pair of token ids in one number that sorts like the pair.
fn key(left: u32, right: u32) -> u64 {
    (u64::from(left) << 32) | u64::from(right)
}

fn halves(key: u64) -> (u32, u32) {
    ((key >> 32) as u32, key as u32)
}

/// Where a pair occurs: its count, and its list in `Pairs::positions`.
#[derive(Debug, Clone, Copy)]
struct Pair {
    count: u64,
    start: usize,
    len: u32,
}

/// What one merge does to the pairs with one neighbouring token.
#[derive(Debug, Clone, Copy, Default)]
struct Change {
    /// Occurrences of (neighbour, left half) or (right half, neighbour) that are gone.
    lost: u64,
    /// Occurrences of (neighbour, new token) or (new token, neighbour).
    gained: u64,
    /// Positions of those in the layout; then where the next one goes.
    positions: usize,
}

/// Changes by neighbour on one side: dense by token id, with the list of those that are not zero.
#[derive(Debug)]
struct Side {
    changes: Vec<Change>,
    touched: Vec<u32>,
    /// (neighbour, position of the new pair), by ascending position.
    found: Vec<(u32, u32)>,
}

impl Side {
    fn new(vocab_size: usize) -> Self {
        Self { changes: vec![Change::default(); vocab_size], touched: Vec::new(), found: Vec::new() }
    }

    #[inline]
    fn change(&mut self, neighbour: u32) -> &mut Change {
        let change = &mut self.changes[neighbour as usize];
        if change.lost == 0 && change.gained == 0 {
            self.touched.push(neighbour);
        }
        change
    }

    #[inline]
    fn record(&mut self, neighbour: u32, position: u32, count: u64) {
        let change = self.change(neighbour);
        change.lost += count;
        change.gained += count;
        self.found.push((neighbour, position));
    }
}

/// All pairs that occur, and a heap over them. Counts in the heap may be out of date, but never too low.
#[derive(Debug, Default)]
struct Pairs {
    table: HashMap<u64, Pair, FxBuildHasher>,
    heap: BinaryHeap<(u64, Reverse<u64>)>,
    positions: Vec<u32>,
    /// Positions that belong to a pair in the table.
    live: usize,
}

impl Pairs {
    fn new(words: &Words) -> Self {
        let mut counts = vec![(0u64, 0usize); 1 << 16];
        let slot = |left: u32, right: u32| (left as usize) << 8 | right as usize;
        words.byte_pairs(|left, right, _, count| {
            let entry = &mut counts[slot(left, right)];
            entry.0 += count;
            entry.1 += 1;
        });
        let mut pairs = Self::default();
        let mut next = vec![0usize; 1 << 16];
        for (index, &(count, len)) in counts.iter().enumerate().filter(|(_, &(_, len))| len > 0) {
            next[index] = pairs.live;
            pairs.insert(key((index >> 8) as u32, (index & 255) as u32), count, pairs.live, len);
        }
        pairs.positions = vec![0; pairs.live];
        words.byte_pairs(|left, right, position, _| {
            let at = &mut next[slot(left, right)];
            pairs.positions[*at] = position;
            *at += 1;
        });
        pairs
    }

    fn insert(&mut self, key: u64, count: u64, start: usize, len: usize) {
        // A list is no longer than the layout, whose positions are 32-bit.
        self.table.insert(key, Pair { count, start, len: len as u32 });
        self.heap.push((count, Reverse(key)));
        self.live += len;
    }

    fn remove(&mut self, key: u64) -> Option<Pair> {
        let pair = self.table.remove(&key)?;
        self.live -= pair.len as usize;
        Some(pair)
    }

    fn subtract(&mut self, key: u64, count: u64) {
        if let Some(pair) = self.table.get_mut(&key) {
            pair.count -= count;
            if pair.count == 0 {
                self.remove(key);
            }
        }
    }

    /// Takes the most frequent pair out.
    fn pop(&mut self) -> Option<(u64, Pair)> {
        while let Some((count, Reverse(key))) = self.heap.pop() {
            match self.table.get(&key) {
                Some(pair) if pair.count == count => return self.remove(key).map(|pair| (key, pair)),
                Some(pair) => self.heap.push((pair.count, Reverse(key))),
                None => {}
            }
        }
        None
    }

    /// Adds the pairs on one side of a new token; `pair_of(neighbour)` gives their (lost, gained) keys.
    fn apply(&mut self, side: &mut Side, pair_of: impl Fn(u32) -> (u64, u64)) {
        let base = self.positions.len();
        let mut at = base;
        for &(neighbour, _) in &side.found {
            side.changes[neighbour as usize].positions += 1;
        }
        for &neighbour in &side.touched {
            let change = &mut side.changes[neighbour as usize];
            let (lost, gained) = pair_of(neighbour);
            if change.lost > 0 {
                self.subtract(lost, change.lost);
            }
            if change.gained > 0 {
                self.insert(gained, change.gained, at, change.positions);
            }
            let len = change.positions;
            *change = Change { lost: 0, gained: 0, positions: at };
            at += len;
        }
        self.positions.resize(at, 0);
        for &(neighbour, position) in &side.found {
            let change = &mut side.changes[neighbour as usize];
            self.positions[change.positions] = position;
            change.positions += 1;
        }
        for neighbour in side.touched.drain(..) {
            side.changes[neighbour as usize] = Change::default();
        }
        side.found.clear();
    }

    /// Drops the lists of pairs that are gone, and stale positions, once they are the larger part.
    fn compact(&mut self, words: &Words) {
        if self.positions.len() < COMPACT_FROM || self.positions.len() < 2 * self.live {
            return;
        }
        let old = std::mem::take(&mut self.positions);
        self.positions.reserve_exact(self.live);
        for (&key, pair) in &mut self.table {
            let (left, right) = halves(key);
            let start = self.positions.len();
            let list = &old[pair.start..pair.start + pair.len as usize];
            self.positions.extend(list.iter().filter(|&&position| words.is_pair(position, left, right)));
            *pair = Pair { start, len: (self.positions.len() - start) as u32, ..*pair };
        }
        self.live = self.positions.len();
    }
}

/// Learns `vocab_size - 256` merges.
///
/// `tick(merges_done)` runs after each merge; returning `false` stops with [`TrainError::Cancelled`].
///
/// # Errors
/// [`TrainError::TooFewTokens`] says the largest size the text can give.
pub fn train(counts: ChunkCounts, vocab_size: u32, mut tick: impl FnMut(u32) -> bool) -> Result<Merges, TrainError> {
    if !(256..=1 << 31).contains(&vocab_size) {
        return Err(TrainError::VocabSize { asked: vocab_size.into() });
    }
    if counts.totals.bytes == 0 {
        return Err(TrainError::NoText);
    }
    let mut words = Words::new(&counts)?;
    // The layout has all of it; free the table before the pairs need the memory.
    drop(counts);
    let mut pairs = Pairs::new(&words);
    let mut merges = Merges::new();
    let (mut before, mut after) = (Side::new(256), Side::new(256));
    while 256 + merges.len() < vocab_size as usize {
        let Some((best, pair)) = pairs.pop() else {
            let reached = 256 + merges.len() as u32;
            return Err(TrainError::TooFewTokens { asked: vocab_size, reached });
        };
        let (left, right) = halves(best);
        let token = words.new_token(left, right);
        for side in [&mut before, &mut after] {
            side.changes.push(Change::default());
        }
        let list = pair.start..pair.start + pair.len as usize;
        merge_all(&mut words, &pairs.positions[list], (left, right, token), &mut before, &mut after);
        pairs.apply(&mut before, |x| (key(x, left), key(x, token)));
        pairs.apply(&mut after, |y| (key(right, y), key(token, y)));
        pairs.compact(&words);
        merges.push((left, right));
        if !tick(merges.len() as u32) {
            return Err(TrainError::Cancelled);
        }
    }
    Ok(merges)
}

/// Merges one pair wherever it stands and notes what that does to its neighbours.
fn merge_all(
    words: &mut Words,
    positions: &[u32],
    (left, right, token): (u32, u32, u32),
    before: &mut Side,
    after: &mut Side,
) {
    let mut cursor = Cursor::default();
    for &position in positions {
        if !words.is_pair(position, left, right) {
            continue;
        }
        let count = words.count_at(&mut cursor, position);
        let (x, y) = words.merge(position, left, token);
        if x == token {
            // The new token next to itself: what the merge just before noted as (token, left) is (token, token).
            after.change(left).gained -= count;
            after.change(token).gained += count;
            if let Some(last) = after.found.last_mut() {
                last.0 = token;
            }
        } else if x != EDGE {
            before.record(x, position - words.len_of(x), count);
        }
        if y != EDGE {
            after.record(y, position, count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pretokenize::Splitter;

    fn merges(text: &str, vocab_size: u32) -> Result<Merges, TrainError> {
        let mut counts = ChunkCounts::default();
        counts.count(&Splitter::new("bpe").unwrap(), text).unwrap();
        train(counts, vocab_size, |_| true)
    }

    #[test]
    fn ties_go_to_the_lowest_pair() {
        assert_eq!(merges("ba ab", 257), Ok(vec![(32, 97)]));
    }

    #[test]
    fn a_text_too_small_says_what_it_can_give() {
        assert_eq!(merges("aaaa", 300), Err(TrainError::TooFewTokens { asked: 300, reached: 258 }));
        assert_eq!(merges("", 300), Err(TrainError::NoText));
        assert_eq!(merges("a", 257), Err(TrainError::TooFewTokens { asked: 257, reached: 256 }));
        assert!(matches!(merges("a", 255), Err(TrainError::VocabSize { asked: 255 })));
    }

    #[test]
    fn a_tick_that_says_no_stops() {
        let mut counts = ChunkCounts::default();
        counts.count(&Splitter::new("bpe").unwrap(), "aaaa").unwrap();
        assert_eq!(train(counts, 258, |_| false), Err(TrainError::Cancelled));
    }
}
