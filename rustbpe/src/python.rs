//! The Python module. The only file that knows there is an interpreter.
//!
//! Long calls detach from the interpreter, come back every so often to look for Ctrl-C, and raise ValueError with the
//! messages of `error.rs`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyInt, PyIterator, PyList, PyString};

use crate::shard::AHEAD;
use crate::{
    characters_first, memory, spill, train_spilled, ChunkCounts, Counted, Counter, Encoder, Learned, PatternError,
    SpillTo, Spilled, Splitter, Totals, TrainError, Vocab, VocabError,
};

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
            TrainError::File { .. } => PyOSError::new_err(error.to_string()),
            _ => raised,
        }
    }
}

/// A byte-level BPE tokenizer without special tokens. Ids are ranks.
#[pyclass(frozen, name = "BPE", module = "rustbpe")]
struct Bpe {
    encoder: Encoder,
    totals: Totals,
    counts: Vec<u64>,
    /// All ids as Python's numbers: to count another reference is far quicker than to make another number.
    ints: PyOnceLock<Vec<Py<PyInt>>>,
}

/// Ids, and offsets between texts.
type Flat<'py> = (Bound<'py, PyBytes>, Bound<'py, PyBytes>);

fn flat<'py>(py: Python<'py>, (ids, ends): (Vec<u32>, Vec<usize>)) -> PyResult<Flat<'py>> {
    let ids = PyBytes::new_with(py, 4 * ids.len(), |out| {
        out.chunks_exact_mut(4).zip(&ids).for_each(|(out, id)| out.copy_from_slice(&id.to_le_bytes()));
        Ok(())
    })?;
    let offsets: Vec<u8> = [0].iter().chain(&ends).flat_map(|&end| (end as u64).to_le_bytes()).collect();
    Ok((ids, PyBytes::new(py, &offsets)))
}

/// A merge and how often its pair stood in the text: (left id, right id, count).
type CountedMerge = (u32, u32, u64);

#[pymethods]
impl Bpe {
    /// Learn a vocabulary of exactly `vocab_size` tokens from an iterable of documents.
    ///
    /// pattern: "bpe", "char" or a regular expression. threads: 0 = one per core; the result does not depend on it.
    /// progress(stage, done, total): "count" with bytes (total 0: unknown), then "merge" with merges. coverage: the most
    /// frequent characters that are this share of the text become tokens before any two are joined; 0 = by frequency.
    /// Raises ValueError if there is no text or it cannot give that many tokens; the attribute `reached` of the latter
    /// is the largest size it can give.
    #[staticmethod]
    #[pyo3(signature = (docs, vocab_size, pattern = "bpe", threads = 0, progress = None, coverage = 0.0))]
    fn train(
        py: Python<'_>,
        docs: &Bound<'_, PyAny>,
        vocab_size: u64,
        pattern: &str,
        threads: usize,
        progress: Option<Py<PyAny>>,
        coverage: f64,
    ) -> PyResult<Self> {
        let size = u32::try_from(vocab_size).map_err(|_| TrainError::VocabSize { asked: vocab_size })?;
        if !(0.0..=1.0).contains(&coverage) {
            return Err(PyValueError::new_err(format!("coverage={coverage} is not a share of the text, 0 to 1")));
        }
        let splitter = Splitter::new(pattern)?;
        let counter = Counter::new(&splitter, thread_count(threads), None);
        let mut parts = count(py, docs.try_iter()?, counter, progress.as_ref())?.parts;
        let totals = total(&parts);
        let often = if coverage > 0.0 { py.detach(|| characters_first(&mut parts, coverage))? } else { u64::MAX };
        let mut learned = py.detach(|| reporting(size, progress.as_ref(), |tick| crate::train(parts, size, tick)))?;
        learned.counts.iter_mut().for_each(|count| *count %= often);
        Self::learned(splitter, learned, totals)
    }

