//! Tables of the encoder.

use crate::vocab::Vocab;

/// Rank of a pair that makes no token, id of a character that is none.
pub const NO_TOKEN: u32 = u32::MAX;

/// (left id, right id) to the id of the token they make. Open addressing, at most half full.
#[derive(Debug, Clone)]
pub struct PairTable {
    slots: Vec<(u64, u32)>,
    shift: u32,
}

impl PairTable {
    const EMPTY: u64 = u64::MAX;

    /// All ways to make a token of the vocabulary out of two.
    pub fn new(vocab: &Vocab) -> Self {
        let splits: Vec<_> = vocab.splits().collect();
        let size = (2 * splits.len()).next_power_of_two().max(64);
        let mut table = Self { slots: vec![(Self::EMPTY, NO_TOKEN); size], shift: 64 - size.trailing_zeros() };
        for (left, right, id) in splits {
            let key = key(left, right);
            let mut at = table.first(key);
            while table.slots[at].0 != Self::EMPTY {
                at = (at + 1) & (size - 1);
            }
            table.slots[at] = (key, id);
        }
        table
    }

    #[inline]
    fn first(&self, key: u64) -> usize {
        (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize
    }

    /// The token two tokens make, or [`NO_TOKEN`].
    #[inline]
    pub fn get(&self, left: u32, right: u32) -> u32 {
        let key = key(left, right);
        let mut at = self.first(key);
        loop {
            let (found, id) = self.slots[at];
            if found == key || found == Self::EMPTY {
                return id;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }
}

fn key(left: u32, right: u32) -> u64 {
    (u64::from(left) << 32) | u64::from(right)
}

/// Which characters may be taken as one token from the start.
///
/// Merging starts from bytes, but nearly every character has become one token before anything can be merged across its
/// borders. The first merge across a border of a character that is not yet whole takes a part of it that touches the
/// border: at its right a proper ending, which starts with a continuation byte; at its left a proper beginning, which
/// is shorter than its first byte says. So if no such merge over these two border bytes has a rank below the last one
/// the character needs, the character is whole in time, and starting with it whole gives the same tokens.
#[derive(Debug, Clone)]
pub struct Characters {
    /// By code point below 0x10000: the token and the highest rank needed to make it, or [`NO_TOKEN`] twice.
    whole: Vec<(u32, u32)>,
    /// By byte before and byte after a border: the lowest rank of a merge that takes a beginning of the right character.
    beginnings: Vec<u32>,
    /// The same for merges that take an ending of the left character.
    endings: Vec<u32>,
}

/// Bytes of the character that starts with this byte, as far as the byte tells.
fn length(first: u8) -> usize {
    match first {
        0xF0.. => 4,
        0xE0.. => 3,
        0xC0.. => 2,
        _ => 1,
    }
}

fn border(before: u8, after: u8) -> usize {
    usize::from(before) << 8 | usize::from(after)
}

impl Characters {
    /// `make(token)` gives the highest rank needed to make a token from its bytes, or None if they end up as several.
    pub fn new(vocab: &Vocab, mut make: impl FnMut(&[u8]) -> Option<u32>) -> Self {
        let mut new = Self {
            whole: vec![(NO_TOKEN, NO_TOKEN); 1 << 16],
            beginnings: vec![NO_TOKEN; 1 << 16],
            endings: vec![NO_TOKEN; 1 << 16],
        };
        for (token, id) in vocab.iter().zip(0u32..) {
            let mut characters = std::str::from_utf8(token).unwrap_or("").chars();
            if let (Some(c @ '\u{80}'..='\u{FFFF}'), None) = (characters.next(), characters.next()) {
                if let Some(rank) = make(token) {
                    new.whole[c as usize] = (id, rank);
                }
            }
            for at in 1..token.len() {
                let (left, right) = token.split_at(at);
                if vocab.id(left).is_none() || vocab.id(right).is_none() {
                    continue;
                }
                let border = border(left[at - 1], right[0]);
                if right.len() < length(right[0]) {
                    new.beginnings[border] = new.beginnings[border].min(id);
                }
                if left[0] & 0xC0 == 0x80 {
                    new.endings[border] = new.endings[border].min(id);
                }
            }
        }
        new
    }

    /// Whether the character at `chunk[from..]` may start as one token: (token, bytes).
    #[inline]
    pub fn at(&self, chunk: &[u8], from: usize) -> Option<(u32, usize)> {
        let (code, to) = match chunk[from..] {
            [a @ 0xE0..=0xEF, b, c, ..] if b & c & 0xC0 == 0x80 && (b | c) & 0x40 == 0 => {
                (usize::from(a & 15) << 12 | usize::from(b & 63) << 6 | usize::from(c & 63), from + 3)
            }
            [a @ 0xC2..=0xDF, b, ..] if b & 0xC0 == 0x80 => (usize::from(a & 31) << 6 | usize::from(b & 63), from + 2),
            _ => return None,
        };
        let (id, rank) = self.whole[code];
        let early = from == 0 || rank < self.beginnings[border(chunk[from - 1], chunk[from])];
        let late = to == chunk.len() || rank < self.endings[border(chunk[to - 1], chunk[to])];
        // An overlong form, found in damaged text only, has the code of another character.
        let honest = to - from == 2 || code >= 0x800;
        (id != NO_TOKEN && early && late && honest).then_some((id, to - from))
    }
}
