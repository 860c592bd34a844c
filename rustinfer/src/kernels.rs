//! The inner loops: a few rows times one panel of 64 columns, for each instruction set.
//!
//! A panel stores, for each `k`, what its 64 columns need side by side. Every output is one chain of additions over
//! `k`, so it does not depend on how many rows are computed together.
#![allow(unsafe_code, clippy::too_many_arguments)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Columns of a panel.
pub const PANEL: usize = 64;
/// Lanes that belong together: a register of AVX-512.
pub const LANES: usize = 16;
/// Rows that are computed together at most: 6 x 4 accumulators fill the registers of AVX-512.
pub const ROWS: usize = 6;

/// Up to so many rows take more columns at once, or their additions wait for each other.
pub const FEW_ROWS: usize = 3;

/// From so many rows of bytes on, all multiply the same weights in 16 bits, where that is the fastest way.
#[cfg(target_arch = "x86_64")]
const WIDE_ROWS: usize = 3;

/// Results of a block: up to [`ROWS`] rows of [`PANEL`] columns.
pub type Block<T> = [[T; PANEL]; ROWS];

/// A number of a panel: float32, or a byte that a scale belongs to.
pub trait Element: Copy + Default {
    /// Its value, without the scale.
    fn number(self) -> f32;
    /// Store a row; returns its scale.
    fn store(isa: Isa, from: &[f32], to: &mut [Self]) -> f32;
    /// Read 16 numbers.
    ///
    /// # Safety
    /// Needs AVX-512F and 16 elements at `at`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load512(at: *const Self) -> __m512;
    /// Read 8 numbers.
    ///
    /// # Safety
    /// Needs AVX2 and 8 elements at `at`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load256(at: *const Self) -> __m256;
}

impl Element for f32 {
    fn number(self) -> f32 {
        self
    }

    fn store(_: Isa, from: &[f32], to: &mut [Self]) -> f32 {
        to.copy_from_slice(from);
        1.0
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load512(at: *const Self) -> __m512 {
        _mm512_loadu_ps(at)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load256(at: *const Self) -> __m256 {
        _mm256_loadu_ps(at)
    }
}

impl Element for i8 {
    fn number(self) -> f32 {
        f32::from(self)
    }

    fn store(isa: Isa, from: &[f32], to: &mut [Self]) -> f32 {
        isa.quantize_signed(from, to)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load512(at: *const Self) -> __m512 {
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast())))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn load256(at: *const Self) -> __m256 {
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast())))
    }
}

