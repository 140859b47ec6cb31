//! How long a step takes: bytes over bandwidth, and what each stage of the implementation adds.
//!
//! Pure. The constants are estimates, within 8 points of a floor's share for what there is today;
//! [`Constants`] measured on a card can take their place.

use std::time::Duration;

use super::hardware::Hardware;

/// What products multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    Bf16,
    /// e4m3 on both sides.
    Fp8,
    /// e4m3 that is widened to bf16 for each product.
    Fp8Widened,
    /// Integers of 4 bits, widened above 64 rows.
    Int4,
}

/// One rank's part of a model, as steps read it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Streams {
    pub layers: usize,
    /// H.
    pub hidden: usize,
    pub products: Products,
    /// Bytes of the matrices that every token is multiplied with, without the output matrix.
    pub dense: u64,
    /// Elements of those.
    pub dense_elements: u64,
    /// Bytes of all experts.
    pub experts: u64,
    /// Elements of those.
    pub expert_elements: u64,
    /// Experts that a token goes to, of all.
    pub expert_share: f64,
    /// Bytes of the output matrix.
    pub head: u64,
    /// Bytes of one token's keys and values.
    pub kv_token: u64,
    /// Query heads times their size.
    pub attention: usize,
    pub ranks: usize,
}

/// What a step moves, and how long that takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Of the fullest rank.
    pub bytes: f64,
    /// By the data sheet.
    pub floor_ms: f64,
    pub predicted_ms: f64,
}

/// How far the implementation has come; each with what is before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A launch for each op, cuBLASLt, and groups that exchange through the host.
    First,
    /// Groups sum twice a layer by each other's memory.
    Sums,
    /// A graph for each step; groups gather on their devices.
    Graphs,
    /// Products of few rows by kernels of their own; graphs in groups whose ranks sum.
    Kernels,
    /// Fewer, larger kernels; in groups all of the above.
    Fused,
    /// Weights are fetched while the kernel before, or the exchange, still runs.
    Prefetch,
}

impl Stage {
    /// What there is for a card; nothing of it was measured on one. Kernels overlap on compute
    /// capability 9.0 alone, as `cuda::CudaConfig::overlap` says.
    pub fn today(hardware: &Hardware) -> Self {
        match hardware.compute_capability {
            (9, 0) => Self::Prefetch,
            _ => Self::Fused,
        }
    }
}

/// What a stage costs, at some number of rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Constants {
    /// Of the data sheet's bandwidth that products reach.
    pub products: f64,
    /// Of a copy's bandwidth that attention reaches.
    pub attention: f64,
    /// Between two kernels.
    pub boundary_us: f64,
    /// Of a layer.
    pub kernels: f64,
    /// Of a layer's norms, activations and rounding.
    pub small_us: f64,
    /// Before a layer's attention is busy.
    pub attention_us: f64,
    pub exchange_us: f64,
    /// Of a layer.
    pub exchanges: f64,
    /// Of a step, while the device waits.
    pub host_ms: f64,
    /// How often the output matrix is read.
    pub head_reads: f64,
}

/// Rows that the constants by rows are for; between them they are taken on a line.
const ROWS: [f64; 4] = [1.0, 8.0, 32.0, 128.0];

fn at(rows: usize, values: [f64; 4]) -> f64 {
    let rows = rows as f64;
    let upper = (1..ROWS.len() - 1).find(|at| rows <= ROWS[*at]).unwrap_or(ROWS.len() - 1);
    let (from, to) = (ROWS[upper - 1], ROWS[upper]);
    values[upper - 1] + (values[upper] - values[upper - 1]) * (rows - from) / (to - from)
}

impl Constants {
    /// Of a decode with `rows` sequences on each of `ranks` ranks.
    pub fn of(stage: Stage, products: Products, rows: usize, ranks: usize) -> Self {
        match ranks {
            1 => Self::of_one(stage, products, rows),
            _ => Self::of_group(stage, products, rows, ranks),
        }
    }

    fn of_one(stage: Stage, products: Products, rows: usize) -> Self {
        // Shares and sizes of kernels end where the last were estimated.
        let most = rows.min(128);
        let library = library(products, most);
        let own = own_kernels(products, most);
        let (kernels, ops) = launches(products);
        let long = |us: f64| us * at(most, [1.0, 1.0, 1.0, 1.5]);
        let first = Self {
            products: library,
            attention: 0.80,
            boundary_us: 2.1,
            kernels,
            small_us: long(ops * 1.7),
            attention_us: 5.0,
            exchange_us: 0.0,
            exchanges: 0.0,
            host_ms: 0.2 + 0.003 * rows as f64,
            head_reads: rows.div_ceil(64) as f64,
        };
        let graphs = Self { boundary_us: 1.3, host_ms: 0.02, head_reads: 1.0, ..first };
        let kernels = Self { products: own, attention: 0.88, ..graphs };
        let fused = Self {
            attention: 0.90,
            kernels: 7.0,
            small_us: long(3.4),
            attention_us: 4.0,
            ..kernels
        };
        match stage {
            Stage::First | Stage::Sums => first,
            Stage::Graphs => graphs,
            Stage::Kernels => kernels,
            Stage::Fused => fused,
            Stage::Prefetch => Self {
                products: own + 0.015,
                attention: 0.92,
                boundary_us: 0.35,
                small_us: long(1.2),
                ..fused
            },
        }
    }

