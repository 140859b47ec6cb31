//! Steps as the device lays them out: the indices of the host's own, and what is refused before
//! anything is read.

use crate::{
    BF16, Check, Device,
    flat::{refused, text},
    paged::Case,
};
use cuda::{Cuda, CudaKv, Driver, Ints};
use kernels::{
    BLOCK_TOKENS, Backend, Batch, BatchRoom, Heads, KernelError, Step, StepSequence, TableBlock,
    Tensor, plain::Plain,
};

const STALE: &str = "changed after it was laid out, or never laid out";

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check { name: "step: as the host lays it out", run: as_the_host },
        Check { name: "step: padding", run: padding },
        Check { name: "step: what is refused", run: refusals_of_steps },
    ]
}

const ROOM: BatchRoom = BatchRoom {
    tokens: 700,
    sequences: 300,
    tables: 320,
    context: 1300,
    heads: Heads { q: 2, kv: 1, dim: 64 },
};

/// Indices of a batch that ops follow, by name.
fn indices<B: Backend>(
    batch: &Batch<B>,
    read: impl Fn(&B::Ints, usize) -> Result<Vec<i32>, String>,
) -> Result<Vec<(&'static str, Vec<i32>)>, String> {
    let (tokens, sequences) = (batch.tokens, batch.sequences);
    let tables = batch.room.tables * batch.block_table_cols;
    [
        ("ids", &batch.ids, tokens),
        ("positions", &batch.positions, tokens),
        ("rope rows", &batch.rope_rows, tokens),
        ("slots", &batch.slots, tokens),
        ("row starts", &batch.row_starts, sequences + 1),
        ("contexts", &batch.context_lens, sequences),
        ("tables", &batch.tables, sequences),
        ("block tables", &batch.block_tables, tables),
        ("logit rows", &batch.logit_rows, batch.logit_rows_len),
    ]
    .into_iter()
    .map(|(name, ints, len)| Ok((name, read(ints, len)?)))
    .collect()
}

/// Sequences that come, grow, end and give their tables to others, in steps of many sizes.
fn steps() -> Vec<Step> {
    // Of each table: cached tokens, entries.
    let mut tables = vec![(0, 0); ROOM.tables];
    let (mut draw, mut next_block) = (12345u64, 0);
    let mut below = |end: usize| {
        draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (draw >> 33) as usize % end
    };
    let mut steps = Vec::new();
    for sequences in [1, 3, 40, 300, 2, 297, 1] {
        let mut step = Step::default();
        let (first, mut left) = (below(ROOM.tables), ROOM.tokens);
        for at in 0..sequences {
            let table = (first + at * 7) % ROOM.tables;
            let (cached, entries) = &mut tables[table];
            if *cached > 1100 || below(9) == 0 {
                (*cached, *entries) = (0, 0);
            }
            let rows = if below(3) == 0 { 1 + below(180) } else { 1 };
            let rows = rows.min(left - (sequences - 1 - at));
            left -= rows;
            let start = *cached;
            *cached += rows;
            let (from, to) = (*entries, cached.div_ceil(BLOCK_TOKENS));
            *entries = to.max(from);
            step.new_blocks.extend((from..to).map(|index| {
                next_block += 1;
                TableBlock { table, index, block: next_block * 31 % 7919 }
            }));
            let rope_start = start + below(2) * 1500;
            step.sequences.push(StepSequence { table, start, rows, rope_start });
            step.ids.extend((0..rows).map(|_| below(1000) as i32));
        }
        let tokens = step.ids.len();
        step.logit_rows = (0..below(tokens + 1)).map(|_| below(tokens) as i32).collect();
        steps.push(step);
    }
    steps
}

/// Factors on queries by position, none of them another's.
fn scales() -> Vec<f32> {
    (0..ROOM.context).map(|position| 1.0 + position as f32 / 64.0).collect()
}

fn as_the_host<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let there = device(BF16);
    let mut got = Batch::new(&there, ROOM, Some(&scales())).map_err(text)?;
    let mut wanted = Batch::new(&Plain, ROOM, Some(&scales())).map_err(text)?;
    for (number, step) in steps().iter().enumerate() {
        there.lay_out(&mut got, step).map_err(text)?;
        Plain.lay_out(&mut wanted, step).map_err(text)?;
        same(&there, &got, &wanted).map_err(|error| format!("step {number}: {error}"))?;
    }
    Ok(())
}

fn same<D: Driver>(
    device: &Cuda<D>,
    got: &Batch<Cuda<D>>,
    wanted: &Batch<Plain>,
) -> Result<(), String> {
    let read = |ints: &Ints<D>, len: usize| {
        let mut values = vec![0; len];
        ints.read(device.driver(), &mut values).map(|()| values).map_err(text)
    };
    let got_indices = indices(got, read)?;
    let of_host = indices(wanted, |ints, len| Ok(ints[..len].to_vec()))?;
    for ((name, got), (_, wanted)) in got_indices.into_iter().zip(of_host) {
        let differs = got.iter().zip(&wanted).position(|(a, b)| a != b);
        if let Some(at) = differs {
            return Err(format!("{name} [{at}]: {}, wanted {}", got[at], wanted[at]));
        }
    }
    let mut factors = vec![0.0; got.tokens];
    let (Some(there), Some(here)) = (&got.q_scale, &wanted.q_scale) else {
        return Err("a batch without factors on queries".into());
    };
    device.read_floats(&mut factors, there).map_err(text)?;
    if factors != here[..wanted.tokens] {
        return Err("factors on queries differ".into());
    }
    let ends = |rope, blocks| (rope, blocks);
    let (got, wanted) =
        (ends(got.rope_rows_end, got.blocks_end), ends(wanted.rope_rows_end, wanted.blocks_end));
    if got == wanted { Ok(()) } else { Err(format!("ends {got:?}, wanted {wanted:?}")) }
}

