//! Encoding: text to ids, by the rule tiktoken uses.
//!
//! A chunk that is a token becomes that token. Otherwise, starting from bytes, the two neighbours whose concatenation
//! is the token with the lowest rank are merged, leftmost first, until no two neighbours make a token.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{PatternError, VocabError};
use crate::lookup::{Characters, PairTable, NO_TOKEN};
use crate::pretokenize::Splitter;
use crate::vocab::Vocab;

/// Up to this many pieces, merging scans for the lowest rank: quadratic, but in one cache line or a few.
const SCAN_MAX: usize = 96;

/// Texts are dealt out to threads in runs of about this many bytes.
const RUN_BYTES: usize = 1 << 16;

/// Turns text into ids.
#[derive(Debug, Clone)]
pub struct Encoder {
    splitter: Splitter,
    vocab: Vocab,
    byte_ids: [u32; 256],
    pairs: PairTable,
    characters: Option<Characters>,
    longest_token: usize,
}

/// Memory reused from chunk to chunk.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    ids: Vec<u32>,
    /// Rank of the pair that starts at each id.
    ranks: Vec<u32>,
}

impl Encoder {
    /// An encoder for `vocab` with chunks cut by `splitter`.
    pub fn new(splitter: Splitter, vocab: Vocab) -> Self {
        let mut byte_ids = [0; 256];
        for byte in 0..=255u8 {
            byte_ids[usize::from(byte)] = vocab.id(&[byte]).unwrap_or(NO_TOKEN);
        }
        let pairs = PairTable::new(&vocab);
        let longest_token = vocab.iter().map(<[u8]>::len).max().unwrap_or(1);
        let mut encoder = Self { splitter, vocab, byte_ids, pairs, characters: None, longest_token };
        let mut scratch = Scratch::default();
        let characters = Characters::new(&encoder.vocab, |token| {
            let highest = encoder.merge(token, NO_TOKEN, &mut scratch);
            (scratch.ids.len() == 1).then_some(highest)
        });
        encoder.characters = Some(characters);
        encoder
    }

    /// The vocabulary.
    pub fn vocab(&self) -> &Vocab {
        &self.vocab
    }

    /// The splitter.
    pub fn splitter(&self) -> &Splitter {
        &self.splitter
    }

    /// The merge that makes each token after the 256 bytes, in order of rank.
    ///
    /// These alone, applied in order, encode as this encoder does: see `train.rs` on why no token has two ways to be
    /// made. A vocabulary from elsewhere may hold tokens no merge makes; those are errors.
    pub fn merges(&self) -> Result<Vec<(u32, u32)>, VocabError> {
        let mut scratch = Scratch::default();
        let mut merges = Vec::with_capacity(self.vocab.len().saturating_sub(256));
        for (token, id) in self.vocab.iter().zip(0u32..).filter(|(token, _)| token.len() > 1) {
            self.merge(token, id, &mut scratch);
            match scratch.ids[..] {
                [left, right] => merges.push((left, right)),
                _ => return Err(VocabError::Unreachable { id }),
            }
        }
        Ok(merges)
    }

    /// Encodes a text, appending to `out`.
    pub fn encode_into(&self, text: &str, out: &mut Vec<u32>) -> Result<(), PatternError> {
        let mut scratch = Scratch::default();
        self.splitter.split(text, |chunk| self.encode_chunk(chunk.as_bytes(), &mut scratch, out))
    }

