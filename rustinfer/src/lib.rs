//! Batched decoding of nanozhchat models on CPUs, float32 and int8.
//!
//! One pass takes any mix of prompt pieces and single tokens of many sequences. Every number of a row is computed from
//! that row alone, in a fixed order: a sequence gets the same logits, bit for bit, whatever runs beside it and however
//! its tokens are cut into passes.
//!
//! [`kernels`] multiplies small blocks by panels of weights, [`matrix`] packs weights into panels, [`model`] is the
//! network over the slots of [`cache`].
#![deny(missing_docs)]
#![deny(unsafe_code)]

pub mod cache;
pub mod kernels;
pub mod loops;
pub mod matrix;
pub mod model;
#[cfg(feature = "python")]
mod python;
