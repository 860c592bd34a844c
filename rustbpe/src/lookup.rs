//! Tables of the encoder.

use std::cmp::Reverse;

use crate::vocab::{Vocab, MAX_TOKENS};

/// Rank of a pair that makes no token, id of a character that is none: more than any id.
pub const NO_TOKEN: u32 = MAX_TOKENS as u32;

/// While a chunk is merged, its tokens are *pieces*: the id, then whether it is a byte of a longer character.
pub const FLAG_BITS: u32 = 1;
const IS_PART: u32 = 1;
const ID_BITS: u32 = NO_TOKEN.ilog2() + 1;
const PIECE_BITS: u32 = ID_BITS + FLAG_BITS;
/// What two pieces make that make nothing.
pub const APART: u32 = (1 << PIECE_BITS) - 1;
/// Less than that, more than any piece; half of no pair.
pub const NO_PIECE: u32 = APART - 1;

/// Bits for each pair of characters side by side, of which all others then find about a tenth set.
const NEIGHBOUR_BITS: usize = 8;

/// Two pieces to the piece they make. A perfect hash table, since branches that cannot be foreseen take more time than
/// all else: a pair's group has a factor that sends every pair of it to a slot of its own.
#[derive(Debug, Clone)]
pub struct PairTable {
    /// Pair of ids in the upper bits, piece in the lower: eight to a cache line.
    slots: Vec<u64>,
    /// By group.
    factors: Vec<u16>,
    /// By hash, a bit for the pairs of characters that stand side by side in some token. Apart from the merges, so that
    /// these stay in a near cache.
    neighbours: Vec<u64>,
    /// By id.
    pieces: Vec<u32>,
}

impl PairTable {
    /// Of no pair.
    const EMPTY: u64 = u64::MAX;

    /// From merges as (left, right, token).
    pub fn new(mut pairs: Vec<(u32, u32, u32)>, vocab: &Vocab) -> Self {
        pairs.sort_unstable();
        pairs.dedup_by_key(|&mut (left, right, _)| (left, right));
        let part = |token: &[u8]| if matches!(token, [0x80..=0xFF]) { IS_PART } else { 0 };
        let pieces: Vec<u32> = vocab.iter().zip(0..).map(|(token, id)| id << FLAG_BITS | part(token)).collect();
        let of = |id: u32| pieces.get(id as usize).copied().unwrap_or(NO_PIECE);
        let full: Vec<u64> = pairs
            .into_iter()
            .map(|(left, right, id)| pair(of(left), of(right)) << PIECE_BITS | u64::from(of(id)))
            .collect();
        let side_by_side: Vec<_> =
            vocab.neighbours().into_iter().map(|(left, right)| pair(of(left), of(right))).collect();
        let neighbours = vec![0; (side_by_side.len() * NEIGHBOUR_BITS / 64).next_power_of_two()];
        let mut table = Self { slots: Vec::new(), factors: Vec::new(), neighbours, pieces };
        for pair in side_by_side {
            let (word, bit) = table.neighbour_bit(pair);
            table.neighbours[word] |= bit;
        }
        let mut size = full.len() + full.len() / 8 + 64;
        loop {
            (table.factors, table.slots) = (vec![0; (size / 4).next_power_of_two()], vec![Self::EMPTY; size]);
            if table.fill(&full) {
                return table;
            }
            size += size / 4;
        }
    }

    /// Finds the factors; false if there is none for some group.
    fn fill(&mut self, full: &[u64]) -> bool {
        let mut groups = vec![Vec::new(); self.factors.len()];
        full.iter().for_each(|&slot| groups[self.group(slot >> PIECE_BITS)].push(slot));
        let mut order: Vec<usize> = (0..groups.len()).collect();
        order.sort_by_key(|&group| Reverse(groups[group].len()));
        order.into_iter().all(|group| {
            let mut placed = Vec::new();
            (0..=u16::MAX).any(|factor| {
                self.factors[group] = factor;
                for &slot in &groups[group] {
                    let at = self.place(slot >> PIECE_BITS);
                    if self.slots[at] != Self::EMPTY {
                        placed.drain(..).for_each(|at: usize| self.slots[at] = Self::EMPTY);
                        return false;
                    }
                    self.slots[at] = slot;
                    placed.push(at);
                }
                true
            })
        })
    }

    /// The piece of an id.
    pub fn piece(&self, id: u32) -> u32 {
        self.pieces[id as usize]
    }

    #[inline(always)]
    fn group(&self, pair: u64) -> usize {
        (pair.wrapping_mul(SPREAD) >> (64 - self.factors.len().trailing_zeros())) as usize
    }

    #[inline(always)]
    fn place(&self, pair: u64) -> usize {
        let factor = 2 * u64::from(self.factors[self.group(pair)]) + 1;
        // Below the number of slots, which fits 32 bits.
        let hash = pair.wrapping_mul(SPREAD).wrapping_mul(factor) >> 32;
        ((hash * self.slots.len() as u64) >> 32) as usize
    }

    #[inline(always)]
    fn neighbour_bit(&self, pair: u64) -> (usize, u64) {
        let bit = pair.wrapping_mul(SPREAD) >> (58 - self.neighbours.len().trailing_zeros());
        ((bit >> 6) as usize, 1 << (bit & 63))
    }

    /// The piece two pieces make, or [`APART`].
    #[inline(always)]
    pub fn get(&self, left: u32, right: u32) -> u32 {
        let pair = pair(left, right);
        let slot = self.slots[self.place(pair)];
        if slot >> PIECE_BITS == pair {
            slot as u32 & APART
        } else {
            APART
        }
    }

