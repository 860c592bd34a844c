//! The first merges, which make characters out of bytes, learned from counts of characters and of neighbours alone.
//!
//! Bytes merge inside characters, or whole characters merge with each other; merges of parts of characters across the
//! border are possible but come late if at all. As long as none comes, what happens inside characters depends only on
//! how often each character occurs, and whole characters can stand in the text as symbols from the start: a pair of
//! them never occurs more often than either, so both have become tokens before it is their turn. What would be the
//! most frequent pair of parts across a border is kept account of, from counts of neighbouring characters; once it
//! could be next, this stops, with every merge so far as it should be, and the general loop goes on from bytes.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::DerefMut;

use hashbrown::HashMap;
use rustc_hash::FxBuildHasher;

use crate::count::ChunkCounts;
use crate::crew::{each, join};
use crate::error::TrainError;
use crate::memory;
use crate::pairs::{halves, key, pop, restore, PairMap, Pairs};

/// The characters of the text: the symbols.
#[derive(Debug)]
pub struct Alphabet {
    /// Symbol by code point.
    symbols: Vec<u32>,
    /// (occurrences, character) by symbol, the most frequent first.
    characters: Vec<(u64, char)>,
}

/// Occurrences of every code point in counted chunks, up to the highest.
pub fn count_characters(counts: &ChunkCounts) -> Vec<u64> {
    let mut totals = Vec::new();
    for index in 0..counts.len() {
        let (chunk, count) = counts.get(index);
        characters(chunk, |c| match totals.get_mut(c as usize) {
            Some(total) => *total += count,
            None => {
                totals.resize(c as usize + 1, 0);
                totals[c as usize] = count;
            }
        });
    }
    totals
}

/// Adds the most frequent characters that together are `coverage` (0 to 1) of the text as chunks of their own, more often
/// than any pair can stand in it: they become tokens before whole characters are joined.
///
/// Returns what was added to the count of each; counts of merges modulo that are those of the text.
///
/// # Errors
/// [`TrainError::TooMuchText`] if there is no room for more chunks.
pub fn characters_first(parts: &mut [ChunkCounts], coverage: f64) -> Result<u64, TrainError> {
    let alphabet = Alphabet::new(each(parts, |part| count_characters(part)));
    let often = 1 + parts.iter().map(|part| part.totals.bytes).sum::<u64>();
    let total: u64 = alphabet.characters.iter().map(|&(count, _)| count).sum();
    let mut left = coverage * total as f64;
    for &(count, character) in &alphabet.characters {
        if left <= 0.0 {
            break;
        }
        left -= count as f64;
        let mut bytes = [0; 4];
        let chunk = character.encode_utf8(&mut bytes).as_bytes();
        if chunk.len() > 1 && !parts[0].add(chunk, often) {
            return Err(TrainError::TooMuchText { bytes: parts.iter().map(ChunkCounts::distinct_bytes).sum() });
        }
    }
    Ok(often)
}

/// The characters of a chunk, which is valid UTF-8.
#[inline]
pub fn characters(chunk: &[u8], mut visit: impl FnMut(u32)) {
    let mut at = 0;
    while at < chunk.len() {
        let first = u32::from(chunk[at]);
        let (code, len) = match first {
            0..0x80 => (first, 1),
            0x80..0xE0 => (first & 31, 2),
            0xE0..0xF0 => (first & 15, 3),
            _ => (first & 7, 4),
        };
        let tail = chunk.get(at + 1..at + len).unwrap_or(&[]);
        visit(tail.iter().fold(code, |code, &byte| code << 6 | u32::from(byte & 63)));
        at += len;
    }
}

impl Alphabet {
    /// From occurrences by code point, in parts.
    pub fn new(parts: Vec<Vec<u64>>) -> Self {
        let limit = parts.iter().map(Vec::len).max().unwrap_or(0);
        let total = |code: u32| parts.iter().filter_map(|part| part.get(code as usize)).sum();
        let mut symbols = vec![0; limit];
        let mut characters: Vec<(u64, char)> = (0..limit as u32)
            .filter_map(|code| Some((total(code), char::from_u32(code)?)))
            .filter(|&(total, _)| total > 0)
            .collect();
        characters.sort_unstable_by(|a, b| b.cmp(a));
        characters.iter().zip(0..).for_each(|(&(_, c), symbol)| symbols[c as usize] = symbol);
        Self { symbols, characters }
    }

