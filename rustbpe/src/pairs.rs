//! Pairs of neighbouring tokens: how often each occurs, and which one is next.

use std::cmp::Reverse;
use std::collections::binary_heap::{BinaryHeap, PeekMut};
use std::mem::take;
use std::ops::DerefMut;
use std::sync::RwLockReadGuard;

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use crate::crew::each;
use crate::memory;
use crate::shard::{Merge, Shard, Side, AHEAD};
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
    /// All others, by key, in parts: see [`Pairs`].
    tables: Vec<HashMap<u64, u64, FxBuildHasher>>,
}

impl PairMap {
    /// No counts yet, in `n` parts.
    pub fn new(n_tokens: usize, n: usize) -> Self {
        let side = n_tokens.min(SQUARE_MAX_TOKENS);
        let map = Self { square: vec![0; side * side], side, tables: vec![HashMap::default(); n] };
        memory::advise_huge(&map.square);
        map
    }

    /// The count of every pair of neighbours.
    pub fn count<S: Slot>(words: &Words<S>, n_tokens: usize, n: usize) -> Self {
        let mut map = Self::new(n_tokens, n);
        words.pairs(|left, right, _, count| *map.entry(left, right) += count);
        map
    }

    #[inline]
    fn entry(&mut self, left: u32, right: u32) -> &mut u64 {
        if (left.max(right) as usize) < self.side {
            &mut self.square[left as usize * self.side + right as usize]
        } else {
            let n = self.tables.len();
            self.tables[part_of(key(left, right), n)].entry(key(left, right)).or_default()
        }
    }

    /// The sums of maps in as many parts, with squares like the first's or none. A thread adds up every part.
    pub fn sum(maps: Vec<Self>) -> Self {
        let mut maps = maps.into_iter();
        let Some(mut all) = maps.next() else { return Self::default() };
        let (side, n) = (all.side.max(1), all.tables.len());
        let mut tables: Vec<_> = all.tables.drain(..).map(|table| vec![table]).collect();
        let mut squares = Vec::new();
        for map in maps {
            squares.push(map.square);
            tables.iter_mut().zip(map.tables).for_each(|(tables, table)| tables.push(table));
        }
        all.tables = each(&mut tables, |tables| {
            let sum = |mut all: HashMap<u64, u64, FxBuildHasher>, table| {
                HashMap::into_iter(table).for_each(|(key, count)| *all.entry(key).or_default() += count);
                all
            };
            take(tables).into_iter().reduce(sum).unwrap_or_default()
        });
        let mut rows: Vec<_> = all.square.chunks_mut(side * side.div_ceil(n)).enumerate().collect();
        each(&mut rows, |(number, rows)| {
            for square in &squares {
                let others = square.get(*number * side * side.div_ceil(n)..).unwrap_or(&[]);
                rows.iter_mut().zip(others).for_each(|(value, other)| *value += other);
            }
        });
        all
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
        let wanted = |&pair: &u64, _: &mut u64| wanted(hash(halves(pair).0, halves(pair).1));
        self.tables.iter_mut().for_each(|table| table.retain(wanted));
    }

    /// Forgets pairs below a count.
    pub fn retain_from(&mut self, cutoff: u64) {
        self.square.iter_mut().filter(|count| **count < cutoff).for_each(|count| *count = 0);
        for table in &mut self.tables {
            table.retain(|_, &mut count| count >= cutoff);
            table.shrink_to_fit();
        }
    }

    /// Pairs outside the square, which are what takes memory.
    pub fn len(&self) -> usize {
        self.tables.iter().map(HashMap::len).sum()
    }

    /// The count of a pair, if it is known.
    #[inline]
    pub fn get(&self, left: u32, right: u32) -> Option<u64> {
        if (left.max(right) as usize) < self.side {
            Some(self.square[left as usize * self.side + right as usize])
        } else {
            self.tables[part_of(key(left, right), self.tables.len())].get(&key(left, right)).copied()
        }
    }