    /// Learn a vocabulary from files of counted chunks (see `count_to_files`), in about `memory` bytes.
    ///
    /// bytes: UTF-8 bytes of the text that was counted. merges: [(left id, right id, count)] of an earlier call to go on
    /// from; saved(merges) is handed such a list now and then, never a wrong one. The rest is as in `train`.
    /// Writes a `*.tokens.counts` of about the same size beside every file, and removes it in the end.
    /// Raises OSError if a file cannot be read or written.
    #[staticmethod]
    #[pyo3(signature = (files, bytes, vocab_size, memory, pattern = "bpe", threads = 0, merges = vec![], progress = None, saved = None))]
    #[allow(clippy::too_many_arguments)]
    fn train_from_files(
        py: Python<'_>,
        files: Vec<PathBuf>,
        bytes: u64,
        vocab_size: u64,
        memory: usize,
        pattern: &str,
        threads: usize,
        merges: Vec<CountedMerge>,
        progress: Option<Py<PyAny>>,
        saved: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let size = u32::try_from(vocab_size).map_err(|_| TrainError::VocabSize { asked: vocab_size })?;
        let splitter = Splitter::new(pattern)?;
        let spilled = Spilled { files, bytes, memory, threads: thread_count(threads) };
        let mut learned = Learned::default();
        for (left, right, count) in merges {
            learned.merges.push((left, right));
            learned.counts.push(count);
        }
        let mut raised = None;
        let outcome = py.detach(|| {
            reporting(size, progress.as_ref(), |tick| {
                train_spilled(&spilled, size, learned, tick, |learned| {
                    let Some(saved) = &saved else { return true };
                    let merges = learned.merges.iter().zip(&learned.counts);
                    let merges: Vec<CountedMerge> =
                        merges.map(|(&(left, right), &count)| (left, right, count)).collect();
                    raised = Python::attach(|py| saved.call1(py, (merges,)).err());
                    raised.is_none()
                })
            })
        });
        match raised {
            Some(error) => Err(error),
            None => Self::learned(splitter, outcome?, Totals { bytes, ..Totals::default() }),
        }
    }

    /// Build from the byte strings of all tokens; the index is the id. Raises ValueError if the list is damaged.
    #[staticmethod]
    #[pyo3(signature = (ranks, pattern = "bpe"))]
    fn from_ranks(py: Python<'_>, ranks: Vec<Vec<u8>>, pattern: &str) -> PyResult<Self> {
        let splitter = Splitter::new(pattern)?;
        let encoder = py.detach(|| Ok::<_, PyErr>(Encoder::new(splitter, Vocab::from_ranks(ranks)?)))?;
        Ok(Self { encoder, totals: Totals::default(), counts: Vec::new(), ints: PyOnceLock::new() })
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

    /// How often the pair of each merge stood in the text when it was merged; empty if built from ranks.
    #[getter]
    fn counts(&self) -> Vec<u64> {
        self.counts.clone()
    }

    /// What was counted in training: documents, bytes, chunks; empty if built from ranks.
    #[getter]
    fn stats(&self) -> BTreeMap<&'static str, u64> {
        if self.totals == Totals::default() {
            BTreeMap::new()
        } else {
            stats(&self.totals)
        }
    }

    /// The chunks of a text; put together they are the text.
    fn split(&self, text: &Bound<'_, PyString>) -> PyResult<Vec<String>> {
        let text = utf8(text)?;
        let mut chunks = Vec::new();
        self.encoder.splitter().split(&text, |chunk| chunks.push(chunk.to_owned()))?;
        Ok(chunks)
    }

    /// The ids of a text.
    fn encode<'py>(&self, py: Python<'py>, text: &Bound<'py, PyString>) -> PyResult<Bound<'py, PyList>> {
        let text = utf8(text)?;
        self.list(py, &py.detach(|| self.encoder.encode(&text))?)
    }