    /// Whether two characters are known to stand side by side in no token; never of parts of characters.
    #[inline(always)]
    pub fn are_apart(&self, left: u32, right: u32) -> bool {
        let (word, bit) = self.neighbour_bit(pair(left, right));
        (left | right) & IS_PART == 0 && self.neighbours[word] & bit == 0
    }
}

/// Odd, and without a pattern.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

#[inline(always)]
fn pair(left: u32, right: u32) -> u64 {
    u64::from(left >> FLAG_BITS) << ID_BITS | u64::from(right >> FLAG_BITS)
}

/// Which characters may be taken as one token from the start.
///
/// Merging starts from bytes, but nearly every character has become one token before anything can be merged across its
/// borders. The first merge across a border of a character that is not yet whole takes a part of it that touches the
/// border: at its right a proper ending, which starts with a continuation byte; at its left a proper beginning, which
/// is shorter than its first byte says. So if no such merge over these two border bytes has a rank below the last one
/// the character needs, the character is whole in time, and starting with it whole gives the same tokens.
#[derive(Debug, Clone)]
pub struct Characters {
    /// By code point below 0x10000: the piece, with [`ALWAYS`] if it is whole in time between any neighbours.
    pieces: Vec<u32>,
    /// By code point: the highest rank needed to make the token.
    ranks: Vec<u32>,
    /// By byte before and byte after a border: the lowest rank of a merge that takes a beginning of the right character.
    beginnings: Vec<u32>,
    /// The same for merges that take an ending of the left character.
    endings: Vec<u32>,
}

const ALWAYS: u32 = 1 << 31;

/// Bytes of the character that starts with this byte, as far as the byte tells.
fn length(first: u8) -> usize {
    match first {
        0xF0.. => 4,
        0xE0.. => 3,
        0xC0.. => 2,
        _ => 1,
    }
}

fn border(before: u8, after: u8) -> usize {
    usize::from(before) << 8 | usize::from(after)
}

impl Characters {
    /// `highest` is the highest rank needed to make each token from its bytes, or [`NO_TOKEN`] if they end up as several.
    pub fn new(vocab: &Vocab, pairs: &PairTable, highest: &[u32]) -> Self {
        let none = || vec![NO_TOKEN; 1 << 16];
        let mut new = Self { pieces: vec![NO_PIECE; 1 << 16], ranks: none(), beginnings: none(), endings: none() };
        for (token, id) in vocab.iter().zip(0u32..) {
            let ending = token[0] & 0xC0 == 0x80;
            for (left, right) in (1..token.len()).map(|cut| token.split_at(cut)) {
                let beginning = right.len() < length(right[0]);
                if (beginning || ending) && vocab.id(left).is_some() && vocab.id(right).is_some() {
                    let border = border(left[left.len() - 1], right[0]);
                    if beginning {
                        new.beginnings[border] = new.beginnings[border].min(id);
                    }
                    if ending {
                        new.endings[border] = new.endings[border].min(id);
                    }
                }
            }
        }
        let lowest = |borders: &mut dyn Iterator<Item = u32>| borders.min().unwrap_or(NO_TOKEN);
        let before: Vec<_> =
            (0..=255).map(|first| lowest(&mut (0..=255).map(|before| new.beginnings[border(before, first)]))).collect();
        let after: Vec<_> =
            (0..=255).map(|last| lowest(&mut (0..=255).map(|after| new.endings[border(last, after)]))).collect();
        for ((token, id), &rank) in vocab.iter().zip(0u32..).zip(highest) {
            let mut characters = std::str::from_utf8(token).unwrap_or("").chars();
            if let (Some(c @ '\u{80}'..='\u{FFFF}'), None, true) =
                (characters.next(), characters.next(), rank < NO_TOKEN)
            {
                let always = rank < before[usize::from(token[0])] && rank < after[usize::from(token[token.len() - 1])];
                new.pieces[c as usize] = pairs.piece(id) | if always { ALWAYS } else { 0 };
                new.ranks[c as usize] = rank;
            }
        }
        new
    }

    /// Whether the character at `chunk[from..]` may start as one token: (piece, bytes).
    #[inline(always)]
    pub fn at(&self, chunk: &[u8], from: usize) -> Option<(u32, usize)> {
        let (code, bytes) = match chunk[from..] {
            // An overlong form, found in damaged text only, has the code of another character.
            [a @ 0xE0..=0xEF, b, c, ..] if b & c & 0xC0 == 0x80 && (b | c) & 0x40 == 0 && (a, b) >= (0xE0, 0xA0) => {
                (usize::from(a & 15) << 12 | usize::from(b & 63) << 6 | usize::from(c & 63), 3)
            }
            [a @ 0xC2..=0xDF, b, ..] if b & 0xC0 == 0x80 => (usize::from(a & 31) << 6 | usize::from(b & 63), 2),
            _ => return None,
        };
        let piece = self.pieces[code];
        if piece & ALWAYS != 0 {
            return Some((piece & APART, bytes));
        }
        let (rank, to) = (self.ranks[code], from + bytes);
        let early = from == 0 || rank < self.beginnings[border(chunk[from - 1], chunk[from])];
        let late = to == chunk.len() || rank < self.endings[border(chunk[to - 1], chunk[to])];
        (piece != NO_PIECE && early && late).then_some((piece, bytes))
    }
}
