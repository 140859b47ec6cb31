//! How backends in host memory read a batch: slices of the right length, contents checked.
//!
//! Every index that an op follows (slots, block ids, rows) is checked here before the op runs, so
//! that a wrong plan is an error and never a read outside a buffer.

use crate::{
    BLOCK_TOKENS, Backend, Batch, KernelError, LAST_SAMPLED, Routes, ShapeError, Step, TableBlock,
    shape::ensure,
};
use std::ops::Range;

/// The first `len` elements of a buffer.
pub fn first<'a, T>(
    op: &'static str,
    name: &str,
    values: &'a [T],
    len: usize,
) -> Result<&'a [T], ShapeError> {
    ensure(op, len <= values.len(), || {
        format!("{name} needs {len} elements, its buffer has {}", values.len())
    })?;
    Ok(&values[..len])
}

/// A zeroed vector, or an error where the allocator refuses it.
pub fn zeroed<T: Clone + Default>(what: &'static str, len: usize) -> Result<Vec<T>, KernelError> {
    let bytes = len.saturating_mul(size_of::<T>());
    // The probe is given back at once: `vec!` then takes fresh zero pages without touching them,
    // which resizing the probe would not.
    Vec::<T>::new().try_reserve_exact(len).map_err(|_| KernelError::Memory { what, bytes })?;
    Ok(vec![T::default(); len])
}

/// Copies `values` to the start of `to`.
pub fn write<T: Copy>(to: &mut [T], values: &[T]) -> Result<(), ShapeError> {
    let room = to.len();
    let to = to.get_mut(..values.len()).ok_or_else(|| ShapeError {
        op: "write",
        detail: format!("{} values into a buffer of {room}", values.len()),
    })?;
    to.copy_from_slice(values);
    Ok(())
}

/// Copies the start of `from` to `to`.
pub fn read<T: Copy>(to: &mut [T], from: &[T]) -> Result<(), ShapeError> {
    to.copy_from_slice(first("read", "source", from, to.len())?);
    Ok(())
}

/// Non-negative integers below `end`.
fn below(op: &'static str, name: &str, values: &[i32], end: usize) -> Result<(), ShapeError> {
    match values.iter().find(|&&v| usize::try_from(v).map_or(true, |v| v >= end)) {
        Some(bad) => ensure(op, false, || format!("{name} {bad} is outside 0..{end}")),
        None => Ok(()),
    }
}

/// What [`Backend::lay_out`] does where the batch lies in host memory.
///
/// # Errors
/// As [`Batch::begin`]; for padding, which is for devices that run recorded steps.
pub fn lay_out<B>(batch: &mut Batch<B>, step: &Step) -> Result<(), ShapeError>
where
    B: Backend<Ints: AsRef<[i32]> + AsMut<[i32]>, Floats: AsRef<[f32]> + AsMut<[f32]>>,
{
    const OP: &str = "lay_out";
    ensure(OP, step.padding == 0, || format!("{} rows of padding", step.padding))?;
    let known = step.ids.iter().all(|&id| id != LAST_SAMPLED);
    ensure(OP, known, || "an id that this device does not know".into())?;
    batch.begin(step)?;
    write(batch.ids.as_mut(), &step.ids)?;
    write(batch.logit_rows.as_mut(), &step.logit_rows)?;
    let cols = batch.block_table_cols;
    for &TableBlock { table, index, block } in &step.new_blocks {
        batch.block_tables.as_mut()[table * cols + index] = block as i32;
    }
    let mut row = 0;
    for (s, sequence) in step.sequences.iter().enumerate() {
        let blocks = &batch.block_tables.as_ref()[sequence.table * cols..];
        for token in 0..sequence.rows {
            let position = sequence.start + token;
            let block = blocks[position / BLOCK_TOKENS] as usize;
            let slot = block * BLOCK_TOKENS + position % BLOCK_TOKENS;
            batch.slots.as_mut()[row + token] = slot as i32;
            batch.positions.as_mut()[row + token] = position as i32;
            batch.rope_rows.as_mut()[row + token] = (sequence.rope_start + token) as i32;
            if let (Some(to), Some(scales)) = (&mut batch.q_scale, &batch.q_scales) {
                to.as_mut()[row + token] = scales.as_ref()[position];
            }
        }
        batch.row_starts.as_mut()[s] = row as i32;
        batch.context_lens.as_mut()[s] = sequence.context() as i32;
        batch.tables.as_mut()[s] = sequence.table as i32;
        row += sequence.rows;
    }
    batch.row_starts.as_mut()[step.sequences.len()] = row as i32;
    Ok(())
}

