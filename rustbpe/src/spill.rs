//! Training on more text than memory holds, with the same merges.
//!
//! Counted chunks are written to files as memory fills up. A round encodes the chunks with the merges so far, into
//! files beside them from which the next round goes on; reads these several times to count the pairs; cuts the chunks between neighbours whose pair is
//! rarer than the cutoff, and keeps only the pieces, equal ones once. What the merge loop then does above the cutoff is
//! exactly what it would do to the whole text (see `train.rs`). The cutoff is as low as memory allows: where the
//! pieces do not fit it is raised and they are cut again. Pairs that do not fit are counted in several readings.

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::count::ChunkCounts;
use crate::crew::each;
use crate::encode::Encoder;
use crate::error::TrainError;
use crate::pairs::{hash, PairMap};
use crate::pretokenize::Splitter;
use crate::train::{Learned, Learner, FIRST_CUTOFF_BYTES};
use crate::vocab::MAX_TOKENS;
use crate::word::{Slot, Words};

/// Bytes of a pair in a table that may be half empty.
const PAIR_BYTES: usize = 40;

/// The bytes, in which chunks come.
const FIRST_TOKENS: usize = 256;

/// Bytes of a file that are read or written at once.
const BUFFER: usize = 1 << 18;

/// Readings in which a round counts pairs, if that is enough to go on at all.
const MAX_READINGS: usize = 3;

fn io_error(path: &Path, error: &std::io::Error) -> TrainError {
    TrainError::File { path: path.to_path_buf(), reason: error.to_string() }
}

/// Writes counted chunks to a new file, safely on disk when this returns.
pub fn write(counts: &ChunkCounts, path: &Path) -> Result<(), TrainError> {
    let write = || {
        let mut out = BufWriter::with_capacity(BUFFER, File::create_new(path)?);
        for index in 0..counts.len() {
            let (chunk, count) = counts.get(index);
            write_chunk(&mut out, chunk, count)?;
        }
        out.into_inner()?.sync_all()
    };
    write().map_err(|error| io_error(path, &error))
}

fn write_chunk(out: &mut impl Write, chunk: &[u8], count: u64) -> std::io::Result<()> {
    write_number(out, chunk.len() as u64)?;
    out.write_all(chunk)?;
    write_number(out, count)
}

fn write_number(out: &mut impl Write, mut number: u64) -> std::io::Result<()> {
    while number >= 0x80 {
        out.write_all(&[number as u8 | 0x80])?;
        number >>= 7;
    }
    out.write_all(&[number as u8])
}

fn read_number(input: &mut impl Read) -> std::io::Result<u64> {
    let (mut number, mut shift) = (0, 0);
    loop {
        let mut byte = [0];
        input.read_exact(&mut byte)?;
        number |= u64::from(byte[0] & 0x7F) << shift;
        shift += 7;
        if byte[0] < 0x80 || shift > 63 {
            return Ok(number);
        }
    }
}

/// Calls `visit(chunk, count)` for everything in a file.
fn read(path: &Path, mut visit: impl FnMut(&[u8], u64) -> Result<(), TrainError>) -> Result<(), TrainError> {
    let fail = |error| io_error(path, &error);
    let mut input = BufReader::with_capacity(BUFFER, File::open(path).map_err(fail)?);
    let mut chunk = Vec::new();
    while !input.fill_buf().map_err(fail)?.is_empty() {
        chunk.resize(read_number(&mut input).map_err(fail)? as usize, 0);
        input.read_exact(&mut chunk).map_err(fail)?;
        visit(&chunk, read_number(&mut input).map_err(fail)?)?;
    }
    Ok(())
}

/// Where and how to train.
#[derive(Debug, Clone)]
pub struct Spilled {
    /// Files of counted chunks.
    pub files: Vec<PathBuf>,
    /// UTF-8 bytes of text that was counted.
    pub bytes: u64,
    /// Bytes of memory to use for tables.
    pub memory: usize,
    /// Threads, at least 1.
    pub threads: usize,
}