    /// Number of symbols.
    pub fn len(&self) -> usize {
        self.characters.len()
    }

    /// The symbol of a code point that occurs.
    #[inline]
    pub fn symbol(&self, code: u32) -> u32 {
        self.symbols[code as usize]
    }
}

/// What to merge next.
#[derive(Debug, Clone, Copy)]
pub enum Next {
    /// Two symbols that stand for tokens.
    Symbols {
        /// Key of the symbols.
        pair: u64,
        /// Key of their tokens.
        tokens: u64,
        /// Occurrences.
        count: u64,
        /// Id of the pair.
        id: u32,
    },
    /// Two pieces of characters.
    Pieces {
        /// Key of the tokens.
        pair: u64,
        /// Occurrences.
        count: u64,
    },
    /// Nothing that is certain, or that reaches the cutoff.
    Unsure,
}

/// The characters on their way from bytes to tokens.
#[derive(Debug)]
pub struct Assembly {
    totals: Vec<u64>,
    /// Tokens by symbol: the pieces of a character; for later symbols, one token.
    pieces: Vec<Vec<u32>>,
    /// The first and the last of them, which differ unless the symbol is one token.
    ends: Vec<(u32, u32)>,
    /// Pairs of pieces inside characters: occurrences, and the symbols that have or had them.
    inside: HashMap<u64, (u64, Vec<u32>), FxBuildHasher>,
    /// (count, pair) of those that reach the cutoff. Counts may be out of date, but the highest is never too low.
    order: BinaryHeap<(u64, Reverse<u64>)>,
    /// Pairs of pieces across borders, where not both characters are whole.
    across: Pairs,
    /// (left symbol, right symbol, count), by left, and again by right, with where each symbol starts.
    neighbours: Vec<(u32, u32, u64)>,
    by_left: Vec<u32>,
    by_right: Vec<u32>,
    right_order: Vec<(u32, u32, u64)>,
    cutoff: u64,
}

/// What a merge takes from and adds to pairs across borders, by which of their halves it changed (the one before, the one
/// after), whether it adds, and the token on the other side.
type Deltas = [[Vec<u64>; 2]; 2];

impl Assembly {
    /// All characters in bytes. `neighbours` counts pairs of symbols; nothing rarer than `cutoff` is looked at.
    pub fn new(alphabet: &Alphabet, neighbours: &PairMap, cutoff: u64) -> Self {
        let n = alphabet.len();
        let pieces: Vec<Vec<u32>> = alphabet
            .characters
            .iter()
            .map(|(_, c)| c.encode_utf8(&mut [0; 4]).bytes().map(u32::from).collect())
            .collect();
        let triples = || neighbours.iter().map(|(key, n)| (halves(key).0, halves(key).1, n));
        let ((by_left, neighbours), (by_right, right_order)) = join(
            neighbours.n_parts() > 1,
            || grouped(n, || triples().map(|pair| (pair.0, pair))),
            || grouped(n, || triples().map(|pair| (pair.1, pair))),
        );
        let totals = alphabet.characters.iter().map(|&(total, _)| total).collect();
        let ends = pieces.iter().map(|pieces| (pieces[0], pieces[pieces.len() - 1])).collect();
        let (inside, order, across) = (HashMap::default(), BinaryHeap::new(), Pairs::new(cutoff, 0, 1));
        let mut new =
            Self { totals, pieces, ends, inside, order, across, neighbours, by_left, by_right, right_order, cutoff };
        let mut across = vec![0; 1 << 16];
        for &(left, right, count) in &new.neighbours {
            new.border(left, right)
                .into_iter()
                .for_each(|(before, after)| across[(before << 8 | after) as usize] += count);
        }
        for (i, count) in (0..).zip(across).filter(|&(_, count)| count >= cutoff) {
            new.across.insert(key(i >> 8, i & 0xFF), count);
        }
        for symbol in 0..n as u32 {
            new.note_inside(symbol, true);
        }
        new
    }

