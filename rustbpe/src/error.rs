//! Errors: one variant per thing a user can fix. Every message says what was wrong and what to do next.

use std::fmt;
use std::path::PathBuf;

use crate::vocab::MAX_TOKENS;

/// Why a split pattern could not be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PatternError {
    /// The regular expression does not compile.
    Invalid {
        /// The pattern as given.
        pattern: String,
        /// What the regex engine said.
        reason: String,
    },
    /// The regex engine gave up on a text, for example at its backtracking limit.
    GaveUp {
        /// What the regex engine said.
        reason: String,
    },
}

impl fmt::Display for PatternError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid { pattern, reason } => write!(
                f,
                "split pattern {pattern:?} is neither a known name (bpe, char) nor a valid regular expression: {reason}"
            ),
            Self::GaveUp { reason } => write!(
                f,
                "the split pattern failed on a text ({reason}); use a pattern without look-around, such as \"bpe\""
            ),
        }
    }
}

impl std::error::Error for PatternError {}

/// Why training stopped without a vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrainError {
    /// Fewer tokens were asked for than there are byte values, or more than ids can number.
    VocabSize {
        /// The size asked for.
        asked: u64,
    },
    /// The documents hold no text at all.
    NoText,
    /// Every chunk is one token before the vocabulary is full.
    TooFewTokens {
        /// The size asked for.
        asked: u32,
        /// The largest size the text can give.
        reached: u32,
    },
    /// More distinct text than 32-bit positions can address.
    TooMuchText {
        /// Bytes of distinct chunks.
        bytes: usize,
    },
    /// A file of counted chunks cannot be written or read.
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// No merge can be made in the memory allowed.
    MemoryLimit {
        /// Bytes allowed for tables.
        bytes: usize,
    },
    /// The text could not be split.
    Pattern(PatternError),
    /// The caller asked to stop.
    Cancelled,
    /// A counting thread died; a bug in this crate.
    WorkerDied,
}

impl fmt::Display for TrainError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::VocabSize { asked } => write!(
                f,
                "vocab_size={asked} is out of range; the 256 byte tokens are always there, so pass 256 to {MAX_TOKENS}"
            ),
            Self::NoText => write!(f, "there is no text to train on; check that the documents are UTF-8 and not empty"),
            Self::TooFewTokens { asked, reached } => write!(
                f,
                "vocab_size={asked} is too large: the text gives at most {reached} tokens; \
                 pass --vocab-size={reached} or give more text"
            ),
            Self::File { path, reason } => {
                write!(
                    f,
                    "{}: {reason}; free some space if the disk is full, else delete it and run again",
                    path.display()
                )
            }
            Self::MemoryLimit { bytes } => write!(
                f,
                "{} MiB of memory are too little to train on this text; pass a larger --memory-limit",
                bytes >> 20
            ),
            Self::TooMuchText { bytes } => write!(
                f,
                "the text has {bytes} bytes of distinct chunks, more than 32-bit positions can address (4 GiB); \
                 train on a sample, for example with --max-bytes"
            ),
            Self::Pattern(error) => error.fmt(f),
            Self::Cancelled => write!(f, "training was cancelled"),
            Self::WorkerDied => write!(f, "a counting thread died; please report this as a bug"),
        }
    }
}

impl std::error::Error for TrainError {}

impl From<PatternError> for TrainError {
    fn from(error: PatternError) -> Self {
        Self::Pattern(error)
    }
}

/// Why a list of token byte strings is not a vocabulary, or an id is not in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VocabError {
    /// A token with no bytes.
    EmptyToken {
        /// Its id.
        id: usize,
    },
    /// The same bytes twice.
    Duplicate {
        /// The earlier id.
        first: u32,
        /// The later id.
        second: usize,
    },
    /// A byte value without a token of its own, so some text could not be encoded.
    MissingByte {
        /// The byte.
        byte: u8,
    },
    /// More tokens or bytes than 32-bit ids and offsets can number.
    TooLarge,
    /// A token that two lower-ranked tokens never merge into.
    Unreachable {
        /// Its id.
        id: u32,
    },
    /// An id outside the vocabulary.
    UnknownId {
        /// The id.
        id: u32,
        /// Number of tokens.
        size: usize,
    },
    /// The split pattern is not usable.
    Pattern(PatternError),
}

impl fmt::Display for VocabError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::EmptyToken { id } => write!(f, "token {id} has no bytes; the list of ranks is damaged"),
            Self::Duplicate { first, second } => {
                write!(f, "tokens {first} and {second} have the same bytes; the list of ranks is damaged")
            }
            Self::MissingByte { byte } => {
                write!(f, "byte 0x{byte:02x} has no token of its own; a byte-level vocabulary needs all 256")
            }
            Self::TooLarge => write!(f, "the list of ranks has more than {MAX_TOKENS} tokens or 4 GiB"),
            Self::Unreachable { id } => write!(
                f,
                "token {id} is not the merge of two tokens before it, so this vocabulary has no list of merges"
            ),
            Self::UnknownId { id, size } => {
                write!(f, "id {id} is not in this vocabulary, which has ids 0 to {}", size.saturating_sub(1))
            }
            Self::Pattern(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for VocabError {}

impl From<PatternError> for VocabError {
    fn from(error: PatternError) -> Self {
        Self::Pattern(error)
    }
}
