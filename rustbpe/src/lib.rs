//! Byte-level BPE for Chinese: training and encoding.
//!
//! Ids 0 to 255 are the byte values; each merge adds the next id. See [`pretokenize`] for how text is cut into chunks,
//! [`train`](mod@train) for the order of merges, [`encode`] for the rule of encoding.
//!
//! ```
//! use rustbpe::{train, ChunkCounts, Encoder, Splitter};
//!
//! let splitter = Splitter::new("bpe")?;
//! let mut counts = ChunkCounts::default();
//! counts.count(&splitter, "人之初，性本善。性相近，习相远。")?;
//! let learned = train(vec![counts], 260, |_| true)?;
//! let encoder = Encoder::from_merges(splitter, learned.merges)?;
//! let ids = encoder.encode("性善")?;
//! assert_eq!(encoder.vocab().decode(&ids)?, "性善".as_bytes());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![deny(missing_docs)]
#![deny(unsafe_code)]

mod chars;
pub mod count;
mod crew;
pub mod encode;
pub mod error;
mod lookup;
mod memory;
mod pairs;
pub mod pretokenize;
#[cfg(feature = "python")]
mod python;
mod shard;
pub mod spill;
pub mod train;
pub mod vocab;
mod word;

pub use chars::characters_first;
pub use count::{Batch, ChunkCounts, Counted, Counter, SpillTo, Totals};
pub use encode::Encoder;
pub use error::{PatternError, TrainError, VocabError};
pub use pretokenize::{Splitter, BPE_PATTERN, CHAR_PATTERN};
pub use spill::{train_spilled, Spilled};
pub use train::{train, Learned, Merges};
pub use vocab::Vocab;
