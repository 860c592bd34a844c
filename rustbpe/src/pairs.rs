//! Pairs of neighbouring tokens: how often each occurs, and which one is next.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::mem::take;
use std::ops::DerefMut;
use std::sync::RwLockReadGuard;

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use crate::crew::each;
use crate::memory;
use crate::shard::{Merge, Shard, AHEAD};
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
        Self { square: memory::filled(0, side * side), side, tables: vec![HashMap::default(); n] }
    }

    /// The count of every pair of neighbours.
    pub fn count<S: Slot>(words: &Words<S>, n_tokens: usize, n: usize) -> Self {
        let mut map = Self::new(n_tokens, n);
        // In half the memory first, which decides the speed; what does not fit there is counted in the square at once.
        let mut near = memory::filled(0u32, map.square.len());
        words.pairs(|left, right, _, count| {
            if (left.max(right) as usize) < map.side {
                let at = left as usize * map.side + right as usize;
                match u32::try_from(count).ok().and_then(|count| near[at].checked_add(count)) {
                    Some(sum) => near[at] = sum,
                    None => map.square[at] += count,
                }
            } else {
                *map.entry(left, right) += count;
            }
        });
        map.square.iter_mut().zip(near).for_each(|(count, near)| *count += u64::from(near));
        map
    }

    #[inline]
    fn entry(&mut self, left: u32, right: u32) -> &mut u64 {
        if (left.max(right) as usize) < self.side {
            &mut self.square[left as usize * self.side + right as usize]
        } else {
            let n = self.tables.len();
            self.tables[part_of(left, n)].entry(key(left, right)).or_default()
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

    /// In how many parts.
    pub fn n_parts(&self) -> usize {
        self.tables.len()
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
            self.tables[part_of(left, self.tables.len())].get(&key(left, right)).copied()
        }
    }

    /// All pairs that occur, with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let side = self.side.max(1);
        let square = self.square.iter().enumerate().filter(|&(_, &count)| count > 0);
        let square = square.map(move |(i, &count)| (key((i / side) as u32, (i % side) as u32), count));
        square.chain(self.tables.iter().flatten().map(|(&key, &count)| (key, count)))
    }

    /// The pairs that reach the cutoff, in parts, and their ids.
    pub fn number(&self, cutoff: u64) -> (Vec<Pairs>, Ids) {
        let (n, side) = (self.tables.len(), self.side.max(1));
        let mut tables: Vec<_> = self.tables.iter().enumerate().collect();
        let numbered = each(&mut tables, |(number, table)| {
            let (mut pairs, mut ids) = (Pairs::new(cutoff, *number, n), Vec::new());
            for (i, &count) in self.square.iter().enumerate().filter(|&(_, &count)| count >= cutoff) {
                let pair = key((i / side) as u32, (i % side) as u32);
                if pairs.owns(halves(pair).0) {
                    ids.push((pair, pairs.insert(pair, count)));
                }
            }
            for (&pair, &count) in table.iter().filter(|&(_, &count)| count >= cutoff) {
                ids.push((pair, pairs.insert(pair, count)));
            }
            (pairs, ids)
        });
        let (parts, ids): (Vec<_>, Vec<_>) = numbered.into_iter().unzip();
        (parts, Ids::new(&ids.concat()))
    }
}

/// The ids of pairs.
#[derive(Debug)]
pub struct Ids {
    /// Of pairs of tokens below `side`, row by left token, and last, for all others, [`NONE`].
    square: Vec<u32>,
    side: usize,
    others: HashMap<u64, u32, FxBuildHasher>,
}

impl Ids {
    fn new(ids: &[(u64, u32)]) -> Self {
        let highest = |pair| halves(pair).0.max(halves(pair).1) as usize;
        let side = ids.iter().map(|&(pair, _)| highest(pair) + 1).max().unwrap_or(0).min(SQUARE_MAX_TOKENS);
        let mut new = Self { square: memory::filled(NONE, side * side + 1), side, others: HashMap::default() };
        for &(pair, id) in ids {
            if highest(pair) < side {
                let (left, right) = halves(pair);
                new.square[left as usize * side + right as usize] = id;
            } else {
                new.others.insert(pair, id);
            }
        }
        new
    }

