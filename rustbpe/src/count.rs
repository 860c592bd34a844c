//! Counting distinct chunks, in parallel.
//!
//! Each thread keeps its own table; the tables are added up at the end. Sums do not depend on which thread saw which
//! document, so neither does anything built on them.

use std::hash::Hasher;
use std::sync::mpsc::{sync_channel, Receiver, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use hashbrown::HashTable;
use rustc_hash::FxHasher;

use crate::error::TrainError;
use crate::pretokenize::Splitter;

/// Documents end to end. Chunks never cross the end of a document.
#[derive(Debug, Default, Clone)]
pub struct Batch {
    text: String,
    ends: Vec<usize>,
}

impl Batch {
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
#[derive(Debug, Default)]
pub struct ChunkCounts {
    arena: Vec<u8>,
    entries: Vec<Entry>,
    table: HashTable<u32>,
    /// Totals over all documents.
    pub totals: Totals,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Where the chunk ends in the arena; it starts where the one before ends.
    end: usize,
    count: u64,
    hash: u32,
}

/// Hash of a chunk, shortened to what an entry keeps.
fn hash_bytes(bytes: &[u8]) -> u32 {
    let mut hasher = FxHasher::default();
    hasher.write(bytes);
    (hasher.finish() >> 32) as u32
}

/// Spreads the 32 bits kept over the 64 the table wants.
fn widen(hash: u32) -> u64 {
    u64::from(hash).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

fn slice<'a>(arena: &'a [u8], entries: &[Entry], index: usize) -> &'a [u8] {
    let start = if index == 0 { 0 } else { entries[index - 1].end };
    &arena[start..entries[index].end]
}

impl ChunkCounts {
    /// Counts one document.
    pub fn count(&mut self, splitter: &Splitter, document: &str) -> Result<(), TrainError> {
        self.totals.documents += 1;
        self.totals.bytes += document.len() as u64;
        let mut overflow = false;
        splitter.split(document, |chunk| {
            self.totals.chunks += 1;
            // A chunk of one byte has no pair to merge.
            if chunk.len() > 1 {
                overflow |= !self.add(chunk.as_bytes(), 1);
            }
        })?;
        if overflow {
            return Err(TrainError::TooMuchText { bytes: self.distinct_bytes() });
        }
        Ok(())
    }

    /// Adds `count` occurrences of `chunk`; false if there is no room for another distinct chunk.
    fn add(&mut self, chunk: &[u8], count: u64) -> bool {
        self.add_hashed(chunk, hash_bytes(chunk), count)
    }

    fn add_hashed(&mut self, chunk: &[u8], hash: u32, count: u64) -> bool {
        let Self { arena, entries, table, .. } = self;
        let same = |&i: &u32| entries[i as usize].hash == hash && slice(arena, entries, i as usize) == chunk;
        if let Some(&index) = table.find(widen(hash), same) {
            let entry = &mut entries[index as usize];
            entry.count = entry.count.saturating_add(count);
            return true;
        }
        let Ok(index) = u32::try_from(entries.len()) else { return false };
        arena.extend_from_slice(chunk);
        entries.push(Entry { end: arena.len(), count, hash });
        table.insert_unique(widen(hash), index, |&i| widen(entries[i as usize].hash));
        true
    }

    /// Adds all of `other`.
    pub fn absorb(&mut self, other: &Self) -> Result<(), TrainError> {
        for (index, entry) in other.entries.iter().enumerate() {
            if !self.add_hashed(slice(&other.arena, &other.entries, index), entry.hash, entry.count) {
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

    /// The chunk at `index < len()` and its count, in order of first sight.
    pub fn get(&self, index: usize) -> (&[u8], u64) {
        (slice(&self.arena, &self.entries, index), self.entries[index].count)
    }
}

/// Threads that count batches.
#[derive(Debug)]
pub struct Counter {
    sender: SyncSender<Batch>,
    threads: Vec<JoinHandle<Result<ChunkCounts, TrainError>>>,
}

impl Counter {
    /// Starts `threads >= 1` threads.
    pub fn new(splitter: &Splitter, threads: usize) -> Self {
        let threads = threads.max(1);
        // Two batches waiting per thread keep all of them busy and memory bounded.
        let (sender, receiver) = sync_channel(2 * threads);
        let receiver = Arc::new(Mutex::new(receiver));
        let threads = (0..threads)
            .map(|_| {
                // A clone per thread: regex engines share scratch memory between clones less than between references.
                let (splitter, receiver) = (splitter.clone(), Arc::clone(&receiver));
                std::thread::spawn(move || count_batches(&splitter, &receiver))
            })
            .collect();
        Self { sender, threads }
    }

    /// Hands over a batch; waits while all threads are busy. False if the threads have stopped with an error.
    pub fn push(&self, batch: Batch) -> bool {
        self.sender.send(batch).is_ok()
    }

    /// Waits for the threads and adds up what they counted.
    pub fn finish(self) -> Result<ChunkCounts, TrainError> {
        drop(self.sender);
        let mut parts = Vec::with_capacity(self.threads.len());
        for thread in self.threads {
            parts.push(thread.join().map_err(|_| TrainError::WorkerDied)??);
        }
        // The largest part takes in the others, which moves the fewest bytes.
        parts.sort_by_key(|part| part.entries.len());
        let mut all = parts.pop().unwrap_or_default();
        while let Some(part) = parts.pop() {
            all.absorb(&part)?;
        }
        Ok(all)
    }
}

fn count_batches(splitter: &Splitter, receiver: &Mutex<Receiver<Batch>>) -> Result<ChunkCounts, TrainError> {
    let mut counts = ChunkCounts::default();
    loop {
        let batch = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(batch) = batch else { return Ok(counts) };
        for document in batch.documents() {
            counts.count(splitter, document)?;
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
            let counter = Counter::new(&splitter, threads);
            for i in 0..50 {
                let mut batch = Batch::default();
                batch.push(&format!("天地玄黄，宇宙洪荒。{}", "日月".repeat(i % 7)));
                batch.push("");
                assert!(counter.push(batch));
            }
            let counts = counter.finish().unwrap();
            let mut all: Vec<_> = (0..counts.len()).map(|i| (counts.get(i).0.to_vec(), counts.get(i).1)).collect();
            all.sort();
            assert_eq!(counts.totals.documents, 100);
            assert_eq!(*want.get_or_insert_with(|| all.clone()), all);
        }
    }
}
