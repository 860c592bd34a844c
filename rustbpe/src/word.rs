//! Pieces of chunks in one flat array, where merging two neighbours takes constant time and no links.
//!
//! A token occupies `width` slots. Its id stands in its first slot and in its last, so the token after it starts
//! `width[id]` slots further on, and the token before it has its id in the slot just before. Slots in between hold
//! nothing that is ever read as a token: the first slot of a right half is overwritten when the halves merge.

use crate::count::Range;
use crate::memory;
use crate::pairs::{Ids, NONE};

/// What a slot holds: 16 bits if the ids fit, since the array is far larger than any cache.
pub trait Slot: Copy + Eq + Send + Sync + 'static {
    /// Stands between pieces.
    const EDGE: Self;
    /// Stands where a token used to start.
    const DEAD: Self;
    /// Ids below this fit.
    const ID_LIMIT: u32;
    /// The slot for an id below the limit.
    fn new(id: u32) -> Self;
    /// The id, or a number from the limit up for the two marks.
    fn id(self) -> u32;
}

macro_rules! slot {
    ($type:ty) => {
        impl Slot for $type {
            const EDGE: Self = <$type>::MAX;
            const DEAD: Self = <$type>::MAX - 1;
            const ID_LIMIT: u32 = Self::DEAD as u32;
            #[inline]
            fn new(id: u32) -> Self {
                id as $type
            }
            #[inline]
            fn id(self) -> u32 {
                self.into()
            }
        }
    };
}
slot!(u16);
slot!(u32);

/// The pieces as token ids, ordered by count, with the width in slots of every token so far.
#[derive(Debug)]
pub struct Words<S> {
    slots: Vec<S>,
    width: Vec<u32>,
    /// Ascending (first slot after the pieces with this count, count).
    weights: Vec<(u32, u64)>,
    /// For each block of slots, the first of the weights that reaches into it; made when first asked for.
    blocks: Vec<u32>,
}

/// Pairs of neighbours that have an id, by ascending position.
#[derive(Debug)]
pub enum Found {
    /// All have: their ids.
    All(Vec<u32>),
    /// Some have: (position, id).
    Some(Vec<(u32, u32)>),
}

impl Found {
    /// Calls `visit` for the id of each.
    pub fn ids(&self, visit: impl FnMut(u32)) {
        match self {
            Self::All(ids) => ids.iter().copied().for_each(visit),
            Self::Some(pairs) => pairs.iter().map(|pair| pair.1).for_each(visit),
        }
    }

    /// Calls `visit(position, id)` for each; they are of these words.
    #[inline]
    pub fn visit<S: Slot>(&self, words: &Words<S>, mut visit: impl FnMut(u32, u32)) {
        match self {
            Self::All(ids) => {
                let mut ids = ids.iter();
                words.pairs(|_, _, position, _| ids.next().into_iter().for_each(|&id| visit(position, id)));
            }
            Self::Some(pairs) => pairs.iter().for_each(|&(position, id)| visit(position, id)),
        }
    }
}

/// Pairs looked at before what came of them goes to an array that is far away.
const NEAR: usize = 1 << 10;

/// Slots in a block, as a power of two.
const BLOCK: u32 = 9;

