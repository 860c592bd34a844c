//! Hints to the processor and the kernel about memory. None of them changes what a program computes.
#![allow(unsafe_code)]

/// Asks the kernel to back a large array with huge pages: random access to it then misses the TLB far less.
pub fn advise_huge<T>(array: &Vec<T>) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 1 << 21;
        let start = (array.as_ptr() as usize).next_multiple_of(PAGE);
        let end = (array.as_ptr() as usize + array.capacity() * size_of::<T>()) / PAGE * PAGE;
        if start < end {
            // SAFETY: the range lies within one allocation of this vector, and MADV_HUGEPAGE never changes contents.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = array;
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