    /// The id of a pair, or [`NONE`].
    #[inline]
    pub fn get(&self, left: u32, right: u32) -> u32 {
        let within = (left.max(right) as usize) < self.side;
        if !within && !self.others.is_empty() {
            return self.others.get(&key(left, right)).copied().unwrap_or(NONE);
        }
        self.square[if within { left as usize * self.side + right as usize } else { self.side * self.side }]
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
    len: u32,
    /// (key, count), the count 0 once the pair is merged. Open addressing, at most half full.
    slots: Vec<(u64, u64)>,
    /// Pairs whose turn is next. Counts here and in `later` may be out of date, but never too low.
    heap: BinaryHeap<Ranked>,
    /// Rarer ones, by step: most become rarer still, or too rare, before it is their turn, and a small heap stays near.
    later: Vec<Vec<Ranked>>,
    /// Counts in a step.
    step: u64,
    /// Rarer pairs are not kept.
    pub cutoff: u64,
    /// By neighbour, what all shards tell of pairs gained; the neighbours that are added up, and a bit for each of them.
    sums: Vec<u64>,
    large: Vec<u32>,
    is_large: Vec<u64>,
    /// (neighbour, id) of the new pairs, by merge of the batch last booked and side, before then after the token.
    filed: Vec<(u32, u32)>,
    filed_ends: Vec<usize>,
}

/// (count, key, index), in the order in which pairs are merged.
type Ranked = (u64, Reverse<u64>, u32);

/// Steps below the heap, at first.
const N_STEPS: usize = 1 << 12;

/// No pair has this key.
const EMPTY: u64 = u64::MAX;

/// Which of `n` parts the pairs with this left half belong to. So what a merge does before the new token stays in a part,
/// neighbour by neighbour, and of what it does after it one part loses and one gains all.
#[inline]
pub fn part_of(left: u32, n: usize) -> usize {
    ((u64::from(left.wrapping_mul(0x9E37_79B9)) * n as u64) >> 32) as usize
}

/// Where a search for a key starts.
#[inline]
fn place_of(slots: &[(u64, u64)], key: u64) -> usize {
    (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - slots.len().trailing_zeros())) as usize
}

/// The slot that has a key, or the empty one where it would be.
#[inline]
fn slot_of(slots: &[(u64, u64)], key: u64) -> usize {
    let mut at = place_of(slots, key);
    while slots[at].0 != key && slots[at].0 != EMPTY {
        at = (at + 1) & (slots.len() - 1);
    }
    at
}

impl Pairs {
    /// Part `number` of `n`, without pairs yet.
    pub fn new(cutoff: u64, number: usize, n: usize) -> Self {
        Self {
            number,
            n,
            len: 0,
            slots: vec![(EMPTY, 0); 1 << 10],
            heap: BinaryHeap::new(),
            later: vec![Vec::new(); N_STEPS],
            step: (cutoff / 256).max(1),
            cutoff,
            sums: Vec::new(),
            large: Vec::new(),
            is_large: Vec::new(),
            filed: Vec::new(),
            filed_ends: Vec::new(),
        }
    }

    #[inline]
    fn owns(&self, left: u32) -> bool {
        part_of(left, self.n) == self.number
    }

    /// Adds a pair and returns its id.
    pub fn insert(&mut self, key: u64, count: u64) -> u32 {
        let index = self.len;
        self.len += 1;
        if 2 * self.len as usize > self.slots.len() {
            let twice = memory::filled((EMPTY, 0), 2 * self.slots.len());
            for slot in std::mem::replace(&mut self.slots, twice).into_iter().filter(|slot| slot.0 != EMPTY) {
                let at = slot_of(&self.slots, slot.0);
                self.slots[at] = slot;
            }
        }
        let at = slot_of(&self.slots, key);
        self.slots[at] = (key, count);
        self.wait((count, Reverse(key), index));
        index * self.n as u32 + self.number as u32
    }

    fn wait(&mut self, pair: Ranked) {
        match self.later.get_mut((pair.0 / self.step) as usize) {
            Some(step) => step.push(pair),
            None => self.heap.push(pair),
        }
    }

    /// Lowers the count of a pair, if the pair is known and not merged.
    #[inline]
    pub fn subtract(&mut self, key: u64, lost: u64) {
        let at = slot_of(&self.slots, key);
        self.slots[at].1 = self.slots[at].1.saturating_sub(lost);
    }

    /// The count that a pair has now.
    #[inline]
    fn count_of(&self, key: u64) -> u64 {
        self.slots[slot_of(&self.slots, key)].1
    }