    /// Encodes a text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, PatternError> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.encode_into(text, &mut ids)?;
        Ok(ids)
    }

    /// Encodes any bytes: what is valid UTF-8 as text, each invalid stretch as a chunk of its own.
    pub fn encode_bytes(&self, bytes: &[u8]) -> Result<Vec<u32>, PatternError> {
        let mut ids = Vec::with_capacity(bytes.len() / 3);
        for part in bytes.utf8_chunks() {
            self.encode_into(part.valid(), &mut ids)?;
            self.encode_chunk(part.invalid(), &mut Scratch::default(), &mut ids);
        }
        Ok(ids)
    }

    /// Encodes many texts on `threads >= 1` threads, in order: all ids end to end, and where each text ends.
    pub fn encode_batch<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        threads: usize,
    ) -> Result<(Vec<u32>, Vec<usize>), PatternError> {
        let runs = runs_of(texts);
        let threads = threads.clamp(1, runs.len().max(1));
        let next = AtomicUsize::new(0);
        let work = || {
            // A clone per thread: regex engines share scratch memory between clones less than between references.
            let (splitter, mut scratch) = (self.splitter.clone(), Scratch::default());
            let mut done = Vec::new();
            while let Some(&(from, to)) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let (mut ids, mut ends) = (Vec::new(), Vec::with_capacity(to - from));
                for text in &texts[from..to] {
                    splitter.split(text.as_ref(), |c| self.encode_chunk(c.as_bytes(), &mut scratch, &mut ids))?;
                    ends.push(ids.len());
                }
                done.push((from, ids, ends));
            }
            Ok(done)
        };
        let mut parts = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut parts = work()?;
            for thread in others {
                let part = thread
                    .join()
                    .unwrap_or_else(|_| Err(PatternError::GaveUp { reason: "an encoding thread died".to_owned() }))?;
                parts.extend(part);
            }
            Ok::<_, PatternError>(parts)
        })?;
        parts.sort_unstable_by_key(|&(from, ..)| from);
        let mut ids = Vec::with_capacity(parts.iter().map(|(_, part, _)| part.len()).sum());
        let mut ends = Vec::with_capacity(texts.len());
        for (_, part, part_ends) in parts {
            ends.extend(part_ends.iter().map(|end| ids.len() + end));
            ids.extend_from_slice(&part);
        }
        Ok((ids, ends))
    }

    #[inline]
    pub(crate) fn encode_chunk(&self, chunk: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        match chunk {
            [] => {}
            [byte] => out.push(self.byte_ids[usize::from(*byte)]),
            _ => {
                if let Some((id, bytes)) = self.character_at(chunk, 0) {
                    if bytes == chunk.len() {
                        return out.push(id);
                    }
                }
                if chunk.len() <= self.longest_token {
                    if let Some(id) = self.vocab.id(chunk) {
                        return out.push(id);
                    }
                }
                self.merge(chunk, NO_TOKEN, scratch);
                out.extend_from_slice(&scratch.ids);
            }
        }
    }

    #[inline]
    fn character_at(&self, chunk: &[u8], from: usize) -> Option<(u32, usize)> {
        self.characters.as_ref()?.at(chunk, from)
    }

    /// The id of the token two tokens make, or [`NO_TOKEN`] if there is none below `limit`.
    #[inline]
    fn rank(&self, left: u32, right: u32, limit: u32) -> u32 {
        let rank = self.pairs.get(left, right);
        if rank < limit {
            rank
        } else {
            NO_TOKEN
        }
    }

    /// Leaves in `scratch.ids` the tokens of a chunk of two bytes or more, using only merges of rank below `limit`.
    /// Returns the highest rank used.
    fn merge(&self, chunk: &[u8], limit: u32, scratch: &mut Scratch) -> u32 {
        let Scratch { ids, ranks } = scratch;
        ids.clear();
        let mut from = 0;
        while from < chunk.len() {
            // With a limit, a character may not be whole at the end.
            let whole = if limit == NO_TOKEN { self.character_at(chunk, from) } else { None };
            let (id, bytes) = whole.unwrap_or((self.byte_ids[usize::from(chunk[from])], 1));
            ids.push(id);
            from += bytes;
        }
        ranks.clear();
        ranks.extend(ids.windows(2).map(|pair| self.rank(pair[0], pair[1], limit)));
        ranks.push(NO_TOKEN);
        if ids.len() <= SCAN_MAX {
            self.merge_by_scan(limit, scratch)
        } else {
            self.merge_by_heap(limit, scratch)
        }
    }

    fn merge_by_scan(&self, limit: u32, scratch: &mut Scratch) -> u32 {
        let Scratch { ids, ranks } = scratch;
        let mut highest = 0;
        loop {
            let (mut at, mut lowest) = (0, NO_TOKEN);
            for (i, &rank) in ranks.iter().enumerate() {
                if rank < lowest {
                    (at, lowest) = (i, rank);
                }
            }
            if lowest == NO_TOKEN {
                return highest;
            }
            highest = highest.max(lowest);
            ids[at] = lowest;
            ids.remove(at + 1);
            ranks.remove(at + 1);
            ranks[at] = ids.get(at + 1).map_or(NO_TOKEN, |&right| self.rank(lowest, right, limit));
            if at > 0 {
                ranks[at - 1] = self.rank(ids[at - 1], lowest, limit);
            }
        }
    }

    /// The same in O(n log n): a heap of (rank, position) over a doubly linked list.
    fn merge_by_heap(&self, limit: u32, scratch: &mut Scratch) -> u32 {
        let Scratch { ids, ranks } = scratch;
        let mut highest = 0;
        let n = ids.len();
        let mut next: Vec<usize> = (1..=n).collect();
        let mut previous: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> =
            (0..n).filter(|&i| ranks[i] != NO_TOKEN).map(|i| Reverse((ranks[i], i))).collect();
        while let Some(Reverse((rank, at))) = heap.pop() {
            if ranks[at] != rank {
                continue; // merged away, or part of another pair by now
            }
            highest = highest.max(rank);
            let gone = next[at];
            let after = next[gone];
            ids[at] = rank;
            ranks[gone] = NO_TOKEN;
            next[at] = after;
            let mut update = |i: usize, rank: u32| {
                ranks[i] = rank;
                if rank != NO_TOKEN {
                    heap.push(Reverse((rank, i)));
                }
            };
            if after < n {
                previous[after] = at;
                update(at, self.rank(rank, ids[after], limit));
            } else {
                update(at, NO_TOKEN);
            }
            let before = previous[at];
            if before < n {
                update(before, self.rank(ids[before], rank, limit));
            }
        }
        let (mut from, mut to) = (0, 0);
        while from < n {
            ids[to] = ids[from];
            to += 1;
            from = next[from];
        }
        ids.truncate(to);
        highest
    }
}

