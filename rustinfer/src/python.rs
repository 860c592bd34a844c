//! The Python module. The only file that knows there is an interpreter; numbers cross as bytes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::cache::{Heads, Slot};
use crate::kernels::{bytes_of, Isa};
use crate::matrix::Weights;
use crate::model::{Config, Model, Part, Work};

/// A tensor as Python gives it: float32 bytes, or int8 bytes with the float32 bytes of a scale per row.
#[derive(FromPyObject)]
enum Given<'py> {
    Float(Bound<'py, PyBytes>),
    Int8(Bound<'py, PyBytes>, Bound<'py, PyBytes>),
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect()
}

impl Given<'_> {
    fn weights(&self) -> Weights {
        match self {
            Self::Float(values) => Weights::Float(floats(values.as_bytes())),
            Self::Int8(values, scale) => {
                let values = values.as_bytes().iter().map(|&b| b.cast_signed()).collect();
                Weights::Int8(values, floats(scale.as_bytes()))
            }
        }
    }
}

fn setting<'py, T: FromPyObjectOwned<'py>>(config: &Bound<'py, PyDict>, name: &str) -> PyResult<T> {
    let value = config.get_item(name)?.ok_or_else(|| PyValueError::new_err(format!("{name} is missing")))?;
    value.extract().map_err(Into::into)
}

/// A model's weights, packed for this machine; slots share them.
#[pyclass(frozen, name = "Model", module = "rustinfer")]
struct PyModel(Arc<Model>);

#[pymethods]
impl PyModel {
    /// config: the sizes; tensors: name -> bytes; isa: a name from `instruction_sets()`, None = the best.
    #[new]
    #[pyo3(signature = (config, tensors, *, threads = 1, isa = None))]
    fn new(
        config: &Bound<'_, PyDict>,
        tensors: HashMap<String, Given<'_>>,
        threads: usize,
        isa: Option<&str>,
    ) -> PyResult<Self> {
        let heads = Heads {
            n_layer: setting(config, "n_layer")?,
            n_head: setting(config, "n_head")?,
            n_kv_head: setting(config, "n_kv_head")?,
            head_dim: setting(config, "head_dim")?,
            context: setting(config, "context")?,
            offset_heads: setting(config, "offset_heads")?,
        };
        let parsed = Config {
            heads,
            n_embd: setting(config, "n_embd")?,
            vocab_size: setting(config, "vocab_size")?,
            windows: setting(config, "windows")?,
            gate_channels: setting(config, "gate_channels")?,
            qk_scale: setting(config, "qk_scale")?,
            softcap: setting(config, "softcap")?,
        };
        let found = Isa::available().iter().find(|i| isa.is_none_or(|name| i.name() == name));
        let isa = *found.ok_or_else(|| PyValueError::new_err("this machine does not have that instruction set"))?;
        let tensors = tensors.iter().map(|(name, given)| (name.clone(), given.weights())).collect();
        let model = Model::new(parsed, tensors, isa, threads).map_err(PyValueError::new_err)?;
        Ok(Self(Arc::new(model)))
    }

    /// Return empty slots for `n` sequences.
    fn slots(&self, n: usize) -> Slots {
        Slots { model: self.0.clone(), state: Mutex::new((vec![self.0.slot(); n], Work::default())) }
    }
}

/// Sequences in flight.
#[pyclass(frozen, module = "rustinfer")]
struct Slots {
    model: Arc<Model>,
    state: Mutex<(Vec<Slot>, Work)>,
}

/// slot, tokens held, the last of them or None, tokens to append, places at the end whose logits are wanted.
type Given5 = (usize, usize, Option<u32>, Vec<u32>, usize);

#[pymethods]
impl Slots {
    /// Append every part to its slot; return the float32 bytes of (places wanted, vocab_size) logits.
    fn forward<'py>(&self, py: Python<'py>, parts: Vec<Given5>) -> PyResult<Bound<'py, PyBytes>> {
        let parts: Vec<Part> = parts
            .iter()
            .map(|(slot, held, previous, ids, wanted)| Part {
                slot: *slot,
                held: *held,
                previous: *previous,
                ids,
                wanted: *wanted,
            })
            .collect();
        let wanted: usize = parts.iter().map(|part| part.wanted.min(part.ids.len())).sum();
        PyBytes::new_with(py, wanted * self.model.config().vocab_size * 4, |bytes| {
            py.detach(|| {
                let (slots, work) = &mut *self.lock();
                let logits = self.model.forward(slots, &parts, work).map_err(PyValueError::new_err)?;
                bytes.copy_from_slice(bytes_of(logits));
                Ok(())
            })
        })
    }

    /// Make `target` hold the first n tokens of `source`.
    fn copy(&self, source: usize, target: usize, n: usize) {
        let slots = &mut self.lock().0;
        let mut taken = std::mem::replace(&mut slots[target], self.model.slot());
        taken.copy_from(&slots[source], &self.model.config().heads, n);
        slots[target] = taken;
    }

    /// Empty a slot and give its memory back.
    fn clear(&self, slot: usize) {
        self.lock().0[slot].clear();
    }
}

impl Slots {
    fn lock(&self) -> std::sync::MutexGuard<'_, (Vec<Slot>, Work)> {
        // A panic in the middle of a pass leaves stale numbers at worst, which are overwritten before they are read.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Names of the instruction sets that this machine has, the best first.
#[pyfunction]
fn instruction_sets() -> Vec<String> {
    Isa::available().iter().map(|isa| isa.name()).collect()
}

/// Batched decoding of nanozhchat models on CPUs.
#[pymodule]
fn rustinfer(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyModel>()?;
    module.add_class::<Slots>()?;
    module.add_function(wrap_pyfunction!(instruction_sets, module)?)
}
