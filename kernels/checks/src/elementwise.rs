//! embed, add, silu_mul, gather_rows.

use crate::{BF16, Check, Device, Tolerance, compare, noise, rounded};
use kernels::{Backend, KernelError, Tensor, cuda::Driver};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![Check { name: "add", run: add }]
}

fn add<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let device = device(BF16);
    for (rows, cols) in [(1, 8), (3, 64), (1, 2056), (7, 5120)] {
        let (x, delta) = (rounded(&noise(1, rows * cols)), rounded(&noise(2, rows * cols)));
        let run = || -> Result<Vec<f32>, KernelError> {
            let mut to = Tensor::from_host(&device, cols, &x)?;
            let delta = Tensor::from_host(&device, cols, &delta)?;
            device.add(&mut to, &delta)?;
            let mut got = vec![0.0; rows * cols];
            device.read_floats(&mut got, &to.data)?;
            Ok(got)
        };
        let got = run().map_err(|error| error.to_string())?;
        let wanted: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| x + d).collect();
        compare(&format!("add [{rows}, {cols}]"), &got, &wanted, Tolerance::Rounded)?;
    }
    Ok(())
}
