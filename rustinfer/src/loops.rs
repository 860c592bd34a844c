//! Plain loops over rows, which the compiler turns into vector code for each instruction set.
//!
//! Sums run over [`LANES`] lanes whatever the register, so that every instruction set adds in the same order.
#![allow(unsafe_code)]

use crate::kernels::{Isa, Kind, LANES};

/// Epsilon of the norm: that of float32, as in PyTorch.
const EPSILON: f32 = f32::EPSILON;

/// 1.5 * 2^23: adding it to a small number rounds that to a whole one, kept in the lowest bits.
const ROUND: f32 = 12_582_912.0;

/// Define methods of [`Isa`], compiled once for each instruction set.
macro_rules! vectorized {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $kind:ty),*) $(-> $out:ty)? $body:block)*) => {
        $(
            #[inline(always)]
            fn $name($($arg: $kind),*) $(-> $out)? $body
        )*
        impl Isa {$(
            $(#[$doc])*
            pub fn $name(self, $($arg: $kind),*) $(-> $out)? {
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
                fn avx512($($arg: $kind),*) $(-> $out)? {
                    $name($($arg),*)
                }
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $kind),*) $(-> $out)? {
                    $name($($arg),*)
                }
                match self.0 {
                    #[cfg(target_arch = "x86_64")]
                    Kind::Vnni | Kind::Avx512 => {
                        // SAFETY: `self` proves that the instructions exist.
                        unsafe { avx512($($arg),*) }
                    }
                    #[cfg(target_arch = "x86_64")]
                    Kind::Avx2 => {
                        // SAFETY: `self` proves that the instructions exist.
                        unsafe { avx2($($arg),*) }
                    }
                    Kind::Portable => $name($($arg),*),
                }
            }
        )*}
    };
}

vectorized! {
    /// Replace every x by e to the x. Relative error below 3e-7 between -87 and 88, where x is clamped.
    fn exp(x: &mut [f32]) {
        for x in x {
            *x = exp_of(*x);
        }
    }

    /// Replace every logit x by cap * tanh(x / cap), by way of tanh(a) = 1 - 2 / (e to the 2a + 1).
    fn squeeze(x: &mut [f32], cap: f32) {
        for x in x {
            *x = cap - 2.0 * cap / (exp_of(*x * (2.0 / cap)) + 1.0);
        }
    }

    /// Turn scores into weights outside of which, `low..high`, all is zero: e to the score less the largest.
    ///
    /// A score is first multiplied by its key's scale, a weight in the end by its value's. Returns the sum of the
    /// weights before that. The row is a multiple of [`LANES`] long.
    fn softmax(row: &mut [f32], low: usize, high: usize, key_scales: &[f32], value_scales: &[f32]) -> f32 {
        for (v, scale) in row.iter_mut().zip(key_scales) {
            *v *= scale;
        }
        row[..low].fill(f32::NEG_INFINITY);
        row[high..].fill(f32::NEG_INFINITY);
        let mut top = [f32::NEG_INFINITY; LANES];
        for lanes in row.chunks_exact(LANES) {
            for (t, &v) in top.iter_mut().zip(lanes) {
                *t = if v > *t { v } else { *t };
            }
        }
        let top = top.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        for v in row.iter_mut() {
            *v = exp_of(*v - top);
        }
        row[..low].fill(0.0);
        row[high..].fill(0.0);
        let mut sum = [0.0; LANES];
        for lanes in row.chunks_exact(LANES) {
            for (s, &v) in sum.iter_mut().zip(lanes) {
                *s += v;
            }
        }
        for (v, scale) in row[low..high].iter_mut().zip(&value_scales[low..high]) {
            *v *= scale;
        }
        sum.iter().sum()
    }

    /// Spread a row's range, zero included, over 0 to 255; returns the scale and the zero point.
    ///
    /// The scale of a row that is not finite is not finite.
    fn quantize(from: &[f32], to: &mut [u8]) -> (f32, i32) {
        let (low, high, check) = range(from);
        let range = high - low;
        let scale = if range > 0.0 { range / 255.0 } else { 1.0 };
        let (inverse, zero) = (1.0 / scale, (-low / scale + 0.5).floor());
        for (t, &v) in to.iter_mut().zip(from) {
            let v = v * inverse + zero;
            let v = if v > 0.0 { v } else { 0.0 };
            *t = ((if v < 255.0 { v } else { 255.0 }) + ROUND).to_bits() as u8;
        }
        (scale + check, zero as i32)
    }

    /// Spread a row's largest magnitude over 127 steps either way; returns the scale, not finite if the row is not.
    fn quantize_signed(from: &[f32], to: &mut [i8]) -> f32 {
        let (low, high, check) = range(from);
        let most = if high > -low { high } else { -low };
        let scale = if most > 0.0 { most / 127.0 } else { 1.0 };
        let inverse = 1.0 / scale;
        for (t, &v) in to.iter_mut().zip(from) {
            *t = (v * inverse + ROUND).to_bits() as i8;
        }
        scale + check
    }

    /// Turn sums over bytes back into numbers: `(sum - zero * column sum) * scale * column scale`.
    fn dequantize(sums: &[i32], zero: i32, scale: f32, columns: &[i32], scales: &[f32], out: &mut [f32]) {
        for (((out, &sum), &column), &s) in out.iter_mut().zip(sums).zip(columns).zip(scales) {
            *out = (sum - zero * column) as f32 * (scale * s);
        }
    }

    /// Scale each row of `width` values to unit root mean square.
    fn rms_norm(x: &[f32], width: usize, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let factor = inverse_rms(x);
            for (out, x) in out.iter_mut().zip(x) {
                *out = x * factor;
            }
        }
    }

    /// Rotate a head by the angles of its position (arXiv 2104.09864), norm it to `norm` unless that is 0, scale it.
    fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32], norm: f32, scale: f32) {
        let (a, b) = head.split_at_mut(cos.len());
        for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
            (*a, *b) = (*a * c + *b * s, *b * c - *a * s);
        }
        let factor = if norm > 0.0 { inverse_rms(head) * norm * scale } else { scale };
        for v in head {
            *v *= factor;
        }
    }

    /// x becomes a * x + b * y.
    fn mix(x: &mut [f32], a: f32, y: &[f32], b: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x = a * *x + b * y;
        }
    }

    /// x becomes x + y.
    fn add(x: &mut [f32], y: &[f32]) {
        for (x, y) in x.iter_mut().zip(y) {
            *x += y;
        }
    }

    /// Replace negative numbers by zero and square the others; NaN stays NaN.
    fn relu_squared(x: &mut [f32]) {
        for x in x {
            let v = if *x < 0.0 { 0.0 } else { *x };
            *x = v * v;
        }
    }
}

