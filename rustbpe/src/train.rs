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
//! A pair comes into being only while its newer half is being made, so afterwards its count only falls. Two things
//! follow. A pair needs a list of the positions where it stands only if it starts with at least the count of the last
//! merge to be made, the *cutoff*; most pairs are rarer, and nothing needs to be known of them. And no token will ever
//! reach across two neighbours whose pair is rarer than that, so chunks can be cut there: the pieces are short, and
//! most of them equal to others. Merges therefore go in rounds. Each round guesses a cutoff, cuts, counts equal pieces
//! once, and merges while a pair reaches the cutoff; the next goes on with a lower one. A guess that is off costs time,
//! never a merge.

use std::marker::PhantomData;
use std::sync::{PoisonError, RwLock};

use crate::chars::{characters, count_characters, Alphabet, Assembly, Next};
use crate::count::{shares, ChunkCounts};
use crate::crew::{each, lead, read, write};
use crate::error::TrainError;
use crate::pairs::{halves, id_limit, Level, PairMap, Pairs};
use crate::shard::{Merge, Shard};
use crate::vocab::MAX_TOKENS;
use crate::word::{Found, Slot, Words};

/// The first round ends with pairs that occur once in this many bytes of text: by then characters are tokens.
pub const FIRST_CUTOFF_BYTES: u64 = 8000;

/// Merges done in one go, if their order is certain.
const BATCH: usize = 32;

/// Merges in order: the first makes token 256.
pub type Merges = Vec<(u32, u32)>;

/// What training gives.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Learned {
    /// The merges.
    pub merges: Merges,
    /// How often each pair stood in the text when it was merged.
    pub counts: Vec<u64>,
}

/// Learns `vocab_size - 256` merges from chunks counted in parts; each part gets a thread.
///
/// `tick(merges_done)` runs after each merge; returning `false` stops with [`TrainError::Cancelled`].
///
/// # Errors
/// [`TrainError::TooFewTokens`] says the largest size the text can give.
pub fn train(parts: Vec<ChunkCounts>, vocab_size: u32, tick: impl FnMut(u32) -> bool) -> Result<Learned, TrainError> {
    if !(256..=MAX_TOKENS).contains(&(vocab_size as usize)) {
        return Err(TrainError::VocabSize { asked: vocab_size.into() });
    }
    if parts.iter().all(|part| part.totals.bytes == 0) {
        return Err(TrainError::NoText);
    }
    run(parts, vocab_size, FIRST_CUTOFF_BYTES, tick)
}

fn run(
    mut parts: Vec<ChunkCounts>,
    vocab_size: u32,
    cutoff_bytes: u64,
    tick: impl FnMut(u32) -> bool,
) -> Result<Learned, TrainError> {
    let alphabet = Alphabet::new(each(&mut parts, |part| count_characters(part)));
    if vocab_size as usize + alphabet.len() <= u16::ID_LIMIT as usize {
        Learner::<u16, _>::new(vocab_size, Learned::default(), tick).run(parts, &alphabet, cutoff_bytes)
    } else {
        Learner::<u32, _>::new(vocab_size, Learned::default(), tick).run(parts, &alphabet, cutoff_bytes)
    }
}

/// Learns merges, telling `tick` after each.
#[derive(Debug)]
pub struct Learner<S, T> {
    /// Tokens to reach.
    pub vocab_size: u32,
    /// Merges so far.
    pub learned: Learned,
    tick: T,
    slot: PhantomData<S>,
}

impl<S: Slot, T: FnMut(u32) -> bool> Learner<S, T> {
    /// Goes on from what was learned.
    pub fn new(vocab_size: u32, learned: Learned, tick: T) -> Self {
        Self { vocab_size, learned, tick, slot: PhantomData }
    }

    /// Tokens so far.
    pub fn n_tokens(&self) -> usize {
        256 + self.learned.merges.len()
    }

    fn run(mut self, parts: Vec<ChunkCounts>, alphabet: &Alphabet, cutoff_bytes: u64) -> Result<Learned, TrainError> {
        let bytes: u64 = parts.iter().map(|part| part.totals.bytes).sum();
        let lay =
            |chunk: &[u8], slots: &mut Vec<S>| characters(chunk, |code| slots.push(S::new(alphabet.symbol(code))));
        let words = each(&mut shares(&parts), |share| Words::new(share, alphabet.len(), lay));
        let words = words.into_iter().collect::<Option<Vec<_>>>();
        let too_much = || TrainError::TooMuchText { bytes: parts.iter().map(ChunkCounts::distinct_bytes).sum() };
        let words = words.ok_or_else(too_much)?;
        drop(parts);
        let mut cutoff = (bytes / cutoff_bytes).max(1);
        let mut words = self.assemble(words, alphabet, cutoff)?;
        let n_sure = self.learned.merges.len();
        while self.n_tokens() < self.vocab_size as usize {
            // Nothing below the cutoff can be learned from pieces that were cut: every round starts from whole ones.
            self.learned.merges.truncate(n_sure);
            self.learned.counts.truncate(n_sure);
            cutoff = self.next_cutoff(cutoff);
            let (pairs, ids) = count_pairs(&mut words, self.n_tokens()).number(cutoff);
            self.round(each(&mut words, |words| words.cut(&ids)), pairs, None)?;
            if cutoff == 1 && self.n_tokens() < self.vocab_size as usize {
                return Err(TrainError::TooFewTokens { asked: self.vocab_size, reached: self.n_tokens() as u32 });
            }
        }
        Ok(self.learned)
    }

