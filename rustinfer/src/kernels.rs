//! The inner loops: a few rows times one panel of 64 columns, for each instruction set.
//!
//! A panel stores, for each `k`, what its 64 columns need side by side. Every output is one chain of additions over
//! `k`, so it does not depend on how many rows are computed together.
#![allow(unsafe_code)]

use std::sync::OnceLock;

/// Columns of a panel.
pub const PANEL: usize = 64;
/// Lanes that belong together: a register of AVX-512.
pub const LANES: usize = 16;
/// Rows that are computed together at most: 6 x 4 accumulators fill the registers of AVX-512.
pub const ROWS: usize = 6;

/// Results of a block: up to [`ROWS`] rows of [`PANEL`] columns.
pub type Block<T> = [[T; PANEL]; ROWS];

/// An instruction set. Only [`Isa::available`] hands them out, so holding one proves that the machine has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// What this machine has, the best first; the portable code is always there.
    pub fn available() -> &'static [Isa] {
        static FOUND: OnceLock<Vec<Isa>> = OnceLock::new();
        FOUND.get_or_init(|| {
            let mut found = Vec::new();
            #[cfg(target_arch = "x86_64")]
            {
                let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
                let avx512 = avx2 && is_x86_feature_detected!("avx512f");
                if avx512 && is_x86_feature_detected!("avx512vnni") {
                    found.push(Isa(Kind::Vnni));
                }
                if avx512 {
                    found.push(Isa(Kind::Avx512));
                }
                if avx2 {
                    found.push(Isa(Kind::Avx2));
                }
            }
            found.push(Isa(Kind::Portable));
            found
        })
    }

    /// Its name, for people.
    pub fn name(self) -> String {
        format!("{:?}", self.0).to_lowercase()
    }

    /// `out[m][c] = sum over i < k of x[m * ldx + i] * w[i * ldw + c]` for `m < rows` and `c < columns`.
    ///
    /// `columns` is a multiple of [`LANES`], at most [`PANEL`]; `rows` is 1 to [`ROWS`].
    #[allow(clippy::too_many_arguments)]
    #[inline]
    pub fn float(
        self,
        rows: usize,
        columns: usize,
        k: usize,
        x: &[f32],
        ldx: usize,
        w: &[f32],
        ldw: usize,
        out: &mut Block<f32>,
    ) {
        assert!((1..=ROWS).contains(&rows) && columns <= PANEL && columns.is_multiple_of(LANES));
        assert!(k > 0 && x.len() >= (rows - 1) * ldx + k && w.len() >= (k - 1) * ldw + columns);
        macro_rules! by_rows {
            ($($f:ident)::+, $w:expr, $at:expr) => {
                // SAFETY: the asserts above bound every read, and `self` proves that the instructions exist.
                unsafe {
                    match rows {
                        1 => $($f)::+::<1, $w>(k, x, ldx, &w[$at..], ldw, $at, out),
                        2 => $($f)::+::<2, $w>(k, x, ldx, &w[$at..], ldw, $at, out),
                        3 => $($f)::+::<3, $w>(k, x, ldx, &w[$at..], ldw, $at, out),
                        4 => $($f)::+::<4, $w>(k, x, ldx, &w[$at..], ldw, $at, out),
                        5 => $($f)::+::<5, $w>(k, x, ldx, &w[$at..], ldw, $at, out),
                        _ => $($f)::+::<6, $w>(k, x, ldx, &w[$at..], ldw, $at, out),
                    }
                }
            };
        }
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Vnni | Kind::Avx512 => match columns {
                64 => by_rows!(x86::float512, 4, 0),
                32 => by_rows!(x86::float512, 2, 0),
                _ => (0..columns).step_by(LANES).for_each(|at| by_rows!(x86::float512, 1, at)),
            },
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => match (rows, columns) {
                (1, 64) => by_rows!(x86::float256, 8, 0), // few rows: more columns, or the additions wait for each other
                (..=3, 32 | 64) => (0..columns).step_by(32).for_each(|at| by_rows!(x86::float256, 4, at)),
                _ => (0..columns).step_by(LANES).for_each(|at| by_rows!(x86::float256, 2, at)),
            },
            Kind::Portable => (0..columns).step_by(LANES).for_each(|at| by_rows!(float_portable, 1, at)),
        }
    }

    /// `out[m][c] = sum over i < k of x[m * k + i] * w[i / 4][c][i % 4]`; `k` is a multiple of 4, `w` is k * 64 bytes.
    #[inline]
    pub fn int8(self, rows: usize, k: usize, x: &[u8], w: &[i8], out: &mut Block<i32>) {
        assert!((1..=ROWS).contains(&rows) && k > 0 && k.is_multiple_of(4));
        assert!(x.len() >= rows * k && w.len() >= k * PANEL);
        macro_rules! by_rows {
            ($($f:ident)::+) => {
                // SAFETY: the asserts above bound every read, and `self` proves that the instructions exist.
                unsafe {
                    match rows {
                        1 => $($f)::+::<1>(k, x, w, out),
                        2 => $($f)::+::<2>(k, x, w, out),
                        3 => $($f)::+::<3>(k, x, w, out),
                        4 => $($f)::+::<4>(k, x, w, out),
                        5 => $($f)::+::<5>(k, x, w, out),
                        _ => $($f)::+::<6>(k, x, w, out),
                    }
                }
            };
        }
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Vnni => by_rows!(x86::int8_vnni),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 | Kind::Avx2 => by_rows!(x86::int8_avx2),
            Kind::Portable => by_rows!(int8_portable),
        }
    }
}

