//! Any bytes: the scanner cuts as the regex does, and encoding loses nothing.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rustbpe::{train, ChunkCounts, Encoder, Splitter, Vocab, BPE_PATTERN};

static ENCODER: LazyLock<Encoder> = LazyLock::new(|| {
    let splitter = Splitter::new("bpe").expect("a built-in pattern");
    let mut counts = ChunkCounts::default();
    for text in ["人之初，性本善。性相近，习相远。", "don't do the same as the others did", "aaaaaaaa bbbb éé"] {
        counts.count(&splitter, text).expect("little text");
    }
    let learned = train(vec![counts], 300, |_| true).expect("enough text");
    Encoder::new(splitter, Vocab::from_merges(&learned.merges).expect("trained merges"))
});

/// The same pattern under another name, so that the regex engine runs it.
static BY_REGEX: LazyLock<Splitter> =
    LazyLock::new(|| Splitter::new(&format!("(?:{BPE_PATTERN})")).expect("the same pattern"));

fuzz_target!(|data: &[u8]| {
    let ids = ENCODER.encode_bytes(data).expect("never gives up");
    assert_eq!(ENCODER.vocab().decode(&ids).expect("ids of its own"), data);
    if let Ok(text) = std::str::from_utf8(data) {
        let (mut scanned, mut matched) = (Vec::new(), Vec::new());
        ENCODER.splitter().split(text, |chunk| scanned.push(chunk)).expect("never gives up");
        BY_REGEX.split(text, |chunk| matched.push(chunk)).expect("linear");
        assert_eq!(scanned, matched);
    }
});
