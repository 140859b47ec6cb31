//! What the tests share: values, devices, comparisons and batches.

use cpu::{Cpu, CpuConfig, Isa, Precision};
use kernels::{Backend, Batch, BatchRoom, Format, Heads, Tensor, WeightPart};

/// Multiples of 1/1024 in [-1, 1): exact in half precision, so that both precisions agree on
/// inputs.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    pub fn float(&mut self) -> f32 {
        (self.next() % 2048) as f32 / 1024.0 - 1.0
    }
    pub fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.float()).collect()
    }
}

/// Every level this machine has, both precisions, one to three threads.
pub fn devices() -> Vec<(String, Cpu)> {
    let mut devices = Vec::new();
    for isa in Isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect()) {
        for precision in [Precision::Fast, Precision::Exact] {
            for threads in 1..=3 {
                let name = format!("{isa:?} {precision:?} {threads}");
                devices.push((name, Cpu::new(CpuConfig { threads, precision, isa }).unwrap()));
            }
        }
    }
    devices
}

pub fn host<B: Backend>(device: &B, tensor: &Tensor<B>) -> Vec<f32> {
    let mut values = vec![0.0; tensor.rows * tensor.cols];
    device.read_floats(&mut values, &tensor.data).unwrap();
    values
}

#[track_caller]
pub fn assert_close(name: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (got - want).abs();
        assert!(error <= tolerance * want.abs().max(1.0), "{name} [{i}]: {got}, wanted {want}");
    }
}

#[track_caller]
pub fn assert_same_bits(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.to_bits(), want.to_bits(), "{name} [{i}]: {got}, wanted {want}");
    }
}

/// A batch whose every buffer is empty.
pub fn no_batch<B: Backend>(device: &B) -> Batch<B> {
    let heads = Heads { q: 1, kv: 1, dim: 1 };
    let room = BatchRoom { tokens: 0, sequences: 0, tables: 0, context: 0, heads };
    Batch::new(device, room, None).unwrap()
}

pub fn ints<B: Backend>(device: &B, values: &[i32]) -> B::Ints {
    let mut to = device.ints(values.len()).unwrap();
    device.write_ints(&mut to, values).unwrap();
    to
}

pub fn floats<B: Backend>(device: &B, values: &[f32]) -> B::Floats {
    let mut to = device.floats(values.len()).unwrap();
    device.write_floats(&mut to, values).unwrap();
    to
}

pub fn f32_weight<B: Backend>(device: &B, cols: usize, values: &[f32]) -> B::Weight {
    let data: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let rows = values.len() / cols;
    device.weight(&[WeightPart::plain(Format::F32, rows, cols, data)]).unwrap()
}

/// A table [1, D] of a turn by nothing: rows are stored as they are.
pub fn no_turn<B: Backend>(device: &B, dim: usize) -> Tensor<B> {
    let cos_sin: Vec<f32> = (0..dim).map(|i| if i < dim / 2 { 1.0 } else { 0.0 }).collect();
    Tensor::from_host(device, dim, &cos_sin).unwrap()
}