/// [T] token ids.
pub fn ids<B: Backend<Ints: AsRef<[i32]>>>(batch: &Batch<B>) -> Result<&[i32], ShapeError> {
    first("embed", "ids", batch.ids.as_ref(), batch.tokens)
}

/// [T] rows of a cos/sin table with `table_rows`.
pub fn rope_rows<B: Backend<Ints: AsRef<[i32]>>>(
    batch: &Batch<B>,
    table_rows: usize,
) -> Result<&[i32], ShapeError> {
    let rows = first("rotate_and_store", "rope_rows", batch.rope_rows.as_ref(), batch.tokens)?;
    below("rotate_and_store", "table row", rows, table_rows)?;
    Ok(rows)
}

/// [T] the factor on each query.
pub fn q_scale<B: Backend<Floats: AsRef<[f32]>>>(
    batch: &Batch<B>,
) -> Result<Option<&[f32]>, ShapeError> {
    let scale = batch.q_scale.as_ref();
    scale.map(|s| first("rotate_and_store", "q_scale", s.as_ref(), batch.tokens)).transpose()
}

/// [T] slots of a cache with `blocks` blocks.
pub fn slots<B: Backend<Ints: AsRef<[i32]>>>(
    batch: &Batch<B>,
    blocks: usize,
) -> Result<&[i32], ShapeError> {
    let slots = first("rotate_and_store", "slots", batch.slots.as_ref(), batch.tokens)?;
    below("rotate_and_store", "slot", slots, blocks * BLOCK_TOKENS)?;
    Ok(slots)
}

/// [len] rows of a tensor with `rows` rows whose logits are wanted.
pub fn logit_rows<B: Backend<Ints: AsRef<[i32]>>>(
    batch: &Batch<B>,
    range: Range<usize>,
    rows: usize,
) -> Result<&[i32], ShapeError> {
    let wanted = first("gather_rows", "logit_rows", batch.logit_rows.as_ref(), range.end)?;
    let wanted = &wanted[range];
    below("gather_rows", "logit row", wanted, rows)?;
    Ok(wanted)
}

/// Pairs by place, and where each expert's begin there, every index within the step's tokens.
pub fn expert_pairs<B: Backend<Ints: AsRef<[i32]>>>(
    routes: &Routes<B>,
) -> Result<(&[i32], &[i32]), ShapeError> {
    const OP: &str = "expert_linear";
    let count = routes.pairs();
    let pairs = first(OP, "pairs", routes.pairs.as_ref(), count)?;
    below(OP, "pair", pairs, count)?;
    let starts = first(OP, "starts", routes.starts.as_ref(), routes.routing.experts + 1)?;
    below(OP, "start", starts, count + 1)?;
    let ends = starts.first() == Some(&0) && starts.last() == Some(&(count as i32));
    ensure(OP, ends && starts.is_sorted(), || {
        format!("starts of experts do not rise from 0 to {count} pairs")
    })?;
    Ok((pairs, starts))
}

/// [T k] the place of each pair.
pub fn expert_places<B: Backend<Ints: AsRef<[i32]>>>(
    routes: &Routes<B>,
) -> Result<&[i32], ShapeError> {
    let places = first("combine", "places", routes.places.as_ref(), routes.pairs())?;
    below("combine", "place", places, routes.pairs())?;
    Ok(places)
}

