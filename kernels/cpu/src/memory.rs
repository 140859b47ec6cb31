//! Host memory as kernels want it: on cache lines, and cut up between threads.

use kernels::KernelError;
use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    marker::PhantomData,
    ops::{Deref, DerefMut, Range},
    ptr::NonNull,
};

const LINE_BYTES: usize = 64;
/// From here on memory comes from the system, not from the allocator: that one may hand out what
/// was used before, and would have to zero it, touching every page.
const MAP_BYTES: usize = 1 << 20;

/// Numbers of which any bytes, zeros too, are a value.
pub(crate) trait Number: Copy + Send + Sync + 'static {}
impl Number for u8 {}
impl Number for u16 {}
impl Number for f32 {}

/// Zeroed numbers of which the first lies at the start of a cache line. Pages of a large array that
/// were never written take no memory.
pub struct Aligned<T> {
    start: NonNull<T>,
    len: usize,
    mapped: bool,
}

// SAFETY: it owns plain numbers, and hands them out as a slice would.
unsafe impl<T: Number> Send for Aligned<T> {}
// SAFETY: as above.
unsafe impl<T: Number> Sync for Aligned<T> {}

#[allow(private_bounds)] // What can be in it is for this crate to say.
impl<T: Number> Aligned<T> {
    pub(crate) fn zeroed(what: &'static str, len: usize) -> Result<Self, KernelError> {
        let bytes = len.saturating_mul(size_of::<T>());
        let refused = || KernelError::Memory { what, bytes };
        let layout = Layout::from_size_align(bytes, LINE_BYTES).map_err(|_| refused())?;
        if let Some(start) = (bytes >= MAP_BYTES).then(|| map(bytes)).flatten() {
            return Ok(Self { start: start.cast(), len, mapped: true });
        }
        if bytes == 0 {
            return Ok(Self { start: empty(), len, mapped: false });
        }
        // SAFETY: the layout is not empty.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        Ok(Self { start: start.cast(), len, mapped: false })
    }

    /// Asks for large pages, where the system has them to give: for what is read from end to end.
    pub(crate) fn in_large_pages(self) -> Self {
        #[cfg(target_os = "linux")]
        if self.mapped {
            let (start, bytes) = (self.start.as_ptr().cast(), self.len * size_of::<T>());
            // SAFETY: the range is this mapping. Refused, nothing changes.
            unsafe { libc::madvise(start, bytes, libc::MADV_HUGEPAGE) };
        }
        self
    }
}

/// Where nothing lies, on a cache line.
fn empty<T>() -> NonNull<T> {
    NonNull::without_provenance(const { std::num::NonZero::new(LINE_BYTES).unwrap() })
}

/// Fresh zero pages; `None` where the system refuses or knows no such thing.
fn map(bytes: usize) -> Option<NonNull<u8>> {
    #[cfg(unix)]
    {
        let (read_write, kind) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping of nothing overlaps no other.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, read_write, kind, -1, 0) };
        if start == libc::MAP_FAILED { None } else { NonNull::new(start.cast()) }
    }
    #[cfg(not(unix))]
    {
        let _ = bytes;
        None
    }
}

impl<T> Drop for Aligned<T> {
    fn drop(&mut self) {
        let bytes = self.len * size_of::<T>();
        if self.mapped {
            #[cfg(unix)]
            // SAFETY: `map` gave exactly this, and nobody else has it.
            unsafe {
                libc::munmap(self.start.as_ptr().cast(), bytes);
            }
        } else if let (1.., Ok(layout)) = (bytes, Layout::from_size_align(bytes, LINE_BYTES)) {
            // SAFETY: allocated in `zeroed` with this layout.
            unsafe { dealloc(self.start.as_ptr().cast(), layout) };
        }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];
    #[inline(always)]
    fn deref(&self) -> &[T] {
        // SAFETY: `len` numbers lie there, initialised as zeros; the slice borrows `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Aligned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T> AsRef<[T]> for Aligned<T> {
    fn as_ref(&self) -> &[T] {
        self
    }
}

impl<T> AsMut<[T]> for Aligned<T> {
    fn as_mut(&mut self) -> &mut [T] {
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
    #[cfg(target_os = "linux")]
    fn untouched_pages_take_no_memory() {
        let resident = || -> usize {
            let status = std::fs::read_to_string("/proc/self/statm").unwrap();
            status.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let before = resident();
        // Another thread's allocator has no fresh memory of its own to hand out; sixty layers of 24
        // MiB.
        let arrays = std::thread::spawn(|| {
            let layer = |_| Aligned::<u16>::zeroed("a test", 12 << 20).unwrap();
            (0..60).map(layer).collect::<Vec<_>>()
        });
        let mut arrays = arrays.join().unwrap();
        assert!(resident() < before + (256 << 20), "{} of {before}", resident());
        arrays[59][(12 << 20) - 1] = 1;
        assert_eq!((arrays[59][0], arrays[59][(12 << 20) - 1]), (0, 1));
    }

    #[test]
    fn too_much_is_an_error() {
        let refused = Aligned::<f32>::zeroed("a test", usize::MAX / 8).map(|_| ());
        assert!(matches!(refused, Err(KernelError::Memory { what: "a test", .. })));
    }
}
