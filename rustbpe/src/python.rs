//! The Python module. The only file that knows there is an interpreter.
//!
//! Long calls detach from the interpreter, come back every so often to look for Ctrl-C, and raise ValueError with the
//! messages of `error.rs`.

use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyboardInterrupt, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyIterator, PyString};

use crate::{Batch, ChunkCounts, Counter, Encoder, PatternError, Splitter, Totals, TrainError, Vocab, VocabError};

/// Documents are handed to the counting threads in batches of about this many bytes.
const BATCH_BYTES: usize = 1 << 20;

/// How often a long call comes back to the interpreter.
const TICK: Duration = Duration::from_millis(100);

impl From<PatternError> for PyErr {
    fn from(error: PatternError) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

impl From<VocabError> for PyErr {
    fn from(error: VocabError) -> Self {
        PyValueError::new_err(error.to_string())
    }
}

impl From<TrainError> for PyErr {
    fn from(error: TrainError) -> Self {
        let raised = PyValueError::new_err(error.to_string());
        match error {
            TrainError::Cancelled => PyKeyboardInterrupt::new_err(()),
            // For callers that add tokens of their own and count them too.
            TrainError::TooFewTokens { reached, .. } => Python::attach(|py| {
                let set = raised.value(py).setattr("reached", reached);
                set.err().unwrap_or(raised)
            }),
            _ => raised,
        }
    }
}

/// A byte-level BPE tokenizer without special tokens. Ids are ranks.
#[pyclass(frozen, name = "BPE", module = "rustbpe")]
struct Bpe {
    encoder: Encoder,
    totals: Option<(Totals, usize)>,
}

#[pymethods]
impl Bpe {
    /// Learn a vocabulary of exactly `vocab_size` tokens from an iterable of documents.
    ///
    /// pattern: "bpe", "char" or a regular expression. threads: 0 = one per core; the result does not depend on it.
    /// progress(stage, done, total): "count" with bytes (total 0: unknown), then "merge" with merges.
    /// Raises ValueError if there is no text or it cannot give that many tokens; the attribute `reached` of the latter
    /// is the largest size it can give.
    #[staticmethod]
    #[pyo3(signature = (docs, vocab_size, pattern = "bpe", threads = 0, progress = None))]
    fn train(
        py: Python<'_>,
        docs: &Bound<'_, PyAny>,
        vocab_size: u64,
        pattern: &str,
        threads: usize,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let size = u32::try_from(vocab_size).map_err(|_| TrainError::VocabSize { asked: vocab_size })?;
        let splitter = Splitter::new(pattern)?;
        let counter = Counter::new(&splitter, thread_count(threads));
        let counts = count(py, docs.try_iter()?, counter, progress.as_ref())?;
        let totals = Some((counts.totals, counts.len()));
        let encoder = py.detach(|| {
            let merges = merge(counts, size, progress.as_ref())?;
            Ok::<_, PyErr>(Encoder::new(splitter, Vocab::from_merges(&merges)?))
        })?;
        Ok(Self { encoder, totals })
    }

    /// Build from the byte strings of all tokens; the index is the id. Raises ValueError if the list is damaged.
    #[staticmethod]
    #[pyo3(signature = (ranks, pattern = "bpe"))]
    fn from_ranks(py: Python<'_>, ranks: Vec<Vec<u8>>, pattern: &str) -> PyResult<Self> {
        let splitter = Splitter::new(pattern)?;
        let encoder = py.detach(|| Ok::<_, PyErr>(Encoder::new(splitter, Vocab::from_ranks(ranks)?)))?;
        Ok(Self { encoder, totals: None })
    }

