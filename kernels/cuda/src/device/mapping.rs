//! Device memory that other ranks map, by the driver's virtual memory calls.
//!
//! A ticket names the process, the device and the memory; whoever holds it asks `handles` for the
//! memory's file descriptor. Memory lives as long as anybody has it mapped.

use super::{
    context::{Context, call},
    handles, sys,
};
use kernels::KernelError;
use std::{
    ffi::{CString, c_char, c_int},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
    sync::Arc,
};

/// Long enough for `0000:00:00.0` in any of its spellings.
const BUS_ID_BYTES: usize = 32;
const BY_FILE: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType_enum::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// Addresses behind which there is memory, one's own or another rank's.
pub(super) struct Mapping {
    address: sys::CUdeviceptr,
    /// A multiple of the driver's granularity.
    bytes: usize,
    handle: sys::CUmemGenericAllocationHandle,
    mapped: bool,
    /// Of one's own memory.
    ticket: Option<handles::Ticket>,
    context: Arc<Context>,
}

impl Mapping {
    /// New memory of at least so many bytes, not zeroed; `None` where there are not as many.
    pub fn create(context: &Arc<Context>, bytes: usize) -> Result<Option<Self>, KernelError> {
        context.enter()?;
        let what = "making memory for an exchange";
        let (location, none) = (location(context), ptr::null_mut());
        let flags = sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        };
        let kind = sys::CUmemAllocationType_enum::CU_MEM_ALLOCATION_TYPE_PINNED;
        let wanted = sys::CUmemAllocationProp {
            type_: kind,
            requestedHandleTypes: BY_FILE,
            location,
            win32HandleMetaData: none,
            allocFlags: flags,
        };
        let mut piece = 0;
        let best = sys::CUmemAllocationGranularity_flags_enum::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
        call!(context, what, cuMemGetAllocationGranularity(&mut piece, &wanted, best))?;
        let bytes = bytes.max(1).next_multiple_of(piece.max(1));
        let mut handle = 0;
        // SAFETY: the context is current; the call writes a handle.
        let result = unsafe { sys::cuMemCreate(&mut handle, bytes, &wanted, 0) };
        if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Ok(None);
        }
        context.check(what, result)?;
        let mut mapping = Self::map(context, handle, bytes)?;
        let mut file: c_int = -1;
        let to = ptr::from_mut(&mut file).cast();
        call!(context, what, cuMemExportToShareableHandle(to, handle, BY_FILE, 0))?;
        // SAFETY: the driver has made the descriptor for this call alone.
        let file = unsafe { OwnedFd::from_raw_fd(file) };
        let about = handles::About { bytes: bytes as u64, bus_id: bus_id(context)? };
        mapping.ticket = Some(handles::offer(file, about).map_err(KernelError::Device)?);
        Ok(Some(mapping))
    }

    /// Another rank's memory.
    pub fn import(context: &Arc<Context>, ticket: &[u8]) -> Result<Self, KernelError> {
        context.enter()?;
        let what = "mapping another rank's memory";
        let (file, about) = handles::fetch(ticket).map_err(KernelError::Device)?;
        within_reach(context, &about.bus_id)?;
        let bytes = usize::try_from(about.bytes)
            .map_err(|_| KernelError::Device(format!("{what}: {} bytes", about.bytes)))?;
        let mut handle = 0;
        // The driver takes the descriptor itself for a pointer.
        let from = file.as_raw_fd() as usize as *mut _;
        call!(context, what, cuMemImportFromShareableHandle(&mut handle, from, BY_FILE))?;
        Self::map(context, handle, bytes)
    }

    fn map(
        context: &Arc<Context>,
        handle: sys::CUmemGenericAllocationHandle,
        bytes: usize,
    ) -> Result<Self, KernelError> {
        let what = "mapping memory for an exchange";
        // From here on dropped with whatever it has got so far.
        let mut mapping = Self {
            address: 0,
            bytes,
            handle,
            mapped: false,
            ticket: None,
            context: Arc::clone(context),
        };
        call!(context, what, cuMemAddressReserve(&mut mapping.address, bytes, 0, 0, 0))?;
        call!(context, what, cuMemMap(mapping.address, bytes, 0, handle, 0))?;
        mapping.mapped = true;
        let access = sys::CUmemAccessDesc {
            location: location(context),
            flags: sys::CUmemAccess_flags_enum::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        call!(context, what, cuMemSetAccess(mapping.address, bytes, &access, 1))?;
        Ok(mapping)
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn ticket(&self) -> Option<Vec<u8>> {
        self.ticket.as_ref().map(handles::Ticket::bytes)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Where the device hangs, the process's end gives all back.
        if self.context.settle().is_err() {
            return;
        }
        let Self { address, bytes, handle, mapped, .. } = *self;
        // A failure is kept by the context, and returned by its next use.
        let done = |result| drop(self.context.check("giving back memory of an exchange", result));
        // SAFETY: nobody else has the address, and the work that used it is done; each undoes a
        // call that was made.
        unsafe {
            if mapped {
                done(sys::cuMemUnmap(address, bytes));
            }
            if address != 0 {
                done(sys::cuMemAddressFree(address, bytes));
            }
            done(sys::cuMemRelease(handle));
        }
    }
}

fn location(context: &Context) -> sys::CUmemLocation {
    let type_ = sys::CUmemLocationType_enum::CU_MEM_LOCATION_TYPE_DEVICE;
    sys::CUmemLocation { type_, id: context.device() }
}

/// Where the device sits in this machine: what its processes may number otherwise.
fn bus_id(context: &Context) -> Result<String, KernelError> {
    let mut text: [c_char; BUS_ID_BYTES] = [0; BUS_ID_BYTES];
    let (to, len) = (text.as_mut_ptr(), BUS_ID_BYTES as c_int);
    call!(
        context,
        "asking for the device's place",
        cuDeviceGetPCIBusId(to, len, context.device())
    )?;
    let until = text.iter().take_while(|c| **c != 0);
    Ok(until.map(|c| char::from(c.unsigned_abs())).collect())
}

/// Whether this device can read and write the other's memory, as far as this process sees it.
fn within_reach(context: &Context, bus_id: &str) -> Result<(), KernelError> {
    let text = CString::new(bus_id).map_err(|error| KernelError::Device(error.to_string()))?;
    let mut other = 0;
    // SAFETY: reads a text that ends with a zero, and writes a number.
    let found = unsafe { sys::cuDeviceGetByPCIBusId(&mut other, text.as_ptr()) };
    if found != sys::CUresult::CUDA_SUCCESS || other == context.device() {
        return Ok(());
    }
    let (mut can, what) = (0, "asking whether devices reach each other");
    call!(context, what, cuDeviceCanAccessPeer(&mut can, context.device(), other))?;
    if can != 0 {
        return Ok(());
    }
    Err(KernelError::Device(format!(
        "device {} cannot reach the memory of the device at {bus_id}: there is neither NVLink nor \
         peer access over PCIe between them (nvidia-smi topo -p2p r shows it)",
        context.ordinal()
    )))
}
