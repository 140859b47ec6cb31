//! Cosine and sine tables of rotary position embedding, and the factors of logn attention.
//!
//! Frequencies and angles are rounded to f32 where the reference implementations round them, since
//! that is what the models were trained with; the functions themselves are taken in f64.
//!
//! Original Qwen's dynamic NTK raises the base with the length of the *prompt*, and keeps it while
//! decoding. The few bases that a context allows each get a table; the tables are stacked, and a
//! sequence's rows begin where its table does.

use crate::config::{DecoderConfig, Rope, RopeScaling};
use std::f64::consts::TAU;

/// Which rows of the stacked tables a sequence reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeTables {
    /// Rows of one table: positions 0, 1, 2 …
    positions: usize,
    /// Prompts longer than this have a table of another base.
    dynamic_ntk: Option<usize>,
}

impl RopeTables {
    /// Tables for sequences of up to `positions` tokens.
    pub fn new(rope: &Rope, positions: usize) -> Self {
        Self { positions, dynamic_ntk: rope.dynamic_ntk }
    }

    pub fn count(&self) -> usize {
        self.index(self.positions) + 1
    }

    /// Rows of all tables together.
    pub fn rows(&self) -> usize {
        self.count().saturating_mul(self.positions)
    }

    /// The row of position 0 for a sequence whose prompt has `prompt_len` tokens.
    pub fn first_row(&self, prompt_len: usize) -> usize {
        self.index(prompt_len.min(self.positions)) * self.positions
    }

    /// The doublings of the trained length that hold `tokens`.
    fn index(&self, tokens: usize) -> usize {
        let Some(trained) = self.dynamic_ntk else { return 0 };
        match tokens.div_ceil(trained.max(1)) {
            0 | 1 => 0,
            times => (times - 1).ilog2() as usize + 1,
        }
    }

    /// [rows, D] row-major: D/2 cosines, then D/2 sines.
    pub fn cos_sin(&self, config: &DecoderConfig) -> Vec<f32> {
        let mut values = Vec::with_capacity(self.rows() * config.head_dim);
        for index in 0..self.count() {
            // alpha of the published code: 2^ceil(log2(n / trained) + 1) - 1.
            let alpha = ((2u64 << index) - 1) as f64;
            let frequencies = frequencies(&config.rope, config.head_dim, alpha);
            let scale = attention_factor(&config.rope);
            for position in 0..self.positions {
                let angle = |frequency: &f32| f64::from(position as f32 * frequency);
                values.extend(frequencies.iter().map(|f| (angle(f).cos() * scale) as f32));
                values.extend(frequencies.iter().map(|f| (angle(f).sin() * scale) as f32));
            }
        }
        values
    }
}

/// The factor on the query at `position` (from 0) of a model trained on `trained` tokens: the
/// logarithm of the number of keys to the base `trained`, never below 1.
pub fn logn(position: usize, trained: usize) -> f32 {
    let keys = position + 1;
    if keys > trained { ((keys as f64).ln() / (trained as f64).ln()) as f32 } else { 1.0 }
}

/// [D/2] angles per position.
fn frequencies(rope: &Rope, dim: usize, alpha: f64) -> Vec<f32> {
    let d = dim as f64;
    let base = if alpha > 1.0 { rope.base * alpha.powf(d / (d - 2.0)) } else { rope.base };
    let plain = |pair: usize| base.powf(-(2.0 * pair as f64) / d);
    let scaled = |pair: usize| match &rope.scaling {
        RopeScaling::None => plain(pair),
        RopeScaling::Linear { factor } => plain(pair) / factor,
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } => {
            // The pair that turns `turns` times within the trained context.
            let pair_of = |turns: f64| {
                d * (*original_context as f64 / (turns * TAU)).ln() / (2.0 * base.ln())
            };
            let (mut low, mut high) = (pair_of(*beta_fast), pair_of(*beta_slow));
            if *truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let (low, high) = (low.max(0.0), high.min(d - 1.0));
            let width = if low == high { 0.001 } else { high - low };
            let stretched = ((pair as f64 - low) / width).clamp(0.0, 1.0);
            plain(pair) * (1.0 - stretched) + plain(pair) / factor * stretched
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let turns = *original_context as f64 * plain(pair) / TAU;
            let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            let kept = kept.clamp(0.0, 1.0);
            plain(pair) * kept + plain(pair) / factor * (1.0 - kept)
        }
        RopeScaling::Divisors(divisors) => plain(pair) / f64::from(divisors[pair]),
    };
    (0..dim / 2).map(|pair| scaled(pair) as f32).collect()
}

