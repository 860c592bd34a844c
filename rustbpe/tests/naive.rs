//! The trainer against one that recounts every pair after every merge.

use std::collections::HashMap;

use rustbpe::{spill, train, train_spilled, Batch, Counter, Learned, SpillTo, Spilled, Splitter, TrainError, Vocab};

fn naive(documents: &[String], splitter: &Splitter, vocab_size: u32) -> Vec<(u32, u32)> {
    let mut chunks: Vec<Vec<u32>> = Vec::new();
    for document in documents {
        splitter.split(document, |chunk| chunks.push(chunk.bytes().map(u32::from).collect())).unwrap();
    }
    let mut merges = Vec::new();
    for token in 256..vocab_size {
        let mut counts: HashMap<(u32, u32), u64> = HashMap::new();
        for pair in chunks.iter().flat_map(|chunk| chunk.windows(2)) {
            *counts.entry((pair[0], pair[1])).or_default() += 1;
        }
        let Some((&best, _)) = counts.iter().max_by_key(|&(&pair, &n)| (n, std::cmp::Reverse(pair))) else { break };
        for chunk in &mut chunks {
            let mut merged = Vec::with_capacity(chunk.len());
            let mut i = 0;
            while i < chunk.len() {
                if i + 1 < chunk.len() && (chunk[i], chunk[i + 1]) == best {
                    merged.push(token);
                    i += 2;
                } else {
                    merged.push(chunk[i]);
                    i += 1;
                }
            }
            *chunk = merged;
        }
        merges.push(best);
    }
    merges
}

fn fast(documents: &[String], splitter: &Splitter, vocab_size: u32, threads: usize) -> Vec<(u32, u32)> {
    let counter = Counter::new(splitter, threads, None);
    for document in documents {
        let mut batch = Batch::default();
        batch.push(document);
        assert!(counter.push(batch));
    }
    let done = std::cell::Cell::new(0);
    match train(counter.finish().unwrap().parts, vocab_size, |n| {
        done.set(n);
        true
    }) {
        Ok(learned) => {
            assert_eq!(done.get() as usize, learned.merges.len());
            learned.merges
        }
        Err(TrainError::TooFewTokens { reached, .. }) => fast(documents, splitter, reached, threads),
        Err(TrainError::NoText) => Vec::new(),
        Err(error) => panic!("{error}"),
    }
}

/// Texts over small alphabets, where pairs overlap and tie all the time.
fn random_documents(seed: u64, alphabet: &str, documents: usize, chars: usize) -> Vec<String> {
    let alphabet: Vec<char> = alphabet.chars().collect();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let mut next = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    (0..documents).map(|_| (0..next(chars + 1)).map(|_| alphabet[next(alphabet.len())]).collect()).collect()
}

#[test]
fn equals_the_naive_trainer() {
    let splitters = ["bpe", "char", "[^ ]+| "].map(|pattern| Splitter::new(pattern).unwrap());
    for seed in 0..12 {
        for alphabet in ["a", "ab", "aab c", "的一是不了，。", "ab的一\n1 "] {
            let documents = random_documents(seed, alphabet, 12, 40);
            for splitter in &splitters {
                let want = naive(&documents, splitter, 320);
                for threads in [1, 2] {
                    assert_eq!(fast(&documents, splitter, 320, threads), want, "{alphabet:?} {documents:?}");
                }
            }
        }
    }
}

#[test]
fn byte_strings_of_tokens_are_unique() {
    // Vocab refuses duplicates, so building it is the test.
    for seed in 0..10 {
        let documents = random_documents(seed, "aaab", 6, 120);
        let merges = fast(&documents, &Splitter::new("bpe").unwrap(), 400, 1);
        Vocab::from_merges(&merges).unwrap();
    }
}

#[test]
fn spilling_does_not_change_the_merges() {
    let splitter = Splitter::new("bpe").unwrap();
    let documents = random_documents(5, "的一是不了人我在有他这中大来上国，。ab", 60, 4_000);
    let want = fast(&documents, &splitter, 3_000, 1);
    let directory = std::env::temp_dir().join(format!("rustbpe-spill-{}", std::process::id()));
    for (threads, memory) in [(1, 1 << 20), (3, 1 << 20)] {
        std::fs::create_dir_all(&directory).unwrap();
        let spill = SpillTo { directory: directory.clone(), prefix: "a".to_owned(), memory };
        let counter = Counter::new(&splitter, threads, Some(spill));
        let mut bytes = 0;
        for document in &documents {
            let mut batch = Batch::default();
            batch.push(document);
            bytes += document.len() as u64;
            assert!(counter.push(batch));
        }
        let mut counted = counter.finish().unwrap();
        assert!(!counted.files.is_empty());
        for (i, part) in counted.parts.iter().enumerate() {
            let path = directory.join(format!("rest{i}"));
            spill::write(part, &path).unwrap();
            counted.files.push(path);
        }
        let spilled = Spilled { files: counted.files, bytes, memory, threads };
        let mut rounds = Vec::new();
        let learned = train_spilled(
            &spilled,
            3_000,
            Learned::default(),
            |_| true,
            |learned| {
                rounds.push(learned.clone());
                true
            },
        );
        assert_eq!(learned.unwrap().merges, want);
        // Whatever was certain after a round, training goes on from there as if nothing had happened.
        assert!(rounds.len() > 1);
        let resumed = train_spilled(&spilled, 3_000, rounds.swap_remove(0), |_| true, |_| true).unwrap();
        assert_eq!(resumed.merges, want);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