/// Cuts a list of texts into runs (from, to) of about [`RUN_BYTES`].
fn runs_of<T: AsRef<str>>(texts: &[T]) -> Vec<(usize, usize)> {
    let (mut runs, mut from, mut bytes) = (Vec::new(), 0, 0);
    for (i, text) in texts.iter().enumerate() {
        bytes += text.as_ref().len();
        if bytes >= RUN_BYTES || i + 1 == texts.len() {
            runs.push((from, i + 1));
            (from, bytes) = (i + 1, 0);
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoder(merges: &[(u32, u32)]) -> Encoder {
        Encoder::new(Splitter::new("bpe").unwrap(), Vocab::from_merges(merges).unwrap())
    }

    #[test]
    fn lowest_rank_then_leftmost() {
        let e = encoder(&[(98, 99), (97, 97), (97, 98)]);
        assert_eq!(e.encode("abc").unwrap(), [97, 256]);
        assert_eq!(e.encode("aaab").unwrap(), [257, 258]);
    }

    #[test]
    fn scan_and_heap_agree() {
        let e = encoder(&[(97, 97), (256, 97), (97, 98), (256, 258), (257, 257), (98, 98), (259, 261)]);
        let mut state = 1u32;
        for n in 2..600 {
            let chunk: Vec<u8> = (0..n)
                .map(|_| {
                    state = state.wrapping_mul(1_103_515_245).wrapping_add(12345);
                    b'a' + u8::from((state >> 16) % 3 == 0)
                })
                .collect();
            let (mut a, mut b) = (Scratch::default(), Scratch::default());
            e.merge(&chunk[..2], NO_TOKEN, &mut a);
            for s in [&mut a, &mut b] {
                s.ids = chunk.iter().map(|&c| u32::from(c)).collect();
                s.ranks = chunk.windows(2).map(|p| e.rank(p[0].into(), p[1].into(), NO_TOKEN)).collect();
                s.ranks.push(NO_TOKEN);
            }
            e.merge_by_scan(NO_TOKEN, &mut a);
            e.merge_by_heap(NO_TOKEN, &mut b);
            assert_eq!(a.ids, b.ids);
        }
    }

    #[test]
    fn batches_equal_single_texts_for_any_number_of_threads() {
        let e = encoder(&[(97, 97), (228, 189)]);
        let texts: Vec<String> = (0..300).map(|i| "aaa 你好，world".repeat(i)).collect();
        for threads in [1, 3] {
            let (ids, ends) = e.encode_batch(&texts, threads).unwrap();
            let mut from = 0;
            for (text, end) in texts.iter().zip(ends) {
                assert_eq!(ids[from..end], e.encode(text).unwrap());
                from = end;
            }
        }
        assert_eq!(e.encode_batch::<&str>(&[], 2).unwrap(), (vec![], vec![]));
    }

    #[test]
    fn any_bytes_survive_the_round_trip() {
        let e = encoder(&[(97, 97), (255, 254)]);
        let bytes: Vec<u8> = (0..=255).rev().chain(0..=255).collect();
        assert_eq!(e.vocab().decode(&e.encode_bytes(&bytes).unwrap()).unwrap(), bytes);
    }

    #[test]
    fn merges_are_recovered_from_the_vocabulary() {
        let merges = [(97, 97), (256, 97), (97, 98), (257, 98)];
        assert_eq!(encoder(&merges).merges().unwrap(), merges);
        let unreachable = Vocab::from_ranks((0..=255u8).map(|b| vec![b]).chain([b"abc".to_vec()])).unwrap();
        let encoder = Encoder::new(Splitter::new("bpe").unwrap(), unreachable);
        assert_eq!(encoder.merges(), Err(VocabError::Unreachable { id: 256 }));
    }
}
