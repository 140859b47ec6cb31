//! Steps for ops that work on rows one by one, and outputs that show what was written.

use kernels::{BLOCK_TOKENS, Backend, Batch, BatchRoom, Heads, KernelError, Tensor};

/// The indices of a step that has no sequences.
#[derive(Clone, Debug, Default)]
pub struct Indices {
    pub tokens: usize,
    pub ids: Vec<i32>,
    pub rope_rows: Vec<i32>,
    pub slots: Vec<i32>,
    pub logit_rows: Vec<i32>,
    pub q_scale: Option<Vec<f32>>,
}

impl Indices {
    /// # Errors
    /// The device's own.
    pub fn batch<B: Backend>(&self, device: &B) -> Result<Batch<B>, KernelError> {
        let ints = |values: &[i32]| -> Result<B::Ints, KernelError> {
            let mut to = device.ints(values.len())?;
            device.write_ints(&mut to, values)?;
            Ok(to)
        };
        let q_scale = self.q_scale.as_ref().map(|values| {
            let mut to = device.exact_floats(values.len())?;
            device.write_floats(&mut to, values)?;
            Ok::<_, KernelError>(to)
        });
        let end = |values: &[i32]| values.iter().max().map_or(0, |&most| most as usize + 1);
        let heads = Heads { q: 1, kv: 1, dim: 64 };
        let room = BatchRoom { tokens: 0, sequences: 0, tables: 0, context: 0, heads };
        Ok(Batch {
            tokens: self.tokens,
            logit_rows_len: self.logit_rows.len(),
            ids: ints(&self.ids)?,
            rope_rows: ints(&self.rope_rows)?,
            rope_rows_end: end(&self.rope_rows),
            slots: ints(&self.slots)?,
            blocks_end: end(&self.slots).div_ceil(BLOCK_TOKENS),
            logit_rows: ints(&self.logit_rows)?,
            q_scale: q_scale.transpose()?,
            ..Batch::new(device, room, None)?
        })
    }
}

/// A table [1, D] of a turn by nothing: rows are stored as they are.
///
/// # Errors
/// The device's own.
pub fn no_turn<B: Backend>(device: &B, dim: usize) -> Result<Tensor<B>, KernelError> {
    let half = dim / 2;
    let cos_sin: Vec<f32> = (0..dim).map(|i| if i < half { 1.0 } else { 0.0 }).collect();
    Tensor::exact_from_host(device, dim, &cos_sin)
}

/// Rows behind an output's own, which no op may write.
const GUARD: usize = 2;

/// `values` and two rows of NaN behind them.
///
/// # Errors
/// The device's own.
pub fn guarded<B: Backend>(
    device: &B,
    cols: usize,
    values: &[f32],
) -> Result<Tensor<B>, KernelError> {
    let mut all = values.to_vec();
    all.extend(vec![f32::NAN; GUARD * cols]);
    let mut tensor = Tensor::from_host(device, cols, &all)?;
    tensor.rows -= GUARD;
    Ok(tensor)
}

/// Rows of NaN, so that elements which an op leaves out show.
///
/// # Errors
/// The device's own.
pub fn unwritten<B: Backend>(
    device: &B,
    rows: usize,
    cols: usize,
) -> Result<Tensor<B>, KernelError> {
    guarded(device, cols, &vec![f32::NAN; rows * cols])
}

/// The rows of a tensor of [`guarded`] or [`unwritten`].
///
/// # Errors
/// Says where something was written behind them; the device's own.
pub fn written<B: Backend>(device: &B, tensor: &Tensor<B>) -> Result<Vec<f32>, String> {
    let mut all = vec![0.0; (tensor.rows + GUARD) * tensor.cols];
    device.read_floats(&mut all, &tensor.data).map_err(text)?;
    let guard = all.split_off(tensor.rows * tensor.cols);
    match guard.iter().position(|v| !v.is_nan()) {
        Some(at) => Err(format!("element {at} behind {} rows was written", tensor.rows)),
        None => Ok(all),
    }
}

/// A device's error as a check tells it.
pub fn text(error: KernelError) -> String {
    error.to_string()
}

/// `Ok` where an op was refused with `reason` in its message.
///
/// # Errors
/// Says what happened instead.
pub fn refused(what: &str, result: Result<(), KernelError>, reason: &str) -> Result<(), String> {
    match result {
        Ok(()) => Err(format!("{what} was not refused")),
        Err(error) if error.to_string().contains(reason) => Ok(()),
        Err(error) => Err(format!("{what} was refused with: {error}; wanted: {reason}")),
    }
}