/// Learns `vocab_size - 256` merges from files, going on from `learned`; `saved` is shown what is certain after each
/// round, and either callback may stop by returning `false`.
pub fn train_spilled(
    spilled: &Spilled,
    vocab_size: u32,
    learned: Learned,
    tick: impl FnMut(u32) -> bool,
    saved: impl FnMut(&Learned) -> bool,
) -> Result<Learned, TrainError> {
    if !(256..=MAX_TOKENS).contains(&(vocab_size as usize)) {
        return Err(TrainError::VocabSize { asked: vocab_size.into() });
    }
    if spilled.bytes == 0 {
        return Err(TrainError::NoText);
    }
    if vocab_size <= u16::ID_LIMIT {
        Learner::<u16, _>::new(vocab_size, learned, tick).run_spilled(spilled, saved)
    } else {
        Learner::<u32, _>::new(vocab_size, learned, tick).run_spilled(spilled, saved)
    }
}

impl Spilled {
    /// Does some work on each of the files; every thread has a state of its own.
    fn share<T: Send>(
        &self,
        new: impl Fn() -> T + Sync,
        work: impl Fn(&mut T, &Path) -> Result<(), TrainError> + Sync,
    ) -> Result<Vec<T>, TrainError> {
        let next = AtomicUsize::new(0);
        let mut states: Vec<_> = (0..self.threads).map(|_| Some(new())).collect();
        let results = each(&mut states, |state| {
            let Some(mut state) = state.take() else { unreachable!("each state is taken once") };
            while let Some(path) = self.files.get(next.fetch_add(1, Ordering::Relaxed)) {
                work(&mut state, path)?;
            }
            Ok(state)
        });
        results.into_iter().collect()
    }

    /// Writes all chunks in tokens, but for those that are a single one, to files beside them. They replace those of
    /// the round before, which are read if this is not the first round: merging goes on from there.
    fn encode<S: Slot>(&self, encoder: &Encoder, first: bool) -> Result<(), TrainError> {
        let encode = |ids: &mut Vec<u32>, path: &Path| {
            let (from, to) = (tokens_beside(path), path.with_extension("new.counts"));
            let fail = |error| io_error(&to, &error);
            let mut out = BufWriter::with_capacity(BUFFER, File::create(&to).map_err(fail)?);
            let mut bytes = Vec::new();
            read(if first { path } else { &from }, |chunk, count| {
                ids.clear();
                if first {
                    encoder.encode_chunk(chunk, ids);
                } else {
                    encoder.encode_on(ids_of::<S>(chunk), ids);
                }
                if ids.len() > 1 {
                    to_bytes::<S>(ids, &mut bytes);
                    write_chunk(&mut out, &bytes, count).map_err(fail)?;
                }
                Ok(())
            })?;
            out.flush().and_then(|()| std::fs::rename(&to, &from)).map_err(fail)
        };
        self.share(Vec::new, encode).map(|_| ())
    }

    /// Reads all chunks in tokens, as the round wrote them, or bytes; every thread has a state of its own.
    fn stream<S: Slot, T: Send>(
        &self,
        n_tokens: usize,
        new: impl Fn() -> T + Sync,
        visit: impl Fn(&mut T, &[u32], u64) -> Result<(), TrainError> + Sync,
    ) -> Result<Vec<T>, TrainError> {
        let new = || (new(), Vec::new());
        let states = self.share(new, |(state, ids), path| {
            let bytes = n_tokens == FIRST_TOKENS;
            let path = if bytes { path.to_path_buf() } else { tokens_beside(path) };
            read(&path, |chunk, count| {
                ids.clear();
                if bytes {
                    ids.extend(chunk.iter().copied().map(u32::from));
                } else {
                    ids.extend(ids_of::<S>(chunk));
                }
                visit(state, ids, count)
            })
        })?;
        Ok(states.into_iter().map(|(state, _)| state).collect())
    }