    /// Learns the first merges from whole characters; returns the text in the tokens so far.
    fn assemble(
        &mut self,
        mut words: Vec<Words<S>>,
        alphabet: &Alphabet,
        cutoff: u64,
    ) -> Result<Vec<Words<S>>, TrainError> {
        let counts = count_pairs(&mut words, alphabet.len());
        let mut assembly = Assembly::new(alphabet, &counts, cutoff);
        let (pairs, ids) = counts.number(cutoff);
        drop(counts);
        let found = each(&mut words, |words| words.find(&ids));
        let mut words = self.round(words.into_iter().zip(found).collect(), pairs, Some(&mut assembly))?;
        let n_tokens = self.n_tokens();
        let lay = |symbol, slots: &mut Vec<S>| match assembly.token(symbol) {
            Some(token) => slots.push(S::new(token)),
            None => slots.extend(assembly.pieces(symbol).iter().map(|&token| S::new(token))),
        };
        Ok(each(&mut words, |words| words.map(n_tokens, lay)))
    }

    /// Guesses the count of the last merge: counts fall about as a power of the number of merges.
    pub fn next_cutoff(&self, cutoff: u64) -> u64 {
        let (n, last) = (self.learned.counts.len(), self.learned.counts.len().saturating_sub(1));
        if n > 256 && self.learned.counts[last] >= cutoff {
            let slope = (self.learned.counts[n / 4] as f64 / self.learned.counts[last] as f64).ln() / 4f64.ln();
            let rest = (n as f64 / f64::from(self.vocab_size - 256)).powf(slope);
            // A quarter of it, since a guess too high costs a round, one too low next to nothing.
            return ((cutoff as f64 * rest * 0.25) as u64).clamp(1, (cutoff / 2).max(1));
        }
        (cutoff / 8).max(1)
    }

    /// Merges while a pair reaches the cutoff and there is room for tokens, in pieces with the pairs found in them.
    /// With an assembly, the words are in symbols.
    pub fn round(
        &mut self,
        words: Vec<(Words<S>, Found)>,
        pairs: Vec<Pairs>,
        mut assembly: Option<&mut Assembly>,
    ) -> Result<Vec<Words<S>>, TrainError> {
        let n_symbols = words.first().map_or(0, |(words, _)| words.n_tokens());
        let n = pairs.len();
        let new = |(words, found)| (Shard::new(words, n_symbols + self.vocab_size as usize, n), found);
        let mut shards: Vec<_> = words.into_iter().map(new).collect();
        each(&mut shards, |(shard, found)| shard.list_pairs(found, id_limit(&pairs)));
        let shards: Vec<_> = shards.into_iter().map(|(shard, _)| RwLock::new(shard)).collect();
        let pairs: Vec<_> = pairs.into_iter().map(RwLock::new).collect();
        let batch = RwLock::new(Vec::new());
        lead(
            shards.len(),
            |number, order| match order {
                Order::Rest => {}
                Order::Merge => {
                    let mut shard = write(&shards[number]);
                    shard.file(&pairs.iter().map(read).collect::<Vec<_>>());
                    shard.merge(&read(&batch));
                }
                Order::Book => write(&pairs[number]).book(&shards.iter().map(read).collect::<Vec<_>>(), &read(&batch)),
            },
            |crew| {
                let mut symbol = n_symbols as u32;
                let mut level = Level::default();
                while self.n_tokens() < self.vocab_size as usize {
                    let room = (self.vocab_size as usize - self.n_tokens()).min(BATCH);
                    let mut parts: Vec<_> = pairs.iter().map(write).collect();
                    let next = match &mut assembly {
                        Some(assembly) => vec![assembly.next(&mut parts)],
                        None => {
                            let symbols = |(pair, count, id)| Next::Symbols { pair, tokens: pair, count, id };
                            level.next(&mut parts, room).into_iter().map(symbols).collect()
                        }
                    };
                    drop(parts);
                    let (mut merges, n_learned) = (Vec::with_capacity(BATCH), self.learned.merges.len());
                    for next in next {
                        let token = self.n_tokens() as u32;
                        let (merged, count) = match (next, &mut assembly) {
                            (Next::Symbols { pair, tokens, count, id }, assembly) => {
                                let (left, right) = halves(pair);
                                merges.push(Merge { id, left, right, token: symbol });
                                assembly.iter_mut().for_each(|assembly| assembly.add_symbol(token));
                                symbol += 1;
                                (tokens, count)
                            }
                            (Next::Pieces { pair, count }, Some(assembly)) => {
                                assembly.merge(pair, token);
                                (pair, count)
                            }
                            _ => break,
                        };
                        self.learned.merges.push(halves(merged));
                        self.learned.counts.push(count);
                    }
                    if self.learned.merges.len() == n_learned {
                        break;
                    }
                    if !merges.is_empty() {
                        *write(&batch) = merges;
                        crew.order(Order::Merge);
                        crew.order(Order::Book);
                    }
                    for done in n_learned..self.learned.merges.len() {
                        if !(self.tick)(done as u32 + 1) {
                            return Err(TrainError::Cancelled);
                        }
                    }
                }
                Ok(())
            },
        )?;
        Ok(shards
            .into_iter()
            .map(|shard| shard.into_inner().unwrap_or_else(PoisonError::into_inner).into_words())
            .collect())
    }
}

