//! Attention's error beside that of PyTorch's scaled_dot_product_attention, both in bf16 against
//! float64, on inputs of one distribution. `sdpa_error.py` prints PyTorch's.

use crate::{BF16, Check, Device, paged::Case};
use cuda::{CudaConfig, Driver, PrefillKernel};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "accuracy of attention by mma.sync", run: |d| run(d, PrefillKernel::Mma) },
        Check { name: "accuracy of attention", run: |d| run(d, PrefillKernel::Fastest) },
    ]
}

/// A shape, and how far PyTorch's result is off at worst and in the root of the mean square.
struct Peer {
    /// Query heads, key heads, head size.
    heads: (usize, usize, usize),
    prefix: usize,
    rows: usize,
    worst: f64,
    rms: f64,
}

/// PyTorch 2.15.0 on its CPU, the worst of eight draws.
const PYTORCH: [Peer; 4] = [
    Peer { heads: (2, 1, 128), prefix: 0, rows: 192, worst: 2.89e-3, rms: 4.37e-4 },
    Peer { heads: (2, 1, 64), prefix: 0, rows: 192, worst: 3.08e-3, rms: 4.35e-4 },
    Peer { heads: (2, 1, 128), prefix: 684, rows: 16, worst: 1.98e-3, rms: 2.26e-4 },
    Peer { heads: (8, 1, 128), prefix: 1299, rows: 1, worst: 1.49e-3, rms: 2.26e-4 },
];
/// Ours may be so many times as far off.
const TIMES: f64 = 2.0;

fn run<D: Driver>(device: Device<'_, D>, prefill: PrefillKernel) -> Result<(), String> {
    for peer in PYTORCH {
        let case = Case::new(peer.heads, &[(peer.prefix, peer.rows)]);
        let text = |error: kernels::KernelError| error.to_string();
        let got = case.run(&device(CudaConfig { prefill, ..BF16 })).map_err(text)?;
        let wanted = case.oracle().map_err(text)?;
        let off = || got.iter().zip(&wanted).map(|(a, b)| f64::from(a - b).abs());
        // A NaN is no maximum, but it is in the mean.
        let worst = off().fold(0.0, f64::max);
        let rms = (off().map(|off| off * off).sum::<f64>() / got.len() as f64).sqrt();
        let near = worst <= TIMES * peer.worst && rms <= TIMES * peer.rms;
        if !near {
            let Peer { worst: w, rms: r, .. } = peer;
            return Err(format!("{case:?}: {worst} and {rms} off, PyTorch {w} and {r}"));
        }
    }
    Ok(())
}
