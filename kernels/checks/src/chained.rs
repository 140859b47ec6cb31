//! Kernels that begin before the one before them is done: layers of a decode step as a graph of
//! them leave what they leave one after another, bit for bit.

use crate::{BF16, Check, Device, flat::text, noise, paged::Case, rounded};
use cuda::{Cuda, CudaConfig, CudaKv, Driver, WeightFormat};
use kernels::{
    Backend, Batch, Heads, Random, RandomFormat, Rotation, Step, Stored, Tensor, WeightPart,
};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "overlapping kernels: bf16", run: bf16 },
        Check { name: "overlapping kernels: e4m3", run: e4m3 },
        Check { name: "overlapping kernels: int4", run: int4 },
    ]
}

const HEADS: Heads = Heads { q: 4, kv: 2, dim: 64 };
const HIDDEN: usize = 520;
const INTERMEDIATE: usize = 264;
const LAYERS: usize = 2;
const EPS: f32 = 1e-6;

type Weight<D> = <Cuda<D> as Backend>::Weight;

/// One layer's weights, the same for all.
struct Layer<D: Driver> {
    qkv: Weight<D>,
    bias: Tensor<Cuda<D>>,
    out: Weight<D>,
    gate_up: Weight<D>,
    down: Weight<D>,
    norm: Tensor<Cuda<D>>,
}

/// A step's buffers.
struct Buffers<D: Driver> {
    kv: Vec<CudaKv<D>>,
    batch: Batch<Cuda<D>>,
    cos_sin: Tensor<Cuda<D>>,
    hidden: Tensor<Cuda<D>>,
    normed: Tensor<Cuda<D>>,
    qkv: Tensor<Cuda<D>>,
    attended: Tensor<Cuda<D>>,
    delta: Tensor<Cuda<D>>,
    gate_up: Tensor<Cuda<D>>,
    gated: Tensor<Cuda<D>>,
}

