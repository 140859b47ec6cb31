//! Host memory as kernels want it: on cache lines, and cut up between threads.

use crate::{KernelError, host};
use std::{
    marker::PhantomData,
    ops::{Deref, DerefMut, Range},
};

const LINE_BYTES: usize = 64;

/// Zeroed elements of which the first lies at the start of a cache line. Pages that were never
/// written take no memory.
pub struct Aligned<T> {
    data: Vec<T>,
    range: Range<usize>,
}

impl<T: Copy + Default> Aligned<T> {
    pub(crate) fn zeroed(what: &'static str, len: usize) -> Result<Self, KernelError> {
        let data: Vec<T> = host::zeroed(what, len.saturating_add(LINE_BYTES / size_of::<T>()))?;
        let start = data.as_ptr().align_offset(LINE_BYTES).min(data.len() - len);
        Ok(Self { data, range: start..start + len })
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];
    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.data[self.range.clone()]
    }
}

impl<T> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.range.clone()]
    }
}

impl<T> AsRef<[T]> for Aligned<T> {
    fn as_ref(&self) -> &[T] {
        self
    }
}

/// A slice that threads write disjoint parts of.
pub(crate) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: a part is handed out as a `&mut [T]` to one thread only, which is what `T: Send` allows.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// The elements in `range`, which must lie within the slice.
    ///
    /// # Safety
    /// No two parts that are alive at the same time overlap.
    #[allow(clippy::mut_from_ref)] // Handing out disjoint parts of one borrow is the purpose.
    #[inline(always)]
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        // SAFETY: within the borrowed slice by the check above, and unaliased by the caller's
        // promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_start_on_a_cache_line() {
        for len in [0, 1, 1000] {
            let mut floats = Aligned::<f32>::zeroed("a test", len).unwrap();
            let halves = Aligned::<u16>::zeroed("a test", len).unwrap();
            assert_eq!((floats.len(), halves.len()), (len, len));
            assert!(floats.as_ptr().cast::<u8>().align_offset(64) == 0);
            assert!(halves.as_ptr().cast::<u8>().align_offset(64) == 0);
            floats.fill(1.0);
        }
    }

    #[test]
    fn too_much_is_an_error() {
        let refused = Aligned::<f32>::zeroed("a test", usize::MAX / 8).map(|_| ());
        assert!(matches!(refused, Err(KernelError::Memory { what: "a test", .. })));
    }
}
