//! Memory that nobody uses any more and that was not given back yet.
//!
//! Giving memory back waits for all of a device, other ranks' kernels too where ranks share one.
//! Such a kernel may wait for this very rank. So nothing is given back while steps run, unless
//! there is much of it.

use super::{context::Context, sys};

/// So much is kept at most: what grows in steps doubles, and is far from this on cards that ranks
/// share.
const BYTES_MAX: usize = 1 << 30;

#[derive(Default)]
pub(super) struct Retired {
    addresses: Vec<sys::CUdeviceptr>,
    bytes: usize,
}

impl Retired {
    /// Whether there is so much that it should be given back now.
    pub fn put(&mut self, address: sys::CUdeviceptr, bytes: usize) -> bool {
        self.addresses.push(address);
        self.bytes += bytes;
        self.bytes > BYTES_MAX
    }

    /// Gives all back; whether there was any.
    pub fn give_back(&mut self, context: &Context) -> bool {
        let any = !self.addresses.is_empty();
        // Where the device hangs, the process's end gives it back.
        if any && context.settle().is_ok() {
            for address in self.addresses.drain(..) {
                // SAFETY: nobody has the address any more, and the work that used it is done.
                let result = unsafe { sys::cuMemFree_v2(address) };
                // A failure is kept by the context, and returned by its next use.
                drop(context.check("freeing memory", result));
            }
            self.bytes = 0;
        }
        any
    }
}
