//! Counting distinct chunks, in parallel.
//!
//! Each thread keeps its own table; the tables are added up at the end. Sums do not depend on which thread saw which
//! document, so neither does anything built on them.

use std::hash::Hasher;
use std::path::PathBuf;
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustc_hash::FxHasher;

use crate::error::TrainError;
use crate::memory;
use crate::pretokenize::Splitter;

/// Documents end to end. Chunks never cross the end of a document.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    text: String,
    ends: Vec<usize>,
}

impl Batch {
    fn clear(&mut self) {
        self.text.clear();
        self.ends.clear();
    }

    /// Adds a document.
    pub fn push(&mut self, document: &str) {
        self.text.push_str(document);
        self.ends.push(self.text.len());
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.text.len()
    }

    /// Whether it holds no document.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    fn documents(&self) -> impl Iterator<Item = &str> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, &end)| &self.text[start..end])
    }
}

/// Totals of the text that was counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Documents seen.
    pub documents: u64,
    /// UTF-8 bytes seen.
    pub bytes: u64,
    /// Chunks seen.
    pub chunks: u64,
}

/// Distinct chunks with how often each occurs. One arena holds the bytes of all of them.
#[derive(Debug, Default, Clone)]
pub struct ChunkCounts {
    arena: Vec<u8>,
    entries: Vec<Entry>,
    /// Open addressing, linear probing, a power of two: hash in the upper half, entry + 1 in the lower, 0 if empty.
    slots: Vec<u64>,
    waiting: Vec<Waiting>,
    /// Totals over all documents.
    pub totals: Totals,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Where the chunk starts in the arena; it ends where the next starts.
    start: usize,
    count: u64,
}

/// A chunk whose slot has been asked for: where it stands in the document, and its hash.
#[derive(Debug, Clone, Copy)]
struct Waiting {
    from: usize,
    to: usize,
    hash: u32,
    entry: u32,
}

/// Merging gains nothing from more threads than this.
pub const MAX_PARTS: usize = 8;

/// Chunks looked up together, so that the waits for memory overlap.
const TOGETHER: usize = 64;

fn hash_bytes(bytes: &[u8]) -> u32 {
    let mut hasher = FxHasher::default();
    hasher.write(bytes);
    (hasher.finish() >> 32) as u32
}

impl ChunkCounts {
    /// Counts one document.
    pub fn count(&mut self, splitter: &Splitter, document: &str) -> Result<(), TrainError> {
        self.totals.documents += 1;
        self.totals.bytes += document.len() as u64;
        let (mut from, mut fits) = (0, true);
        splitter.split(document, |chunk| {
            self.totals.chunks += 1;
            let to = from + chunk.len();
            // A chunk of one byte has no pair to merge.
            if chunk.len() > 1 {
                let hash = hash_bytes(chunk.as_bytes());
                memory::prefetch(&self.slots, self.slot_of(hash));
                self.waiting.push(Waiting { from, to, hash, entry: 0 });
                if self.waiting.len() == TOGETHER {
                    fits &= self.add_waiting(document.as_bytes());
                }
            }
            from = to;
        })?;
        fits &= self.add_waiting(document.as_bytes());
        if fits {
            Ok(())
        } else {
            Err(TrainError::TooMuchText { bytes: self.distinct_bytes() })
        }
    }

    fn slot_of(&self, hash: u32) -> usize {
        // The hash's upper bits choose the slot, so that a table that doubles keeps its order.
        if self.slots.is_empty() {
            0
        } else {
            hash as usize >> (32 - self.slots.len().trailing_zeros().min(32))
        }
    }

    /// Adds all that wait, each once; false if there is no room for another distinct chunk.
    fn add_waiting(&mut self, document: &[u8]) -> bool {
        let mut waiting = std::mem::take(&mut self.waiting);
        for chunk in &mut waiting {
            // The first entry with this hash is nearly always the right one: ask for it, then for its bytes.
            let found = self.slots.get(self.slot_of(chunk.hash)).copied().unwrap_or(0);
            chunk.entry = if (found >> 32) as u32 == chunk.hash { found as u32 } else { 0 };
            memory::prefetch(&self.entries, (chunk.entry as usize).wrapping_sub(1));
        }
        for chunk in &waiting {
            if let Some(entry) = self.entries.get((chunk.entry as usize).wrapping_sub(1)) {
                memory::prefetch(&self.arena, entry.start);
            }
        }
        let fits = waiting.iter().all(|chunk| self.add_hashed(&document[chunk.from..chunk.to], chunk.hash, 1));
        waiting.clear();
        self.waiting = waiting;
        fits
    }

    /// Adds `count` occurrences of `chunk`; false if there is no room for another distinct chunk.
    pub fn add(&mut self, chunk: &[u8], count: u64) -> bool {
        self.add_hashed(chunk, hash_bytes(chunk), count)
    }

