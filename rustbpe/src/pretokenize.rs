//! Splitting text into chunks. Merges never cross a chunk boundary, so the pattern decides what a token can be.
//!
//! The Han policy, decided here and nowhere else: a run of Han characters is a chunk of its own. Punctuation is never
//! glued to the Han run after it, as patterns made for English do ("：我" as one token): a prompt that ends in "："
//! would then be a context never seen in training. A run is not capped either: a cap would put boundaries at places
//! that depend on where the run began, and the encoder needs none.
//!
//! The classes are spelt out as ranges rather than named by Unicode properties, whose members differ from one version
//! to the next: so every regex engine, old or new, cuts every text alike. Beyond Chinese they are coarse: whole blocks
//! of alphabets count as letters. No pattern here looks around or backtracks: any engine runs it in linear time.

use std::sync::LazyLock;

use fancy_regex::Regex;
use regex_syntax::hir::{Class as HirClass, HirKind};

use crate::error::PatternError;

/// Extension A, the unified block, compatibility, planes 2 and 3, then the iteration mark and the zero.
macro_rules! han {
    () => {
        "\u{3400}-\u{4DBF}\u{4E00}-\u{9FFF}\u{F900}-\u{FAFF}\u{20000}-\u{323AF}\u{3005}\u{3007}"
    };
}

/// Latin, combining marks, the alphabets up to U+1FFF and U+2C00, kana, bopomofo, Hangul, Yi and others, half and full
/// width forms, the alphabets of plane 1.
macro_rules! letters {
    () => {
        concat!(
            "A-Za-z\u{AA}\u{B5}\u{BA}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{2C1}\u{300}-\u{374}\u{376}-\u{37D}",
            "\u{37F}-\u{383}\u{386}\u{388}-\u{167F}\u{1681}-\u{180D}\u{180F}-\u{1FFF}\u{2C00}-\u{2DFF}",
            "\u{3041}-\u{309A}\u{309D}-\u{309F}\u{30A1}-\u{30FA}\u{30FC}-\u{30FF}\u{3105}-\u{318E}\u{31A0}-\u{31BF}",
            "\u{31F0}-\u{31FF}\u{A000}-\u{D7FF}\u{FB00}-\u{FDFF}\u{FE70}-\u{FEFC}\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}",
            "\u{FF66}-\u{FFDC}\u{10000}-\u{1BFFF}\u{1D400}-\u{1D7CB}"
        )
    };
}

/// Digits, fractions, superscripts, Roman and circled numbers.
macro_rules! digits {
    () => {
        concat!(
            "0-9\u{B2}\u{B3}\u{B9}\u{BC}-\u{BE}\u{2070}\u{2074}-\u{2079}\u{2080}-\u{2089}\u{2150}-\u{218B}",
            "\u{2460}-\u{249B}\u{24EA}-\u{24FF}\u{2776}-\u{2793}\u{3220}-\u{3229}\u{3280}-\u{3289}",
            "\u{FF10}-\u{FF19}\u{1D7CE}-\u{1D7FF}"
        )
    };
}

/// White space except line breaks.
macro_rules! spaces {
    () => {
        "\t\u{B}\u{C} \u{85}\u{A0}\u{1680}\u{2000}-\u{200A}\u{2028}\u{2029}\u{202F}\u{205F}\u{3000}"
    };
}

/// The default pattern, by alternative: English contraction; Han run; word of any other script, with one leading
/// space; one digit; punctuation, symbols and controls, with one leading space; line breaks; other white space.
pub const BPE_PATTERN: &str = concat!(
    "'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[",
    han!(),
    "]+| ?[",
    letters!(),
    "]+|[",
    digits!(),
    "]| ?[^\r\n",
    spaces!(),
    letters!(),
    digits!(),
    han!(),
    "]+|[\r\n]+|[",
    spaces!(),
    "]+"
);

/// One character per chunk: merges only build characters out of bytes.
pub const CHAR_PATTERN: &str = r"[\s\S]";

/// Splits text by one pattern. Chunks put together again are the text, whatever the pattern.
#[derive(Debug, Clone)]
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

#[derive(Debug, Clone)]
enum Engine {
    /// Hand-written scanner equal to [`BPE_PATTERN`].
    Bpe(&'static [Class]),
    Char,
    Regex(Box<Regex>),
}

impl Splitter {
    /// `pattern`: "bpe", "char", or a regular expression (look-around allowed, but then long runs may be refused).
    pub fn new(pattern: &str) -> Result<Self, PatternError> {
        let (pattern, engine) = match pattern {
            "bpe" | BPE_PATTERN => (BPE_PATTERN, Engine::Bpe(CLASSES.as_slice())),
            "char" | CHAR_PATTERN => (CHAR_PATTERN, Engine::Char),
            other => (other, Engine::Regex(Box::new(compile(other)?))),
        };
        Ok(Self { pattern: pattern.to_owned(), engine })
    }

