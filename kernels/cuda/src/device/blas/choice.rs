//! Which of the library's guesses for a shape is fastest, measured before the first weight of that
//! shape is uploaded, on memory that is given back at once.

use super::{
    Asked, Blas,
    plan::{Algorithm, Kind, Plan, Shape},
    product::{Input, Product},
};
use crate::{
    Scales,
    device::{event::Event, memory::Memory},
};
use kernels::KernelError;
use std::{collections::HashMap, time::Duration};

/// Guesses of the library that are measured.
const CANDIDATES: usize = 8;
/// Runs of each, after a first one that loads its code.
const RUNS: u32 = 3;
/// Another than the library's first must be this much faster: below that it is noise.
const FASTER: f64 = 0.97;
/// Rows that are measured; a product of others takes what was found at the next of these above.
const ROWS: [usize; 5] = [1, 16, 64, 256, 1024];

/// n, k and what the operands are.
type Weight = (usize, usize, Kind);

/// What was chosen, for the process.
#[derive(Default)]
pub(super) struct Choices {
    of: HashMap<Weight, [Option<Algorithm>; ROWS.len()]>,
}

impl Choices {
    /// What a product of that shape should try first, where something was measured.
    pub fn of(&self, shape: &Shape) -> Option<Algorithm> {
        let at = ROWS.iter().position(|rows| shape.rows <= *rows)?;
        let measured = !shape.f32_out && shape.stride == shape.n;
        let of = self.of.get(&(shape.n, shape.k, shape.input)).filter(|_| measured)?;
        of[at]
    }
}

impl Blas {
    /// Measures products with weights [n, k], once for each shape. Where there is no memory for
    /// that, the library's first guess is as good as any.
    pub fn choose(&mut self, (n, k): (usize, usize), is_fp8: bool) -> Result<(), KernelError> {
        let kind = if is_fp8 { Kind::ScaledFp8 } else { Kind::Bf16 };
        if n == 0 || k == 0 || self.choices.of.contains_key(&(n, k, kind)) {
            return Ok(());
        }
        let most = ROWS[ROWS.len() - 1];
        // The weight, x, out, and both scales; one after another at multiples of 256.
        let bytes = [n * k * 2, most * k * 2, most * n * 2, n * 4, most * 4];
        let bytes = bytes.map(|bytes| bytes.next_multiple_of(256));
        let all = bytes.iter().sum();
        let memory = match Memory::zeroed(&self.context, "measuring products", all) {
            Err(KernelError::Memory { .. }) => return Ok(()),
            memory => memory?,
        };
        let at = |before: usize| memory.address() + bytes[..before].iter().sum::<usize>() as u64;
        let input = match is_fp8 {
            true => Input::Fp8(Some(Scales { weight: at(3), x: at(4) })),
            false => Input::Bf16,
        };
        let (weight, x, out, stride, bias, f32_out) = (at(0), at(1), at(2), n, None, false);
        let mut found = [None; ROWS.len()];
        for (found, m) in found.iter_mut().zip(ROWS) {
            let product = Product { out, stride, f32_out, x, weight, input, bias, m, n, k };
            *found = self.fastest(&product)?;
        }
        self.choices.of.insert((n, k, kind), found);
        Ok(())
    }

    /// `None` where the library's first guess is as good as any.
    fn fastest(&self, product: &Product) -> Result<Option<Algorithm>, KernelError> {
        let context = &self.context;
        let plan = Plan::new(context, self.handle, product, None)?;
        let candidates = plan.candidates(context, self.handle, CANDIDATES)?;
        if candidates.len() < 2 {
            return Ok(None);
        }
        let mut best: Option<(Algorithm, f64)> = None;
        for candidate in candidates {
            let Some(time) = self.time(&plan, product, &candidate)? else { continue };
            let time = time.as_secs_f64();
            if best.is_none_or(|(_, least)| time < FASTER * least) {
                best = Some((candidate, time));
            }
        }
        Ok(best.map(|(candidate, _)| candidate))
    }

    fn time(
        &self,
        plan: &Plan,
        product: &Product,
        algorithm: &Algorithm,
    ) -> Result<Option<Duration>, KernelError> {
        let context = &self.context;
        let (start, end) = (Event::timed(context)?, Event::timed(context)?);
        let run = || plan.run(context, (self.handle, self.workspace.address()), product, algorithm);
        if run()? == Asked::Refused {
            return Ok(None);
        }
        start.record(context)?;
        for _ in 0..RUNS {
            run()?;
        }
        end.record(context)?;
        context.wait(&end)?;
        end.since(&start, context).map(Some)
    }
}
