//! A plan's way through the device: launched, and finished later, so that another may be launched
//! behind it.

use super::{
    ModelShard, Runner,
    batch::{WantedRow, wanted_rows},
    results::{Results, is_answered, samples},
};
use crate::{ModelError, decoder::Context, sampler::penalizes};
use collective::Collective;
use engine::plan::{Chunk, StepOutput, StepPlan, Tokens, Want};
use kernels::Backend;

/// A plan that was launched, whose tokens come later.
pub(super) struct Launched {
    plan: StepPlan,
    rows: Vec<WantedRow>,
}

/// A plan that was launched and not finished.
pub(super) struct InFlight<B: Backend> {
    /// Behind its work; `None` where there is none.
    mark: Option<B::Mark>,
    /// `None` where `output` is all of it.
    launched: Option<Launched>,
    output: StepOutput,
}

impl<B: Backend> InFlight<B> {
    fn done(output: StepOutput) -> Self {
        Self { mark: None, launched: None, output }
    }
}

impl<B: Backend, C: Collective<B>> Runner<B, C> {
    /// Runs the next plan to its end. Every rank must be given the same one. The output means
    /// something on rank 0 only.
    ///
    /// # Errors
    /// As [`Self::launch`] and [`Self::finish`].
    pub fn step(&mut self, plan: &StepPlan) -> Result<StepOutput, ModelError> {
        self.launch(plan)?;
        self.finish()
    }

    /// Plans that were launched and not finished.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether a plan may follow one that is in flight: the device knows what it sampled.
    pub fn runs_ahead(&self) -> bool {
        self.model.device.keeps_sampled()
    }

    /// Whether `plan` can be launched while the one before it is in flight: whatever it goes on
    /// with is on the device.
    pub fn follows(&self, plan: &StepPlan) -> bool {
        self.runs_ahead() && self.is_on_device(plan)
    }

    /// Whether all that `plan` wants is chosen on the device, at once, and hangs on no token that
    /// the host does not know.
    fn is_on_device(&self, plan: &StepPlan) -> bool {
        let rows: usize = plan.chunks.iter().map(wanted_rows).sum();
        let answers = |chunk: &Chunk| {
            let admitted = chunk.admission.as_ref().map(|admission| &admission.params);
            let known = self.sequences.get(&chunk.sequence).map(|sequence| &sequence.params);
            let Some(params) = admitted.or(known) else { return false };
            let looks_back = chunk.tokens == Tokens::LastSampled && penalizes(params);
            wanted_rows(chunk) == 0 || (is_answered(chunk, params) && !looks_back)
        };
        let answered = self.sampler.is_none() || plan.chunks.iter().all(answers);
        rows <= self.logit_rows_max && answered
    }

    /// Begins to run the next plan.
    ///
    /// # Errors
    /// `Plan` for a plan that cannot be right, before anything is run; otherwise what failed of the
    /// device or the group, after which this rank is of no further use.
    pub fn launch(&mut self, plan: &StepPlan) -> Result<(), ModelError> {
        self.limits.check(plan, self.next_number, &self.sequences)?;
        let later = self.follows(plan);
        if !self.in_flight.is_empty() && !later {
            return Err(ModelError::Plan {
                number: plan.number,
                reason: "it follows another that is not finished".into(),
            });
        }
        self.next_number += 1;
        self.update_sequences(plan);
        if plan.chunks.is_empty() {
            let output = StepOutput { number: plan.number, ..StepOutput::default() };
            self.in_flight.push_back(InFlight::done(output));
            return Ok(());
        }
        let rows = self.graph_rows(plan);
        let Self { model: ModelShard { device, .. }, batch, sequences, on_device, .. } = self;
        batch.prepare(plan, sequences, rows, device.keeps_sampled())?;
        let answered = match on_device {
            Some(room) => batch.ask(device, room, plan, sequences)?,
            None => vec![false; batch.wanted.len()],
        };
        batch.lay_out(device)?;
        self.forward(rows)?;
        let step = match later {
            true => self.sample(plan, rows.is_some())?,
            false => InFlight::done(self.read_logits(plan, &answered, rows.is_some())?),
        };
        self.share(plan)?;
        self.group.end_step(&self.model.device)?;
        let mark = Some(self.model.device.mark()?);
        self.in_flight.push_back(InFlight { mark, ..step });
        Ok(())
    }

    /// Waits for the oldest plan in flight.
    ///
    /// # Errors
    /// What failed of the device or the group, after which this rank is of no further use; `Plan`
    /// where none is in flight.
    pub fn finish(&mut self) -> Result<StepOutput, ModelError> {
        let none =
            || ModelError::Plan { number: self.next_number, reason: "no plan is in flight".into() };
        let InFlight { mark, launched, output } = self.in_flight.pop_front().ok_or_else(none)?;
        let Some(mark) = mark else { return Ok(output) };
        // First: what the group knows explains why a device does not finish.
        self.group.check(&self.model.device)?;
        self.model.device.wait(mark)?;
        let (Some(Launched { plan, rows }), Some(sampler)) = (launched, &mut self.sampler) else {
            return Ok(output);
        };
        let answers = match &mut self.on_device {
            Some(room) if !rows.is_empty() => self.model.device.answers(room)?,
            _ => Vec::new(),
        };
        let mut results = Results::new(&plan, sampler, &mut self.sequences);
        for (row, answer) in rows.into_iter().zip(answers) {
            results.answer(row, answer);
        }
        Ok(results.finish())
    }