    /// The full regular expression.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `emit` with each chunk in order. Text between two matches of a custom pattern is a chunk too.
    pub fn split<'t>(&self, text: &'t str, mut emit: impl FnMut(&'t str)) -> Result<(), PatternError> {
        match &self.engine {
            Engine::Bpe(classes) => {
                let mut start = 0;
                while start < text.len() {
                    let end = bpe_chunk_end(classes, text, start);
                    emit(&text[start..end]);
                    start = end;
                }
            }
            Engine::Char => {
                let mut rest = text;
                while let Some(c) = rest.chars().next() {
                    let (chunk, tail) = rest.split_at(c.len_utf8());
                    emit(chunk);
                    rest = tail;
                }
            }
            Engine::Regex(regex) => split_by_regex(regex, text, emit)?,
        }
        Ok(())
    }
}

fn compile(pattern: &str) -> Result<Regex, PatternError> {
    Regex::new(pattern)
        .map_err(|error| PatternError::Invalid { pattern: pattern.to_owned(), reason: error.to_string() })
}

fn split_by_regex<'t>(regex: &Regex, text: &'t str, mut emit: impl FnMut(&'t str)) -> Result<(), PatternError> {
    let mut done = 0;
    for found in regex.find_iter(text) {
        let found = found.map_err(|error| PatternError::GaveUp { reason: error.to_string() })?;
        for (from, to) in [(done, found.start()), (found.start(), found.end())] {
            if from < to {
                emit(&text[from..to]);
            }
        }
        done = done.max(found.end());
    }
    if done < text.len() {
        emit(&text[done..]);
    }
    Ok(())
}

/// What a character is to [`BPE_PATTERN`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    Han,
    Letter,
    Digit,
    Newline,
    Space,
    Other,
}

/// The class of every code point, from the same ranges as the pattern.
static CLASSES: LazyLock<Vec<Class>> = LazyLock::new(|| {
    let mut classes = vec![Class::Other; 0x11_0000];
    for (ranges, class) in [
        (letters!(), Class::Letter),
        (digits!(), Class::Digit),
        (spaces!(), Class::Space),
        ("\r\n", Class::Newline),
        (han!(), Class::Han),
    ] {
        for (first, last) in class_ranges(&format!("[{ranges}]")) {
            classes[first as usize..=last as usize].fill(class);
        }
    }
    classes
});

fn class_ranges(pattern: &str) -> Vec<(char, char)> {
    match regex_syntax::parse(pattern).map(regex_syntax::hir::Hir::into_kind) {
        Ok(HirKind::Class(HirClass::Unicode(class))) => class.iter().map(|r| (r.start(), r.end())).collect(),
        // Cannot happen for the constants above; the tests compare every class with the regex.
        _ => Vec::new(),
    }
}

/// Reads the character at `at`, with its class and the position after it.
#[inline]
fn class_at(classes: &[Class], text: &str, at: usize) -> Option<(Class, usize)> {
    let c = text[at..].chars().next()?;
    Some((classes[c as usize], at + c.len_utf8()))
}

/// Where the run of characters that satisfy `belongs` ends, from `at` on.
#[inline]
fn run_end(classes: &[Class], text: &str, mut at: usize, belongs: impl Fn(Class) -> bool) -> usize {
    while let Some((class, next)) = class_at(classes, text, at) {
        if !belongs(class) {
            break;
        }
        at = next;
    }
    at
}

fn han_run_end(classes: &[Class], text: &str, mut at: usize) -> usize {
    let bytes = text.as_bytes();
    loop {
        // U+5000 to U+9FFF, most of the Han in a text, needs no decoding: the lead byte tells.
        while at < bytes.len() && matches!(bytes[at], 0xE5..=0xE9) {
            at += 3;
        }
        match class_at(classes, text, at) {
            Some((Class::Han, next)) => at = next,
            _ => return at,
        }
    }
}