    /// The ids of any bytes, valid UTF-8 or not.
    fn encode_bytes<'py>(&self, py: Python<'py>, data: &[u8]) -> PyResult<Bound<'py, PyList>> {
        self.list(py, &py.detach(|| self.encoder.encode_bytes(data))?)
    }

    /// The ids of each text. threads: 0 = one per core.
    #[pyo3(signature = (texts, threads = 0))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        threads: usize,
    ) -> PyResult<Vec<Bound<'py, PyList>>> {
        let (ids, ends) = self.batch(py, &texts, threads)?;
        let mut from = 0;
        ends.into_iter().map(|end| self.list(py, &ids[std::mem::replace(&mut from, end)..end])).collect()
    }

    /// All ids end to end as little-endian uint32, and the len(texts) + 1 offsets between texts as uint64.
    #[pyo3(signature = (texts, threads = 0))]
    fn encode_batch_flat<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<Bound<'py, PyString>>,
        threads: usize,
    ) -> PyResult<Flat<'py>> {
        flat(py, self.batch(py, &texts, threads)?)
    }

    /// The same for texts end to end as UTF-8, with the len(texts) + 1 offsets between them as little-endian int64.
    ///
    /// Raises ValueError for data that is not UTF-8, or offsets that do not ascend within it from character to character.
    #[pyo3(signature = (data, offsets, threads = 0))]
    fn encode_joined<'py>(&self, py: Python<'py>, data: &[u8], offsets: &[u8], threads: usize) -> PyResult<Flat<'py>> {
        let encoded = py.detach(|| {
            let text = simdutf8::basic::from_utf8(data).map_err(|error| PyValueError::new_err(error.to_string()))?;
            let offsets: Vec<_> =
                offsets.chunks_exact(8).map(|at| i64::from_le_bytes(at.try_into().unwrap_or_default())).collect();
            let between = |ends: &[i64]| text.get(usize::try_from(ends[0]).ok()?..usize::try_from(ends[1]).ok()?);
            let texts: Option<Vec<&str>> = offsets.windows(2).map(between).collect();
            let texts = texts.ok_or_else(|| PyValueError::new_err("the offsets do not fit the text"))?;
            Ok::<_, PyErr>(self.encoder.encode_batch(&texts, thread_count(threads))?)
        });
        flat(py, encoded?)
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

fn stats(totals: &Totals) -> BTreeMap<&'static str, u64> {
    [("documents", totals.documents), ("bytes", totals.bytes), ("chunks", totals.chunks)].into()
}

fn total(parts: &[ChunkCounts]) -> Totals {
    parts.iter().fold(Totals::default(), |mut all, part| {
        all.documents += part.totals.documents;
        all.bytes += part.totals.bytes;
        all.chunks += part.totals.chunks;
        all
    })
}