    fn of_group(stage: Stage, products: Products, rows: usize, ranks: usize) -> Self {
        let most = rows.min(128);
        let (kernels, ops) = launches(products);
        let many = ranks > 4;
        let through_host = match many {
            false => [70.0, 150.0, 700.0, 2600.0],
            true => [80.0, 170.0, 800.0, 3000.0],
        };
        let on_devices = |us: [f64; 4]| at(rows, us) * if many { 1.15 } else { 1.0 };
        let first = Self {
            products: library(products, most),
            attention: 0.80,
            boundary_us: 2.1,
            kernels,
            small_us: ops * 1.7,
            attention_us: 5.0,
            exchange_us: at(rows, through_host),
            exchanges: 4.0,
            host_ms: 0.3,
            head_reads: rows.div_ceil(64) as f64,
        };
        let graphs = Self {
            attention: 0.85,
            boundary_us: 1.3,
            exchange_us: on_devices([4.5, 5.0, 8.0, 20.0]),
            host_ms: 0.02,
            head_reads: 1.0,
            ..first
        };
        let sum_us = on_devices([6.0, 7.0, 10.0, 22.0]);
        let sums = |stage: Self| Self {
            kernels: kernels - 2.0,
            small_us: (ops - 2.0) * 1.7,
            exchange_us: sum_us,
            exchanges: 2.0,
            ..stage
        };
        let summed = sums(graphs);
        let fused = Self {
            products: own_kernels(products, most),
            attention: 0.90,
            boundary_us: 0.35,
            kernels: 6.0,
            small_us: 0.6,
            attention_us: 4.0,
            ..summed
        };
        match stage {
            Stage::First => first,
            Stage::Sums => sums(first),
            Stage::Graphs => graphs,
            Stage::Kernels => summed,
            Stage::Fused => fused,
            Stage::Prefetch => Self { exchange_us: sum_us * 0.4, ..fused },
        }
    }
}

/// What cuBLASLt's products, or those of integers, reach.
fn library(products: Products, rows: usize) -> f64 {
    at(
        rows,
        match products {
            Products::Bf16 | Products::Fp8Widened => [0.70; 4],
            Products::Fp8 => [0.66, 0.66, 0.66, 0.70],
            Products::Int4 => [0.67, 0.67, 0.67, 0.40],
        },
    )
}

/// What kernels for few rows are to reach.
fn own_kernels(products: Products, rows: usize) -> f64 {
    at(
        rows,
        match products {
            Products::Bf16 => [0.83, 0.83, 0.80, 0.74],
            Products::Fp8 | Products::Fp8Widened => [0.825, 0.825, 0.80, 0.76],
            Products::Int4 => [0.80, 0.80, 0.74, 0.60],
        },
    )
}

/// Kernels of a layer, and how many of them are neither products nor attention.
fn launches(products: Products) -> (f64, f64) {
    match products {
        Products::Fp8 | Products::Fp8Widened => (14.0, 8.0),
        Products::Bf16 | Products::Int4 => (10.0, 4.0),
    }
}

impl Streams {
    /// Bytes of layers' matrices that a step of `rows` tokens reads.
    fn weights(&self, rows: usize) -> f64 {
        let missed = (1.0 - self.expert_share).powf(rows as f64);
        self.dense as f64 + self.experts as f64 * (1.0 - missed)
    }

    /// Elements of layers' matrices that a token is multiplied with.
    fn elements_of_token(&self) -> f64 {
        self.dense_elements as f64 + self.expert_elements as f64 * self.expert_share
    }

    /// A step of `rows` sequences with `context` tokens each.
    pub fn decode(
        &self,
        hardware: &Hardware,
        constants: &Constants,
        (rows, context): (usize, usize),
    ) -> Prediction {
        let (weights, head) = (self.weights(rows), self.head as f64);
        let kv = (rows * context) as f64 * self.kv_token as f64;
        let c = constants;
        // The output matrix is long, and its product near what a copy reaches.
        let head_ms = c.head_reads * head / (hardware.bandwidth * c.products.max(0.75)) * 1e3;
        let products_ms = weights / (hardware.bandwidth * c.products) * 1e3;
        let kv_ms = kv / (hardware.copy_bandwidth * c.attention) * 1e3;
        let layers_ms = self.layers_ms(c);
        let bytes = weights + head + kv;
        Prediction {
            bytes,
            floor_ms: bytes / hardware.bandwidth * 1e3,
            predicted_ms: products_ms
                + head_ms
                + kv_ms
                + self.widened_ms(hardware, self.products == Products::Fp8Widened)
                + layers_ms
                + c.host_ms
                + STEP_MS,
        }
    }