/// Orders pairs by their experts: what `route` leaves beside `chosen` and the weights.
pub fn sort_pairs<B: Backend<Ints: AsMut<[i32]>>>(
    routes: &mut Routes<B>,
) -> Result<(), ShapeError> {
    let count = routes.pairs();
    let Routes { chosen, pairs, places, starts, routing, .. } = routes;
    let room = |buffer: &mut B::Ints, len: usize| {
        let has = buffer.as_mut().len();
        ensure("route", len <= has, || format!("{len} indices in a buffer of {has}"))
    };
    for buffer in [&mut *chosen, &mut *pairs, &mut *places] {
        room(buffer, count)?;
    }
    room(starts, routing.experts + 1)?;
    let (chosen, starts) = (&chosen.as_mut()[..count], &mut starts.as_mut()[..=routing.experts]);
    below("route", "expert", chosen, routing.experts)?;
    let (pairs, places) = (pairs.as_mut(), places.as_mut());
    starts.fill(0);
    for &expert in chosen {
        starts[expert as usize + 1] += 1;
    }
    for expert in 0..routing.experts {
        starts[expert + 1] += starts[expert];
    }
    // Each start moves to its expert's end while that fills, and is the next one's start then.
    for (pair, &expert) in chosen.iter().enumerate() {
        let place = &mut starts[expert as usize];
        (pairs[*place as usize], places[pair]) = (pair as i32, *place);
        *place += 1;
    }
    starts.copy_within(..routing.experts, 1);
    starts[0] = 0;
    Ok(())
}

/// One sequence's part of a batch.
#[derive(Clone, Debug)]
pub struct BatchSequence<'a> {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Position of the first of `rows`.
    pub start: usize,
    /// Block ids, exactly those that hold the context.
    pub blocks: &'a [i32],
}

/// The batch's sequences, every index within a cache of `blocks` blocks.
pub fn sequences<B: Backend<Ints: AsRef<[i32]>>>(
    batch: &Batch<B>,
    blocks: usize,
) -> Result<Vec<BatchSequence<'_>>, ShapeError> {
    const OP: &str = "attention";
    let (tokens, count, cols) = (batch.tokens, batch.sequences, batch.block_table_cols);
    let starts = first(OP, "row_starts", batch.row_starts.as_ref(), count + 1)?;
    below(OP, "row start", starts, tokens + 1)?;
    let ends = starts[0] == 0 && starts[count] as usize == tokens;
    ensure(OP, ends && starts.is_sorted(), || {
        format!("row_starts {starts:?} do not rise from 0 to {tokens}")
    })?;
    let lens = first(OP, "context_lens", batch.context_lens.as_ref(), count)?;
    below(OP, "context length", lens, cols * BLOCK_TOKENS + 1)?;
    let tables = first(OP, "tables", batch.tables.as_ref(), count)?;
    let all_blocks = batch.block_tables.as_ref();
    below(OP, "table", tables, all_blocks.len() / cols.max(1))?;
    let positions = first(OP, "positions", batch.positions.as_ref(), tokens)?;
    let mut found = Vec::with_capacity(count);
    for s in 0..count {
        let rows = starts[s] as usize..starts[s + 1] as usize;
        let context = lens[s] as usize;
        ensure(OP, rows.len() <= context, || {
            format!("sequence {s} has {} rows and a context of {context}", rows.len())
        })?;
        let start = context - rows.len();
        let in_order = positions[rows.clone()].iter().zip(start..).all(|(&p, q)| p == q as i32);
        ensure(OP, in_order, || {
            format!("positions of sequence {s} do not run from {start} to {context}")
        })?;
        let table = &all_blocks[tables[s] as usize * cols..][..context.div_ceil(BLOCK_TOKENS)];
        below(OP, "block", table, blocks)?;
        found.push(BatchSequence { rows, start, blocks: table });
    }
    Ok(found)
}