fn count_pairs<S: Slot>(words: &mut [Words<S>], n_tokens: usize) -> PairMap {
    let n = words.len();
    PairMap::sum(each(words, |words| PairMap::count(words, n_tokens, n)))
}

/// What every thread does next.
#[derive(Debug, Default, Clone, Copy)]
enum Order {
    #[default]
    Rest,
    /// Merge a batch in its shard, once the batch before is booked.
    Merge,
    /// Book the batch in its part of the pairs, once all shards have done it.
    Book,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pretokenize::Splitter;

    fn merges(text: &str, vocab_size: u32) -> Result<Learned, TrainError> {
        let mut counts = ChunkCounts::default();
        counts.count(&Splitter::new("bpe").unwrap(), text).unwrap();
        train(vec![counts], vocab_size, |_| true)
    }

    fn merges_of(parts: Vec<ChunkCounts>, vocab_size: u32) -> Learned {
        train(parts, vocab_size, |_| true).unwrap()
    }

    #[test]
    fn ties_go_to_the_lowest_pair() {
        assert_eq!(merges("ba ab", 257).unwrap().merges, [(32, 97)]);
    }

    #[test]
    fn a_text_too_small_says_what_it_can_give() {
        assert_eq!(merges("aaaa", 300), Err(TrainError::TooFewTokens { asked: 300, reached: 258 }));
        assert_eq!(merges("", 300), Err(TrainError::NoText));
        assert_eq!(merges("a", 257), Err(TrainError::TooFewTokens { asked: 257, reached: 256 }));
        assert!(matches!(merges("a", 255), Err(TrainError::VocabSize { asked: 255 })));
    }

    #[test]
    fn neither_rounds_nor_parts_nor_slots_change_the_merges() {
        let alphabet: Vec<char> = "的一是不了人我在有他这中大来上国，。ab ".chars().collect();
        let mut state = 1u64;
        let mut part = |documents: usize| {
            let mut counts = ChunkCounts::default();
            for _ in 0..documents {
                let mut text = String::new();
                for _ in 0..400 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    // Low characters are far more frequent, and so are pairs of them.
                    let draw = (state >> 40) as f64 / (1u64 << 24) as f64;
                    text.push(alphabet[(draw * draw * draw * alphabet.len() as f64) as usize]);
                }
                counts.count(&Splitter::new("bpe").unwrap(), &text).unwrap();
            }
            counts
        };
        let parts = [part(150), part(100), part(3)];
        let mut whole = ChunkCounts::default();
        parts.iter().for_each(|part| whole.absorb(part).unwrap());
        let copies = || parts.to_vec();
        // One round with nothing cut, which the naive trainer of the integration tests checks.
        let want = run(vec![whole], 4000, u64::MAX, |_| true).unwrap();
        for bytes in [200, 1000, 10_000] {
            assert_eq!(run(copies(), 4000, bytes, |_| true).unwrap(), want, "{bytes}");
        }
    }

    #[test]
    fn counts_beyond_32_bits_change_no_merge() {
        let splitter = Splitter::new("bpe").unwrap();
        let mut small = ChunkCounts::default();
        let text = "的一是不了人我在有他的一是在有他这中大来上国，一是不了。".repeat(3) + "人我在有他，的一是不了人我";
        small.count(&splitter, &text).unwrap();
        let want = merges_of(vec![small.clone()], 300);
        for times in [3, 1 << 31, 1 << 32, 5 << 33] {
            let mut large = small.clone();
            large.totals.bytes *= times * 4000; // so that the first cutoff is a count too
            (0..small.len()).for_each(|i| assert!(large.add(small.get(i).0, small.get(i).1 * (times - 1))));
            let scaled = Learned { counts: want.counts.iter().map(|n| n * times).collect(), ..want.clone() };
            assert_eq!(merges_of(vec![large.clone()], 300), scaled, "{times}");
            let twice = Learned { counts: want.counts.iter().map(|n| n * times * 2).collect(), ..want.clone() };
            assert_eq!(merges_of(vec![large.clone(), large], 300), twice, "{times} in two parts");
        }
    }

    #[test]
    fn a_tick_that_says_no_stops() {
        let mut counts = ChunkCounts::default();
        counts.count(&Splitter::new("bpe").unwrap(), "aaaa").unwrap();
        assert_eq!(train(vec![counts], 258, |_| false), Err(TrainError::Cancelled));
    }
}
