//! Decode attention of rows as their product left them: what the two ops do one after the other,
//! bit for bit, in the cache too.

use crate::flat::text;
use crate::{BF16, Check, Device, noise, paged::Case, paged::SPLIT_TOKENS as SPLIT, rounded};
use cuda::{Array, Cuda, CudaConfig, CudaKv, Driver, KvFormat};
use kernels::{BLOCK_TOKENS, Backend, Batch, Rotation, Step, Tensor};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "decode of new rows: lengths", run: lengths },
        Check { name: "decode of new rows: heads", run: heads },
        Check { name: "decode of new rows: norms, factors, windows", run: models },
        Check { name: "decode of new rows: e4m3", run: e4m3 },
        Check { name: "decode of new rows: a block of this very step", run: shared_block },
    ]
}

/// What a model does beside the turn.
#[derive(Clone, Copy, Debug, Default)]
struct Model {
    norm: bool,
    q_scale: bool,
}

/// What there is on the device.
struct There<D: Driver> {
    device: Cuda<D>,
    case: Case,
    batch: Batch<Cuda<D>>,
    cos_sin: Tensor<Cuda<D>>,
    norms: Option<[Tensor<Cuda<D>>; 2]>,
    values: Vec<f32>,
}

/// What attention leaves: rows, and the cache's bytes; and the packed rows behind it.
#[derive(PartialEq)]
struct Left {
    out: Vec<u32>,
    cache: [Vec<u8>; 2],
    qkv: Vec<u32>,
}

fn bits(values: Vec<f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

impl<D: Driver> There<D> {
    fn new(device: Device<'_, D>, case: &Case, model: Model) -> Result<Self, String> {
        let device = device(CudaConfig { kv_format: case.format, ..BF16 });
        let (dim, room) = (case.heads.dim, case.room());
        let factors: Vec<f32> = (0..room.context).map(|p| 1.0 + (p % 7) as f32 / 8.0).collect();
        let factors = model.q_scale.then_some(&factors[..]);
        let batch = Batch::new(&device, room, factors).map_err(text)?;
        let angles = noise(31, (room.context + 64) * dim / 2);
        let row = |angles: &[f32]| {
            let angles = angles.iter().map(|a| a * std::f32::consts::PI);
            angles.clone().map(f32::cos).chain(angles.map(f32::sin)).collect::<Vec<f32>>()
        };
        let table: Vec<f32> = angles.chunks_exact(dim / 2).flat_map(row).collect();
        let cos_sin = Tensor::exact_from_host(&device, dim, &table).map_err(text)?;
        let weight = |seed| {
            let weight: Vec<f32> = noise(seed, dim).iter().map(|w| w + 0.5).collect();
            Tensor::from_host(&device, dim, &rounded(&weight)).map_err(text)
        };
        let norms = model.norm.then(|| Ok::<_, String>([weight(41)?, weight(42)?])).transpose()?;
        Ok(Self { case: case.clone(), batch, cos_sin, norms, values: case.qkv(), device })
    }

    fn lay_out(&mut self, step: &Step) -> Result<(), String> {
        self.device.lay_out(&mut self.batch, step).map_err(text)
    }

    /// Whatever `how` does with a cache and rows.
    fn left(&self, at_once: bool) -> Result<Left, String> {
        let Self { device, case, batch, cos_sin, norms, values } = self;
        let heads = case.heads;
        let mut kv = device.kv(case.layout().1, heads).map_err(text)?;
        case.fill(device, &kv).map_err(text)?;
        let mut qkv = Tensor::from_host(device, heads.qkv_cols(), values).map_err(text)?;
        let mut out = Tensor::zeros(device, case.tokens(), heads.q * heads.dim).map_err(text)?;
        let norm = norms.as_ref().map(|[q, k]| (q, k, 1e-6));
        let rotation = Rotation { norm, cos_sin, heads };
        match at_once {
            true => device
                .rotate_and_attend(&mut out, &mut kv, &mut qkv, &rotation, batch, case.window)
                .map_err(text)?,
            false => {
                device.rotate_and_store(&mut kv, &mut qkv, &rotation, batch).map_err(text)?;
                device.attention(&mut out, &qkv, &kv, batch, heads, case.window).map_err(text)?;
            }
        }
        let floats = |tensor: &Tensor<Cuda<D>>| {
            let mut values = vec![0.0; tensor.rows * tensor.cols];
            device.read_floats(&mut values, &tensor.data).map_err(text)?;
            Ok::<_, String>(bits(values))
        };
        Ok(Left { out: floats(&out)?, cache: cache(device, &kv)?, qkv: floats(&qkv)? })
    }
}

fn cache<D: Driver>(device: &Cuda<D>, kv: &CudaKv<D>) -> Result<[Vec<u8>; 2], String> {
    let bytes = |pool: &Array<D>| {
        let mut bytes = vec![0; pool.bytes()];
        pool.read(device.driver(), &mut bytes).map(|()| bytes).map_err(text)
    };
    Ok([bytes(kv.keys())?, bytes(kv.values())?])
}

/// The case's step: first as the one that brings all blocks, then as the next one, which brings
/// none and has other rows of the table.
fn steps(case: &Case) -> [Step; 2] {
    let first = case.step();
    let mut second = Step { new_blocks: Vec::new(), ..first.clone() };
    for (at, sequence) in second.sequences.iter_mut().enumerate() {
        sequence.rope_start = sequence.start + 5 * at % 64;
    }
    [first, second]
}

fn agrees<D: Driver>(device: Device<'_, D>, case: &Case, model: Model) -> Result<(), String> {
    let mut there = There::new(device, case, model)?;
    for step in steps(case) {
        there.lay_out(&step)?;
    }
    let (got, wanted) = (there.left(true)?, there.left(false)?);
    let what = format!("{case:?}, {model:?}");
    if got.qkv != bits(there.values) {
        return Err(format!("{what}: rows were turned where they lie, not on the way"));
    }
    same(&what, &got, &wanted)
}

fn same(what: &str, got: &Left, wanted: &Left) -> Result<(), String> {
    if let Some(at) = got.out.iter().zip(&wanted.out).position(|(a, b)| a != b) {
        return Err(format!("{what}: element {at} of the result has other bits"));
    }
    for (name, which) in [("keys", 0), ("values", 1)] {
        let (got, wanted) = (&got.cache[which], &wanted.cache[which]);
        if let Some(at) = got.iter().zip(wanted).position(|(a, b)| a != b) {
            return Err(format!("{what}: byte {at} of the cached {name} is another"));
        }
    }
    Ok(())
}

/// Sequences with such contexts and one row each.
fn contexts(heads: (usize, usize, usize), contexts: &[usize]) -> Case {
    let sequences: Vec<_> = contexts.iter().map(|context| (context - 1, 1)).collect();
    Case::new(heads, &sequences)
}

fn lengths<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let edges = [1, 2, 16, 17, 65, SPLIT, SPLIT + 1, SPLIT + 17, 2 * SPLIT + 16];
    for dim in [64, 128] {
        agrees(device, &contexts((2, 1, dim), &edges), Model::default())?;
    }
    Ok(())
}

