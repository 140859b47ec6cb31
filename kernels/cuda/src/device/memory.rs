//! Device memory, and the pinned host memory through which bytes come and go.

use super::{
    context::{Context, call},
    event::Event,
    mapping::Mapping,
    sys,
};
use kernels::KernelError;
use std::{ffi::c_void, ptr, slice, sync::Arc};

/// Pinned bytes in one piece of a transfer: as many as a piece of a weight has.
const PIECE_BYTES: usize = 8 << 20;

/// Device memory, given back when dropped.
pub struct Memory {
    address: sys::CUdeviceptr,
    bytes: usize,
    /// Behind the address, where other ranks may have mapped the memory too.
    mapping: Option<Mapping>,
    context: Arc<Context>,
}

impl Memory {
    pub(super) fn zeroed(
        context: &Arc<Context>,
        what: &'static str,
        bytes: usize,
    ) -> Result<Self, KernelError> {
        context.enter_to("taking memory")?;
        let mut address = 0;
        // The driver has no empty allocations; addresses are multiples of 256 at least.
        // SAFETY: the context is current; the call writes an address.
        let mut allocate = || unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) };
        let mut result = allocate();
        if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY && context.give_back() {
            result = allocate();
        }
        if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(KernelError::Memory { what, bytes });
        }
        context.check("allocating memory", result)?;
        let memory = Self { address, bytes, mapping: None, context: Arc::clone(context) };
        memory.clear(bytes.max(1))?;
        Ok(memory)
    }

    fn clear(&self, bytes: usize) -> Result<(), KernelError> {
        let stream = self.context.stream();
        call!(self.context, "clearing memory", cuMemsetD8Async(self.address, 0, bytes, stream))
    }

    /// As [`Self::zeroed`], for others to map.
    pub(super) fn shared(
        context: &Arc<Context>,
        what: &'static str,
        bytes: usize,
    ) -> Result<Self, KernelError> {
        let mapping = Mapping::create(context, bytes)?;
        let mapping = mapping.ok_or(KernelError::Memory { what, bytes })?;
        let memory = Self::mapped(context, mapping);
        memory.clear(bytes)?;
        // Another rank may write as soon as it has the ticket.
        context.settle()?;
        Ok(memory)
    }

    pub(super) fn export(&self) -> Result<Vec<u8>, KernelError> {
        let ticket = self.mapping.as_ref().and_then(Mapping::ticket);
        ticket.ok_or_else(|| KernelError::Device("memory that is not shared".into()))
    }

    pub(super) fn import(context: &Arc<Context>, ticket: &[u8]) -> Result<Self, KernelError> {
        Ok(Self::mapped(context, Mapping::import(context, ticket)?))
    }

    fn mapped(context: &Arc<Context>, mapping: Mapping) -> Self {
        let (address, bytes) = (mapping.address(), mapping.bytes());
        Self { address, bytes, mapping: Some(mapping), context: Arc::clone(context) }
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// The address of `len` bytes from `offset` on.
    pub(super) fn at(&self, offset: usize, len: usize) -> Result<u64, KernelError> {
        if offset.checked_add(len).is_some_and(|end| end <= self.bytes) {
            return Ok(self.address + offset as u64);
        }
        let bytes = self.bytes;
        let text = format!("{len} bytes at {offset} of an allocation of {bytes}");
        Err(KernelError::Device(text))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.mapping.is_none() {
            self.context.retire(self.address, self.bytes);
        }
    }
}

/// Host memory that the device reads and writes by itself.
struct Pinned {
    start: *mut u8,
    bytes: usize,
    context: Arc<Context>,
}

// SAFETY: plain memory behind a pointer of its own.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<Self, KernelError> {
        context.enter_to("taking memory")?;
        let mut start: *mut c_void = ptr::null_mut();
        // Without flags: the host reads it too, which write-combined memory is slow at.
        let what = "allocating pinned host memory";
        call!(context, what, cuMemHostAlloc(&mut start, bytes, 0))?;
        let pinned = Self { start: start.cast(), bytes, context: Arc::clone(context) };
        // SAFETY: as many bytes were allocated; written before they are ever borrowed.
        unsafe { pinned.start.write_bytes(0, bytes) };
        Ok(pinned)
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: as many bytes, written when allocated; the device is done with those that the
        // caller touches.
        unsafe { slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.context.settle().is_ok() {
            // SAFETY: allocated by cuMemHostAlloc, and the work that used it is done.
            let result = unsafe { sys::cuMemFreeHost(self.start.cast()) };
            drop(self.context.check("freeing pinned memory", result));
        }
    }
}

/// Half of the way to the device.
struct Half {
    pinned: Pinned,
    /// Behind the last copy out of it.
    done: Event,
    in_use: bool,
}

/// Bytes on their way to the device. Two halves take turns: the host fills one while the device
/// reads the other.
pub(super) struct Uploads {
    halves: [Half; 2],
    at: usize,
    used: usize,
}

