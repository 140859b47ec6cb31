//! Kernels that keep a row in the registers of a warp or a block, one for each range of lengths.

use super::{Cuda, Driver, Launch};
use kernels::{KernelError, shape::ensure};

/// One of a kernel's instances.
pub(super) struct ByRow {
    pub kernel: &'static str,
    /// The longest row it can hold.
    pub cols_max: usize,
    pub threads: u32,
}

impl<D: Driver> Cuda<D> {
    /// Runs the first of `instances`, ascending by length, that holds rows of `cols` elements. They
    /// wait for the launches before.
    pub(super) fn launch_rows<A: Copy>(
        &self,
        op: &'static str,
        instances: &[ByRow],
        (rows, cols): (usize, usize),
        args: &A,
    ) -> Result<(), KernelError> {
        let longest = instances.last().map_or(0, |instance| instance.cols_max);
        let Some(instance) = instances.iter().find(|instance| cols <= instance.cols_max) else {
            ensure(op, false, || format!("rows of {cols} elements, {longest} at most"))?;
            return Ok(());
        };
        // Four warps a block have a row each; larger blocks share one.
        let warps = instance.threads / 32;
        let (rows_each, shared) = if warps == 4 { (4, 0) } else { (1, warps * 4) };
        let blocks = rows.div_ceil(rows_each);
        ensure(op, blocks <= i32::MAX as usize, || format!("{rows} rows, {} at most", i32::MAX))?;
        if blocks == 0 {
            return Ok(());
        }
        let grid = [blocks as u32, 1, 1];
        let launch = Launch::new(instance.kernel, grid, instance.threads, args);
        self.launch_dependent(launch.shared(shared))
    }
}