/// Padded rows have no slot, whatever was there before, and change nothing else.
fn padding<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let there = device(BF16);
    let mut batch = Batch::new(&there, ROOM, Some(&scales())).map_err(text)?;
    let mut wanted = Batch::new(&Plain, ROOM, Some(&scales())).map_err(text)?;
    let all = steps();
    for step in &all[..4] {
        there.lay_out(&mut batch, step).map_err(text)?;
        Plain.lay_out(&mut wanted, step).map_err(text)?;
    }
    let few = Step { padding: 5, ..all[4].clone() };
    there.lay_out(&mut batch, &few).map_err(text)?;
    Plain.lay_out(&mut wanted, &all[4]).map_err(text)?;
    let rows = few.ids.len();
    let mut slots = vec![0; rows + 5];
    batch.slots.read(there.driver(), &mut slots).map_err(text)?;
    if slots[rows..] != [-1; 5] || batch.tokens != rows + 5 {
        return Err(format!("slots of padding: {:?}", &slots[rows..]));
    }
    batch.tokens = rows;
    same(&there, &batch, &wanted)
}

fn refusals_of_steps<D: Driver>(device: Device<'_, D>) -> Result<(), String> {
    let there = device(BF16);
    let sequence = StepSequence { table: 2, start: 30, rows: 2, rope_start: 0 };
    let block = |index| TableBlock { table: 2, index, block: index + 7 };
    let sound = Step {
        sequences: vec![sequence],
        ids: vec![0, 1],
        new_blocks: vec![block(0), block(1)],
        logit_rows: vec![1],
        padding: 0,
    };
    let with = |change: &dyn Fn(&mut Step)| {
        let mut step = sound.clone();
        change(&mut step);
        let mut batch = Batch::new(&there, ROOM, None)?;
        there.lay_out(&mut batch, &step)
    };
    with(&|_| ()).map_err(text)?;
    type Change<'a> = &'a dyn Fn(&mut Step);
    let cases: [(&str, Change<'_>, &str); 11] = [
        ("too many rows", &|s| s.padding = 699, "a step of 701 tokens of 1 sequences"),
        ("few ids", &|s| s.ids.truncate(1), "1 ids for 2 rows"),
        ("no rows", &|s| s.sequences[0].rows = 0, "2 ids for 0 rows"),
        ("a table outside", &|s| s.sequences[0].table = 320, "32 tokens of at most 1300 in 0"),
        ("few blocks", &|s| s.new_blocks.truncate(1), "32 tokens of at most 1300 in 1 blocks"),
        ("a gap", &|s| s.new_blocks[1].index = 2, "as entry 2 of table 2 of 82"),
        ("no table", &|s| s.new_blocks[0].table = 320, "of table 320"),
        ("a block beyond", &|s| s.new_blocks[0].block = 1 << 27, "block 134217728 as entry 0"),
        ("a long table", &|s| s.new_blocks.extend((2..83).map(block)), "as entry 82 of table 2"),
        ("a logit row", &|s| s.logit_rows[0] = 2, "logit row 2 is outside 0..2"),
        ("a logit row", &|s| s.logit_rows[0] = -1, "logit row -1 is outside 0..2"),
    ];
    for (what, change, why) in cases {
        refused(what, with(change), why)?;
    }
    let long = |s: &mut Step| {
        s.new_blocks.extend((2..82).map(block));
        s.sequences[0].start = 1299;
    };
    refused("a long context", with(&long), "1301 tokens of at most 1300 in 82 blocks")
}

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

/// Attention of a batch that is not what it was when it was laid out.
///
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
    let batch = || case.batch(device).map_err(text);
    trial.attend(&batch()?).map_err(text)?;
    let mut fewer = batch()?;
    fewer.sequences -= 1;
    trial.refused("fewer sequences", &fewer, STALE)?;
    let mut longer = batch()?;
    longer.tokens += 1;
    trial.refused("more tokens", &longer, "qkv is [")?;
    let mut never = case.empty(device).map_err(text)?;
    (never.tokens, never.sequences) = (case.tokens(), case.sequences.len());
    trial.refused("no step", &never, STALE)?;
    let mut failed = batch()?;
    let wrong = Step { ids: Vec::new(), ..case.step() };
    refused("a wrong step", device.lay_out(&mut failed, &wrong), "0 ids for")?;
    trial.refused("a step that was refused", &failed, STALE)?;
    // The cache of another pool, one block short of the highest that is owned.
    let owned = case.layout().0.into_iter().flatten().max().unwrap_or(0);
    trial.kv = device.kv(owned as usize, case.heads).map_err(text)?;
    trial.refused("a small cache", &batch()?, &format!("block {owned} of a cache of {owned}"))
}