    /// The counts of all pairs that reach the cutoff, and the cutoff, which is raised until they fit in memory.
    ///
    /// One reading gives every pair an upper bound of its count. Each reading after that counts the pairs with the
    /// highest bounds not counted yet, as many as fit, until there are enough that reach the lowest of these bounds.
    fn count_pairs<S: Slot>(&self, n_tokens: usize, wanted: u64) -> Result<(PairMap, u64), TrainError> {
        let new = || Bounds::new(self.memory / 2 / self.threads);
        let bounds = self.stream::<S, _>(n_tokens, new, |bounds, ids, count| {
            ids.windows(2).for_each(|pair| bounds.add(hash(pair[0], pair[1]), count));
            Ok(())
        })?;
        let bound = |hash| bounds.iter().map(|bounds| bounds.of(hash)).fold(0, u64::saturating_add).min(u64::MAX - 1);
        let side = n_tokens.min((self.memory / 8 / size_of::<u64>() / self.threads).isqrt());
        let (mut all, mut known) = (PairMap::new(side, self.threads), u64::MAX);
        let mut most = self.memory / 4 / PAIR_BYTES;
        for reading in 1.. {
            // The square is counted in the first reading.
            let (first, skipped) = if reading == 1 { (side, 0) } else { (0, side as u32) };
            let room = most.saturating_sub(all.len()) / self.threads;
            let cutoff = AtomicU64::new(wanted);
            let mut maps = self.stream::<S, _>(
                n_tokens,
                || PairMap::new(first, self.threads),
                |map, ids, count| {
                    let now = cutoff.load(Ordering::Relaxed);
                    for pair in ids.windows(2).filter(|pair| pair[0].max(pair[1]) >= skipped) {
                        map.add_if(pair[0], pair[1], count, |hash| (now..known).contains(&bound(hash)));
                    }
                    while map.len() > room && cutoff.load(Ordering::Relaxed) < known {
                        let raised = raise(&cutoff, known);
                        map.retain(|hash| bound(hash) >= raised);
                    }
                    Ok(())
                },
            )?;
            known = cutoff.into_inner();
            maps.insert(0, all);
            all = PairMap::sum(maps);
            // Pairs whose bound reaches the last cutoff reached all before it, and were counted from the start.
            all.retain(|hash| bound(hash) >= known);
            all.retain_from(wanted);
            let found = all.iter().filter(|&(_, count)| count >= known).count();
            let full = 2 * all.len() > most || reading >= MAX_READINGS;
            if known <= wanted || found >= most / 8 || (found > 0 && full) {
                break;
            }
            if found == 0 {
                most *= 2; // too little memory to go on within
            }
        }
        all.retain_from(known);
        Ok((all, known))
    }

    /// The pieces between neighbours whose pair is too rare, and the cutoff that made them fit.
    fn cut<S: Slot>(
        &self,
        n_tokens: usize,
        counts: &PairMap,
        cutoff: u64,
    ) -> Result<(Vec<ChunkCounts>, u64), TrainError> {
        let most = self.memory / 5 * 2 / self.threads;
        let highest = counts.iter().map(|(_, count)| count).max().unwrap_or(0);
        let cutoff = AtomicU64::new(cutoff);
        let mut parts = self.stream::<S, _>(n_tokens, ChunkCounts::default, |pieces, ids, count| {
            add_pieces::<S>(pieces, ids, count, |l, r| counts.get(l, r) >= Some(cutoff.load(Ordering::Relaxed)));
            // The most frequent pair alone always fits: there is progress in every round, however little.
            while pieces.memory() > most && cutoff.load(Ordering::Relaxed) < highest {
                *pieces = cut_again::<S>(pieces, counts, raise(&cutoff, highest));
            }
            Ok(())
        })?;
        let cutoff = cutoff.into_inner();
        let parts = each(&mut parts, |pieces| cut_again::<S>(pieces, counts, cutoff));
        Ok((parts, cutoff))
    }
}

/// Raises a cutoff that others may be raising too; returns what it is now.
fn raise(cutoff: &AtomicU64, highest: u64) -> u64 {
    let old = cutoff.load(Ordering::Relaxed);
    let raised = old.saturating_add(old / 4 + 1).min(highest);
    cutoff.fetch_max(raised, Ordering::Relaxed).max(raised)
}

/// Upper bounds of counts by hash: the lower of two sums, each over all that share a place with it.
#[derive(Debug)]
struct Bounds {
    /// Sums that reach the largest number stay there, and stand for any number.
    sums: [Vec<u32>; 2],
}

impl Bounds {
    fn new(memory: usize) -> Self {
        let new = || vec![0; (memory / 2 / size_of::<u32>()).max(1)];
        Self { sums: [new(), new()] }
    }

    /// Where the sums of a 32-bit hash are.
    #[inline]
    fn places(&self, hash: u64) -> [usize; 2] {
        let other = hash.wrapping_mul(0x85EB_CA6B) & u64::from(u32::MAX);
        [hash, other].map(|hash| ((hash * self.sums[0].len() as u64) >> 32) as usize)
    }

    #[inline]
    fn add(&mut self, hash: u64, count: u64) {
        let [a, b] = self.places(hash);
        let lower = u64::from(self.sums[0][a].min(self.sums[1][b]));
        // A sum that is higher than the new bound is high enough for all that share it.
        let bound = u32::try_from(lower.saturating_add(count)).unwrap_or(u32::MAX);
        self.sums[0][a] = self.sums[0][a].max(bound);
        self.sums[1][b] = self.sums[1][b].max(bound);
    }

