//! Attention of a batch that is not what it was when it was cut: refused, before anything is read.

use crate::{
    flat::{refused, text},
    paged::Case,
};
use cuda::{Cuda, CudaKv, Driver, Ints};
use kernels::{BLOCK_TOKENS, Backend, Batch, KernelError, Tensor};
use std::mem::swap;

const STALE: &str = "written after it was cut, or never cut";

/// A device, a cache and rows: what a batch is tried with.
struct Trial<'a, D: Driver> {
    device: &'a Cuda<D>,
    case: &'a Case,
    kv: CudaKv<D>,
    qkv: Tensor<Cuda<D>>,
    out: Tensor<Cuda<D>>,
}

impl<D: Driver> Trial<'_, D> {
    fn attend(&mut self, batch: &Batch<Cuda<D>>) -> Result<(), KernelError> {
        let Case { heads, window, .. } = *self.case;
        self.device.attention(&mut self.out, &self.qkv, &self.kv, batch, heads, window)
    }

    /// Refused for this reason, and no row was written.
    fn refused(&mut self, what: &str, batch: &Batch<Cuda<D>>, why: &str) -> Result<(), String> {
        let mut rows = vec![f32::NAN; self.out.rows * self.out.cols];
        self.device.write_floats(&mut self.out.data, &rows).map_err(text)?;
        refused(what, self.attend(batch), why)?;
        self.device.read_floats(&mut rows, &self.out.data).map_err(text)?;
        match rows.iter().all(|v| v.is_nan()) {
            true => Ok(()),
            false => Err(format!("{what} was refused, and rows were written")),
        }
    }
}

/// Which of the arrays that kernels follow.
type Indices<D> = fn(&mut Batch<Cuda<D>>) -> &mut Ints<D>;

/// # Errors
/// Says which batch was not refused, or not for its reason; the device's own.
pub fn refusals<D: Driver>(device: &Cuda<D>, case: &Case) -> Result<(), String> {
    let blocks = case.layout().1;
    let mut trial = Trial {
        device,
        case,
        kv: device.kv(blocks, case.heads).map_err(text)?,
        qkv: Tensor::from_host(device, case.heads.qkv_cols(), &case.qkv()).map_err(text)?,
        out: Tensor::zeros(device, case.tokens(), case.heads.q * case.heads.dim).map_err(text)?,
    };
    trial.attend(&case.batch(device).map_err(text)?).map_err(text)?;
    rewritten(&mut trial)?;
    recounted(&mut trial)?;
    wrong(&mut trial)?;
    too_large(&mut trial)?;
    // The cache of another pool, one block short of the highest that is owned.
    let owned = case.layout().0.into_iter().flatten().max().unwrap_or(0);
    trial.kv = device.kv(owned as usize, case.heads).map_err(text)?;
    let batch = case.batch(device).map_err(text)?;
    trial.refused("a small cache", &batch, &format!("block {owned} of a cache of {owned}"))
}

/// Arrays written since the cut, with what they held or with anything, or put in another's place.
fn rewritten<D: Driver>(trial: &mut Trial<'_, D>) -> Result<(), String> {
    let arrays: [(&str, Indices<D>); 4] = [
        ("row_starts", |batch| &mut batch.row_starts),
        ("context_lens", |batch| &mut batch.context_lens),
        ("block_tables", |batch| &mut batch.block_tables),
        ("positions", |batch| &mut batch.positions),
    ];
    let device = trial.device;
    for (name, array) in arrays {
        let mut batch = trial.case.batch(device).map_err(text)?;
        let held = array(&mut batch).as_ref().to_vec();
        for values in [held.clone(), vec![i32::MAX; held.len()]] {
            device.write_ints(array(&mut batch), &values).map_err(text)?;
            trial.refused(name, &batch, STALE)?;
        }
        device.cut(&mut batch).expect_err("indices outside everything");
        trial.refused("a batch that could not be cut", &batch, STALE)?;
        device.write_ints(array(&mut batch), &held).map_err(text)?;
        device.cut(&mut batch).map_err(text)?;
        trial.attend(&batch).map_err(text)?;
        let mut other = trial.case.batch(device).map_err(text)?;
        swap(array(&mut batch), array(&mut other));
        trial.refused("another's array", &batch, STALE)?;
        *array(&mut batch) = device.ints(0).map_err(text)?;
        trial.refused("an array of nothing", &batch, STALE)?;
    }
    Ok(())
}

/// Other counts than at the cut, no cut, and the cut of another batch.
fn recounted<D: Driver>(trial: &mut Trial<'_, D>) -> Result<(), String> {
    let (device, case) = (trial.device, trial.case);
    let batch = || case.batch(device).map_err(text);
    let mut fewer = batch()?;
    fewer.sequences -= 1;
    trial.refused("fewer sequences", &fewer, STALE)?;
    let mut narrower = batch()?;
    narrower.block_table_cols -= 1;
    trial.refused("narrower tables", &narrower, STALE)?;
    let mut longer = batch()?;
    longer.tokens += 1;
    trial.refused("more tokens", &longer, "qkv is [")?;
    let mut uncut = batch()?;
    uncut.cuts = device.cuts(uncut.tokens, uncut.sequences).map_err(text)?;
    trial.refused("no cut", &uncut, STALE)?;
    let mut others = batch()?;
    swap(&mut uncut.cuts, &mut others.cuts);
    trial.refused("another's cut", &uncut, STALE)
}

/// Indices that no cut takes.
fn wrong<D: Driver>(trial: &mut Trial<'_, D>) -> Result<(), String> {
    let (device, case) = (trial.device, trial.case);
    let mut batch = case.batch(device).map_err(text)?;
    let room = batch.block_table_cols * BLOCK_TOKENS;
    let table = batch.block_tables.as_ref().to_vec();
    let lens = batch.context_lens.as_ref().to_vec();
    let mut negative = table.clone();
    negative[0] = -1;
    device.write_ints(&mut batch.block_tables, &negative).map_err(text)?;
    refused("a block", device.cut(&mut batch), "block -1 is outside")?;
    device.write_ints(&mut batch.block_tables, &table).map_err(text)?;
    for (len, why) in [(room as i32 + 1, "is outside 0.."), (0, "and a context of 0")] {
        let mut lens = lens.clone();
        lens[0] = len;
        device.write_ints(&mut batch.context_lens, &lens).map_err(text)?;
        refused("a context", device.cut(&mut batch), why)?;
        trial.refused("a wrong context", &batch, STALE)?;
    }
    Ok(())
}

/// Steps that the cuts were not made for.
fn too_large<D: Driver>(trial: &mut Trial<'_, D>) -> Result<(), String> {
    let (device, case) = (trial.device, trial.case);
    let (tokens, sequences) = (case.tokens(), case.sequences.len());
    for (tokens_max, sequences_max) in [(tokens - 1, sequences), (tokens, sequences - 1), (0, 0)] {
        let mut batch = case.batch(device).map_err(text)?;
        batch.cuts = device.cuts(tokens_max, sequences_max).map_err(text)?;
        let why = format!("room for {tokens_max} of {sequences_max}");
        refused("a step too large", device.cut(&mut batch), &why)?;
        trial.refused("a step that was not cut", &batch, STALE)?;
    }
    Ok(())
}