    /// The tokens a symbol stands for.
    pub fn pieces(&self, symbol: u32) -> &[u32] {
        &self.pieces[symbol as usize]
    }

    /// Adds a symbol for a new token.
    pub fn add_symbol(&mut self, token: u32) {
        self.pieces.push(vec![token]);
        self.ends.push((token, token));
    }

    /// The token of a symbol that is one.
    #[inline]
    pub fn token(&self, symbol: u32) -> Option<u32> {
        let ends = self.ends[symbol as usize];
        is_whole(ends).then_some(ends.0)
    }

    /// The key of tokens of a key of symbols, if both are tokens already.
    fn token_key(&self, symbols: u64) -> Option<u64> {
        let (left, right) = halves(symbols);
        Some(key(self.token(left)?, self.token(right)?))
    }

    /// Chooses the next merge; `symbols` are the pairs of symbols in the text, and lose the one that is chosen.
    pub fn next(&mut self, symbols: &mut [impl DerefMut<Target = Pairs>]) -> Next {
        let inside = self.most_frequent_inside();
        let mut equal = Vec::new();
        while let Some(pair) = pop(symbols) {
            equal.push(pair);
            if pair.1 < equal[0].1 {
                break;
            }
        }
        let highest = equal.first().map_or(0, |pair| pair.1);
        // Ties go to the lowest pair of tokens; a symbol that is no token yet waits for the merge inside it.
        let chosen =
            equal.iter().filter(|pair| pair.1 == highest).filter_map(|&p| Some((self.token_key(p.0)?, p))).min();
        let (next, count) = match (inside, chosen) {
            (Some((count, pair)), Some((tokens, _))) if count > highest || (count == highest && pair < tokens) => {
                (Next::Pieces { pair, count }, count)
            }
            (Some((count, pair)), None) => (Next::Pieces { pair, count }, count),
            (_, Some((tokens, (pair, count, id)))) => (Next::Symbols { pair, tokens, count, id }, count),
            (None, None) => (Next::Unsure, 0),
        };
        let next = if self.across.top().is_some_and(|(rival, ..)| rival >= count) { Next::Unsure } else { next };
        let taken = if let Next::Symbols { pair, .. } = next { Some(pair) } else { None };
        equal.into_iter().filter(|&(pair, ..)| Some(pair) != taken).for_each(|pair| restore(symbols, pair));
        next
    }

    /// The most frequent pair of pieces inside characters, the lowest of equals.
    fn most_frequent_inside(&mut self) -> Option<(u64, u64)> {
        while let Some(&(noted, Reverse(pair))) = self.order.peek() {
            let count = self.inside.get(&pair).map_or(0, |&(count, _)| count);
            if count == noted {
                return Some((count, pair));
            }
            self.order.pop();
            // If the count is higher by now, it has been noted too.
            if (self.cutoff..noted).contains(&count) {
                self.order.push((count, Reverse(pair)));
            }
        }
        None
    }

    /// Merges two pieces wherever they stand in a character.
    pub fn merge(&mut self, pair: u64, token: u32) {
        let (left, right) = halves(pair);
        let mut deltas: Deltas = [0; 2].map(|_| [0; 2].map(|_| vec![0; token as usize + 1]));
        for symbol in self.inside.remove(&pair).map_or(Vec::new(), |(_, symbols)| symbols) {
            let mut merged = Vec::with_capacity(4);
            let mut rest = self.pieces(symbol);
            while let [first, tail @ ..] = rest {
                let hit = *first == left && tail.first() == Some(&right);
                merged.push(if hit { token } else { *first });
                rest = if hit { &tail[1..] } else { tail };
            }
            let pieces = self.pieces(symbol);
            if merged.len() == pieces.len() {
                continue;
            }
            let ends = (merged[0], merged[merged.len() - 1]);
            self.note_around(symbol, ends, &mut deltas);
            self.ends[symbol as usize] = ends;
            self.note_inside(symbol, false);
            self.pieces[symbol as usize] = merged;
            self.note_inside(symbol, true);
        }
        self.inside.remove(&pair);
        self.book(&deltas, left, right, token);
    }

