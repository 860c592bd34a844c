//! Speed of counting, training and encoding on generated text: `cargo bench`.

use std::hint::black_box;

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use rustbpe::{train, ChunkCounts, Encoder, Splitter};

/// About `bytes` bytes of clauses of Han characters, with a skewed distribution as in real text.
fn text(bytes: usize) -> String {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1u64 << 24) as f64
    };
    let mut out = String::with_capacity(bytes + 64);
    while out.len() < bytes {
        for _ in 0..3 + (next() * 9.0) as usize {
            out.extend(char::from_u32(0x4E00 + (next().powi(4) * 6000.0) as u32));
        }
        out.push(if next() < 0.7 { '，' } else { '。' });
    }
    out
}

fn benches(c: &mut Criterion) {
    let text = text(1 << 21);
    let splitter = Splitter::new("bpe").expect("a built-in pattern");
    let count = || {
        let mut counts = ChunkCounts::default();
        counts.count(&splitter, &text).expect("a built-in pattern never gives up");
        counts
    };
    let merges = train(vec![count()], 8192, |_| true).expect("enough text");
    let encoder = Encoder::from_merges(splitter.clone(), merges.merges).expect("trained merges");
    let mut group = c.benchmark_group("2 MiB");
    group.sample_size(10).throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("count", |b| b.iter(|| black_box(count())));
    group.bench_function("count and train 8192", |b| b.iter(|| black_box(train(vec![count()], 8192, |_| true))));
    group.bench_function("encode", |b| b.iter(|| black_box(encoder.encode(&text))));
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