    fn add_hashed(&mut self, chunk: &[u8], hash: u32, count: u64) -> bool {
        if 8 * (self.entries.len() + 1) > 5 * self.slots.len() {
            self.grow();
        }
        let mut slot = self.slot_of(hash);
        loop {
            match self.slots[slot] {
                0 => break,
                taken if (taken >> 32) as u32 == hash && self.bytes_of(taken as u32 as usize - 1) == chunk => {
                    let entry = &mut self.entries[taken as u32 as usize - 1];
                    entry.count = entry.count.saturating_add(count);
                    return true;
                }
                _ => slot = (slot + 1) & (self.slots.len() - 1),
            }
        }
        let Ok(number) = u32::try_from(self.entries.len() + 1) else { return false };
        memory::reserve_huge(&mut self.entries, 1);
        memory::reserve_huge(&mut self.arena, chunk.len());
        self.entries.push(Entry { start: self.arena.len(), count });
        self.arena.extend_from_slice(chunk);
        self.slots[slot] = u64::from(hash) << 32 | u64::from(number);
        true
    }

    fn grow(&mut self) {
        let old = std::mem::take(&mut self.slots);
        self.slots = memory::filled(0, (2 * old.len()).max(1 << 12));
        for taken in old.into_iter().filter(|&taken| taken != 0) {
            let mut slot = self.slot_of((taken >> 32) as u32);
            while self.slots[slot] != 0 {
                slot = (slot + 1) & (self.slots.len() - 1);
            }
            self.slots[slot] = taken;
        }
    }

    fn bytes_of(&self, index: usize) -> &[u8] {
        let end = self.entries.get(index + 1).map_or(self.arena.len(), |next| next.start);
        &self.arena[self.entries[index].start..end]
    }

    /// Adds all of `other`.
    pub fn absorb(&mut self, other: &Self) -> Result<(), TrainError> {
        for index in 0..other.len() {
            let (chunk, count) = other.get(index);
            if !self.add(chunk, count) {
                return Err(TrainError::TooMuchText { bytes: self.distinct_bytes() });
            }
        }
        self.totals.documents += other.totals.documents;
        self.totals.bytes += other.totals.bytes;
        self.totals.chunks += other.totals.chunks;
        Ok(())
    }

    /// Number of distinct chunks of two bytes or more.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no chunk of two bytes or more was counted.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of the distinct chunks.
    pub fn distinct_bytes(&self) -> usize {
        self.arena.len()
    }

    /// Bytes of the distinct chunks in a range.
    pub fn bytes_in(&self, range: &std::ops::Range<usize>) -> usize {
        let start = |index| self.entries.get(index).map_or(self.arena.len(), |entry: &Entry| entry.start);
        start(range.end) - start(range.start)
    }

    /// The first chunk that starts at or after this byte of all distinct chunks end to end.
    fn chunk_at(&self, byte: usize) -> usize {
        self.entries.partition_point(|entry| entry.start < byte)
    }

    /// Bytes of memory in use.
    pub fn memory(&self) -> usize {
        self.arena.len() + self.entries.len() * size_of::<Entry>() + self.slots.len() * size_of::<u64>()
    }

    /// The count of the chunk at `index < len()`.
    pub fn count_of(&self, index: usize) -> u64 {
        self.entries[index].count
    }

    /// The chunk at `index < len()` and its count, in order of first sight.
    pub fn get(&self, index: usize) -> (&[u8], u64) {
        (self.bytes_of(index), self.entries[index].count)
    }
}

/// Some of the chunks of a table.
pub type Range<'a> = (&'a ChunkCounts, std::ops::Range<usize>);

/// Deals the chunks of all tables out to as many threads, about equally many bytes to each.
pub fn shares(parts: &[ChunkCounts]) -> Vec<Vec<Range<'_>>> {
    let share = parts.iter().map(ChunkCounts::distinct_bytes).sum::<usize>().div_ceil(parts.len().max(1));
    let mut shares: Vec<Vec<Range<'_>>> = vec![Vec::new(); parts.len()];
    let mut before = 0;
    for part in parts {
        let border = |number: usize| part.chunk_at((number * share).saturating_sub(before));
        for (number, ranges) in shares.iter_mut().enumerate() {
            let last = number + 1 == parts.len();
            ranges.push((part, border(number)..if last { part.len() } else { border(number + 1) }));
        }
        before += part.distinct_bytes();
    }
    shares
}

/// Where full tables go.
#[derive(Debug, Clone)]
pub struct SpillTo {
    /// An existing folder.
    pub directory: PathBuf,
    /// What the names of the files start with.
    pub prefix: String,
    /// Bytes of memory for the tables of all threads together.
    pub memory: usize,
}