    /// The byte strings of all tokens; the index is the id.
    fn ranks<'py>(&self, py: Python<'py>) -> Vec<Bound<'py, PyBytes>> {
        self.encoder.vocab().iter().map(|token| PyBytes::new(py, token)).collect()
    }

    /// The merges in order, as (left id, right id).
    ///
    /// Raises ValueError for a vocabulary from elsewhere with tokens that no merge makes.
    fn merges(&self, py: Python<'_>) -> PyResult<Vec<(u32, u32)>> {
        Ok(py.detach(|| self.encoder.merges())?)
    }

    /// The full regular expression that cuts text into chunks.
    #[getter]
    fn pattern(&self) -> &str {
        self.encoder.splitter().pattern()
    }

    /// Number of tokens.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder.vocab().len()
    }

    /// What was counted in training: documents, bytes, chunks, distinct_chunks; empty if built from ranks.
    #[getter]
    fn stats(&self) -> std::collections::BTreeMap<&'static str, u64> {
        let Some((totals, distinct)) = self.totals else { return Default::default() };
        [
            ("documents", totals.documents),
            ("bytes", totals.bytes),
            ("chunks", totals.chunks),
            ("distinct_chunks", distinct as u64),
        ]
        .into()
    }

    /// The chunks of a text; put together they are the text.
    fn split(&self, text: &Bound<'_, PyString>) -> PyResult<Vec<String>> {
        let text = utf8(text)?;
        let mut chunks = Vec::new();
        self.encoder.splitter().split(&text, |chunk| chunks.push(chunk.to_owned()))?;
        Ok(chunks)
    }

    /// The ids of a text.
    fn encode(&self, py: Python<'_>, text: &Bound<'_, PyString>) -> PyResult<Vec<u32>> {
        let text = utf8(text)?;
        Ok(py.detach(|| self.encoder.encode(&text))?)
    }

    /// The ids of any bytes, valid UTF-8 or not.
    fn encode_bytes(&self, py: Python<'_>, data: &[u8]) -> PyResult<Vec<u32>> {
        Ok(py.detach(|| self.encoder.encode_bytes(data))?)
    }

    /// The ids of each text. threads: 0 = one per core.
    #[pyo3(signature = (texts, threads = 0))]
    fn encode_batch(&self, py: Python<'_>, texts: Vec<Bound<'_, PyString>>, threads: usize) -> PyResult<Vec<Vec<u32>>> {
        let (ids, ends) = self.batch(py, &texts, threads)?;
        let mut from = 0;
        Ok(ends.into_iter().map(|end| ids[std::mem::replace(&mut from, end)..end].to_vec()).collect())
    }

    /// All ids end to end as little-endian uint32, and the len(texts) + 1 offsets between texts as uint64.
    #[pyo3(signature = (texts, threads = 0))]
    fn encode_batch_flat<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        threads: usize,
    ) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
        let (ids, ends) = self.batch(py, &texts, threads)?;
        let (ids, offsets) = py.detach(|| {
            let ids: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            let offsets: Vec<u8> = [0].iter().chain(&ends).flat_map(|&end| (end as u64).to_le_bytes()).collect();
            (ids, offsets)
        });
        Ok((PyBytes::new(py, &ids), PyBytes::new(py, &offsets)))
    }

    /// The bytes of a list of ids. Raises ValueError for an id outside the vocabulary.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<i64>) -> PyResult<Bound<'py, PyBytes>> {
        let size = self.vocab_size();
        let ids: Vec<u32> = ids
            .into_iter()
            .map(|id| {
                u32::try_from(id).map_err(|_| {
                    PyValueError::new_err(format!("id {id} is not in this vocabulary, which has ids 0 to {}", size - 1))
                })
            })
            .collect::<PyResult<_>>()?;
        Ok(PyBytes::new(py, &self.encoder.vocab().decode(&ids)?))
    }

    fn __repr__(&self) -> String {
        format!("BPE(vocab_size={})", self.vocab_size())
    }
}

impl Bpe {
    fn batch(&self, py: Python<'_>, texts: &[Bound<'_, PyString>], threads: usize) -> PyResult<(Vec<u32>, Vec<usize>)> {
        let texts: Vec<PyBackedStr> = texts.iter().map(utf8).collect::<PyResult<_>>()?;
        Ok(py.detach(|| self.encoder.encode_batch(&texts, thread_count(threads)))?)
    }
}

/// 0 asks for one thread per core.
fn thread_count(threads: usize) -> usize {
    match threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    }
}

/// The text of a str. A str may hold half of a surrogate pair, which no UTF-8 can: it becomes U+FFFD.
fn utf8(text: &Bound<'_, PyString>) -> PyResult<PyBackedStr> {
    if let Ok(text) = text.extract() {
        return Ok(text);
    }
    let units: Vec<u8> = text.call_method1("encode", ("utf-16-le", "surrogatepass"))?.extract()?;
    let units = units.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    let clean: String = char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect();
    PyString::new(text.py(), &clean).extract()
}

/// Feeds the documents to the counting threads.
fn count(
    py: Python<'_>,
    docs: Bound<'_, PyIterator>,
    counter: Counter,
    progress: Option<&Py<PyAny>>,
) -> PyResult<ChunkCounts> {
    let (mut batch, mut bytes) = (Batch::default(), 0);
    for (index, document) in docs.enumerate() {
        let document = document?;
        let Ok(text) = document.cast::<PyString>() else {
            let kind = document.get_type().name()?;
            return Err(PyValueError::new_err(format!("document {index} is {kind}, expected a str")));
        };
        batch.push(&utf8(text)?);
        if batch.bytes() >= BATCH_BYTES {
            bytes += batch.bytes();
            let full = std::mem::take(&mut batch);
            if !py.detach(|| counter.push(full)) {
                break; // the threads have stopped; finish() says why
            }
            py.check_signals()?;
            if let Some(progress) = progress {
                progress.call1(py, ("count", bytes, 0))?;
            }
        }
    }
    let counts = py.detach(|| {
        if !batch.is_empty() {
            counter.push(batch);
        }
        counter.finish()
    })?;
    if let Some(progress) = progress {
        progress.call1(py, ("count", counts.totals.bytes, counts.totals.bytes))?;
    }
    Ok(counts)
}

/// Runs the merge loop; called detached, attaches for Ctrl-C and progress.
fn merge(counts: ChunkCounts, vocab_size: u32, progress: Option<&Py<PyAny>>) -> PyResult<crate::Merges> {
    let total = vocab_size.saturating_sub(256);
    let mut raised = None;
    let mut last = Instant::now();
    let merges = crate::train(counts, vocab_size, |done| {
        if done < total && last.elapsed() < TICK {
            return true;
        }
        last = Instant::now();
        let outcome = Python::attach(|py| {
            py.check_signals()?;
            progress.map_or(Ok(()), |progress| progress.call1(py, ("merge", done, total)).map(|_| ()))
        });
        raised = outcome.err();
        raised.is_none()
    });
    match raised {
        Some(error) => Err(error),
        None => Ok(merges?),
    }
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("BPE_PATTERN", crate::BPE_PATTERN)?;
    module.add("CHAR_PATTERN", crate::CHAR_PATTERN)?;
    module.add_class::<Bpe>()
}