    /// All pairs that occur, with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let side = self.side.max(1);
        let square = self.square.iter().enumerate().filter(|&(_, &count)| count > 0);
        let square = square.map(move |(i, &count)| (key((i / side) as u32, (i % side) as u32), count));
        square.chain(self.tables.iter().flatten().map(|(&key, &count)| (key, count)))
    }

    /// Turns the counts into ids, or [`NONE`] below the cutoff, and returns the pairs that have one, in parts.
    pub fn number(&mut self, cutoff: u64) -> Vec<Pairs> {
        let (n, side, square) = (self.tables.len(), self.side, &self.square);
        let mut tables: Vec<_> = self.tables.iter_mut().enumerate().collect();
        let parts = each(&mut tables, |(number, table)| {
            let (mut pairs, mut ids) = (Pairs::new(cutoff, *number, n), Vec::new());
            for (i, &count) in square.iter().enumerate().filter(|&(_, &count)| count >= cutoff) {
                let pair = key((i / side) as u32, (i % side) as u32);
                if pairs.owns(pair) {
                    ids.push((i, pairs.insert(pair, count)));
                }
            }
            for (&pair, value) in table.iter_mut() {
                *value = if *value < cutoff { NONE.into() } else { pairs.insert(pair, *value).into() };
            }
            (pairs, ids)
        });
        self.square.fill(NONE.into());
        let (parts, ids): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        ids.into_iter().flatten().for_each(|(i, id)| self.square[i] = id.into());
        parts
    }

    /// The id of a pair, or [`NONE`].
    #[inline]
    pub fn id(&self, left: u32, right: u32) -> u32 {
        self.get(left, right).map_or(NONE, |id| id as u32)
    }
}

/// A part of the pairs that reach the cutoff, and of those that did. A pair is new once, so none is ever removed.
///
/// Which part a pair belongs to depends on the pair alone. Each part has a thread that books merges in it, and ids of its
/// own: `number` and every `n`-th from there.
#[derive(Debug)]
pub struct Pairs {
    number: usize,
    n: usize,
    /// (key, id). Open addressing, at most half full.
    slots: Vec<(u64, u32)>,
    /// Counts by index; 0 of a pair that was taken out.
    counts: Vec<u64>,
    /// (count, key, index). Counts here may be out of date, but never too low.
    heap: BinaryHeap<(u64, Reverse<u64>, u32)>,
    cutoff: u64,
    /// By neighbour, what all shards tell of pairs gained, and the neighbours they tell of.
    sums: Vec<u64>,
    told: Vec<u32>,
    /// (neighbour, id) of the new pairs of the last merge booked, by whether the neighbour is before or after the token.
    pub filed: [Vec<(u32, u32)>; 2],
}

/// Which of `n` parts a pair belongs to.
#[inline]
pub fn part_of(key: u64, n: usize) -> usize {
    // Not the bits that choose a place in a part.
    (((key.wrapping_mul(0xD6E8_FEB8_6659_FD93) >> 48) * n as u64) >> 16) as usize
}

impl Pairs {
    /// Part `number` of `n`, without pairs yet.
    pub fn new(cutoff: u64, number: usize, n: usize) -> Self {
        let (slots, counts, heap) = (vec![(0, NONE); 1 << 10], Vec::new(), BinaryHeap::new());
        Self {
            number,
            n,
            slots,
            counts,
            heap,
            cutoff,
            sums: Vec::new(),
            told: Vec::new(),
            filed: [const { Vec::new() }; 2],
        }
    }

    #[inline]
    fn owns(&self, key: u64) -> bool {
        self.n == 1 || part_of(key, self.n) == self.number
    }