    /// The most frequent pair, the lowest of equals.
    pub fn top(&mut self) -> Option<Ranked> {
        loop {
            while let Some(&(noted, key, index)) = self.heap.peek() {
                let count = self.count_of(key.0);
                if count == noted {
                    return Some((count, key, index));
                }
                self.heap.pop();
                self.wait_again((count, key, index));
            }
            let next = self.later.pop()?;
            for (i, &(_, key, index)) in next.iter().enumerate() {
                if let Some(later) = next.get(i + AHEAD) {
                    memory::prefetch(&self.slots, place_of(&self.slots, later.1 .0));
                }
                self.wait_again((self.count_of(key.0), key, index));
            }
        }
    }

    /// Has a pair wait for its turn, unless it became too rare.
    fn wait_again(&mut self, pair: Ranked) {
        if pair.0 >= self.cutoff {
            self.wait(pair);
        }
    }

    /// Books merges in this part, one after the other, as all shards have done them.
    pub fn book<S: Slot>(&mut self, shards: &[RwLockReadGuard<'_, Shard<S>>], batch: &[Merge]) {
        self.filed.clear();
        self.filed_ends.clear();
        for (i, merge) in batch.iter().enumerate() {
            if let Some(later) = batch.get(i + 1) {
                self.prefetch(shards, i + 1, later);
            }
            let Merge { left, right, token, .. } = *merge;
            if self.owns(left) {
                let at = slot_of(&self.slots, key(left, right));
                self.slots[at].1 = 0;
            }
            let notes = |side| shards.iter().map(move |shard| shard.notes.of(i, side));
            let told = |side, part| notes(side).map(move |note| note.lost(part));
            self.lose(told(0, self.number), |x| merge.with_before(x).0);
            self.gain(told(0, self.number), NONE, 0, |x| merge.with_before(x).1);
            self.filed_ends.push(self.filed.len());
            self.lose(told(1, self.number), |y| merge.with_after(y).0);
            if self.owns(token) {
                let overlap = notes(1).map(|note| note.overlap()).sum();
                self.gain(told(1, part_of(right, self.n)), left, overlap, |y| merge.with_after(y).1);
                if overlap >= self.cutoff {
                    let id = self.insert(key(token, token), overlap);
                    self.filed.push((token, id));
                }
            }
            self.filed_ends.push(self.filed.len());
        }
        self.top();
    }

    /// Merges in the batch last booked.
    pub fn n_booked(&self) -> usize {
        self.filed_ends.len() / 2
    }

    /// (neighbour, id) of the new pairs on a side of the token that a merge of that batch made.
    pub fn filed(&self, merge: usize, side: usize) -> &[(u32, u32)] {
        let end = 2 * merge + side;
        let start = end.checked_sub(1).map_or(0, |before| self.filed_ends[before]);
        &self.filed[start..self.filed_ends[end]]
    }

    /// Asks for the counts that a merge will lower first.
    fn prefetch<S: Slot>(&self, shards: &[RwLockReadGuard<'_, Shard<S>>], i: usize, merge: &Merge) {
        for notes in shards.iter().map(|shard| &shard.notes) {
            for &(x, _) in notes.of(i, 0).lost(self.number).iter().take(AHEAD) {
                memory::prefetch(&self.slots, place_of(&self.slots, merge.with_before(x).0));
            }
            for &(y, _) in notes.of(i, 1).lost(self.number).iter().take(AHEAD) {
                memory::prefetch(&self.slots, place_of(&self.slots, merge.with_after(y).0));
            }
        }
    }

    /// Books what pairs lost, in all shards: (neighbour, occurrences).
    fn lose<'a>(&mut self, told: impl Iterator<Item = &'a [(u32, u32)]>, key: impl Fn(u32) -> u64) {
        for list in told {
            for (i, &(neighbour, count)) in list.iter().enumerate() {
                if let Some(&(later, _)) = list.get(i + AHEAD) {
                    memory::prefetch(&self.slots, place_of(&self.slots, key(later)));
                }
                self.subtract(key(neighbour), count.into());
            }
        }
    }

    /// Books what new pairs gained by the same, if they are frequent enough. A new token next to itself was first taken
    /// for one next to `half`, `overlap` times.
    fn gain<'a>(
        &mut self,
        told: impl Iterator<Item = &'a [(u32, u32)]> + Clone,
        half: u32,
        overlap: u64,
        key: impl Fn(u32) -> u64,
    ) {
        // What reaches the cutoff in all shards together has its share of that in one, or more than 32 bits hold.
        let share = u32::try_from(self.cutoff.div_ceil(self.n as u64)).unwrap_or(u32::MAX);
        let mut large = take(&mut self.large);
        for &(neighbour, _) in told.clone().flatten().filter(|&&(_, count)| count >= share) {
            let (word, bit) = (neighbour as usize / 64, 1 << (neighbour % 64));
            if word >= self.is_large.len() {
                self.is_large.resize(word + 1, 0);
                self.sums.resize(64 * (word + 1), 0);
            }
            if self.is_large[word] & bit == 0 {
                self.is_large[word] |= bit;
                large.push(neighbour);
            }
        }
        if !large.is_empty() {
            for &(neighbour, count) in told.flatten() {
                let word = self.is_large.get(neighbour as usize / 64).copied().unwrap_or(0);
                if word >> (neighbour % 64) & 1 != 0 {
                    self.sums[neighbour as usize] += u64::from(count);
                }
            }
        }
        for neighbour in large.drain(..) {
            self.is_large[neighbour as usize / 64] = 0;
            let count = take(&mut self.sums[neighbour as usize]);
            let gained = if neighbour == half { count - overlap } else { count };
            if gained >= self.cutoff {
                let id = self.insert(key(neighbour), gained);
                self.filed.push((neighbour, id));
            }
        }
        self.large = large;
    }
}