/// Define methods of [`Isa`] by plain loops, which the compiler turns into vector code for AVX2 as well.
macro_rules! vectorized {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $kind:ty),*) $(-> $out:ty)? $body:block)*) => {$(
        impl Isa {
            $(#[$doc])*
            pub fn $name(self, $($arg: $kind),*) $(-> $out)? {
                #[inline(always)]
                fn portable($($arg: $kind),*) $(-> $out)? $body
                #[cfg(target_arch = "x86_64")]
                #[target_feature(enable = "avx2")]
                fn avx2($($arg: $kind),*) $(-> $out)? {
                    portable($($arg),*)
                }
                match self.0 {
                    #[cfg(target_arch = "x86_64")]
                    Kind::Vnni | Kind::Avx512 | Kind::Avx2 => {
                        // SAFETY: `self` proves that the instructions exist.
                        unsafe { avx2($($arg),*) }
                    }
                    Kind::Portable => portable($($arg),*),
                }
            }
        }
    )*};
}

/// 1.5 * 2^23: adding it to a small number rounds that to a whole one, kept in the lowest bits.
const ROUND: f32 = 12_582_912.0;

vectorized! {
    /// Replace every x by e to the x. Relative error below 3e-7 between -87 and 88, where x is clamped.
    fn exp(x: &mut [f32]) {
        for x in x {
            let v = x.clamp(-87.0, 88.0);
            let n = (v * std::f32::consts::LOG2_E + ROUND) - ROUND;
            let r = (v - n * 0.693_359_4) - n * -2.121_944_4e-4; // ln 2 in two parts
            let mut p = 1.987_569_1e-4_f32;
            for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0] {
                p = p * r + c;
            }
            *x = p * f32::from_bits(((n as i32 + 127) as u32) << 23);
        }
    }

    /// Spread a row's range, zero included, over 0 to 255; returns the scale and the zero point.
    ///
    /// The scale of a row that is not finite is not finite.
    fn quantize(from: &[f32], to: &mut [u8]) -> (f32, i32) {
        let (mut low, mut high, mut check) = ([0f32; LANES], [0f32; LANES], [0f32; LANES]);
        for lanes in from.chunks(LANES) {
            for (l, &v) in lanes.iter().enumerate() {
                low[l] = if v < low[l] { v } else { low[l] };
                high[l] = if v > high[l] { v } else { high[l] };
                check[l] += v * 0.0; // NaN if any value is NaN or infinite
            }
        }
        let low = low.iter().copied().fold(0.0, f32::min);
        let range = high.iter().copied().fold(0.0, f32::max) - low;
        let scale = if range > 0.0 { range / 255.0 } else { 1.0 };
        let (inverse, zero) = (1.0 / scale, (-low / scale + 0.5).floor());
        for (t, &v) in to.iter_mut().zip(from) {
            *t = ((v * inverse + zero).clamp(0.0, 255.0) + ROUND).to_bits() as u8;
        }
        (scale + check.iter().sum::<f32>(), zero as i32)
    }

    /// Turn sums over bytes back into numbers: `(sum - zero * column sum) * scale * column scale`.
    fn dequantize(sums: &[i32], zero: i32, scale: f32, columns: &[i32], scales: &[f32], out: &mut [f32]) {
        for (((out, &sum), &column), &s) in out.iter_mut().zip(sums).zip(columns).zip(scales) {
            *out = (sum - zero * column) as f32 * (scale * s);
        }
    }
}