    /// A prompt of `tokens` tokens, in steps of up to `step_tokens`.
    pub fn prefill(
        &self,
        hardware: &Hardware,
        stage: Stage,
        (tokens, step_tokens): (usize, usize),
    ) -> Prediction {
        let head = self.head as f64;
        let mut sum = Prediction {
            bytes: head,
            floor_ms: head / hardware.bandwidth * 1e3,
            predicted_ms: head / (hardware.bandwidth * 0.75) * 1e3,
        };
        for start in (0..tokens).step_by(step_tokens.max(1)) {
            let rows = step_tokens.min(tokens - start);
            let step = self.chunk(hardware, stage, (rows, start));
            sum.bytes += step.bytes;
            sum.floor_ms += step.floor_ms;
            sum.predicted_ms += step.predicted_ms;
        }
        sum
    }

    /// A step of `rows` tokens of one sequence that has `cached` before them, without logits.
    pub fn chunk(
        &self,
        hardware: &Hardware,
        stage: Stage,
        (rows, cached): (usize, usize),
    ) -> Prediction {
        /// Of the matrix peaks that products of many rows reach, and attention does.
        const FP8: f64 = 0.70;
        const BF16: f64 = 0.80;
        const ATTENTION: f64 = 0.45;
        let c = Constants::of(stage, self.products, rows, self.ranks);
        let (peak, reached) = match (self.products, hardware.fp8_peak) {
            (Products::Fp8, Some(peak)) => (peak, FP8),
            _ => (hardware.bf16_peak, BF16),
        };
        let (tokens, layers) = (rows as f64, self.layers as f64);
        let weights = self.weights(rows);
        let kv = (rows + cached) as f64 * self.kv_token as f64;
        let bytes = weights + kv;
        let products = 2.0 * self.elements_of_token() * tokens;
        // A row sees the keys before it: a product with keys, and one with values.
        let keys = cached as f64 + (tokens + 1.0) / 2.0;
        let attention = 4.0 * self.attention as f64 * layers * tokens * keys;
        let read_ms = weights / (hardware.bandwidth * c.products) * 1e3;
        let multiplied_ms = products / (peak * reached) * 1e3;
        let attention_ms = attention / (hardware.bf16_peak * ATTENTION) * 1e3;
        // What norms, activations and rounding read and write of a token, 64 bytes a column.
        let small = tokens * layers * 64.0 * self.hidden as f64;
        let small_ms = small / hardware.copy_bandwidth * 1e3;
        let widens = matches!(self.products, Products::Fp8Widened | Products::Int4);
        let floor_s =
            (bytes / hardware.bandwidth).max(products / peak + attention / hardware.bf16_peak);
        Prediction {
            bytes,
            floor_ms: floor_s * 1e3,
            predicted_ms: read_ms.max(multiplied_ms)
                + attention_ms
                + small_ms
                + self.widened_ms(hardware, widens)
                + self.layers_ms(&c)
                + c.host_ms
                + STEP_MS,
        }
    }

    /// Matrices read, written in bf16 and read again, beyond what the product reads.
    fn widened_ms(&self, hardware: &Hardware, widens: bool) -> f64 {
        let bytes = if widens { 4.0 * self.dense_elements as f64 } else { 0.0 };
        bytes / hardware.copy_bandwidth * 1e3
    }

    /// What layers take that is not for their bytes.
    fn layers_ms(&self, c: &Constants) -> f64 {
        let layer_us =
            c.kernels * c.boundary_us + c.small_us + c.attention_us + c.exchanges * c.exchange_us;
        self.layers as f64 * layer_us / 1e3
    }
}

/// Of a step, for what is in no layer.
const STEP_MS: f64 = 0.05;

/// When a step that was predicted to take so long is taken for hung: ten times as late, and never
/// before a second is over, which the first step of a shape may take to load its kernels.
pub fn step_deadline(step: &Prediction) -> Duration {
    const TIMES: f64 = 10.0;
    const LEAST: Duration = Duration::from_secs(1);
    /// A prediction beyond an hour says that something else is wrong.
    const MOST: Duration = Duration::from_secs(3600);
    let deadline = Duration::try_from_secs_f64(TIMES * step.predicted_ms / 1e3);
    deadline.map_or(MOST, |deadline| deadline.clamp(LEAST, MOST))
}

#[cfg(test)]
mod tests;
