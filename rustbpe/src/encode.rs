//! Encoding: text to ids, by the rule tiktoken uses.
//!
//! A chunk that is a token becomes that token. Otherwise, starting from bytes, the two neighbours whose concatenation
//! is the token with the lowest rank are merged, leftmost first, until no two neighbours make a token.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{PatternError, VocabError};
use crate::lookup::{Characters, PairTable, APART, FLAG_BITS, NO_PIECE, NO_TOKEN};
use crate::pretokenize::Splitter;
use crate::vocab::Vocab;

/// Up to this many pieces, merging looks through all pairs for the lowest rank: quadratic, but without a branch.
const SHORT: usize = 64;

/// Up to this many, as nearly always, the search is short.
const FEW: usize = 8;

/// Bits of a position among that many pieces, below the rank in a key: the lowest key is the leftmost lowest rank.
const AT_BITS: u32 = SHORT.ilog2();

/// Pieces that are worked on together: those of many chunks, so that the waits for memory overlap.
const BLOCK: usize = 512;

/// Texts are dealt out to threads in runs of about this many bytes.
const RUN_BYTES: usize = 1 << 16;

/// Turns text into ids.
#[derive(Debug, Clone)]
pub struct Encoder {
    splitter: Splitter,
    vocab: Vocab,
    byte_pieces: [u32; 256],
    pairs: PairTable,
    characters: Option<Characters>,
    merges: Result<Vec<(u32, u32)>, VocabError>,
    longest_token: usize,
}

/// The highest piece made in merging a chunk, and the last pair merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Done {
    highest: u32,
    last: (u32, u32),
}

const NOTHING_DONE: Done = Done { highest: 0, last: (NO_PIECE, NO_PIECE) };

/// Pieces of whole chunks, one after the other.
#[derive(Debug)]
struct Block {
    pieces: [u32; BLOCK],
    len: usize,
    /// A bit for each piece after which merging stops.
    ends: [u64; BLOCK / 64],
    /// What each piece makes with the next; with room to look at a few too many.
    made: [u32; BLOCK + FEW],
}

/// Pieces, a bit for each after which merging stops, and room for what each makes with the next.
type Parts<'a> = (&'a mut [u32], &'a mut [u64], &'a mut [u32]);

impl Encoder {
    /// An encoder for `vocab` with chunks cut by `splitter`.
    pub fn new(splitter: Splitter, vocab: Vocab) -> Self {
        let splits = vocab.splits().collect();
        let mut encoder = Self::with_pairs(splitter, vocab, splits);
        // What happens between two borders that stay does not depend on what is around them. So a token is made, if at
        // all, by the same last merge wherever it is made, and of all its splits only that one is needed.
        let (mut made, mut highest, mut ids) = (Vec::new(), vec![0; encoder.vocab.len()], Vec::new());
        for (token, id) in encoder.vocab.iter().zip(0u32..).filter(|(token, _)| token.len() > 1) {
            ids.clear();
            let done = encoder.merge(token, &mut ids);
            let whole = ids.len() == 1;
            let (highest_id, last) = (done.highest >> FLAG_BITS, (done.last.0 >> FLAG_BITS, done.last.1 >> FLAG_BITS));
            highest[id as usize] = if whole { highest_id } else { NO_TOKEN };
            if whole {
                made.push((last.0, last.1, id));
            }
            match &mut encoder.merges {
                Ok(merges) if whole && highest_id == id => merges.push(last),
                merges if merges.is_ok() => *merges = Err(VocabError::Unreachable { id }),
                _ => {}
            }
        }
        Self::with_merges(encoder.splitter, encoder.vocab, made, &highest, encoder.merges)
    }

    /// An encoder for what was trained, where nothing needs to be found out.
    ///
    /// # Errors
    /// Those of [`Vocab::from_merges`].
    pub fn from_merges(splitter: Splitter, merges: Vec<(u32, u32)>) -> Result<Self, VocabError> {
        let vocab = Vocab::from_merges(&merges)?;
        let highest: Vec<u32> = (0..vocab.len() as u32).map(|id| if id < 256 { 0 } else { id }).collect();
        let made = merges.iter().zip(256..).map(|(&(left, right), id)| (left, right, id)).collect();
        Ok(Self::with_merges(splitter, vocab, made, &highest, Ok(merges)))
    }