/// All ids given so far are below this.
pub fn id_limit(parts: &[Pairs]) -> usize {
    parts.iter().map(|part| part.len as usize).max().unwrap_or(0) * parts.len()
}

/// A pair that is taken out of its part: (key, count, id).
pub type Taken = (u64, u64, u32);

/// Takes the most frequent pair out of all parts.
pub fn pop(parts: &mut [impl DerefMut<Target = Pairs>]) -> Option<Taken> {
    let n = parts.len();
    let (top, number) = parts.iter_mut().map(|part| part.top()).zip(0..).max()?;
    let (count, Reverse(key), index) = top?;
    parts[number].heap.pop();
    Some((key, count, (index as usize * n + number) as u32))
}

/// Puts back what `pop` took out.
pub fn restore(parts: &mut [impl DerefMut<Target = Pairs>], (key, count, id): Taken) {
    let (index, number) = (id / parts.len() as u32, id as usize % parts.len());
    parts[number].wait((count, Reverse(key), index));
}

/// The pairs that are the most frequent, all with the same count, on their way to be merged, the lowest first.
///
/// Several may be merged in one go. Merging (a, b) changes only pairs that end with a or begin with b; and what it makes
/// is as frequent as these at most, and comes later in the order: (x, new) after (x, a), (new, y) after all that wait. So
/// whatever comes before the first pair that ends with an a or begins with a b of the batch is certain.
#[derive(Debug, Default)]
pub struct Level {
    count: u64,
    /// (key, id), the highest first; counts may have fallen since.
    waiting: Vec<(u64, u32)>,
}

impl Level {
    /// Takes the pairs to merge next, in order, at most `most`, out of all parts. Empty: no pair reaches the cutoff.
    pub fn next(&mut self, parts: &mut [impl DerefMut<Target = Pairs>], most: usize) -> Vec<Taken> {
        let mut batch: Vec<Taken> = Vec::with_capacity(most);
        while batch.is_empty() {
            if self.waiting.is_empty() {
                let Some(top) = parts.iter_mut().filter_map(|part| part.top()).max() else { break };
                self.count = top.0;
            }
            let (n, n_known) = (parts.len() as u32, self.waiting.len());
            for (part, number) in parts.iter_mut().zip(0..) {
                // Rarer pairs are looked for when it is their turn, by all threads.
                while let Some(&(_, Reverse(key), index)) = part.heap.peek().filter(|pair| pair.0 >= self.count) {
                    part.heap.pop();
                    let count = part.count_of(key);
                    if count == self.count {
                        self.waiting.push((key, index * n + number));
                    } else {
                        part.wait_again((count, Reverse(key), index));
                    }
                }
            }
            if self.waiting.len() > n_known {
                self.waiting.sort_unstable_by_key(|&pair| Reverse(pair));
            }
            while let Some(&(key, id)) = self.waiting.last().filter(|_| batch.len() < most) {
                let (left, right) = halves(key);
                if batch.iter().any(|taken| halves(taken.0).0 == right || halves(taken.0).1 == left) {
                    break;
                }
                self.waiting.pop();
                let part = &mut parts[(id % n) as usize];
                let count = part.count_of(key);
                if count == self.count {
                    batch.push((key, count, id));
                } else {
                    part.wait_again((count, Reverse(key), id / n));
                }
            }
        }
        batch
    }
}