    /// The layers; the logits of all rows too where the step is of a captured size.
    fn forward(&mut self, rows: Option<usize>) -> Result<(), ModelError> {
        let Self { model: ModelShard { device, decoder, .. }, group, kv, scratch, batch, .. } =
            self;
        let mut cx = Context { device: &*device, group, kv, scratch };
        let batch = &batch.batch;
        let Some(rows) = rows else { return decoder.forward(&mut cx, batch) };
        device.captured(batch, || {
            decoder.forward(&mut cx, batch)?;
            decoder.logits(&mut cx, batch, 0, rows)
        })
    }

    /// Begins to choose the tokens that are wanted, on rank 0.
    fn sample(&mut self, plan: &StepPlan, are_there: bool) -> Result<InFlight<B>, ModelError> {
        let Self { model, group, kv, scratch, batch, on_device, .. } = self;
        let ModelShard { device, decoder, .. } = model;
        let rows = batch.wanted.clone();
        let mut cx = Context { device: &*device, group, kv, scratch };
        match are_there {
            true => cx.scratch.set_logit_rows(rows.len()),
            false if rows.is_empty() => {}
            false => decoder.logits(&mut cx, &batch.batch, 0, rows.len())?,
        }
        if let Some(room) = on_device.as_mut().filter(|_| !rows.is_empty()) {
            device.sample(&mut batch.batch, room, cx.scratch.logits_mut(), 0)?;
        }
        let output = StepOutput { number: plan.number, ..StepOutput::default() };
        Ok(InFlight { mark: None, launched: Some(Launched { plan: plan.clone(), rows }), output })
    }

    /// What rank 0 sampled reaches the other ranks' devices, where they keep it.
    fn share(&mut self, plan: &StepPlan) -> Result<(), ModelError> {
        let samples = plan.chunks.iter().any(samples);
        if !samples || !self.model.device.keeps_sampled() || self.limits.world_size == 1 {
            return Ok(());
        }
        Ok(self.group.share(&self.model.device, &mut self.batch.batch.last_ids)?)
    }

    /// The size to which `plan` is padded, where all it does is to sample a token of each sequence
    /// and the device captures such steps.
    fn graph_rows(&self, plan: &StepPlan) -> Option<usize> {
        let decodes = |chunk: &Chunk| chunk.tokens.len() == 1 && chunk.want == Want::Sample;
        let rows = self.model.device.graph_rows(plan.chunks.len())?;
        let exchanged = rows * self.scratch.hidden_cols();
        let fits = rows <= self.logit_rows_max && self.group.is_captured(exchanged);
        (fits && plan.chunks.iter().all(decodes)).then_some(rows)
    }

    /// Computes the wanted logits, unless they are there, some rows at a time, and turns them into
    /// results.
    fn read_logits(
        &mut self,
        plan: &StepPlan,
        answered: &[bool],
        are_there: bool,
    ) -> Result<StepOutput, ModelError> {
        let Self { model: ModelShard { device, decoder, .. }, batch, scratch, limits, .. } = self;
        let mut cx = Context { device, group: &mut self.group, kv: &mut self.kv, scratch };
        let mut results =
            self.sampler.as_mut().map(|sampler| Results::new(plan, sampler, &mut self.sequences));
        let wanted = batch.wanted.clone();
        for first in (0..wanted.len()).step_by(self.logit_rows_max) {
            let rows = &wanted[first..wanted.len().min(first + self.logit_rows_max)];
            match are_there {
                true => cx.scratch.set_logit_rows(rows.len()),
                false => decoder.logits(&mut cx, &batch.batch, first, rows.len())?,
            }
            let Some(results) = &mut results else { continue };
            let answered = &answered[first..][..rows.len()];
            let answers = match &mut self.on_device {
                Some(room) if answered.contains(&true) => {
                    device.sample(&mut batch.batch, room, cx.scratch.logits_mut(), first)?;
                    device.answers(room)?.into_iter().map(Some).collect()
                }
                _ => vec![None; rows.len()],
            };
            // Read only where a row needs them.
            let logits = match answered.contains(&false) {
                true => cx.scratch.read_logits(cx.device)?,
                false => &[],
            };
            for (index, (&row, answer)) in rows.iter().zip(answers).enumerate() {
                match answer.filter(|_| answered[index]) {
                    Some(answer) => results.answer(row, answer),
                    None => results.push(row, &logits[index * limits.vocab..][..limits.vocab]),
                }
            }
        }
        let Some(results) = results else {
            return Ok(StepOutput { number: plan.number, ..StepOutput::default() });
        };
        let output = results.finish();
        if device.keeps_sampled() {
            batch.tell(device, plan, &output)?;
        }
        Ok(output)
    }
}