/// SAFETY: reads stay in bounds if `x` and `w` are as long as [`Isa::float`] demands; indexing checks it anyway.
unsafe fn float_portable<const M: usize, const W: usize>(
    k: usize,
    x: &[f32],
    ldx: usize,
    w: &[f32],
    ldw: usize,
    at: usize,
    out: &mut Block<f32>,
) {
    for m in 0..M {
        let mut acc = [0f32; LANES];
        for i in 0..k {
            let a = x[m * ldx + i];
            let row: &[f32; LANES] = w[i * ldw..i * ldw + LANES].try_into().expect("sixteen lanes");
            for l in 0..LANES {
                acc[l] = if cfg!(target_arch = "aarch64") { a.mul_add(row[l], acc[l]) } else { a * row[l] + acc[l] };
            }
        }
        out[m][at..at + LANES].copy_from_slice(&acc);
    }
}

/// SAFETY: nothing here is unsafe; the signature is that of its twins.
#[inline(always)]
unsafe fn int8_portable<const M: usize>(k: usize, x: &[u8], w: &[i8], out: &mut Block<i32>) {
    for m in 0..M {
        let mut acc = [0i32; PANEL];
        for (four, group) in x[m * k..(m + 1) * k].chunks_exact(4).zip(w.chunks_exact(4 * PANEL)) {
            for c in 0..PANEL {
                for j in 0..4 {
                    acc[c] += i32::from(four[j]) * i32::from(group[4 * c + j]);
                }
            }
        }
        out[m] = acc;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Block, LANES, PANEL};
    use std::arch::x86_64::*;

    /// SAFETY: needs AVX-512F, and `x`, `w` as long as [`super::Isa::float`] demands for M rows and W * 16 columns.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn float512<const M: usize, const W: usize>(
        k: usize,
        x: &[f32],
        ldx: usize,
        w: &[f32],
        ldw: usize,
        at: usize,
        out: &mut Block<f32>,
    ) {
        let mut acc = [[_mm512_setzero_ps(); W]; M];
        for i in 0..k {
            let mut row = [_mm512_setzero_ps(); W];
            for (v, r) in row.iter_mut().enumerate() {
                *r = _mm512_loadu_ps(w.as_ptr().add(i * ldw + v * LANES));
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                let a = _mm512_set1_ps(*x.get_unchecked(m * ldx + i));
                for v in 0..W {
                    acc[v] = _mm512_fmadd_ps(a, row[v], acc[v]);
                }
            }
        }
        for m in 0..M {
            for v in 0..W {
                let place = &mut out[m][at + v * LANES..at + (v + 1) * LANES];
                _mm512_storeu_ps(place.as_mut_ptr(), acc[m][v]);
            }
        }
    }

    /// SAFETY: needs AVX2 and FMA, and `x`, `w` as long as [`super::Isa::float`] demands for M rows and W * 8 columns.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn float256<const M: usize, const W: usize>(
        k: usize,
        x: &[f32],
        ldx: usize,
        w: &[f32],
        ldw: usize,
        at: usize,
        out: &mut Block<f32>,
    ) {
        let mut acc = [[_mm256_setzero_ps(); W]; M];
        for i in 0..k {
            let mut row = [_mm256_setzero_ps(); W];
            for (v, r) in row.iter_mut().enumerate() {
                *r = _mm256_loadu_ps(w.as_ptr().add(i * ldw + 8 * v));
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                let a = _mm256_set1_ps(*x.get_unchecked(m * ldx + i));
                for v in 0..W {
                    acc[v] = _mm256_fmadd_ps(a, row[v], acc[v]);
                }
            }
        }
        for m in 0..M {
            for v in 0..W {
                let place = &mut out[m][at + 8 * v..at + 8 * (v + 1)];
                _mm256_storeu_ps(place.as_mut_ptr(), acc[m][v]);
            }
        }
    }

    /// SAFETY: needs AVX-512 VNNI, `x` of M * k bytes and `w` of k * 64.
    #[target_feature(enable = "avx512f,avx512vnni")]
    pub unsafe fn int8_vnni<const M: usize>(k: usize, x: &[u8], w: &[i8], out: &mut Block<i32>) {
        const W: usize = PANEL / LANES;
        let mut acc = [[_mm512_setzero_si512(); W]; M];
        for i in (0..k).step_by(4) {
            let mut row = [_mm512_setzero_si512(); W];
            for (v, r) in row.iter_mut().enumerate() {
                *r = _mm512_loadu_si512(w.as_ptr().add(i * PANEL + v * 4 * LANES).cast());
            }
            for (m, acc) in acc.iter_mut().enumerate() {
                let four = x.as_ptr().add(m * k + i).cast::<i32>().read_unaligned();
                let a = _mm512_set1_epi32(four);
                for v in 0..W {
                    acc[v] = _mm512_dpbusd_epi32(acc[v], a, row[v]);
                }
            }
        }
        for m in 0..M {
            for v in 0..W {
                let place = &mut out[m][v * LANES..(v + 1) * LANES];
                _mm512_storeu_si512(place.as_mut_ptr().cast(), acc[m][v]);
            }
        }
    }

    /// SAFETY: needs AVX2, `x` of M * k bytes and `w` of k * 64.
    #[target_feature(enable = "avx2")]
    pub unsafe fn int8_avx2<const M: usize>(k: usize, x: &[u8], w: &[i8], out: &mut Block<i32>) {
        match M {
            1 => int8_columns::<M, 8>(k, x, w, out),
            2 => int8_columns::<M, 4>(k, x, w, out),
            _ => int8_columns::<M, 2>(k, x, w, out),
        }
    }

    /// W * 8 columns at a time. A product of a byte with a signed byte fits 16 bits and a sum of two does not, so the
    /// even and the odd bytes of x are multiplied apart.
    ///
    /// SAFETY: as [`int8_avx2`]; W divides 8.
    #[target_feature(enable = "avx2")]
    unsafe fn int8_columns<const M: usize, const W: usize>(k: usize, x: &[u8], w: &[i8], out: &mut Block<i32>) {
        let (even, ones) = (_mm256_set1_epi16(0xff), _mm256_set1_epi16(1));
        for at in (0..PANEL).step_by(8 * W) {
            let mut acc = [[_mm256_setzero_si256(); W]; M];
            for i in (0..k).step_by(4) {
                let mut row = [_mm256_setzero_si256(); W];
                for (v, r) in row.iter_mut().enumerate() {
                    *r = _mm256_loadu_si256(w.as_ptr().add(i * PANEL + 4 * (at + 8 * v)).cast());
                }
                for (m, acc) in acc.iter_mut().enumerate() {
                    let four = _mm256_set1_epi32(x.as_ptr().add(m * k + i).cast::<i32>().read_unaligned());
                    let (low, high) = (_mm256_and_si256(four, even), _mm256_andnot_si256(even, four));
                    for v in 0..W {
                        let a = _mm256_madd_epi16(_mm256_maddubs_epi16(low, row[v]), ones);
                        let b = _mm256_madd_epi16(_mm256_maddubs_epi16(high, row[v]), ones);
                        acc[v] = _mm256_add_epi32(acc[v], _mm256_add_epi32(a, b));
                    }
                }
            }
            for m in 0..M {
                for v in 0..W {
                    let place = &mut out[m][at + 8 * v..at + 8 * (v + 1)];
                    _mm256_storeu_si256(place.as_mut_ptr().cast(), acc[m][v]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(n).collect()
    }

    #[test]
    fn every_instruction_set_multiplies_like_the_definition_and_rows_do_not_matter() {
        let (k, ldx) = (37, 40);
        let (x, w) = (numbers(ROWS * ldx, 1), numbers(k * PANEL, 2));
        for isa in Isa::available() {
            for columns in [16, 32, 48, 64] {
                let mut six = [[0.0; PANEL]; ROWS];
                isa.float(ROWS, columns, k, &x, ldx, &w, PANEL, &mut six);
                for m in 0..ROWS {
                    let mut one = [[0.0; PANEL]; ROWS];
                    isa.float(1, columns, k, &x[m * ldx..], ldx, &w, PANEL, &mut one);
                    assert_eq!(one[0][..columns], six[m][..columns], "{isa:?}");
                    for c in 0..columns {
                        let want: f64 = (0..k).map(|i| f64::from(x[m * ldx + i]) * f64::from(w[i * PANEL + c])).sum();
                        assert!((f64::from(six[m][c]) - want).abs() < 1e-5, "{isa:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_gives_the_same_exact_integers() {
        let k = 52;
        let x: Vec<u8> = numbers(ROWS * k, 3).iter().map(|v| (v * 127.5 + 127.5) as u8).collect();
        let w: Vec<i8> = numbers(k * PANEL, 4).iter().map(|v| (v * 127.0) as i8).collect();
        for isa in Isa::available() {
            let mut out = [[0; PANEL]; ROWS];
            isa.int8(ROWS, k, &x, &w, &mut out);
            for (m, row) in out.iter().enumerate() {
                for (c, got) in row.iter().enumerate() {
                    let term = |i: usize| i32::from(x[m * k + i]) * i32::from(w[i / 4 * 4 * PANEL + 4 * c + i % 4]);
                    assert_eq!(*got, (0..k).map(term).sum::<i32>(), "{isa:?}");
                }
            }
        }
    }

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
}