/// Count the chunks of documents into new files `PREFIX*.counts` in a folder, using about `memory` bytes for tables.
///
/// Returns the names of the files, which are safely on disk, and what was counted: documents, bytes, chunks.
/// progress("count", bytes, 0) as in `BPE.train`. Raises OSError if a file exists already or cannot be written.
#[pyfunction]
#[pyo3(signature = (docs, directory, prefix, memory, pattern = "bpe", threads = 0, progress = None))]
#[allow(clippy::too_many_arguments)]
fn count_to_files(
    py: Python<'_>,
    docs: &Bound<'_, PyAny>,
    directory: PathBuf,
    prefix: String,
    memory: usize,
    pattern: &str,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<(Vec<String>, BTreeMap<&'static str, u64>)> {
    let to = SpillTo { directory: directory.clone(), prefix: prefix.clone(), memory };
    let counter = Counter::new(&Splitter::new(pattern)?, thread_count(threads), Some(to));
    let Counted { parts, mut files } = count(py, docs.try_iter()?, counter, progress.as_ref())?;
    for (i, part) in parts.iter().enumerate().filter(|(_, part)| !part.is_empty()) {
        let path = directory.join(format!("{prefix}rest-{i:02}.counts"));
        py.detach(|| spill::write(part, &path))?;
        files.push(path);
    }
    let name = |path: PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok((files.into_iter().map(name).collect(), stats(&total(&parts))))
}

impl Bpe {
    fn learned(splitter: Splitter, learned: Learned, totals: Totals) -> PyResult<Self> {
        let encoder = Encoder::from_merges(splitter, learned.merges)?;
        Ok(Self { encoder, totals, counts: learned.counts, ints: PyOnceLock::new() })
    }

    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        let all = 0..self.vocab_size() as u32;
        let ints = self.ints.get_or_init(py, || all.map(|id| PyInt::new(py, id).unbind()).collect());
        let ahead = ids.iter().skip(AHEAD).map(Some).chain(std::iter::repeat(None));
        PyList::new(
            py,
            ids.iter().zip(ahead).map(|(&id, later)| {
                later.into_iter().for_each(|&later| memory::prefetch_at(ints[later as usize].as_ptr()));
                &ints[id as usize]
            }),
        )
    }

    fn batch(&self, py: Python<'_>, texts: &[Bound<'_, PyString>], threads: usize) -> PyResult<(Vec<u32>, Vec<usize>)> {
        let texts: Vec<PyBackedStr> = texts.iter().map(utf8).collect::<PyResult<_>>()?;
        Ok(py.detach(|| self.encoder.encode_batch(&texts, thread_count(threads)))?)
    }
}

/// 0 asks for one thread per core. More than there are cores would wait for each other.
fn thread_count(threads: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if threads == 0 {
        cores
    } else {
        threads.min(cores)
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
) -> PyResult<Counted> {
    let (mut batch, mut bytes) = (counter.batch(), 0);
    for (index, document) in docs.enumerate() {
        let document = document?;
        let Ok(text) = document.cast::<PyString>() else {
            let kind = document.get_type().name()?;
            return Err(PyValueError::new_err(format!("document {index} is {kind}, expected a str")));
        };
        // Not `utf8`, which leaves a copy of the text in the object for later calls.
        let encoded = text.encode_utf8().ok();
        match encoded.as_ref().and_then(|bytes| simdutf8::basic::from_utf8(bytes.as_bytes()).ok()) {
            Some(text) => batch.push(text),
            None => batch.push(&utf8(text)?),
        }
        if batch.bytes() >= BATCH_BYTES {
            bytes += batch.bytes();
            let full = std::mem::replace(&mut batch, counter.batch());
            if !py.detach(|| counter.push(full)) {
                break; // the threads have stopped; finish() says why
            }
            py.check_signals()?;
            if let Some(progress) = progress {
                progress.call1(py, ("count", bytes, 0))?;
            }
        }
    }
    let counted = py.detach(|| {
        if !batch.is_empty() {
            counter.push(batch);
        }
        counter.finish()
    })?;
    if let Some(progress) = progress {
        let bytes = total(&counted.parts).bytes;
        progress.call1(py, ("count", bytes, bytes))?;
    }
    Ok(counted)
}

/// Runs a training that ticks after each merge; called detached, attaches for Ctrl-C and progress.
fn reporting(
    vocab_size: u32,
    progress: Option<&Py<PyAny>>,
    train: impl FnOnce(&mut dyn FnMut(u32) -> bool) -> Result<Learned, TrainError>,
) -> PyResult<Learned> {
    let total = vocab_size.saturating_sub(256);
    let mut raised = None;
    let mut last = Instant::now();
    let learned = train(&mut |done| {
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
        None => Ok(learned?),
    }
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("BPE_PATTERN", crate::BPE_PATTERN)?;
    module.add("CHAR_PATTERN", crate::CHAR_PATTERN)?;
    module.add_function(wrap_pyfunction!(count_to_files, module)?)?;
    module.add_class::<Bpe>()
}