    fn slot_of(&self, key: u64) -> usize {
        (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - self.slots.len().trailing_zeros())) as usize
    }

    /// Adds a pair and returns its id.
    pub fn insert(&mut self, key: u64, count: u64) -> u32 {
        let index = self.counts.len() as u32;
        self.counts.push(count);
        self.heap.push((count, Reverse(key), index));
        if 2 * self.counts.len() > self.slots.len() {
            let twice = vec![(0, NONE); 2 * self.slots.len()];
            memory::advise_huge(&twice);
            let old = std::mem::replace(&mut self.slots, twice);
            old.into_iter().filter(|slot| slot.1 != NONE).for_each(|(key, index)| self.place(key, index));
        }
        self.place(key, index);
        index * self.n as u32 + self.number as u32
    }

    fn place(&mut self, key: u64, index: u32) {
        let mut at = self.slot_of(key);
        while self.slots[at].1 != NONE {
            at = (at + 1) & (self.slots.len() - 1);
        }
        self.slots[at] = (key, index);
    }

    /// Lowers the count of a pair, if the pair is known and not taken out.
    #[inline]
    pub fn subtract(&mut self, key: u64, lost: u64) {
        let mut at = self.slot_of(key);
        loop {
            match self.slots[at] {
                (_, NONE) => return,
                (found, index) if found == key => {
                    let count = &mut self.counts[index as usize];
                    *count = count.saturating_sub(lost);
                    return;
                }
                _ => at = (at + 1) & (self.slots.len() - 1),
            }
        }
    }

    /// The most frequent pair: (count, key, index), the lowest of equals.
    pub fn top(&mut self) -> Option<(u64, Reverse<u64>, u32)> {
        while let Some(mut top) = self.heap.peek_mut() {
            let count = self.counts[top.2 as usize];
            if count == top.0 {
                return Some(*top);
            }
            if count >= self.cutoff {
                top.0 = count;
            } else {
                PeekMut::pop(top);
            }
        }
        None
    }

    /// Books a merge in this part, as all shards have done it.
    pub fn book<S: Slot>(&mut self, shards: &[RwLockReadGuard<'_, Shard<S>>], merge: Merge) {
        let (index, number) = (merge.id as usize / self.n, merge.id as usize % self.n);
        if number == self.number && self.counts[index] > 0 {
            self.heap.pop();
            self.counts[index] = 0;
        }
        let before: Vec<&Side> = shards.iter().map(|shard| &shard.before).collect();
        let after: Vec<&Side> = shards.iter().map(|shard| &shard.after).collect();
        self.filed = [
            self.book_side(&before, merge.token, NONE, |x| merge.with_before(x)),
            self.book_side(&after, merge.token, merge.left, |y| merge.with_after(y)),
        ];
        self.top();
    }

    /// Books what the merge into `token` did on one side of it, in all shards. `keys(neighbour)` gives the pairs that
    /// lost and gained; `half` is the neighbour that a token next to itself is first taken for. Returns the (neighbour, id)
    /// of the new pairs that reach the cutoff.
    fn book_side(
        &mut self,
        sides: &[&Side],
        token: u32,
        half: u32,
        keys: impl Fn(u32) -> (u64, u64),
    ) -> Vec<(u32, u32)> {
        let number = self.number;
        for list in sides.iter().flat_map(|side| side.lost(number)) {
            for (i, &(neighbour, count)) in list.iter().enumerate() {
                if let Some(&(later, _)) = list.get(i + AHEAD) {
                    memory::prefetch(&self.slots, self.slot_of(keys(later).0));
                }
                self.subtract(keys(neighbour).0, count);
            }
        }
        let mut filed = Vec::with_capacity(64);
        let overlap: u64 = sides.iter().map(|side| side.overlap).sum();
        let mut gain = |pairs: &mut Self, neighbour, count| {
            let gained = if neighbour == half { count - overlap } else { count };
            if gained >= pairs.cutoff {
                filed.push((neighbour, pairs.insert(keys(neighbour).1, gained)));
            }
        };
        let gains = sides.iter().flat_map(|side| side.gained(number)).flatten();
        if let [_] = sides {
            gains.for_each(|&(neighbour, count)| gain(self, neighbour, count));
        } else {
            self.sums.resize(sides.iter().map(|side| side.limit()).max().unwrap_or(0), 0);
            for &(neighbour, count) in gains {
                let sum = &mut self.sums[neighbour as usize];
                if *sum == 0 {
                    self.told.push(neighbour);
                }
                *sum += count;
            }
            let mut told = take(&mut self.told);
            for neighbour in told.drain(..) {
                let count = take(&mut self.sums[neighbour as usize]);
                gain(self, neighbour, count);
            }
            self.told = told;
        }
        if overlap >= self.cutoff && self.owns(keys(token).1) {
            filed.push((token, self.insert(keys(token).1, overlap)));
        }
        filed
    }
}

/// All ids given so far are below this.
pub fn id_limit(parts: &[Pairs]) -> usize {
    parts.iter().map(|part| part.counts.len()).max().unwrap_or(0) * parts.len()
}

/// The most frequent pair of all parts: (key, count, id). Its part takes it out when the merge is booked.
pub fn best(parts: &mut [impl DerefMut<Target = Pairs>]) -> Option<(u64, u64, u32)> {
    let n = parts.len();
    let ((count, Reverse(key), index), number) =
        parts.iter_mut().map(|part| part.top()).zip(0..).max().and_then(|(top, number)| Some((top?, number)))?;
    Some((key, count, (index as usize * n + number) as u32))
}

/// Takes the most frequent pair out of all parts: (key, count, id).
pub fn pop(parts: &mut [impl DerefMut<Target = Pairs>]) -> Option<(u64, u64, u32)> {
    let (key, count, id) = best(parts)?;
    let (index, number) = (id as usize / parts.len(), id as usize % parts.len());
    parts[number].heap.pop();
    parts[number].counts[index] = 0;
    Some((key, count, id))
}

/// Puts back what `pop` took out.
pub fn restore(parts: &mut [impl DerefMut<Target = Pairs>], (key, count, id): (u64, u64, u32)) {
    let (index, number) = (id / parts.len() as u32, id as usize % parts.len());
    parts[number].counts[index as usize] = count;
    parts[number].heap.push((count, Reverse(key), index));
}