    /// `made`: the last merge of each token; the rest as in [`Characters::new`].
    fn with_merges(
        splitter: Splitter,
        vocab: Vocab,
        made: Vec<(u32, u32, u32)>,
        highest: &[u32],
        merges: Result<Vec<(u32, u32)>, VocabError>,
    ) -> Self {
        let encoder = Self::with_pairs(splitter, vocab, made);
        let characters = Some(Characters::new(&encoder.vocab, &encoder.pairs, highest));
        Self { merges, characters, ..encoder }
    }

    fn with_pairs(splitter: Splitter, vocab: Vocab, pairs: Vec<(u32, u32, u32)>) -> Self {
        let longest_token = vocab.iter().map(<[u8]>::len).max().unwrap_or(1);
        let pairs = PairTable::new(pairs, &vocab);
        let mut byte_pieces = [NO_PIECE; 256];
        for (byte, piece) in (0..=255u8).zip(&mut byte_pieces) {
            *piece = vocab.id(&[byte]).map_or(NO_PIECE, |id| pairs.piece(id));
        }
        Self { splitter, vocab, byte_pieces, pairs, characters: None, merges: Ok(Vec::new()), longest_token }
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
        self.merges.clone()
    }

    /// Encodes a text, appending to `out`.
    pub fn encode_into(&self, text: &str, out: &mut Vec<u32>) -> Result<(), PatternError> {
        self.encode_split(&self.splitter, text, out)
    }

    fn encode_split(&self, splitter: &Splitter, text: &str, out: &mut Vec<u32>) -> Result<(), PatternError> {
        let mut block = Block { pieces: [0; BLOCK], len: 0, ends: [0; BLOCK / 64], made: [0; BLOCK + FEW] };
        splitter.split(text, |chunk| self.add_chunk(&mut block, chunk.as_bytes(), out))?;
        self.merge_block(&mut block, out);
        Ok(())
    }

    /// Adds a chunk to the block. If there is no room, or the chunk is long, those before it are encoded first.
    #[inline]
    fn add_chunk(&self, block: &mut Block, chunk: &[u8], out: &mut Vec<u32>) {
        if block.len + chunk.len() > BLOCK {
            self.merge_block(block, out);
        }
        let mut len = block.len;
        match self.whole_chunk(chunk) {
            Some(id) => {
                block.pieces[len] = self.pairs.piece(id);
                len += 1;
            }
            None if chunk.len() <= BLOCK => self.pieces(chunk, |piece| {
                block.pieces[len] = piece;
                len += 1;
            }),
            None => {}
        }
        if len == block.len || len - block.len > SHORT {
            self.merge_block(block, out);
            self.merge(chunk, out);
        } else {
            block.ends[(len - 1) / 64] |= 1 << ((len - 1) % 64);
            block.len = len;
        }
    }