#[inline(always)]
fn exp_of(x: f32) -> f32 {
    let v = x.clamp(-87.0, 88.0);
    let shifted = v * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (v - n * 0.693_359_4) - n * -2.121_944_4e-4; // ln 2 in two parts
    let mut p = 1.987_569_1e-4_f32;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23)) // 2 to the n, n read from the lowest bits
}

/// The smallest value, the largest, both with zero included, and zero if every value is finite, else NaN.
#[inline(always)]
fn range(x: &[f32]) -> (f32, f32, f32) {
    let low = by_lanes(x, |a, v| if v < a { v } else { a });
    let high = by_lanes(x, |a, v| if v > a { v } else { a });
    let check = by_lanes(x, |a, v| a + v * 0.0);
    let low = low.iter().copied().fold(0.0, f32::min);
    (low, high.iter().copied().fold(0.0, f32::max), check.iter().sum())
}

/// Combine each lane's values, beginning with zero. One result at a time, or the compiler gives up on vector code.
#[inline(always)]
fn by_lanes(x: &[f32], combine: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    let lanes = x.chunks_exact(LANES);
    for (o, &v) in out.iter_mut().zip(lanes.remainder()) {
        *o = combine(*o, v);
    }
    for lanes in lanes {
        for (o, &v) in out.iter_mut().zip(lanes) {
            *o = combine(*o, v);
        }
    }
    out
}

#[inline(always)]
fn inverse_rms(x: &[f32]) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + EPSILON).sqrt()
}

/// Sum of products.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = [0.0; LANES];
    let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for ((s, a), b) in sum.iter_mut().zip(a.remainder()).zip(b.remainder()) {
        *s = a * b;
    }
    for (a, b) in a.zip(b) {
        for l in 0..LANES {
            sum[l] += a[l] * b[l];
        }
    }
    sum.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_over_its_whole_range_on_every_instruction_set() {
        for isa in Isa::available() {
            let mut x: Vec<f32> = (-8700..=8800).map(|i| i as f32 / 100.0).collect();
            let want: Vec<f64> = x.iter().map(|&v| f64::from(v).exp()).collect();
            isa.exp(&mut x);
            for (got, want) in x.iter().zip(want) {
                assert!((f64::from(*got) / want - 1.0).abs() < 3e-7, "{isa:?} {got} {want}");
            }
        }
    }

    #[test]
    fn bytes_are_within_half_a_step_and_a_row_that_is_not_finite_says_so() {
        let row: Vec<f32> = (0..70).map(|i| (i as f32 * 0.37).sin() * i as f32 - 5.0).collect();
        for isa in Isa::available() {
            let (mut bytes, mut signed) = ([0; 70], [0; 70]);
            let (scale, zero) = isa.quantize(&row, &mut bytes);
            let step = isa.quantize_signed(&row, &mut signed);
            for i in 0..row.len() {
                assert!((row[i] - (i32::from(bytes[i]) - zero) as f32 * scale).abs() <= 0.51 * scale, "{isa:?}");
                assert!((row[i] - f32::from(signed[i]) * step).abs() <= 0.51 * step, "{isa:?}");
            }
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut broken = row.clone();
                broken[69] = bad;
                assert!(
                    !isa.quantize(&broken, &mut bytes).0.is_finite()
                        && !isa.quantize_signed(&broken, &mut signed).is_finite()
                );
            }
        }
    }
}