fn bits<D: Driver>(device: &Cuda<D>, tensor: &Tensor<Cuda<D>>) -> Result<Vec<u32>, String> {
    let mut values = vec![0.0; tensor.rows * tensor.cols];
    device.read_floats(&mut values, &tensor.data).map_err(text)?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

impl<D: Driver> Layer<D> {
    fn new(device: &Cuda<D>, format: RandomFormat) -> Result<Self, String> {
        let part = |seed, rows, cols| {
            let random = Random { seed, first_row: 0, first_col: 0, format };
            WeightPart { rows, cols, stored: Stored::Random(random) }
        };
        let width = HEADS.q * HEADS.dim;
        let vector = |seed, len| Tensor::from_host(device, len, &rounded(&noise(seed, len)));
        let halves = [part(63, INTERMEDIATE, HIDDEN), part(64, INTERMEDIATE, HIDDEN)];
        Ok(Self {
            qkv: device.weight(&[part(61, HEADS.qkv_cols(), HIDDEN)]).map_err(text)?,
            bias: vector(67, HEADS.qkv_cols()).map_err(text)?,
            out: device.weight(&[part(62, HIDDEN, width)]).map_err(text)?,
            gate_up: device.gate_up(&halves).map_err(text)?,
            down: device.weight(&[part(65, HIDDEN, INTERMEDIATE)]).map_err(text)?,
            norm: vector(68, HIDDEN).map_err(text)?,
        })
    }

    fn run(&self, device: &Cuda<D>, s: &mut Buffers<D>) -> Result<(), String> {
        let rotation = Rotation { norm: None, cos_sin: &s.cos_sin, heads: HEADS };
        device.rms_norm(&mut s.normed, &s.hidden, &self.norm, EPS).map_err(text)?;
        for kv in &mut s.kv {
            device.linear(&mut s.qkv, &s.normed, &self.qkv, Some(&self.bias)).map_err(text)?;
            let (out, qkv) = (&mut s.attended, &mut s.qkv);
            device.rotate_and_attend(out, kv, qkv, &rotation, &s.batch, None).map_err(text)?;
            device.linear(&mut s.delta, &s.attended, &self.out, None).map_err(text)?;
            let (norm, hidden) = (&self.norm, &mut s.hidden);
            device.add_rms_norm(&mut s.normed, hidden, &s.delta, norm, EPS).map_err(text)?;
            device.gated(&mut s.gated, &mut s.gate_up, &s.normed, &self.gate_up).map_err(text)?;
            device.linear(&mut s.delta, &s.gated, &self.down, None).map_err(text)?;
            device.add_rms_norm(&mut s.normed, hidden, &s.delta, norm, EPS).map_err(text)?;
        }
        Ok(())
    }
}

impl<D: Driver> Buffers<D> {
    fn new(device: &Cuda<D>, case: &Case) -> Result<Self, String> {
        let zeros = |cols| Tensor::zeros(device, case.tokens(), cols).map_err(text);
        let mut batch = Batch::new(device, case.room(), None).map_err(text)?;
        let first = case.step();
        device.lay_out(&mut batch, &first).map_err(text)?;
        // As in every later step: no new blocks.
        let next = Step { new_blocks: Vec::new(), ..first };
        device.lay_out(&mut batch, &next).map_err(text)?;
        let kv = |_| {
            let kv = device.kv(case.layout().1, HEADS).map_err(text)?;
            case.fill(device, &kv).map_err(text).map(|()| kv)
        };
        let angles = rounded(&noise(69, case.room().context * HEADS.dim));
        Ok(Self {
            kv: (0..LAYERS).map(kv).collect::<Result<_, String>>()?,
            batch,
            cos_sin: Tensor::exact_from_host(device, HEADS.dim, &angles).map_err(text)?,
            hidden: zeros(HIDDEN)?,
            normed: zeros(HIDDEN)?,
            qkv: zeros(HEADS.qkv_cols())?,
            attended: zeros(HEADS.q * HEADS.dim)?,
            delta: zeros(HIDDEN)?,
            gate_up: zeros(2 * INTERMEDIATE)?,
            gated: zeros(INTERMEDIATE)?,
        })
    }

    /// The input, and NaNs in all that is to be written.
    fn begin(&mut self, device: &Cuda<D>) -> Result<(), String> {
        let values = rounded(&noise(70, self.hidden.rows * HIDDEN));
        device.write_floats(&mut self.hidden.data, &values).map_err(text)?;
        let later =
            [&mut self.normed, &mut self.qkv, &mut self.attended, &mut self.delta, &mut self.gated];
        for tensor in later {
            let nothing = vec![f32::NAN; tensor.rows * tensor.cols];
            device.write_floats(&mut tensor.data, &nothing).map_err(text)?;
        }
        Ok(())
    }

    /// What a step leaves.
    fn left(&self, device: &Cuda<D>) -> Result<[Vec<u32>; 2], String> {
        Ok([bits(device, &self.hidden)?, bits(device, &self.normed)?])
    }
}

fn agrees<D: Driver>(
    device: Device<'_, D>,
    config: CudaConfig,
    format: RandomFormat,
) -> Result<(), String> {
    let contexts = [17, 1, 530, 1040].map(|context| (context - 1, 1));
    let case = Case::new((HEADS.q, HEADS.kv, HEADS.dim), &contexts);
    let apart = device(CudaConfig { overlap: false, ..config });
    let mut s = Buffers::new(&apart, &case)?;
    s.begin(&apart)?;
    Layer::new(&apart, format)?.run(&apart, &mut s)?;
    let wanted = s.left(&apart)?;
    let there = device(config);
    let (layer, mut s) = (Layer::new(&there, format)?, Buffers::new(&there, &case)?);
    // What is taken at a first use is there when launches are captured.
    layer.run(&there, &mut s)?;
    s.begin(&there)?;
    there.driver().begin_capture().map_err(text)?;
    let done = layer.run(&there, &mut s);
    let graph = there.driver().end_capture().map_err(text)?;
    done?;
    for time in ["first", "second"] {
        s.begin(&there)?;
        there.driver().replay(&graph).map_err(text)?;
        let got = s.left(&there)?;
        if got != wanted {
            let wrong = got.iter().zip(&wanted).map(|(got, wanted)| {
                got.iter().zip(wanted).filter(|(got, wanted)| got != wanted).count()
            });
            let wrong: Vec<usize> = wrong.collect();
            return Err(format!("the {time} time {wrong:?} elements are not as one by one"));
        }
    }
    Ok(())
}

fn bf16<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    agrees(device, BF16, RandomFormat::Bf16)
}

fn e4m3<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    agrees(device, CudaConfig { weights: WeightFormat::Fp8, ..BF16 }, RandomFormat::Bf16)
}

fn int4<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    agrees(device, BF16, RandomFormat::Int4 { group: 128 })
}
