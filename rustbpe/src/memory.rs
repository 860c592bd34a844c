//! Hints to the processor and the kernel about memory. None of them changes what a program computes.
#![allow(unsafe_code)]

/// Asks the kernel to back a large array with huge pages: random access to it then misses the TLB far less.
fn advise_huge<T>(array: &Vec<T>) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 1 << 12;
        let bytes = array.capacity() * size_of::<T>();
        // Whole pages: an array of its own mapping stays one mapping, which can grow without being copied.
        let start = array.as_ptr() as usize / PAGE * PAGE;
        let end = (array.as_ptr() as usize + bytes).next_multiple_of(PAGE);
        if bytes >= LARGE {
            // SAFETY: MADV_HUGEPAGE never changes contents, not even those of neighbours in the first and the last page.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = array;
}

/// Arrays of this many bytes are worth pages of their own.
const LARGE: usize = 1 << 20;

/// malloc maps what is larger than this by itself, whatever was freed before; what is not touched costs no memory.
const MAPPED: usize = 33 << 20;

/// Elements to ask for where `len` are needed.
fn room<T>(len: usize) -> usize {
    if len * size_of::<T>() >= LARGE {
        len.max(MAPPED / size_of::<T>())
    } else {
        len
    }
}

/// An empty array with room for `len` elements, in huge pages.
pub fn with_capacity<T>(len: usize) -> Vec<T> {
    let array = Vec::with_capacity(room::<T>(len));
    advise_huge(&array);
    array
}

/// `len` copies of a value, in huge pages.
pub fn filled<T: Copy>(value: T, len: usize) -> Vec<T> {
    let mut array = with_capacity(len);
    array.resize(len, value);
    array
}

/// Makes room for `more` elements; an array that has none left doubles, in huge pages.
#[inline]
pub fn reserve_huge<T>(array: &mut Vec<T>, more: usize) {
    if array.len() + more > array.capacity() {
        array.reserve(room::<T>(2 * array.len() + more) - array.len());
        advise_huge(array);
    }
}

/// Asks the processor to bring `array[index]` near.
#[inline]
pub fn prefetch<T>(array: &[T], index: usize) {
    if let Some(element) = array.get(index) {
        prefetch_at(element);
    }
}

/// Asks the processor to bring what is at an address near.
#[inline]
pub fn prefetch_at<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch reads nothing the program can see, and of a wrong address does nothing.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