    #[inline]
    fn of(&self, hash: u64) -> u64 {
        let [a, b] = self.places(hash);
        match self.sums[0][a].min(self.sums[1][b]) {
            u32::MAX => u64::MAX,
            bound => bound.into(),
        }
    }
}

fn add_pieces<S: Slot>(pieces: &mut ChunkCounts, ids: &[u32], count: u64, joined: impl Fn(u32, u32) -> bool) {
    let mut bytes = Vec::with_capacity(64);
    let mut from = 0;
    for to in 1..=ids.len() {
        if to == ids.len() || !joined(ids[to - 1], ids[to]) {
            if to - from > 1 {
                to_bytes::<S>(&ids[from..to], &mut bytes);
                pieces.add(&bytes, count);
            }
            from = to;
        }
    }
}

fn to_bytes<S: Slot>(ids: &[u32], bytes: &mut Vec<u8>) {
    bytes.clear();
    ids.iter().for_each(|id| bytes.extend_from_slice(&id.to_le_bytes()[..size_of::<S>()]));
}

fn ids_of<S: Slot>(piece: &[u8]) -> impl Iterator<Item = u32> + '_ {
    piece.chunks_exact(size_of::<S>()).map(|id| id.iter().rev().fold(0, |id, &byte| id << 8 | u32::from(byte)))
}

fn cut_again<S: Slot>(pieces: &ChunkCounts, counts: &PairMap, cutoff: u64) -> ChunkCounts {
    let mut again = ChunkCounts::default();
    let mut ids = Vec::new();
    for index in 0..pieces.len() {
        let (piece, count) = pieces.get(index);
        ids.clear();
        ids.extend(ids_of::<S>(piece));
        add_pieces::<S>(&mut again, &ids, count, |left, right| counts.get(left, right) >= Some(cutoff));
    }
    again
}

impl<S: Slot, T: FnMut(u32) -> bool> Learner<S, T> {
    fn run_spilled(
        mut self,
        spilled: &Spilled,
        mut saved: impl FnMut(&Learned) -> bool,
    ) -> Result<Learned, TrainError> {
        let mut wanted = (spilled.bytes / FIRST_CUTOFF_BYTES).max(1);
        if let Some(&last) = self.learned.counts.last() {
            wanted = self.next_cutoff(last);
        }
        let mut first = true;
        while self.n_tokens() < self.vocab_size as usize {
            let before = self.n_tokens();
            if before > FIRST_TOKENS {
                let encoder = Encoder::from_merges(Splitter::new("bpe")?, self.learned.merges.clone());
                spilled.encode::<S>(&encoder.map_err(|_| TrainError::WorkerDied)?, first)?;
                first = false;
            }
            let (counts, cutoff) = spilled.count_pairs::<S>(before, wanted)?;
            let (mut parts, cutoff) = spilled.cut::<S>(before, &counts, cutoff)?;
            let (pairs, ids) = counts.number(cutoff);
            drop(counts);
            let lay = |piece: &[u8], slots: &mut Vec<S>| slots.extend(ids_of::<S>(piece).map(S::new));
            let words = each(&mut parts, |part| {
                let part = std::mem::take(part);
                Words::new(&[(&part, 0..part.len())], before, lay)
                    .ok_or(TrainError::MemoryLimit { bytes: spilled.memory })
            });
            let mut words = words.into_iter().collect::<Result<Vec<_>, _>>()?;
            let found = each(&mut words, |words| words.find(&ids));
            drop(ids);
            self.round(words.into_iter().zip(found).collect(), pairs, None)?;
            let stuck = self.n_tokens() == before;
            if self.n_tokens() < self.vocab_size as usize && cutoff == 1 {
                return Err(TrainError::TooFewTokens { asked: self.vocab_size, reached: self.n_tokens() as u32 });
            }
            if !stuck && !saved(&self.learned) {
                return Err(TrainError::Cancelled);
            }
            wanted = if cutoff > wanted { wanted } else { self.next_cutoff(cutoff) };
        }
        spilled.files.iter().for_each(|path| drop(std::fs::remove_file(tokens_beside(path))));
        Ok(self.learned)
    }
}

/// Where the chunks of a file are in tokens.
fn tokens_beside(path: &Path) -> PathBuf {
    path.with_extension("tokens.counts")
}