/// The bytes of numbers, which are to be fetched.
pub fn bytes_of<T: Element>(numbers: &[T]) -> &[u8] {
    // SAFETY: an element is a float32 or a byte, all of whose bytes have a value, and bytes need no alignment.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// An instruction set. Only [`Isa::available`] hands them out, so holding one proves that the machine has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(pub(crate) Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
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
                let avx512 = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
                let avx512 = avx2 && avx512 && is_x86_feature_detected!("avx512vl");
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

    /// Columns that a matrix keeps side by side: as many as a block of rows takes at once, so that these stay in the
    /// nearest cache while all rows pass.
    pub fn strip(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Vnni | Kind::Avx512 => PANEL,
            _ => LANES,
        }
    }

    /// `out[m][c] += sum over i < k of x[m * ldx + i] * w[c / 16 * ldg + i * ldw + c % 16]` for `m < rows`, `c < columns`.
    ///
    /// `columns` is a multiple of [`LANES`], at most [`PANEL`]; `rows` is 1 to [`ROWS`]. `ahead`: what comes next, to be
    /// fetched from memory meanwhile.
    #[inline]
    pub fn float<T: Element>(
        self,
        rows: usize,
        columns: usize,
        k: usize,
        x: &[f32],
        ldx: usize,
        w: &[T],
        (ldw, ldg): (usize, usize),
        out: &mut Block<f32>,
        ahead: &[u8],
    ) {
        assert!((1..=ROWS).contains(&rows) && (LANES..=PANEL).contains(&columns) && columns.is_multiple_of(LANES));
        assert!(k > 0 && x.len() >= (rows - 1) * ldx + k);
        assert!(w.len() >= (columns / LANES - 1) * ldg + (k - 1) * ldw + LANES);
        macro_rules! by_rows {
            ($($f:ident)::+, $w:expr, $at:expr) => {
                // SAFETY: the asserts above bound every read, and `self` proves that the instructions exist.
                unsafe {
                    match rows {
                        1 => $($f)::+::<T, 1, $w>(k, x, ldx, &w[$at / LANES * ldg..], (ldw, ldg), $at, out, ahead),
                        2 => $($f)::+::<T, 2, $w>(k, x, ldx, &w[$at / LANES * ldg..], (ldw, ldg), $at, out, ahead),
                        3 => $($f)::+::<T, 3, $w>(k, x, ldx, &w[$at / LANES * ldg..], (ldw, ldg), $at, out, ahead),
                        4 => $($f)::+::<T, 4, $w>(k, x, ldx, &w[$at / LANES * ldg..], (ldw, ldg), $at, out, ahead),
                        5 => $($f)::+::<T, 5, $w>(k, x, ldx, &w[$at / LANES * ldg..], (ldw, ldg), $at, out, ahead),
                        _ => $($f)::+::<T, 6, $w>(k, x, ldx, &w[$at / LANES * ldg..], (ldw, ldg), $at, out, ahead),
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
                (1, 64) => by_rows!(x86::float256, 8, 0),
                (..=FEW_ROWS, 32 | 64) => (0..columns).step_by(32).for_each(|at| by_rows!(x86::float256, 4, at)),
                _ => (0..columns).step_by(LANES).for_each(|at| by_rows!(x86::float256, 2, at)),
            },
            Kind::Portable => (0..columns).step_by(LANES).for_each(|at| by_rows!(float_portable, 1, at)),
        }
    }

    /// Columns of bytes side by side, the fours of `k` of each: what a block of rows takes at once.
    pub fn byte_strip(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Vnni => PANEL,
            _ => LANES,
        }
    }

    /// Whether so many rows of bytes are wanted in 16 bits too.
    pub fn widens(self, rows: usize) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 | Kind::Avx2 => rows >= WIDE_ROWS,
            _ => false,
        }
    }

    /// `out[m][c] = sum over i < k of x[m * k + i] * w[c / s][i / 4][c % s][i % 4]` with s = [`Isa::byte_strip`].
    ///
    /// `k` is a multiple of 4, `w` is k * 64 bytes; `wide` is `x` in 16 bits if [`Isa::widens`] says so.
    /// `ahead`: as in [`Isa::float`].
    #[inline]
    pub fn int8(self, rows: usize, k: usize, x: &[u8], wide: &[i16], w: &[i8], out: &mut Block<i32>, ahead: &[u8]) {
        assert!((1..=ROWS).contains(&rows) && k > 0 && k.is_multiple_of(4));
        assert!(x.len() >= rows * k && w.len() >= k * PANEL && (wide.len() >= rows * k || !self.widens(rows)));
        macro_rules! by_rows {
            ($($f:ident)::+, $x:expr) => {
                // SAFETY: the asserts above bound every read, and `self` proves that the instructions exist.
                unsafe {
                    match rows {
                        1 => $($f)::+::<1>(k, $x, w, out, ahead),
                        2 => $($f)::+::<2>(k, $x, w, out, ahead),
                        3 => $($f)::+::<3>(k, $x, w, out, ahead),
                        4 => $($f)::+::<4>(k, $x, w, out, ahead),
                        5 => $($f)::+::<5>(k, $x, w, out, ahead),
                        _ => $($f)::+::<6>(k, $x, w, out, ahead),
                    }
                }
            };
        }
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Vnni => by_rows!(x86::int8_vnni, x),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 | Kind::Avx2 => by_rows!(x86::int8_avx2, (x, wide)),
            Kind::Portable => by_rows!(int8_portable, x),
        }
    }
}

