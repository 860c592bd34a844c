//! stub
#[cfg(feature = "python")]
use pyo3::prelude::*;
#[cfg(feature = "python")]
#[pymodule]
fn rustbpe(_m: &Bound<'_, PyModule>) -> PyResult<()> { Ok(()) }
