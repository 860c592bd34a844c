//! One thread's part of the text, with the positions of all pairs in it.

use std::mem::take;
use std::sync::RwLockReadGuard;

use crate::memory;
use crate::pairs::{halves, key, part_of, Pairs, NONE};
use crate::word::{Found, Slot, Words};

/// Memory is asked for this many items ahead of being visited.
pub const AHEAD: usize = 12;

/// A pair, its id, and the token to make of it.
#[derive(Debug, Clone, Copy)]
pub struct Merge {
    /// Id of the pair.
    pub id: u32,
    /// Left half.
    pub left: u32,
    /// Right half.
    pub right: u32,
    /// The new token.
    pub token: u32,
}

impl Merge {
    /// The pairs that lose and gain an occurrence where `x` stands before.
    #[inline]
    pub fn with_before(&self, x: u32) -> (u64, u64) {
        (key(x, self.left), key(x, self.token))
    }

    /// The same where `y` stands after.
    #[inline]
    pub fn with_after(&self, y: u32) -> (u64, u64) {
        (key(self.right, y), key(self.token, y))
    }
}

/// What the merges of a batch do to the pairs with the neighbours of the new tokens, by merge and side, before then after.
#[derive(Debug, Default)]
pub struct Notes {
    /// (neighbour, occurrences) for those who book, by part that loses a pair. What 32 bits do not hold is told in parts.
    told: Vec<Vec<(u32, u32)>>,
    /// Where each merge and side ends in each list.
    told_ends: Vec<usize>,
    /// By side, (neighbour, position of the new pair), by ascending position for every merge, and where they end.
    found: [Vec<(u32, u32)>; 2],
    found_ends: [Vec<usize>; 2],
    /// By merge: how often the new token stands next to itself.
    overlaps: Vec<u64>,
}

/// What one merge does on one side.
#[derive(Debug, Clone, Copy)]
pub struct Note<'a> {
    notes: &'a Notes,
    merge: usize,
    side: usize,
}

impl Notes {
    fn new(n_parts: usize) -> Self {
        Self { told: vec![Vec::new(); n_parts], ..Self::default() }
    }

    /// What a merge of the batch does on a side.
    pub fn of(&self, merge: usize, side: usize) -> Note<'_> {
        Note { notes: self, merge, side }
    }

    fn clear(&mut self) {
        self.told.iter_mut().for_each(Vec::clear);
        self.found.iter_mut().for_each(Vec::clear);
        self.found_ends.iter_mut().for_each(Vec::clear);
        self.told_ends.clear();
        self.overlaps.clear();
    }
}

impl<'a> Note<'a> {
    /// (neighbour, occurrences) of pairs that a part loses.
    pub fn lost(self, part: usize) -> &'a [(u32, u32)] {
        let n_parts = self.notes.told.len();
        let end = (2 * self.merge + self.side) * n_parts + part;
        let start = end.checked_sub(n_parts).map_or(0, |before| self.notes.told_ends[before]);
        &self.notes.told[part][start..self.notes.told_ends[end]]
    }

    /// How often the new token stands next to itself.
    pub fn overlap(self) -> u64 {
        self.notes.overlaps[self.merge] * self.side as u64
    }

    fn found(self) -> &'a [(u32, u32)] {
        let ends = &self.notes.found_ends[self.side];
        let start = self.merge.checked_sub(1).map_or(0, |before| ends[before]);
        &self.notes.found[self.side][start..ends[self.merge]]
    }
}

/// What is needed to write notes about one side: dense by token id, with the list of those met.
#[derive(Debug)]
struct Side {
    /// Occurrences of (neighbour, left half) or (right half, neighbour) that are gone, in 32 bits to have all near.
    seen: Vec<u32>,
    /// The neighbours met.
    touched: Vec<u32>,
    /// Occurrences that do not fit.
    more: Vec<(u32, u64)>,
    /// Where the list of the new pair with a neighbour goes.
    list_of: Vec<u32>,
}

impl Side {
    fn new(vocab_size: usize) -> Self {
        let (touched, more) = (Vec::new(), Vec::new());
        Self { seen: vec![0; vocab_size], touched, more, list_of: vec![NONE; vocab_size] }
    }

    #[inline]
    fn record(&mut self, neighbour: u32, count: u64) {
        let seen = &mut self.seen[neighbour as usize];
        match u32::try_from(count).ok().and_then(|count| seen.checked_add(count)) {
            Some(sum) => {
                if *seen == 0 {
                    self.touched.push(neighbour);
                }
                *seen = sum;
            }
            None => self.more.push((neighbour, u64::from(take(seen)) + count)),
        }
    }

    /// Tells each part what it has to book. What is written at random stays with this thread: others read only lists.
    fn tell(&mut self, notes: &mut Notes, lost: impl Fn(u32) -> u64) {
        let n_parts = notes.told.len();
        let part_of = |neighbour| part_of(halves(lost(neighbour)).0, n_parts);
        let mut tell = |neighbour, count| notes.told[part_of(neighbour)].push((neighbour, count));
        for neighbour in self.touched.drain(..) {
            tell(neighbour, take(&mut self.seen[neighbour as usize]));
        }
        for (neighbour, mut count) in self.more.drain(..) {
            while count > 0 {
                let some = u32::try_from(count).unwrap_or(u32::MAX);
                tell(neighbour, some);
                count -= u64::from(some);
            }
        }
        notes.told_ends.extend(notes.told.iter().map(Vec::len));
    }