/// What was counted.
#[derive(Debug, Default)]
pub struct Counted {
    /// Chunks in memory, in at most [`MAX_PARTS`] parts and at least one.
    pub parts: Vec<ChunkCounts>,
    /// Chunks in files.
    pub files: Vec<PathBuf>,
}

/// Threads that count batches.
#[derive(Debug)]
pub struct Counter {
    sender: SyncSender<Batch>,
    /// Batches that were counted, empty again: their memory need not come from the kernel anew.
    counted: Arc<Mutex<Vec<Batch>>>,
    threads: Vec<JoinHandle<Result<Counted, TrainError>>>,
}

impl Counter {
    /// Starts `threads >= 1` threads. With `spill`, tables that reach their share of memory are written to files.
    pub fn new(splitter: &Splitter, threads: usize, spill: Option<SpillTo>) -> Self {
        let threads = threads.max(1);
        // Two batches waiting per thread keep all of them busy and memory bounded.
        let (sender, receiver) = sync_channel(2 * threads);
        let receiver = Arc::new(Mutex::new(receiver));
        let counted = Arc::new(Mutex::new(Vec::new()));
        let start = |number| {
            // A clone per thread: regex engines share scratch memory between clones less than between references.
            let (splitter, mut spill) = (splitter.clone(), spill.clone());
            let (receiver, counted) = (Arc::clone(&receiver), Arc::clone(&counted));
            if let Some(spill) = &mut spill {
                spill.prefix.push_str(&format!("{number:02}-"));
                spill.memory /= threads;
            }
            std::thread::spawn(move || count_batches(&splitter, &receiver, &counted, spill.as_ref()))
        };
        Self { sender, threads: (0..threads).map(start).collect(), counted }
    }

    /// An empty batch to fill and hand over.
    pub fn batch(&self) -> Batch {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default()
    }

    /// Hands over a batch; waits while all threads are busy. False if the threads have stopped with an error.
    pub fn push(&self, batch: Batch) -> bool {
        self.sender.send(batch).is_ok()
    }

    /// Waits for the threads; returns what they counted.
    pub fn finish(self) -> Result<Counted, TrainError> {
        drop(self.sender);
        let mut all = Counted::default();
        for thread in self.threads {
            let counted = thread.join().map_err(|_| TrainError::WorkerDied)??;
            all.parts.extend(counted.parts);
            all.files.extend(counted.files);
        }
        let parts = &mut all.parts;
        parts.sort_by_key(|part| std::cmp::Reverse(part.len()));
        while parts.len() > MAX_PARTS || (parts.len() > 1 && parts.last().is_some_and(ChunkCounts::is_empty)) {
            let (small, into) = (parts.pop(), parts.len().saturating_sub(1).min(MAX_PARTS - 1));
            if let (Some(small), Some(part)) = (small, parts.get_mut(into)) {
                part.absorb(&small)?;
            }
        }
        Ok(all)
    }
}

fn count_batches(
    splitter: &Splitter,
    receiver: &Mutex<Receiver<Batch>>,
    counted: &Mutex<Vec<Batch>>,
    spill: Option<&SpillTo>,
) -> Result<Counted, TrainError> {
    let (mut counts, mut files) = (ChunkCounts::default(), Vec::new());
    loop {
        let batch = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(mut batch) = batch else { return Ok(Counted { parts: vec![counts], files }) };
        for document in batch.documents() {
            counts.count(splitter, document)?;
        }
        batch.clear();
        counted.lock().unwrap_or_else(PoisonError::into_inner).push(batch);
        // Slots double when they are full, so half the memory must be enough for what is there.
        if let Some(spill) = spill.filter(|spill| counts.memory() > spill.memory / 2) {
            let path = spill.directory.join(format!("{}{:05}.counts", spill.prefix, files.len()));
            crate::spill::write(&counts, &path)?;
            files.push(path);
            counts = ChunkCounts { totals: counts.totals, ..ChunkCounts::default() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_do_not_depend_on_the_number_of_threads() {
        let splitter = Splitter::new("bpe").unwrap();
        let mut want = None;
        for threads in [1, 2, 5] {
            let counter = Counter::new(&splitter, threads, None);
            for i in 0..50 {
                let mut batch = Batch::default();
                batch.push(&format!("天地玄黄，宇宙洪荒。{}", "日月".repeat(i % 7)));
                batch.push("");
                assert!(counter.push(batch));
            }
            let mut counts = ChunkCounts::default();
            counter.finish().unwrap().parts.iter().for_each(|part| counts.absorb(part).unwrap());
            let mut all: Vec<_> = (0..counts.len()).map(|i| (counts.get(i).0.to_vec(), counts.get(i).1)).collect();
            all.sort();
            assert_eq!(counts.totals.documents, 100);
            assert_eq!(*want.get_or_insert_with(|| all.clone()), all);
        }
    }
}