    /// Appends the ids of all chunks in the block, which is empty afterwards.
    fn merge_block(&self, block: &mut Block, out: &mut Vec<u32>) {
        let Block { pieces, len, ends, made } = block;
        let left = self.merge_parts((&mut pieces[..*len], ends, made), true, &mut { NOTHING_DONE });
        out.extend(pieces[..left].iter().map(|piece| piece >> FLAG_BITS));
        (*len, *ends) = (0, [0; BLOCK / 64]);
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
            self.encode_chunk(part.invalid(), &mut ids);
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
            let splitter = self.splitter.clone();
            let mut done = Vec::new();
            while let Some(&(from, to)) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let (mut ids, mut ends) = (Vec::new(), Vec::with_capacity(to - from));
                for text in &texts[from..to] {
                    self.encode_split(&splitter, text.as_ref(), &mut ids)?;
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

    /// Appends the ids of a chunk.
    #[inline]
    pub(crate) fn encode_chunk(&self, chunk: &[u8], ids: &mut Vec<u32>) {
        match self.whole_chunk(chunk) {
            Some(id) => ids.push(id),
            None => drop(self.merge(chunk, ids)),
        }
    }

    /// The token that is this chunk, if it is worth looking up.
    #[inline]
    fn whole_chunk(&self, chunk: &[u8]) -> Option<u32> {
        // Merging finds every token that merges make. Looking it up is quicker only for words, which start from bytes.
        let look_up = chunk.first().is_some_and(|&first| first < 0x80) || self.merges.is_err();
        let look_up = look_up && (2..=self.longest_token).contains(&chunk.len());
        if look_up {
            self.vocab.id(chunk)
        } else {
            None
        }
    }

    /// Appends the ids of a chunk that is given in tokens, as all merges of lower ranks than some left it.
    pub(crate) fn encode_on(&self, tokens: impl Iterator<Item = u32>, ids: &mut Vec<u32>) {
        let first = ids.len();
        ids.extend(tokens.map(|id| self.pairs.piece(id)));
        self.merge_pieces(first, ids, false);
    }

    /// Appends the tokens that merging makes of a chunk.
    fn merge(&self, chunk: &[u8], ids: &mut Vec<u32>) -> Done {
        let first = ids.len();
        self.pieces(chunk, |piece| ids.push(piece));
        self.merge_pieces(first, ids, true)
    }

    /// The pieces a chunk starts from.
    #[inline]
    fn pieces(&self, chunk: &[u8], mut add: impl FnMut(u32)) {
        let mut from = 0;
        while from < chunk.len() {
            let whole = self.characters.as_ref().and_then(|characters| characters.at(chunk, from));
            let (piece, bytes) = whole.unwrap_or((self.byte_pieces[usize::from(chunk[from])], 1));
            add(piece);
            from += bytes;
        }
    }

    /// Turns the pieces from `first` on into the tokens that merging makes of them. `small`: none is more than a character.
    #[inline]
    fn merge_pieces(&self, first: usize, ids: &mut Vec<u32>, small: bool) -> Done {
        let pieces = &mut ids[first..];
        let mut done = NOTHING_DONE;
        let left = match pieces.len() {
            0 | 1 => pieces.len(),
            2..=SHORT => self.merge_short(pieces, small, &mut done),
            _ => self.merge_long(pieces, &mut done),
        };
        pieces.iter_mut().take(left).for_each(|piece| *piece >>= FLAG_BITS);
        ids.truncate(first + left);
        done
    }

    /// Merges 2 to [`SHORT`] pieces in place; returns how many are left.
    fn merge_short(&self, pieces: &mut [u32], small: bool, done: &mut Done) -> usize {
        let mut ends = [1 << (pieces.len() - 1)];
        self.merge_parts((pieces, &mut ends, &mut [0; SHORT + FEW]), small, done)
    }

    /// Merges pieces in place, never across the `ends`; returns how many are left. No more than [`SHORT`] pieces may be
    /// without an end; the last has one.
    #[allow(unsafe_code)]
    fn merge_parts(&self, parts: Parts, small: bool, done: &mut Done) -> usize {
        #[cfg(target_arch = "x86_64")]
        {
            /// The same for newer processors, which find the lowest of many keys and the next bit in one step.
            #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
            fn newer(this: &Encoder, parts: Parts, small: bool, done: &mut Done) -> usize {
                this.merge_parts_anywhere(parts, small, done)
            }
            let has_bits = is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2");
            if has_bits && is_x86_feature_detected!("lzcnt") && is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has these instructions.
                return unsafe { newer(self, parts, small, done) };
            }
        }
        self.merge_parts_anywhere(parts, small, done)
    }

    /// See `merge_parts`. What takes time is branches that cannot be foreseen, so there are few.
    #[inline(always)]
    fn merge_parts_anywhere(&self, (pieces, ends, made): Parts, small: bool, done: &mut Done) -> usize {
        for (at, (pair, made)) in pieces.windows(2).zip(made.iter_mut()).enumerate() {
            *made = self.pairs.get(pair[0], pair[1]);
            // Between characters that no token has side by side, the chunk can be cut.
            ends[at / 64] |= u64::from(small && self.pairs.are_apart(pair[0], pair[1])) << (at % 64);
        }
        let (mut start, mut left) = (0, 0);
        for (base, word) in (0..).step_by(64).zip(ends.iter_mut()) {
            while *word != 0 {
                let end = base + word.trailing_zeros() as usize;
                *word &= *word - 1;
                left = self.merge_part(pieces, made, (start, end), left, done);
                start = end + 1;
            }
        }
        left
    }

    /// Merges the pieces from `start` to `end`, that included, and moves them to `left`; returns where they end.
    #[inline(always)]
    fn merge_part(
        &self,
        pieces: &mut [u32],
        made: &[u32],
        (start, end): (usize, usize),
        mut left: usize,
        done: &mut Done,
    ) -> usize {
        if end - start < 2 {
            // One piece; or two, which make one or stay.
            let made = made[start];
            let one = (start < end) & (made < NO_PIECE);
            if one {
                *done = Done { highest: done.highest.max(made), last: (pieces[start], pieces[end]) };
            }
            let last = pieces[end];
            pieces[left] = if one { made } else { pieces[start] };
            left += usize::from((start < end) & !one);
            pieces[left] = if (start < end) & !one { last } else { pieces[left] };
            left += 1;
        } else if end - start == 2 {
            // Three pieces, the most frequent of the rest: one merge, and perhaps another with what is left.
            let (first, second) = (made[start], made[start + 1]);
            let (leftmost, made) = (first <= second, first.min(second));
            let part = [pieces[start], pieces[start + 1], pieces[end]];
            let pair = if leftmost { (made, part[2]) } else { (part[0], made) };
            let whole = self.pairs.get(pair.0, pair.1);
            let (one, two) = (made < NO_PIECE, made < NO_PIECE && whole < NO_PIECE);
            if one {
                let last = if leftmost { (part[0], part[1]) } else { (part[1], part[2]) };
                *done = Done { highest: done.highest.max(made), last };
            }
            if two {
                *done = Done { highest: done.highest.max(whole), last: pair };
            }
            let two_left = if one { pair } else { (part[0], part[1]) };
            pieces[left] = if two { whole } else { two_left.0 };
            pieces[left + 1] = if two { pieces[left + 1] } else { two_left.1 };
            pieces[left + 2] = if one { pieces[left + 2] } else { part[2] };
            left += 3 - usize::from(one) - usize::from(two);
        } else if end - start < FEW {
            left = self.merge_many::<FEW>(pieces, made, (start, end), left, done);
        } else {
            left = self.merge_many::<SHORT>(pieces, made, (start, end), left, done);
        }
        left
    }

    /// The same for at most `N` pieces, a power of two: a fixed number of keys is searched without a branch.
    #[inline(always)]
    fn merge_many<const N: usize>(
        &self,
        pieces: &mut [u32],
        made: &[u32],
        (start, end): (usize, usize),
        mut to: usize,
        done: &mut Done,
    ) -> usize {
        let (n, mut pairs) = (end - start, [u32::MAX; N]);
        if N == FEW {
            // The same, but all of them at once.
            let near = pairs.iter_mut().zip(&made[start..start + FEW]).zip(0u32..);
            near.for_each(|((pair, &made), at)| *pair = if at < n as u32 { made << AT_BITS | at } else { u32::MAX });
        } else {
            let all = pairs.iter_mut().zip(&made[start..end]).zip(0u32..);
            all.for_each(|((pair, &made), at)| *pair = made << AT_BITS | at);
        }
        // A bit for every piece that is still there.
        let mut alive = u64::MAX >> (SHORT - 1 - n);
        loop {
            let lowest = pairs.iter().fold(u32::MAX, |lowest, &key| key.min(lowest));
            let (made, at) = (lowest >> AT_BITS, lowest as usize % N);
            if made >= NO_PIECE {
                break;
            }
            let after = alive & (!1 << at);
            let gone = after.trailing_zeros() as usize % N;
            *done = Done { highest: done.highest.max(made), last: (pieces[start + at], pieces[start + gone]) };
            pieces[start + at] = made;
            alive &= !(1 << gone);
            let after = after & (after - 1);
            let right = if after == 0 { NO_PIECE } else { pieces[start + after.trailing_zeros() as usize % N] };
            let before = alive & ((1 << at) - 1);
            let left_at = before.checked_ilog2().unwrap_or(N as u32 - 1) as usize % N;
            let left = if before == 0 { NO_PIECE } else { pieces[start + left_at] };
            pairs[gone] = u32::MAX;
            pairs[at] = self.pairs.get(made, right) << AT_BITS | at as u32;
            let key = self.pairs.get(left, made) << AT_BITS | left_at as u32;
            if before != 0 {
                pairs[left_at] = key;
            }
        }
        while alive != 0 {
            pieces[to] = pieces[start + alive.trailing_zeros() as usize];
            to += 1;
            alive &= alive - 1;
        }
        to
    }

    /// The same for any number of pieces in O(n log n): a heap of (rank, position) over a doubly linked list.
    fn merge_long(&self, pieces: &mut [u32], done: &mut Done) -> usize {
        let n = pieces.len();
        let mut ranks: Vec<u32> = pieces.windows(2).map(|pair| self.pairs.get(pair[0], pair[1])).collect();
        ranks.push(APART);
        let mut next: Vec<usize> = (1..=n).collect();
        let mut previous: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> =
            (0..n).filter(|&i| ranks[i] < NO_PIECE).map(|i| Reverse((ranks[i], i))).collect();
        while let Some(Reverse((rank, at))) = heap.pop() {
            if ranks[at] != rank {
                continue; // merged away, or part of another pair by now
            }
            let gone = next[at];
            let after = next[gone];
            *done = Done { highest: done.highest.max(rank), last: (pieces[at], pieces[gone]) };
            pieces[at] = rank;
            ranks[gone] = APART;
            next[at] = after;
            let mut update = |i: usize, rank: u32| {
                ranks[i] = rank;
                if rank < NO_PIECE {
                    heap.push(Reverse((rank, i)));
                }
            };
            if after < n {
                previous[after] = at;
                update(at, self.pairs.get(rank, pieces[after]));
            } else {
                update(at, APART);
            }
            let before = previous[at];
            if before < n {
                update(before, self.pairs.get(pieces[before], rank));
            }
        }
        let (mut from, mut left) = (0, 0);
        while from < n {
            pieces[left] = pieces[from];
            left += 1;
            from = next[from];
        }
        left
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
    fn what_was_trained_needs_no_search_for_merges() {
        let text = "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。日月日月天地天地，宇宙天地。é ü 🙂🙂".repeat(3);
        let mut counts = crate::ChunkCounts::default();
        counts.count(&Splitter::new("bpe").unwrap(), &text).unwrap();
        let merges = crate::train(vec![counts], 310, |_| true).unwrap().merges;
        let trained = Encoder::from_merges(Splitter::new("bpe").unwrap(), merges.clone()).unwrap();
        let found = encoder(&merges);
        assert_eq!(trained.merges(), found.merges());
        for text in [text.as_str(), "月日é，张列🙂", "地天 üé"] {
            assert_eq!(trained.encode(text).unwrap(), found.encode(text).unwrap());
        }
    }

    #[test]
    fn short_and_long_agree() {
        let e = encoder(&[(97, 97), (256, 97), (97, 98), (256, 258), (257, 257), (98, 98), (259, 261)]);
        let mut state = 1u32;
        for n in (2..=SHORT).cycle().take(600) {
            let chunk: Vec<u8> = (0..n)
                .map(|_| {
                    state = state.wrapping_mul(1_103_515_245).wrapping_add(12345);
                    b'a' + u8::from((state >> 16) % 3 == 0)
                })
                .collect();
            let bytes: Vec<u32> = chunk.iter().map(|&byte| e.byte_pieces[usize::from(byte)]).collect();
            let (mut short, mut long) = (bytes.clone(), bytes);
            let mut done = [NOTHING_DONE; 2];
            let n_short = e.merge_short(&mut short, true, &mut done[0]);
            let n_long = e.merge_long(&mut long, &mut done[1]);
            assert_eq!((&short[..n_short], done[0].highest), (&long[..n_long], done[1].highest));
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
