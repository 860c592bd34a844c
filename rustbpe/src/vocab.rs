//! Vocabularies: token byte strings by id (which is also the rank), looked up both ways.

use std::hash::Hasher;

use hashbrown::{HashMap, HashTable};
use rustc_hash::{FxBuildHasher, FxHasher};

use crate::error::VocabError;

/// More tokens than any vocabulary has; so few that a pair of them and the token it makes fit 64 bits.
pub const MAX_TOKENS: usize = (1 << 20) - 1;

/// The byte strings of all tokens in one arena, each of them unique and none empty, every single byte among them.
#[derive(Debug, Clone)]
pub struct Vocab {
    arena: Vec<u8>,
    /// Where each token ends in the arena; it starts where the one before ends.
    ends: Vec<u32>,
    by_bytes: HashTable<u32>,
}

fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(bytes);
    hasher.finish()
}

fn slice<'a>(arena: &'a [u8], ends: &[u32], id: usize) -> &'a [u8] {
    let start = if id == 0 { 0 } else { ends[id - 1] as usize };
    &arena[start..ends[id] as usize]
}

impl Vocab {
    /// Checks and takes over a list of token byte strings; the index is the id.
    pub fn from_ranks<T: AsRef<[u8]>>(ranks: impl IntoIterator<Item = T>) -> Result<Self, VocabError> {
        let mut vocab = Self { arena: Vec::new(), ends: Vec::new(), by_bytes: HashTable::new() };
        for token in ranks {
            vocab.push(token.as_ref())?;
        }
        match (0..=255).find(|&byte| vocab.id(&[byte]).is_none()) {
            Some(byte) => Err(VocabError::MissingByte { byte }),
            None => Ok(vocab),
        }
    }

    /// The bytes 0 to 255, then one token per merge.
    pub fn from_merges(merges: &[(u32, u32)]) -> Result<Self, VocabError> {
        let mut vocab = Self::from_ranks((0..=255u8).map(|byte| [byte]))?;
        for &(left, right) in merges {
            let token = [vocab.bytes(left)?, vocab.bytes(right)?].concat();
            vocab.push(&token)?;
        }
        Ok(vocab)
    }

    fn push(&mut self, token: &[u8]) -> Result<(), VocabError> {
        let index = self.ends.len();
        if token.is_empty() {
            return Err(VocabError::EmptyToken { id: index });
        }
        if let Some(first) = self.id(token) {
            return Err(VocabError::Duplicate { first, second: index });
        }
        let id = u32::try_from(index).ok().filter(|_| index < MAX_TOKENS).ok_or(VocabError::TooLarge)?;
        let end = u32::try_from(self.arena.len() + token.len()).map_err(|_| VocabError::TooLarge)?;
        self.arena.extend_from_slice(token);
        self.ends.push(end);
        let (arena, ends) = (&self.arena, &self.ends);
        self.by_bytes.insert_unique(hash_bytes(token), id, |&id| hash_bytes(slice(arena, ends, id as usize)));
        Ok(())
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Never true: the byte tokens are always there.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of a token.
    pub fn bytes(&self, id: u32) -> Result<&[u8], VocabError> {
        if (id as usize) < self.len() {
            Ok(slice(&self.arena, &self.ends, id as usize))
        } else {
            Err(VocabError::UnknownId { id, size: self.len() })
        }
    }

    /// The token with exactly these bytes.
    #[inline]
    pub fn id(&self, bytes: &[u8]) -> Option<u32> {
        let same = |&id: &u32| slice(&self.arena, &self.ends, id as usize) == bytes;
        self.by_bytes.find(hash_bytes(bytes), same).copied()
    }

    /// All tokens by ascending id.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.len()).map(|id| slice(&self.arena, &self.ends, id))
    }

    /// Every way to cut a token into two tokens, as (left, right, token), by ascending token.
    pub fn splits(&self) -> impl Iterator<Item = (u32, u32, u32)> + '_ {
        self.iter().zip(0u32..).flat_map(move |(token, id)| {
            (1..token.len()).filter_map(move |cut| Some((self.id(&token[..cut])?, self.id(&token[cut..])?, id)))
        })
    }

    /// Characters that stand side by side in a token, as (left, right), where both are tokens too.
    pub fn neighbours(&self) -> Vec<(u32, u32)> {
        // Far fewer than there are tokens to look up by their bytes.
        let mut characters: HashMap<char, Option<u32>, FxBuildHasher> = HashMap::default();
        let mut neighbours = Vec::with_capacity(2 * self.len());
        for text in self.iter().flat_map(|token| token.utf8_chunks().map(|part| part.valid())) {
            let mut before = None;
            for c in text.chars() {
                let id = characters.entry(c).or_insert_with(|| self.id(c.encode_utf8(&mut [0; 4]).as_bytes()));
                neighbours.extend(before.zip(*id));
                before = *id;
            }
        }
        neighbours
    }

    /// The bytes of a list of tokens, end to end.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, VocabError> {
        let mut out = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            out.extend_from_slice(self.bytes(id)?);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_ranks_are_refused() {
        let bytes = || (0..=255u8).map(|b| vec![b]);
        let with = |token: &[u8]| Vocab::from_ranks(bytes().chain([token.to_vec()]));
        assert!(with(b"ab").is_ok());
        assert!(matches!(with(b""), Err(VocabError::EmptyToken { id: 256 })));
        assert!(matches!(with(b"a"), Err(VocabError::Duplicate { first: 97, second: 256 })));
        assert!(matches!(Vocab::from_ranks(bytes().take(255)), Err(VocabError::MissingByte { byte: 255 })));
    }

    #[test]
    fn unknown_ids_are_errors() {
        let vocab = Vocab::from_merges(&[(97, 98)]).unwrap();
        assert_eq!(vocab.decode(&[256, 99]).unwrap(), b"abc");
        assert_eq!(vocab.decode(&[257]), Err(VocabError::UnknownId { id: 257, size: 257 }));
        assert!(Vocab::from_merges(&[(97, 256)]).is_err());
    }
}