/// The end of the chunk that starts at `start < text.len()`; equal to the first match of [`BPE_PATTERN`] there.
fn bpe_chunk_end(classes: &[Class], text: &str, start: usize) -> usize {
    let Some((class, next)) = class_at(classes, text, start) else { return text.len() };
    match class {
        Class::Han => han_run_end(classes, text, next),
        Class::Digit => next,
        Class::Letter => word_end(classes, text, next),
        Class::Newline => run_end(classes, text, next, |c| c == Class::Newline),
        Class::Other => contraction_end(text.as_bytes(), start).unwrap_or_else(|| other_end(classes, text, next)),
        Class::Space => {
            if text.as_bytes()[start] == b' ' {
                match class_at(classes, text, next) {
                    Some((Class::Letter, after)) => return word_end(classes, text, after),
                    Some((Class::Other, after)) => return other_end(classes, text, after),
                    _ => {}
                }
            }
            run_end(classes, text, next, |c| c == Class::Space)
        }
    }
}

fn word_end(classes: &[Class], text: &str, at: usize) -> usize {
    run_end(classes, text, at, |c| c == Class::Letter)
}

fn other_end(classes: &[Class], text: &str, at: usize) -> usize {
    run_end(classes, text, at, |c| c == Class::Other)
}

fn contraction_end(bytes: &[u8], start: usize) -> Option<usize> {
    if bytes[start] != b'\'' {
        return None;
    }
    let lower = |i: usize| bytes.get(start + i).map_or(0, u8::to_ascii_lowercase);
    match (lower(1), lower(2)) {
        (b's' | b'd' | b'm' | b't', _) => Some(start + 2),
        (b'l', b'l') | (b'v', b'e') | (b'r', b'e') => Some(start + 3),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks<'t>(pattern: &str, text: &'t str) -> Vec<&'t str> {
        let mut out = Vec::new();
        Splitter::new(pattern).unwrap().split(text, |c| out.push(c)).unwrap();
        out
    }

    /// The same pattern, run by the regex engine instead of the scanner.
    fn chunks_by_regex(text: &str) -> Vec<&str> {
        static REGEX: LazyLock<Regex> = LazyLock::new(|| compile(BPE_PATTERN).unwrap());
        let mut out = Vec::new();
        split_by_regex(&REGEX, text, |c| out.push(c)).unwrap();
        out
    }

    #[test]
    fn han_runs_stand_alone() {
        assert_eq!(
            chunks("bpe", "他说：“我在abc学校，2026年！”\n\n　　好。"),
            ["他说", "：“", "我在", "abc", "学校", "，", "2", "0", "2", "6", "年", "！”", "\n\n", "　　", "好", "。"]
        );
    }

    #[test]
    fn english_keeps_one_leading_space() {
        assert_eq!(
            chunks("bpe", "I don't  know (x) 'S 'll"),
            ["I", " don", "'t", "  ", "know", " (", "x", ")", " '", "S", " '", "ll"]
        );
    }

    #[test]
    fn char_pattern_splits_every_character() {
        assert_eq!(chunks("char", "a\r\n好😀"), ["a", "\r", "\n", "好", "😀"]);
    }

    #[test]
    fn scanner_classifies_characters_as_the_regex_does() {
        // Everything up to Han, then both sides of every change of class, then a sample.
        let wanted = |c: &u32| {
            let i = *c as usize;
            *c < 0x3500 || CLASSES[i] != CLASSES[i - 1] || CLASSES.get(i + 1) != Some(&CLASSES[i]) || c % 97 == 0
        };
        for c in (0..=0x10_FFFFu32).filter(wanted).filter_map(char::from_u32) {
            let probe = format!("{c}{c}a{c} {c}");
            assert_eq!(chunks("bpe", &probe), chunks_by_regex(&probe), "{probe:?}");
        }
    }

    #[test]
    fn scanner_equals_the_regex_on_random_text() {
        let alphabet: Vec<char> = "中文々〇字㐀𠀀龥a Z\u{e9}\u{301}が 한12½ⅷ  　\t\r\n\n'sldvertLE.,!?，。：“”😀\u{200d}\u{fe0f}\u{0}\u{85}\u{a0}".chars().collect();
        let mut state = 0x9E37_79B9_7F4A_7C15u64;
        for _ in 0..20_000 {
            let mut text = String::new();
            for _ in 0..24 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                text.push(alphabet[(state >> 33) as usize % alphabet.len()]);
            }
            let got = chunks("bpe", &text);
            assert_eq!(got, chunks_by_regex(&text), "{text:?}");
            assert_eq!(got.concat(), text);
        }
    }

    #[test]
    fn gaps_of_a_custom_pattern_are_kept() {
        assert_eq!(chunks("[0-9]+", "a12b3"), ["a", "12", "b", "3"]);
        assert_eq!(chunks("x*", "axxb"), ["a", "xx", "b"]);
    }

    #[test]
    fn a_broken_pattern_is_an_error() {
        assert!(matches!(Splitter::new("("), Err(PatternError::Invalid { .. })));
    }
}