/// Groups of 1, 8 and 16 query heads to a key head, and more than one tile has.
fn heads<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for heads in [(3, 3, 64), (16, 2, 128), (16, 1, 128), (17, 1, 128), (35, 1, 64), (34, 2, 64)] {
        agrees(device, &contexts(heads, &[37, 1, SPLIT + 20]), Model::default())?;
    }
    Ok(())
}

fn models<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for (norm, q_scale) in [(true, false), (false, true), (true, true)] {
        for dim in [64, 128] {
            let case = contexts((4, 2, dim), &[SPLIT + 1, 33, 1, 2 * SPLIT + 5]);
            agrees(device, &case, Model { norm, q_scale })?;
            agrees(device, &case.window(20), Model { norm, q_scale })?;
        }
    }
    Ok(())
}

fn e4m3<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    for heads in [(16, 2, 128), (17, 1, 128), (7, 1, 64), (2, 2, 64)] {
        let case = contexts(heads, &[1, 17, SPLIT, SPLIT + 1]).format(KvFormat::Fp8);
        agrees(device, &case, Model { norm: true, q_scale: false })?;
    }
    Ok(())
}

/// A sequence may see a block that another fills in the same step: then rows are stored before any
/// of them attends. Here the second reads the first's own last block, and has one token behind it.
fn shared_block<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let case = contexts((4, 2, 64), &[2 * BLOCK_TOKENS, 2 * BLOCK_TOKENS + 1]);
    let mut there = There::new(device, &case, Model::default())?;
    let [mut first, mut second] = steps(&case);
    let (one, two) = (first.sequences[0].table, first.sequences[1].table);
    let shared = |index: usize, first: &Step| {
        let found = first.new_blocks.iter().find(|new| (new.table, new.index) == (one, index));
        found.map(|new| new.block).ok_or("a block")
    };
    // The second sequence comes in the second step.
    let (own, came) = first.new_blocks.iter().partition(|new| new.table == one);
    second.new_blocks = came;
    for new in second.new_blocks.iter_mut().filter(|new| new.index < 2) {
        new.block = shared(new.index, &first)?;
    }
    first = Step { new_blocks: own, ids: vec![0], sequences: vec![first.sequences[0]], ..first };
    second.sequences[1].table = two;
    there.lay_out(&first)?;
    there.lay_out(&second)?;
    let (got, wanted) = (there.left(true)?, there.left(false)?);
    if got.qkv == bits(there.values) {
        return Err("a row attends before another that it sees is stored".into());
    }
    same("a shared block", &got, &wanted)
}
