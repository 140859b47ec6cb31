//! Device tensors exchanged through host memory: for backends without a link of their own.
//!
//! Where activations are host floats already, nothing is copied on the way.

use super::{Collective, CollectiveError, HostCollective};
use kernels::{Backend, KernelError, ShapeError, Tensor};

/// Any backend's data plane over any host exchange.
pub struct Staged<H> {
    host: H,
    mine: Vec<f32>,
    all: Vec<f32>,
}

impl<H: HostCollective> Staged<H> {
    pub fn new(host: H) -> Self {
        Self { host, mine: Vec::new(), all: Vec::new() }
    }

    /// Copies x into `mine`.
    fn fetch<B: Backend>(&mut self, device: &B, x: &Tensor<B>) -> Result<(), KernelError> {
        self.mine.resize(x.rows * x.cols, 0.0);
        device.read_floats(&mut self.mine, &x.data)
    }
}

impl<B: Backend, H: HostCollective> Collective<B> for Staged<H> {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn world_size(&self) -> usize {
        self.host.world_size()
    }

    fn share(&mut self, device: &B, x: &mut Tensor<B>) -> Result<(), CollectiveError> {
        if self.host.world_size() == 1 {
            return Ok(());
        }
        self.fetch(device, x)?;
        let mine: Vec<u8> = self.mine.iter().flat_map(|v| v.to_le_bytes()).collect();
        let all = self.host.all_gather_bytes(&mine)?;
        let first = all.first().map_or(&[][..], |bytes| bytes.as_chunks::<4>().0);
        self.mine.clear();
        self.mine.extend(first.iter().map(|v| f32::from_le_bytes(*v)));
        Ok(device.write_floats(&mut x.data, &self.mine)?)
    }

    fn is_captured(&self, _elements: usize) -> bool {
        // One rank exchanges nothing.
        self.host.world_size() == 1
    }

    fn all_reduce_sum(&mut self, device: &B, x: &mut Tensor<B>) -> Result<(), CollectiveError> {
        if self.host.world_size() == 1 {
            return Ok(());
        }
        let len = x.rows * x.cols;
        if let Some(values) = device.host_floats(&mut x.data) {
            let values = values.get_mut(..len).ok_or_else(|| misfit("x", x.rows, x.cols))?;
            return self.host.all_reduce_sum(values);
        }
        self.fetch(device, x)?;
        self.host.all_reduce_sum(&mut self.mine)?;
        Ok(device.write_floats(&mut x.data, &self.mine)?)
    }

    fn all_gather_cols(
        &mut self,
        device: &B,
        out: &mut Tensor<B>,
        x: &Tensor<B>,
        cols: &[usize],
    ) -> Result<(), CollectiveError> {
        let (rows, rank) = (x.rows, self.host.rank());
        let total: usize = cols.iter().sum();
        if cols.len() != self.host.world_size() || cols.get(rank) != Some(&x.cols) {
            let detail = format!("rank {rank} brings {} columns where {cols:?} are due", x.cols);
            return Err(CollectiveError::Mismatch(detail));
        }
        if out.rows != rows || out.cols != total {
            return Err(misfit("out", out.rows, out.cols));
        }
        let (mine, all) = (rows * x.cols, rows * total);
        let share = match device.host_view(&x.data) {
            Some(values) => values.get(..mine).ok_or_else(|| misfit("x", rows, x.cols))?,
            None => {
                self.fetch(device, x)?;
                &self.mine
            }
        };
        if let Some(values) = device.host_floats(&mut out.data) {
            let values = values.get_mut(..all).ok_or_else(|| misfit("out", rows, total))?;
            return self.host.all_gather_cols(share, cols, values);
        }
        self.all.resize(all, 0.0);
        self.host.all_gather_cols(share, cols, &mut self.all)?;
        Ok(device.write_floats(&mut out.data, &self.all)?)
    }
}

fn misfit(name: &str, rows: usize, cols: usize) -> CollectiveError {
    let detail = format!("{name} is [{rows}, {cols}]");
    KernelError::from(ShapeError { op: "exchange", detail }).into()
}
