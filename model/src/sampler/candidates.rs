//! Draws one token from a row of logits.
//!
//! Top-k, top-p and min-p each keep the head of the same order (likelier first, then the lower id),
//! so the row is never sorted: the few tokens near the peak are gathered first, and only where they
//! turn out not to hold the whole head, more. The draw walks what was kept in the order of ids.

use super::logits::{mass, weight};
use kernels::sampling::NextToken;
use std::cmp::Ordering;

/// How far below the peak to look for candidates, in temperatures: most rows need the first only.
const REACHES: [f32; 5] = [4.0, 8.0, 16.0, 32.0, f32::INFINITY];

/// Values summed together, or skipped together when none is a candidate.
const BLOCK: usize = 64;

/// One token that may be drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    pub id: u32,
    pub logit: f32,
    /// exp((logit - peak) / temperature).
    weight: f32,
}

impl Candidate {
    /// Likelier first; equally likely ones by id. Logits are finite here, or -infinity where the
    /// token is forbidden.
    fn order(&self, other: &Self) -> Ordering {
        let by_logit = other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal);
        by_logit.then(self.id.cmp(&other.id))
    }
}

/// Buffers for the candidates of one row.
#[derive(Default)]
pub struct Candidates {
    /// In the order of ids.
    kept: Vec<Candidate>,
    /// The same in whatever order finding a boundary leaves.
    shuffled: Vec<Candidate>,
    /// The mass of each block of a whole row.
    block_mass: Vec<f64>,
}

impl Candidates {
    /// One token of `row` at a temperature above 0; `uniform` in [0, 1).
    pub fn draw(&mut self, row: &[f32], peak: f32, next: &NextToken<'_>, uniform: f64) -> u32 {
        let NextToken { temperature, top_k, top_p, min_p, .. } = *next;
        let top_k = if (top_k as usize) < row.len() { top_k as usize } else { 0 };
        if top_k > 0 {
            self.gather_count(row, peak, temperature, top_k);
            self.keep_count(top_k);
        } else if top_p < 1.0 {
            let needed = f64::from(top_p) * mass(row, peak, temperature);
            self.gather_mass(row, peak, temperature, needed);
            self.keep_mass(needed);
        } else if min_p > 0.0 {
            // One unit of slack: the exact comparison is made on the weights below.
            self.gather(row, peak, temperature, 1.0 - min_p.ln());
        } else {
            return self.draw_from_all(row, peak, temperature, uniform);
        }
        if top_k > 0 && top_p < 1.0 {
            self.keep_mass(f64::from(top_p) * total(&self.kept));
        }
        self.kept.retain(|c| c.weight >= min_p);
        self.draw_from_kept(uniform)
    }

    /// The `count` likeliest tokens of `row`, best first.
    pub fn likeliest(&mut self, row: &[f32], peak: f32, count: usize) -> &[Candidate] {
        let count = count.min(row.len());
        self.kept.clear();
        if count > 0 {
            self.gather_count(row, peak, 1.0, count);
            self.keep_count(count);
            self.kept.sort_unstable_by(Candidate::order);
        }
        &self.kept
    }

    /// `kept` = every token at most `reach` temperatures below the peak.
    fn gather(&mut self, row: &[f32], peak: f32, temperature: f32, reach: f32) {
        self.kept.clear();
        let least = peak - reach * temperature;
        for (index, block) in row.chunks(BLOCK).enumerate() {
            if !block.iter().fold(false, |any, &logit| any | (logit >= least)) {
                continue;
            }
            let first = index * BLOCK;
            let near = block.iter().enumerate().filter(|(_, logit)| **logit >= least);
            self.kept.extend(near.map(|(offset, &logit)| Candidate {
                id: (first + offset) as u32,
                logit,
                weight: weight(logit, peak, temperature),
            }));
        }
    }

    /// `kept` holds the `count` likeliest tokens, and maybe others.
    fn gather_count(&mut self, row: &[f32], peak: f32, temperature: f32, count: usize) {
        for reach in REACHES {
            let least = peak - reach * temperature;
            let near: usize = row.iter().map(|&logit| usize::from(logit >= least)).sum();
            if near >= count {
                return self.gather(row, peak, temperature, reach);
            }
        }
    }

    /// `kept` holds the likeliest tokens that make up `needed`, and maybe others.
    fn gather_mass(&mut self, row: &[f32], peak: f32, temperature: f32, needed: f64) {
        for reach in REACHES {
            self.gather(row, peak, temperature, reach);
            if total(&self.kept) >= needed {
                return;
            }
        }
    }

    fn keep_count(&mut self, count: usize) {
        if self.kept.len() > count {
            self.shuffled.clone_from(&self.kept);
            let (_, last, _) = self.shuffled.select_nth_unstable_by(count - 1, Candidate::order);
            let last = *last;
            self.kept.retain(|c| c.order(&last).is_le());
        }
    }

    /// The shortest head whose mass is at least `needed`; all where rounding leaves none.
    fn keep_mass(&mut self, needed: f64) {
        self.shuffled.clone_from(&self.kept);
        // The head's last token is in `shuffled[low..high]`; `above` is the mass before `low`.
        let (mut low, mut high, mut above) = (0, self.shuffled.len(), 0.0);
        while high - low > 1 {
            let middle = (low + high) / 2;
            let part = &mut self.shuffled[low..high];
            let (head, ..) = part.select_nth_unstable_by(middle - low, Candidate::order);
            let mass = total(head);
            if above + mass >= needed {
                high = middle;
            } else {
                above += mass;
                low = middle;
            }
        }
        if let Some(&last) = self.shuffled.get(low) {
            self.kept.retain(|c| c.order(&last).is_le());
        }
    }

    fn draw_from_kept(&self, uniform: f64) -> u32 {
        let target = uniform * total(&self.kept);
        walk(self.kept.iter().map(|c| (c.id, c.weight)), 0.0, target)
    }

    /// From the whole row, block by block, without a list of candidates.
    fn draw_from_all(&mut self, row: &[f32], peak: f32, temperature: f32, uniform: f64) -> u32 {
        self.block_mass.clear();
        self.block_mass.extend(row.chunks(BLOCK).map(|block| mass(block, peak, temperature)));
        let target = uniform * self.block_mass.iter().sum::<f64>();
        let (mut before, mut chosen) = (0.0, 0);
        for (index, &mass) in self.block_mass.iter().enumerate().filter(|(_, mass)| **mass > 0.0) {
            chosen = index;
            if before + mass > target {
                break;
            }
            before += mass;
        }
        let first = chosen * BLOCK;
        let block = &row[first..row.len().min(first + BLOCK)];
        let weights = block
            .iter()
            .enumerate()
            .map(|(offset, &logit)| ((first + offset) as u32, weight(logit, peak, temperature)));
        walk(weights, before, target)
    }
}

/// The first token at which the running mass passes `target`, or the last that has any.
fn walk(weights: impl Iterator<Item = (u32, f32)>, before: f64, target: f64) -> u32 {
    let (mut sum, mut chosen) = (before, 0);
    for (id, weight) in weights.filter(|(_, weight)| *weight > 0.0) {
        chosen = id;
        sum += f64::from(weight);
        if sum > target {
            break;
        }
    }
    chosen
}

fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|c| f64::from(c.weight)).sum()
}