/// SAFETY: reads stay in bounds if `x` and `w` are as long as [`Isa::float`] demands; indexing checks it anyway.
unsafe fn float_portable<T: Element, const M: usize, const W: usize>(
    k: usize,
    x: &[f32],
    ldx: usize,
    w: &[T],
    (ldw, _): (usize, usize),
    at: usize,
    out: &mut Block<f32>,
    _ahead: &[u8],
) {
    for m in 0..M {
        let mut acc: [f32; LANES] = out[m][at..at + LANES].try_into().expect("sixteen lanes");
        for i in 0..k {
            let a = x[m * ldx + i];
            let row: &[T; LANES] = w[i * ldw..i * ldw + LANES].try_into().expect("sixteen lanes");
            for l in 0..LANES {
                let w = row[l].number();
                acc[l] = if cfg!(target_arch = "aarch64") { a.mul_add(w, acc[l]) } else { a * w + acc[l] };
            }
        }
        out[m][at..at + LANES].copy_from_slice(&acc);
    }
}

/// SAFETY: nothing here is unsafe; the signature is that of its twins.
#[inline(always)]
unsafe fn int8_portable<const M: usize>(k: usize, x: &[u8], w: &[i8], out: &mut Block<i32>, _ahead: &[u8]) {
    for m in 0..M {
        for (acc, w) in out[m].chunks_exact_mut(LANES).zip(w.chunks_exact(LANES * k)) {
            acc.fill(0);
            for (four, group) in x[m * k..(m + 1) * k].chunks_exact(4).zip(w.chunks_exact(4 * LANES)) {
                for c in 0..LANES {
                    for j in 0..4 {
                        acc[c] += i32::from(four[j]) * i32::from(group[4 * c + j]);
                    }
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Block, Element, LANES, PANEL, WIDE_ROWS};
    use std::arch::x86_64::*;

    /// Ask for the i-th `step` bytes. May end beyond `ahead`: asking never faults.
    #[inline(always)]
    fn fetch(ahead: &[u8], i: usize, step: usize) {
        let at = ahead.as_ptr().cast::<i8>().wrapping_add(i * step);
        for line in (0..step).step_by(64) {
            // SAFETY: SSE belongs to x86-64, and a prefetch reads nothing that a program could notice.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(line)) };
        }
    }

    /// SAFETY: needs AVX-512F, and `x`, `w` as long as [`super::Isa::float`] demands for M rows and W * 16 columns.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn float512<T: Element, const M: usize, const W: usize>(
        k: usize,
        x: &[f32],
        ldx: usize,
        w: &[T],
        (ldw, ldg): (usize, usize),
        at: usize,
        out: &mut Block<f32>,
        ahead: &[u8],
    ) {
        let mut acc = [[_mm512_setzero_ps(); W]; M];
        for m in 0..M {
            for v in 0..W {
                acc[m][v] = _mm512_loadu_ps(out[m][at + v * LANES..at + (v + 1) * LANES].as_ptr());
            }
        }
        let step = ahead.len().div_ceil(k);
        for i in 0..k {
            fetch(ahead, i, step);
            let mut row = [_mm512_setzero_ps(); W];
            for (v, r) in row.iter_mut().enumerate() {
                *r = T::load512(w.as_ptr().add(v * ldg + i * ldw));
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
    pub unsafe fn float256<T: Element, const M: usize, const W: usize>(
        k: usize,
        x: &[f32],
        ldx: usize,
        w: &[T],
        (ldw, ldg): (usize, usize),
        at: usize,
        out: &mut Block<f32>,
        ahead: &[u8],
    ) {
        let mut acc = [[_mm256_setzero_ps(); W]; M];
        for m in 0..M {
            for v in 0..W {
                acc[m][v] = _mm256_loadu_ps(out[m][at + 8 * v..at + 8 * (v + 1)].as_ptr());
            }
        }
        let step = ahead.len().div_ceil(k);
        for i in 0..k {
            fetch(ahead, i, step);
            let mut row = [_mm256_setzero_ps(); W];
            for (v, r) in row.iter_mut().enumerate() {
                *r = T::load256(w.as_ptr().add(v / 2 * ldg + i * ldw + v % 2 * 8));
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
    pub unsafe fn int8_vnni<const M: usize>(k: usize, x: &[u8], w: &[i8], out: &mut Block<i32>, ahead: &[u8]) {
        const W: usize = PANEL / LANES;
        let mut acc = [[_mm512_setzero_si512(); W]; M];
        let step = ahead.len().div_ceil(k / 4);
        for i in (0..k).step_by(4) {
            fetch(ahead, i / 4, step);
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

    /// SAFETY: needs AVX2, `x` of M * k bytes, from [`WIDE_ROWS`] on `wide` of as many numbers, and `w` of k * 64 bytes.
    #[target_feature(enable = "avx2")]
    pub unsafe fn int8_avx2<const M: usize>(
        k: usize,
        (x, wide): (&[u8], &[i16]),
        w: &[i8],
        out: &mut Block<i32>,
        ahead: &[u8],
    ) {
        match M {
            WIDE_ROWS.. => int8_rows::<M>(k, wide, w, out, ahead),
            1 => int8_columns::<M, 8>(k, x, w, out),
            _ => int8_columns::<M, 4>(k, x, w, out),
        }
    }

    /// 8 columns at a time, all in 16 bits: half the multiplications of [`int8_columns`], where rows share the widening.
    ///
    /// SAFETY: as [`int8_avx2`].
    #[target_feature(enable = "avx2")]
    unsafe fn int8_rows<const M: usize>(k: usize, x: &[i16], w: &[i8], out: &mut Block<i32>, ahead: &[u8]) {
        let step = ahead.len().div_ceil(k / 4 * (PANEL / 8));
        for at in (0..PANEL).step_by(8) {
            let mut acc = [[_mm256_setzero_si256(); 2]; M];
            let strip = w.as_ptr().add(at / LANES * LANES * k + at % LANES * 4);
            for i in (0..k).step_by(4) {
                fetch(ahead, (at / 8 * k + i) / 4, step);
                let mut row = [_mm256_setzero_si256(); 2];
                for (v, r) in row.iter_mut().enumerate() {
                    *r = _mm256_cvtepi8_epi16(_mm_loadu_si128(strip.add(i * LANES + 16 * v).cast()));
                }
                for (m, acc) in acc.iter_mut().enumerate() {
                    let four = x.as_ptr().add(m * k + i).cast::<i64>().read_unaligned();
                    let a = _mm256_set1_epi64x(four);
                    for v in 0..2 {
                        acc[v] = _mm256_add_epi32(acc[v], _mm256_madd_epi16(a, row[v]));
                    }
                }
            }
            for m in 0..M {
                // Two sums a column, columns 0 1 | 2 3 and 4 5 | 6 7: added, 0 1 4 5 | 2 3 6 7.
                let sums = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(acc[m][0], acc[m][1]));
                _mm256_storeu_si256(out[m][at..at + 8].as_mut_ptr().cast(), sums);
            }
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
                    let c = at + 8 * v;
                    let place = w.as_ptr().add(c / LANES * LANES * k + i * LANES + c % LANES * 4);
                    *r = _mm256_loadu_si256(place.cast());
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
                isa.float(ROWS, columns, k, &x, ldx, &w, (PANEL, LANES), &mut six, &[]);
                for m in 0..ROWS {
                    let mut one = [[0.0; PANEL]; ROWS];
                    isa.float(1, columns, k, &x[m * ldx..], ldx, &w, (PANEL, LANES), &mut one, bytes_of(&w));
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
        let wide: Vec<i16> = x.iter().map(|&v| v.into()).collect();
        for isa in Isa::available() {
            let s = isa.byte_strip();
            for rows in 1..=ROWS {
                let mut out = [[0; PANEL]; ROWS];
                isa.int8(rows, k, &x, &wide, &w, &mut out, bytes_of(&w));
                for (m, row) in out[..rows].iter().enumerate() {
                    for (c, got) in row.iter().enumerate() {
                        let weight = |i: usize| w[c / s * s * k + i / 4 * 4 * s + c % s * 4 + i % 4];
                        let term = |i: usize| i32::from(x[m * k + i]) * i32::from(weight(i));
                        assert_eq!(*got, (0..k).map(term).sum::<i32>(), "{isa:?}");
                    }
                }
            }
        }
    }
}