    /// Writes the lists of the new pairs in `filed`, (neighbour, id) with ids new to `lists`.
    fn file<'a>(
        &mut self,
        found: &[(u32, u32)],
        filed: impl Iterator<Item = &'a (u32, u32)> + Clone,
        lists: &mut Vec<(usize, u32)>,
        positions: &mut Vec<u32>,
    ) {
        let mut n_lists = 0;
        for &(neighbour, id) in filed.clone() {
            self.list_of[neighbour as usize] = id;
            n_lists = n_lists.max(id as usize + 1);
        }
        if n_lists == 0 {
            return;
        }
        lists.resize(n_lists.max(lists.len()), (0, 0));
        for &(neighbour, _) in found {
            let id = self.list_of[neighbour as usize];
            if id != NONE {
                lists[id as usize].1 += 1;
            }
        }
        let mut end = positions.len();
        for &(_, id) in filed.clone() {
            let list = &mut lists[id as usize];
            list.0 = end;
            end += list.1 as usize;
            list.1 = 0;
        }
        positions.resize(end, 0);
        for &(neighbour, position) in found {
            let id = self.list_of[neighbour as usize];
            if id != NONE {
                let (start, len) = &mut lists[id as usize];
                positions[*start + *len as usize] = position;
                *len += 1;
            }
        }
        for &(neighbour, _) in filed {
            self.list_of[neighbour as usize] = NONE;
        }
    }
}

/// One thread's part of the pieces, with the positions of all pairs in it.
#[derive(Debug)]
pub struct Shard<S> {
    words: Words<S>,
    /// By pair id: where its list starts in `positions`, and how long it is.
    lists: Vec<(usize, u32)>,
    positions: Vec<u32>,
    sides: [Side; 2],
    /// What the batch last done did.
    pub notes: Notes,
}

impl<S: Slot> Shard<S> {
    /// A shard without any lists, one of `n`.
    pub fn new(words: Words<S>, vocab_size: usize, n: usize) -> Self {
        let sides = [Side::new(vocab_size), Side::new(vocab_size)];
        Self { words, lists: Vec::new(), positions: Vec::new(), sides, notes: Notes::new(n) }
    }

    /// The pieces as they are now.
    pub fn into_words(self) -> Words<S> {
        self.words
    }

    /// Lists the positions of the pairs that were found, which have one of `n_ids` ids.
    pub fn list_pairs(&mut self, found: &Found, n_ids: usize) {
        self.words.index_counts();
        let mut next = vec![0u32; n_ids];
        found.ids(|id| next[id as usize] += 1);
        self.lists = Vec::with_capacity(2 * n_ids);
        let mut end = 0;
        for next in &mut next {
            // Fits 32 bits, as positions do.
            self.lists.push((end as usize, *next));
            end += std::mem::replace(next, end);
        }
        // Lists of later pairs follow: room for them saves moving all of these.
        self.positions = memory::with_capacity(2 * end as usize);
        self.positions.resize(end as usize, 0);
        let positions = &mut self.positions;
        found.visit(&self.words, |position, id| {
            let next = &mut next[id as usize];
            positions[*next as usize] = position;
            *next += 1;
        });
    }

    /// Writes the lists of the pairs made by the batch before, as all parts booked it.
    pub fn file(&mut self, parts: &[RwLockReadGuard<'_, Pairs>]) {
        let Self { lists, positions, sides, notes, .. } = self;
        for merge in 0..parts.first().map_or(0, |part| part.n_booked()) {
            for (side, at) in sides.iter_mut().zip(0..) {
                let filed = parts.iter().flat_map(|part| part.filed(merge, at));
                side.file(notes.of(merge, at).found(), filed, lists, positions);
            }
        }
    }

    /// Merges pairs wherever they stand, one after the other, and notes what each does to its neighbours.
    pub fn merge(&mut self, batch: &[Merge]) {
        self.notes.clear();
        for merge in batch {
            memory::prefetch(&self.positions, self.lists[merge.id as usize].0);
        }
        for (i, merge) in batch.iter().enumerate() {
            for &position in batch.get(i + 1).map_or(&[][..], |next| self.list(next.id)).iter().take(AHEAD) {
                self.words.prefetch(position);
            }
            self.merge_one(*merge);
        }
    }

    fn list(&self, id: u32) -> &[u32] {
        let (start, len) = self.lists[id as usize];
        &self.positions[start..start + len as usize]
    }

    fn merge_one(&mut self, merge: Merge) {
        let Merge { id, left, right, token } = merge;
        self.words.new_token(left, right);
        let Self { words, lists, positions, sides: [before, after], notes } = self;
        let [found_before, found_after] = &mut notes.found;
        let (start, len) = lists[id as usize];
        let list = &positions[start..start + len as usize];
        let (left_width, width) = (words.width_of(left), words.width_of(token));
        let (left, right, token) = (S::new(left), S::new(right), S::new(token));
        let mut overlap = 0;
        for (i, &position) in list.iter().enumerate() {
            if let Some(&later) = list.get(i + AHEAD) {
                words.prefetch(later);
            }
            if !words.is_pair(position, left, right) {
                continue;
            }
            let count = words.count_at(position);
            let (x, y) = words.merge(position, left_width, width, token);
            if x == token {
                // The new token next to itself: what the merge just before noted as (token, left) is (token, token).
                overlap += count;
                if let Some(last) = found_after.last_mut() {
                    last.0 = token.id();
                }
            } else if x != S::EDGE {
                before.record(x.id(), count);
                found_before.push((x.id(), position - words.width_of(x.id())));
            }
            if y != S::EDGE {
                after.record(y.id(), count);
                found_after.push((y.id(), position));
            }
        }
        notes.overlaps.push(overlap);
        for (found, ends) in notes.found.iter().zip(&mut notes.found_ends) {
            ends.push(found.len());
        }
        before.tell(notes, |x| merge.with_before(x).0);
        after.tell(notes, |y| merge.with_after(y).0);
    }
}
