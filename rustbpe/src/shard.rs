//! One thread's part of the text, with the positions of all pairs in it.

use std::mem::take;
use std::sync::RwLockReadGuard;

use crate::memory;
use crate::pairs::{key, part_of, PairMap, Pairs, NONE};
use crate::word::{Slot, Words};

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

/// What one merge does to the pairs with the neighbours on one side: dense by token id, with the list of those met.
#[derive(Debug)]
pub struct Side {
    /// Occurrences of (neighbour, left half) or (right half, neighbour) that are gone.
    seen: Vec<u64>,
    /// The neighbours met.
    touched: Vec<u32>,
    /// (neighbour, position of the new pair), by ascending position.
    found: Vec<(u32, u32)>,
    /// How often the new token stands next to itself.
    pub overlap: u64,
    /// Where the list of the new pair with a neighbour goes.
    list_of: Vec<u32>,
    /// (neighbour, occurrences) for those who book: by part that loses a pair, `n_parts` times, and part that gains one.
    told: Vec<Vec<(u32, u64)>>,
    n_parts: usize,
}

impl Side {
    fn new(vocab_size: usize, n_parts: usize) -> Self {
        let (seen, list_of, told) = (vec![0; vocab_size], vec![NONE; vocab_size], vec![Vec::new(); n_parts * n_parts]);
        Self { seen, touched: Vec::new(), found: Vec::new(), overlap: 0, list_of, told, n_parts }
    }

    /// All neighbours there may be are below this.
    pub fn limit(&self) -> usize {
        self.seen.len()
    }

    /// (neighbour, occurrences) of pairs that a part loses; they may come twice from different sides.
    pub fn lost(&self, part: usize) -> impl Iterator<Item = &[(u32, u64)]> {
        self.told[part * self.n_parts..(part + 1) * self.n_parts].iter().map(Vec::as_slice)
    }

    /// The same for pairs that a part gains.
    pub fn gained(&self, part: usize) -> impl Iterator<Item = &[(u32, u64)]> {
        self.told.iter().skip(part).step_by(self.n_parts).map(Vec::as_slice)
    }

    /// Tells each part what it has to book. What is written at random stays with this thread: others read only lists.
    fn tell(&mut self, pairs: impl Fn(u32) -> (u64, u64)) {
        self.told.iter_mut().for_each(Vec::clear);
        for neighbour in self.touched.drain(..) {
            let (loser, gainer) = pairs(neighbour);
            let list = part_of(loser, self.n_parts) * self.n_parts + part_of(gainer, self.n_parts);
            self.told[list].push((neighbour, take(&mut self.seen[neighbour as usize])));
        }
    }

    #[inline]
    fn record(&mut self, neighbour: u32, position: u32, count: u64) {
        let seen = &mut self.seen[neighbour as usize];
        if *seen == 0 {
            self.touched.push(neighbour);
        }
        *seen += count;
        self.found.push((neighbour, position));
    }

    /// Writes the lists of the new pairs in `filed`, (neighbour, id) with ids new to `lists`; then forgets everything.
    fn file<'a>(
        &mut self,
        filed: impl Iterator<Item = &'a (u32, u32)> + Clone,
        lists: &mut Vec<(usize, u32)>,
        positions: &mut Vec<u32>,
    ) {
        let mut n_lists = 0;
        for &(neighbour, id) in filed.clone() {
            self.list_of[neighbour as usize] = id;
            n_lists = n_lists.max(id as usize + 1);
        }
        if n_lists > 0 {
            lists.resize(n_lists.max(lists.len()), (0, 0));
            for &(neighbour, _) in &self.found {
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
            for &(neighbour, position) in &self.found {
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
        self.found.clear();
        self.overlap = 0;
    }
}

/// One thread's part of the pieces, with the positions of all pairs in it.
#[derive(Debug)]
pub struct Shard<S> {
    words: Words<S>,
    /// By pair id: where its list starts in `positions`, and how long it is.
    lists: Vec<(usize, u32)>,
    positions: Vec<u32>,
    /// Pairs with the neighbour before.
    pub before: Side,
    /// Pairs with the neighbour after.
    pub after: Side,
}

impl<S: Slot> Shard<S> {
    /// A shard without any lists, one of `n`.
    pub fn new(words: Words<S>, vocab_size: usize, n: usize) -> Self {
        let (before, after) = (Side::new(vocab_size, n), Side::new(vocab_size, n));
        Self { words, lists: Vec::new(), positions: Vec::new(), before, after }
    }

    /// The pieces as they are now.
    pub fn into_words(self) -> Words<S> {
        self.words
    }

    /// Lists the positions of all pairs that have an id. `lens`, if known: how many positions each id has.
    pub fn list_pairs(&mut self, ids: &PairMap, n_ids: usize, lens: Option<Vec<u32>>) {
        self.words.index_counts();
        let mut found = Vec::new();
        let lens = lens.unwrap_or_else(|| {
            let mut lens = vec![0; n_ids];
            self.words.pairs(|left, right, position, _| {
                let id = ids.id(left, right);
                if id != NONE {
                    lens[id as usize] += 1;
                    found.push((id, position));
                }
            });
            lens
        });
        // Fits 32 bits, as positions do.
        let total: usize = lens.iter().map(|&len| len as usize).sum();
        // Lists of later pairs follow: room for them saves moving all of these.
        self.positions = vec![0; 2 * total];
        memory::advise_huge(&self.positions);
        self.positions.truncate(total);
        // Where the next position of each id goes: half the memory of the lists, which decides the speed of filling.
        let mut next = Vec::with_capacity(lens.len());
        let mut end = 0;
        for &len in &lens {
            next.push(end);
            end += len;
        }
        let positions = &mut self.positions;
        let mut file = |id: u32, position| {
            let next = &mut next[id as usize];
            positions[*next as usize] = position;
            *next += 1;
        };
        if found.is_empty() {
            self.words.pairs(|left, right, position, _| {
                let id = ids.id(left, right);
                if id != NONE {
                    file(id, position);
                }
            });
        } else {
            found.into_iter().for_each(|(id, position)| file(id, position));
        }
        self.lists = Vec::with_capacity(2 * lens.len());
        self.lists.extend(lens.iter().zip(next).map(|(&len, end)| ((end - len) as usize, len)));
    }

    /// Writes the lists of the pairs made by the merge before, as all parts booked it.
    pub fn file(&mut self, parts: &[RwLockReadGuard<'_, Pairs>]) {
        let Self { lists, positions, before, after, .. } = self;
        before.file(parts.iter().flat_map(|part| &part.filed[0]), lists, positions);
        after.file(parts.iter().flat_map(|part| &part.filed[1]), lists, positions);
    }

    /// Merges a pair wherever it stands and notes what that does to its neighbours.
    pub fn merge(&mut self, merge: Merge) {
        let Merge { id, left, right, token } = merge;
        self.words.new_token(left, right);
        let Self { words, lists, positions, before, after } = self;
        let (start, len) = lists[id as usize];
        let list = &positions[start..start + len as usize];
        let (left_width, width) = (words.width_of(left), words.width_of(token));
        let (left, right, token) = (S::new(left), S::new(right), S::new(token));
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
                after.overlap += count;
                if let Some(last) = after.found.last_mut() {
                    last.0 = token.id();
                }
            } else if x != S::EDGE {
                before.record(x.id(), position - words.width_of(x.id()), count);
            }
            if y != S::EDGE {
                after.record(y.id(), position, count);
            }
        }
        before.tell(|x| merge.with_before(x));
        after.tell(|y| merge.with_after(y));
    }
}