impl Uploads {
    pub fn new(context: &Arc<Context>) -> Result<Self, KernelError> {
        let half = || -> Result<Half, KernelError> {
            let (pinned, done) = (Pinned::new(context, PIECE_BYTES)?, Event::new(context)?);
            Ok(Half { pinned, done, in_use: false })
        };
        Ok(Self { halves: [half()?, half()?], at: 0, used: 0 })
    }

    /// Begins to copy; the bytes may change once it returns.
    pub fn send(
        &mut self,
        context: &Context,
        address: u64,
        bytes: &[u8],
    ) -> Result<(), KernelError> {
        let mut address = address;
        for piece in bytes.chunks(PIECE_BYTES) {
            self.send_piece(context, address, piece.len(), &mut |to| to.copy_from_slice(piece))?;
            address += piece.len() as u64;
        }
        Ok(())
    }

    /// As [`Self::send`], of bytes that are made where the device copies them from.
    pub fn send_filled(
        &mut self,
        context: &Context,
        address: u64,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), KernelError> {
        if bytes <= PIECE_BYTES {
            return self.send_piece(context, address, bytes, fill);
        }
        let mut made = vec![0; bytes];
        fill(&mut made);
        self.send(context, address, &made)
    }

    fn send_piece(
        &mut self,
        context: &Context,
        address: u64,
        bytes: usize,
        fill: &mut dyn FnMut(&mut [u8]),
    ) -> Result<(), KernelError> {
        if self.used + bytes > PIECE_BYTES {
            self.turn(context)?;
        }
        let place = &mut self.halves[self.at].pinned.bytes()[self.used..][..bytes];
        fill(place);
        let (from, stream) = (place.as_ptr().cast(), context.stream());
        let what = "a copy to the device";
        call!(context, what, cuMemcpyHtoDAsync_v2(address, from, bytes, stream))?;
        self.used += bytes.next_multiple_of(16);
        Ok(())
    }

    /// Goes on in the other half, once the device has read it.
    fn turn(&mut self, context: &Context) -> Result<(), KernelError> {
        let full = &mut self.halves[self.at];
        full.done.record(context)?;
        full.in_use = true;
        self.at = 1 - self.at;
        let next = &mut self.halves[self.at];
        if next.in_use {
            context.wait_awake(&next.done)?;
            next.in_use = false;
        }
        self.used = 0;
        Ok(())
    }
}

/// Bytes on their way from the device.
pub(super) struct Downloads {
    pinned: Pinned,
    done: Event,
}

impl Downloads {
    pub fn new(context: &Arc<Context>) -> Result<Self, KernelError> {
        Ok(Self { pinned: Pinned::new(context, PIECE_BYTES)?, done: Event::new(context)? })
    }

    /// Copies once all work before is done.
    pub fn fetch(
        &mut self,
        context: &Context,
        address: u64,
        to: &mut [u8],
    ) -> Result<(), KernelError> {
        let mut address = address;
        for piece in to.chunks_mut(PIECE_BYTES) {
            let (at, stream) = (self.pinned.start.cast(), context.stream());
            let what = "a copy from the device";
            call!(context, what, cuMemcpyDtoHAsync_v2(at, address, piece.len(), stream))?;
            self.done.record(context)?;
            context.wait(&self.done)?;
            piece.copy_from_slice(&self.pinned.bytes()[..piece.len()]);
            address += piece.len() as u64;
        }
        Ok(())
    }
}

/// Bytes on their way from the device, while it goes on.
pub struct Reading {
    pinned: Pinned,
    bytes: usize,
    done: Event,
}

/// Places for those that are not in use.
#[derive(Default)]
pub(super) struct Readings(Vec<(Pinned, Event)>);

impl Readings {
    pub fn begin(
        &mut self,
        context: &Arc<Context>,
        address: u64,
        bytes: usize,
    ) -> Result<Reading, KernelError> {
        let fits = self.0.iter().position(|(pinned, _)| pinned.bytes >= bytes);
        let (pinned, done) = match fits {
            Some(at) => self.0.swap_remove(at),
            None => (Pinned::new(context, bytes.next_power_of_two())?, Event::new(context)?),
        };
        let (at, stream) = (pinned.start.cast(), context.stream());
        let what = "a copy from the device";
        call!(context, what, cuMemcpyDtoHAsync_v2(at, address, bytes, stream))?;
        done.record(context)?;
        Ok(Reading { pinned, bytes, done })
    }

    /// Its place is free again.
    pub fn keep(&mut self, Reading { pinned, done, .. }: Reading) {
        self.0.push((pinned, done));
    }
}

impl Reading {
    pub(super) fn wait(&mut self, context: &Context) -> Result<Vec<u8>, KernelError> {
        context.wait(&self.done)?;
        Ok(self.pinned.bytes()[..self.bytes].to_vec())
    }
}
