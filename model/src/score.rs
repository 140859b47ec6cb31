//! Perplexity of a text, by the rules of llama.cpp's `llama-perplexity`, so that figures compare.
//!
//! The text is cut into windows of `context` tokens that do not overlap; a rest shorter than that
//! is left out. Of each window only the second half counts, so that every counted token has at
//! least half a context before it. Where the vocabulary wants a beginning-of-text token, it takes
//! the place of the window's first. Pure: whoever runs the model hands in the logprobs.

/// Why a text cannot be scored.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum ScoreError {
    #[error("a text of {tokens} tokens is too short for windows of {context}: it needs {needed}")]
    Short { tokens: usize, context: usize, needed: usize },
    #[error("a context of {0} tokens leaves nothing to score: it needs 4")]
    Context(usize),
    #[error("a window of {context} tokens has {expected} scored tokens, not {found}")]
    Logprobs { context: usize, expected: usize, found: usize },
    #[error("the logprob of token {token} of window {window} is {value}")]
    NotFinite { window: usize, token: usize, value: f32 },
}

/// The windows of `tokens`, each of `context` tokens and ready to run.
///
/// # Errors
/// `Short` below two windows, as the original refuses; `Context` below 4.
pub fn windows(
    tokens: &[u32],
    context: usize,
    bos: Option<u32>,
) -> Result<Vec<Vec<u32>>, ScoreError> {
    if context < 4 {
        return Err(ScoreError::Context(context));
    }
    let needed = 2 * context;
    if tokens.len() < needed {
        return Err(ScoreError::Short { tokens: tokens.len(), context, needed });
    }
    let window = |chunk: &[u32]| {
        let mut window = chunk.to_vec();
        if let Some(bos) = bos {
            window[0] = bos;
        }
        window
    };
    Ok(tokens.chunks_exact(context).map(window).collect())
}

/// Sums over the windows seen so far.
#[derive(Clone, Debug)]
pub struct Perplexity {
    context: usize,
    windows: usize,
    count: usize,
    sum: f64,
    squares: f64,
}

impl Perplexity {
    /// For windows of `context` tokens.
    pub fn new(context: usize) -> Self {
        Self { context, windows: 0, count: 0, sum: 0.0, squares: 0.0 }
    }

    /// Adds one window: `logprobs[i]` is that of the window's token `i + 1`.
    ///
    /// # Errors
    /// `Logprobs` unless there are `context - 1`; `NotFinite` names the first that is no number.
    pub fn add(&mut self, logprobs: &[f32]) -> Result<(), ScoreError> {
        let (context, found) = (self.context, logprobs.len());
        let expected = context.saturating_sub(1);
        if found != expected {
            return Err(ScoreError::Logprobs { context, expected, found });
        }
        let counted = &logprobs[context / 2..];
        if let Some(at) = counted.iter().position(|logprob| !logprob.is_finite()) {
            let (window, token) = (self.windows, context / 2 + at + 1);
            return Err(ScoreError::NotFinite { window, token, value: counted[at] });
        }
        self.sum -= counted.iter().map(|&logprob| f64::from(logprob)).sum::<f64>();
        self.squares += counted.iter().map(|&logprob| f64::from(logprob).powi(2)).sum::<f64>();
        self.count += counted.len();
        self.windows += 1;
        Ok(())
    }

    /// Tokens counted.
    pub fn count(&self) -> usize {
        self.count
    }

    /// exp of the mean negative logprob; `None` before the first window.
    pub fn value(&self) -> Option<f64> {
        (self.count > 0).then(|| (self.sum / self.count as f64).exp())
    }

    /// The standard error of `value`, by the spread of the logprobs; `None` where they have none.
    pub fn error(&self) -> Option<f64> {
        let mean = self.sum / self.count as f64;
        let variance = self.squares / self.count as f64 - mean * mean;
        let known = self.count > 1 && variance > 0.0;
        known.then(|| (variance / (self.count as f64 - 1.0)).sqrt() * mean.exp())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_do_not_overlap_and_begin_as_the_vocabulary_wants() {
        let tokens: Vec<u32> = (0..19).collect();
        let plain = windows(&tokens, 8, None).unwrap();
        assert_eq!(plain, [(0..8).collect::<Vec<_>>(), (8..16).collect()]);
        let marked = windows(&tokens, 8, Some(99)).unwrap();
        assert_eq!(marked[1], [99, 9, 10, 11, 12, 13, 14, 15]);
    }

    #[test]
    fn short_texts_and_contexts_are_refused() {
        let tokens: Vec<u32> = (0..15).collect();
        let short = ScoreError::Short { tokens: 15, context: 8, needed: 16 };
        assert_eq!(windows(&tokens, 8, None), Err(short));
        assert_eq!(windows(&tokens, 3, None), Err(ScoreError::Context(3)));
        assert_eq!(windows(&tokens, 0, None), Err(ScoreError::Context(0)));
    }

    #[test]
    fn only_the_second_half_counts() {
        let mut perplexity = Perplexity::new(6);
        assert_eq!((perplexity.value(), perplexity.error()), (None, None));
        // The tokens 1, 2 and 3 of a window of 6 do not count.
        perplexity.add(&[-100.0, -100.0, -100.0, -1.0, -2.0]).unwrap();
        perplexity.add(&[-100.0, f32::NAN, -100.0, -3.0, -2.0]).unwrap();
        assert_eq!(perplexity.count(), 4);
        assert!((perplexity.value().unwrap() - 2.0f64.exp()).abs() < 1e-12);
        // Variance 0.5, three degrees of freedom.
        let error = (0.5f64 / 3.0).sqrt() * 2.0f64.exp();
        assert!((perplexity.error().unwrap() - error).abs() < 1e-12);
    }

    #[test]
    fn wrong_logprobs_are_refused() {
        let mut perplexity = Perplexity::new(6);
        let wrong = ScoreError::Logprobs { context: 6, expected: 5, found: 4 };
        assert_eq!(perplexity.add(&[-1.0; 4]), Err(wrong));
        let refused = perplexity.add(&[-1.0, -1.0, -1.0, -1.0, f32::NEG_INFINITY]);
        assert!(matches!(refused, Err(ScoreError::NotFinite { window: 0, token: 5, .. })));
        assert_eq!(perplexity.count(), 0);
    }
}