impl<S: Slot> Words<S> {
    /// Lays out counted pieces, one slot a token; `lay` appends the tokens of a piece, all below `n_tokens`.
    /// None if there is more than 32-bit positions can address.
    pub fn new(ranges: &[Range<'_>], n_tokens: usize, lay: impl Fn(&[u8], &mut Vec<S>)) -> Option<Self> {
        // Pieces of equal count side by side: a few thousand boundaries replace a count per slot.
        let all = || {
            ranges.iter().zip(0..).flat_map(|((counts, range), number)| {
                range.clone().map(move |i| (counts.count_of(i), number, i as u32))
            })
        };
        // Most occur once: these are in order as they are.
        let mut order: Vec<(u64, u32, u32)> = memory::with_capacity(ranges.iter().map(|(_, range)| range.len()).sum());
        order.extend(all().filter(|&(count, ..)| count == 1));
        let n_once = order.len();
        order.extend(all().filter(|&(count, ..)| count != 1));
        order[n_once..].sort_unstable();
        let bytes: usize = ranges.iter().map(|(counts, range)| counts.bytes_in(range)).sum();
        let mut slots = memory::with_capacity(bytes + order.len() + 1);
        let mut weights: Vec<(u32, u64)> = Vec::new();
        slots.push(S::EDGE);
        for (count, number, index) in order {
            lay(ranges[number as usize].0.get(index as usize).0, &mut slots);
            slots.push(S::EDGE);
            let end = u32::try_from(slots.len()).ok()?;
            match weights.last_mut() {
                Some(last) if last.1 == count => last.0 = end,
                _ => weights.push((end, count)),
            }
        }
        Some(Self { slots, width: vec![1; n_tokens], weights, blocks: Vec::new() })
    }

    /// The same pieces in other tokens, all below `n_tokens`, one slot each; `lay` appends those for one of ours.
    pub fn map(&self, n_tokens: usize, lay: impl Fn(u32, &mut Vec<S>)) -> Self {
        let mut slots = memory::with_capacity(self.slots.len());
        let mut weights = Vec::with_capacity(self.weights.len());
        slots.push(S::EDGE);
        let mut at = 1;
        for &(end, count) in &self.weights {
            while at < end as usize {
                let token = self.slots[at];
                if token == S::EDGE {
                    slots.push(S::EDGE);
                    at += 1;
                } else {
                    lay(token.id(), &mut slots);
                    at += self.width[token.id() as usize] as usize;
                }
            }
            weights.push((slots.len() as u32, count));
        }
        Self { slots, width: vec![1; n_tokens], weights, blocks: Vec::new() }
    }

    /// The same pieces cut between neighbours whose pair has no id, without single tokens; and the pairs in them.
    ///
    /// Nothing was merged in these pieces yet, as in the two that follow.
    pub fn cut(&self, ids: &Ids) -> (Self, Found) {
        // Two tokens and an edge may come of every two tokens.
        let mut slots = memory::with_capacity(self.slots.len() / 2 * 3 + 2);
        let mut found = memory::with_capacity(self.slots.len());
        slots.push(S::EDGE);
        // Whether two tokens stay together is hard to predict, so all is written, and what is not wanted overwritten.
        let (mut near_slots, mut near_found) = ([S::EDGE; 2 * NEAR + 2], [0; NEAR + 1]);
        let mut weights = Vec::with_capacity(self.weights.len());
        let (mut at, mut open) = (1, false);
        for &(end, count) in &self.weights {
            for start in (at..end as usize).step_by(NEAR) {
                let (mut n_slots, mut n_found) = (0, 0);
                for pair in self.slots[start - 1..(start + NEAR).min(end as usize)].windows(2) {
                    let id = ids.get(pair[0].id(), pair[1].id());
                    let join = id != NONE;
                    near_found[n_found] = id;
                    n_found += usize::from(join);
                    near_slots[n_slots] = pair[0];
                    n_slots += usize::from(open | join);
                    near_slots[n_slots] = S::EDGE;
                    n_slots += usize::from(open & !join);
                    open = join;
                }
                slots.extend_from_slice(&near_slots[..n_slots]);
                found.extend_from_slice(&near_found[..n_found]);
            }
            at = end as usize;
            weights.push((slots.len() as u32, count));
        }
        (Self { slots, width: vec![1; self.width.len()], weights, blocks: Vec::new() }, Found::All(found))
    }

    /// All pairs that have an id.
    pub fn find(&self, ids: &Ids) -> Found {
        let mut found = Vec::new();
        self.pairs(|left, right, position, _| {
            let id = ids.get(left, right);
            if id != NONE {
                memory::reserve_huge(&mut found, 1);
                found.push((position, id));
            }
        });
        Found::Some(found)
    }

    /// Calls `visit(left, right, position, count)` for each pair of neighbours, by ascending position.
    #[inline]
    pub fn pairs(&self, mut visit: impl FnMut(u32, u32, u32, u64)) {
        let mut at = 1;
        for &(end, count) in &self.weights {
            for (pair, position) in self.slots[at..end as usize].windows(2).zip(at as u32..) {
                if pair[0] != S::EDGE && pair[1] != S::EDGE {
                    visit(pair[0].id(), pair[1].id(), position, count);
                }
            }
            at = end as usize;
        }
    }

    /// Number of tokens so far.
    pub fn n_tokens(&self) -> usize {
        self.width.len()
    }

    /// Makes room for a token made of `left` and `right`.
    pub fn new_token(&mut self, left: u32, right: u32) {
        self.width.push(self.width[left as usize].saturating_add(self.width[right as usize]));
    }

    /// Width of a token in slots.
    #[inline]
    pub fn width_of(&self, token: u32) -> u32 {
        self.width[token as usize]
    }

    /// Prepares `count_at`.
    pub fn index_counts(&mut self) {
        self.blocks.clear();
        for (i, &(end, _)) in self.weights.iter().enumerate() {
            let n_blocks = (end as usize).div_ceil(1 << BLOCK);
            self.blocks.resize(self.blocks.len().max(n_blocks), i as u32);
        }
        self.blocks.push(self.weights.len().saturating_sub(1) as u32);
    }

    /// The count of the piece at `position`; `index_counts` comes first.
    #[inline]
    pub fn count_at(&self, position: u32) -> u64 {
        // Most pieces occur once and come first.
        let (end, count) = self.weights[0];
        if position < end {
            return count;
        }
        let block = (position >> BLOCK) as usize;
        let among = &self.weights[self.blocks[block] as usize..=self.blocks[block + 1] as usize];
        among[among.partition_point(|&(end, _)| end <= position)].1
    }

    /// Asks for the slots around `position` to be brought near.
    #[inline]
    pub fn prefetch(&self, position: u32) {
        memory::prefetch(&self.slots, position as usize);
    }

    /// Whether `left` then `right` still stand at `position`, which was once the start of that pair.
    #[inline]
    pub fn is_pair(&self, position: u32, left: S, right: S) -> bool {
        self.slots[position as usize] == left && self.slots[(position + self.width_of(left.id())) as usize] == right
    }

    /// Merges the pair at `position` into `token`; returns the tokens before and after it, or [`Slot::EDGE`].
    #[inline]
    pub fn merge(&mut self, position: u32, left_width: u32, width: u32, token: S) -> (S, S) {
        let start = position as usize;
        let end = start + width as usize;
        self.slots[start + left_width as usize] = S::DEAD;
        self.slots[start] = token;
        self.slots[end - 1] = token;
        (self.slots[start - 1], self.slots[end])
    }
}