    fn note_inside(&mut self, symbol: u32, add: bool) {
        let total = self.totals[symbol as usize];
        for pair in self.pieces[symbol as usize].windows(2) {
            let pair = key(pair[0], pair[1]);
            let (count, symbols) = self.inside.entry(pair).or_default();
            if add {
                *count += total;
                symbols.push(symbol);
                if *count >= self.cutoff {
                    self.order.push((*count, Reverse(pair)));
                }
            } else {
                *count = count.saturating_sub(total);
            }
        }
    }

    /// Notes the pairs across those borders of a character where its piece will be another one; the pair with itself once.
    fn note_around(&self, symbol: u32, new: (u32, u32), [before, after]: &mut Deltas) {
        let old = self.ends[symbol as usize];
        let (first, last) = (old.0 != new.0, old.1 != new.1);
        let range = |starts: &[u32]| starts[symbol as usize] as usize..starts[symbol as usize + 1] as usize;
        let ends_of = |other: u32, own: (u32, u32)| if other == symbol { own } else { self.ends[other as usize] };
        // The character was not whole, so its borders counted; they go on to unless both are whole.
        for &(_, right, count) in &self.neighbours[if last { range(&self.by_left) } else { 0..0 }] {
            before[0][ends_of(right, old).0 as usize] += count;
            let other = ends_of(right, new);
            if !is_whole(new) || !is_whole(other) {
                before[1][other.0 as usize] += count;
            }
        }
        for &(left, _, count) in &self.right_order[if first { range(&self.by_right) } else { 0..0 }] {
            if left != symbol || !last {
                after[0][ends_of(left, old).1 as usize] += count;
                let other = ends_of(left, new);
                if !is_whole(new) || !is_whole(other) {
                    after[1][other.1 as usize] += count;
                }
            }
        }
    }

    /// The pieces next to each other where two characters meet that are not both whole.
    #[inline]
    fn border(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        let (left, right) = (self.ends[left as usize], self.ends[right as usize]);
        (!is_whole(left) || !is_whole(right)).then_some((left.1, right.0))
    }

    /// Books what the merge of `left` and `right` did to pairs across borders.
    fn book(&mut self, [before, after]: &Deltas, left: u32, right: u32, token: u32) {
        // A pair may be gained by one character and lost by its neighbour.
        let mut sums: HashMap<u64, i64, FxBuildHasher> = HashMap::default();
        for other in 0..=token {
            for (sign, before_is, after_is) in [(-1, right, left), (1, token, token)] {
                let add = usize::from(sign > 0);
                for (pair, count) in [
                    (key(before_is, other), before[add][other as usize]),
                    (key(other, after_is), after[add][other as usize]),
                ] {
                    if count > 0 {
                        *sums.entry(pair).or_default() += sign * count as i64;
                    }
                }
            }
        }
        for (pair, sum) in sums {
            if sum < 0 {
                self.across.subtract(pair, sum.unsigned_abs());
            } else if sum as u64 >= self.cutoff {
                self.across.insert(pair, sum as u64);
            }
        }
    }
}

/// Whether a character with these first and last pieces is one token.
#[inline]
fn is_whole((first, last): (u32, u32)) -> bool {
    first == last
}

/// Orders items by symbol; returns where those of each symbol start, and the items.
fn grouped<T: Copy + Default, I: Iterator<Item = (u32, T)>>(n: usize, items: impl Fn() -> I) -> (Vec<u32>, Vec<T>) {
    let mut starts = vec![0; n + 1];
    items().for_each(|(symbol, _)| starts[symbol as usize + 1] += 1);
    for i in 0..n {
        starts[i + 1] += starts[i];
    }
    let (mut next, mut ordered) = (starts.clone(), memory::filled(T::default(), starts[n] as usize));
    for (symbol, item) in items() {
        ordered[next[symbol as usize] as usize] = item;
        next[symbol as usize] += 1;
    }
    (starts, ordered)
}