/// YaRN scales cosines and sines, and so the attention logits by its square.
fn attention_factor(rope: &Rope) -> f64 {
    match rope.scaling {
        RopeScaling::Yarn { attention_factor, .. } => attention_factor,
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(base: f64, scaling: RopeScaling) -> Rope {
        Rope { base, scaling, dynamic_ntk: None }
    }

    #[test]
    fn plain_frequencies_are_a_geometric_series() {
        let plain = frequencies(&rope(10_000.0, RopeScaling::None), 8, 1.0);
        assert_eq!(plain, [1.0, 0.1, 0.01, 0.001]);
        let halved = frequencies(&rope(10_000.0, RopeScaling::Linear { factor: 2.0 }), 8, 1.0);
        assert_eq!(halved, [0.5, 0.05, 0.005, 0.0005]);
        let divisors = RopeScaling::Divisors(vec![1.0, 2.0, 4.0, 8.0]);
        let divided = frequencies(&rope(10_000.0, divisors), 8, 1.0);
        assert_eq!(divided, [1.0, 0.05, 0.0025, 0.000125]);
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_stretches_slow_ones() {
        let scaling = RopeScaling::Yarn {
            factor: 4.0,
            original_context: 32768,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 0.1 * 4f64.ln() + 1.0,
            truncate: true,
        };
        let plain = frequencies(&rope(1e6, RopeScaling::None), 128, 1.0);
        let yarn = frequencies(&rope(1e6, scaling.clone()), 128, 1.0);
        // By the paper's formula the ramp runs from pair 23 to pair 40.
        for pair in 0..64 {
            let ratio = plain[pair] / yarn[pair];
            let expected = match pair {
                0..=23 => 1.0,
                40.. => 4.0,
                _ => 1.0 / (1.0 - 0.75 * (pair as f32 - 23.0) / 17.0),
            };
            assert!((ratio - expected).abs() < 1e-5, "pair {pair}: {ratio}, not {expected}");
        }
        assert!((attention_factor(&rope(1e6, scaling)) - 1.1386).abs() < 1e-4);
    }

    #[test]
    fn llama3_keeps_fast_pairs_and_stretches_slow_ones() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let plain = frequencies(&rope(5e5, RopeScaling::None), 128, 1.0);
        let got = frequencies(&rope(5e5, scaling), 128, 1.0);
        for pair in 0..64 {
            let wavelength = std::f32::consts::TAU / plain[pair];
            let ratio = plain[pair] / got[pair];
            if wavelength < 2048.0 {
                assert_eq!(ratio, 1.0);
            } else if wavelength > 8192.0 {
                assert!((ratio - 8.0).abs() < 1e-5);
            } else {
                assert!((1.0..=8.0).contains(&ratio));
            }
        }
    }

    #[test]
    fn a_table_for_each_doubling_of_the_trained_length() {
        let ntk = Rope { base: 1e4, scaling: RopeScaling::None, dynamic_ntk: Some(48) };
        let tables = RopeTables::new(&ntk, 200);
        assert_eq!(tables.count(), 4);
        let first = |prompt| tables.first_row(prompt) / 200;
        assert_eq!([1, 48, 49, 96, 97, 192, 193, 200].map(first), [0, 0, 1, 1, 2, 2, 3, 3]);
        let plain = RopeTables::new(&rope(1e4, RopeScaling::None), 200);
        assert_eq!((plain.count(), plain.first_row(150)), (1, 0));
        assert_eq!(RopeTables::new(&ntk, usize::MAX).rows(), usize::MAX);
    }

    #[test]
    fn the_base_follows_the_published_rule() {
        // 1e4 · 3^(64/62) and pair 1 of 32.
        let base: f64 = 1e4 * 3f64.powf(64.0 / 62.0);
        let got = frequencies(&rope(1e4, RopeScaling::None), 64, 3.0);
        assert!((f64::from(got[1]) - base.powf(-2.0 / 64.0)).abs() < 1e-7);
    }

    #[test]
    fn logn_begins_past_the_trained_length() {
        assert_eq!(logn(0, 48), 1.0);
        assert_eq!(logn(47, 48), 1.0);
        assert!((logn(48, 48) - (49f32.ln() / 48f32.ln())).abs() < 1e-6);
        assert!((logn(48 * 48 - 1, 48) - 2.0).abs() < 1e-6);
    }
}
