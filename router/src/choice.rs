//! One choice of an answer: token ids become text, watched for stop strings.
//!
//! Tokens that a stop string cut off are counted up to the one that completed it, and not shown; a
//! worker may have run ahead by then.

use crate::{
    RouterError,
    metrics::Waits,
    upstream::{Received, UpstreamStream},
};
use proto::v1::{Finish, Progress, TokenInfo};
use text::{Detokenizer, FinishReason, Piece, Reader};
use tokio::time::Instant;

/// Offsets count the echoed prompt in.
pub(crate) type Token = text::Token<TokenInfo>;

/// A piece of a choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Chunk {
    pub choice: u32,
    pub text: String,
    pub tokens: Vec<Token>,
    pub finish: Option<FinishReason>,
    /// Tokens sampled since the last chunk, shown or not.
    pub sampled: u32,
    /// Prompt tokens that came out of a worker's cache; on one chunk only.
    pub cached_tokens: u32,
    /// How far the choice has come towards its next token; alone in its chunk.
    pub progress: Option<Progress>,
}

/// The prompt in front of the answer.
pub(crate) struct Echo {
    pub ids: Vec<u32>,
    pub text: String,
    pub detokenizer: Detokenizer,
    /// Whether the worker scores the prompt, so that the echo waits for it.
    pub scored: bool,
    /// Nothing but the echo is wanted.
    pub alone: bool,
}

/// A choice being generated.
pub(crate) struct Choice {
    index: u32,
    stream: UpstreamStream,
    reader: Reader<TokenInfo>,
    echo: Option<Echo>,
    scores: Vec<TokenInfo>,
    /// First tokens that the client has, not yet sampled again: their text is not told again.
    known: u32,
    clock: Clock,
}

/// Measures the waits for tokens.
struct Clock {
    waits: Waits,
    last: Instant,
    began: bool,
}

impl Clock {
    fn tick(&mut self) {
        let since = self.last.elapsed();
        match self.began {
            true => self.waits.next_token.observe(since.as_secs_f64()),
            false => self.waits.first_token.observe(since.as_secs_f64()),
        }
        self.began = true;
        self.last = Instant::now();
    }
}

impl Choice {
    /// The client has the text of the first `known` tokens.
    pub fn new(
        (index, known): (u32, u32),
        stream: UpstreamStream,
        reader: Reader<TokenInfo>,
        echo: Option<Echo>,
        waits: Waits,
    ) -> Self {
        Self {
            index,
            stream,
            reader,
            echo,
            scores: Vec::new(),
            known,
            clock: Clock { waits, last: Instant::now(), began: false },
        }
    }

    /// Finds a worker. Nothing is wanted of one where an unscored prompt is all there is to echo.
    pub async fn open(&mut self) -> Result<(), RouterError> {
        match &self.echo {
            Some(Echo { alone: true, scored: false, .. }) => Ok(()),
            _ => self.stream.open().await,
        }
    }

    /// The next piece; the one with `finish` is the last.
    pub async fn next(&mut self) -> Result<Chunk, RouterError> {
        if self.echo.as_ref().is_some_and(|echo| !echo.scored) {
            let mut chunk = Chunk { choice: self.index, ..Chunk::default() };
            let alone = self.tell_prompt(&mut chunk)?;
            chunk.finish = alone.then_some(FinishReason::Length);
            return Ok(chunk);
        }
        loop {
            let Some(received) = self.stream.next().await? else {
                return Err(RouterError::Internal("a choice ended without its finish".into()));
            };
            if received.progress.is_some() {
                let (choice, progress) = (self.index, received.progress);
                return Ok(Chunk { choice, progress, ..Chunk::default() });
            }
            let chunk = self.advance(received)?;
            let news = chunk.sampled > 0 || chunk.cached_tokens > 0 || !chunk.tokens.is_empty();
            if news || chunk.finish.is_some() {
                return Ok(chunk);
            }
        }
    }

    fn advance(&mut self, received: Received) -> Result<Chunk, RouterError> {
        let Received { prompt, tokens, finish, cached_tokens, .. } = received;
        let mut chunk = Chunk { choice: self.index, cached_tokens, ..Chunk::default() };
        self.scores.extend(prompt);
        if let Some(echo) = &self.echo {
            let begins = !tokens.is_empty() || finish.is_some();
            if !begins && self.scores.len() < echo.ids.len() {
                return Ok(chunk);
            }
            if self.tell_prompt(&mut chunk)? {
                chunk.finish = Some(FinishReason::Length);
                return Ok(chunk);
            }
        }
        if !tokens.is_empty() {
            self.clock.tick();
        }
        self.read(tokens, finish, &mut chunk);
        Ok(chunk)
    }

    /// Takes new tokens, in order, up to the finish or a stop string.
    fn read(&mut self, tokens: Vec<TokenInfo>, finish: Option<Finish>, chunk: &mut Chunk) {
        let last = tokens.len().wrapping_sub(1);
        let (mut piece, mut told) = (Piece::default(), Piece::default());
        let (mut end, mut stopped) = (None, false);
        for (at, info) in tokens.into_iter().enumerate() {
            chunk.sampled += 1;
            if finish == Some(Finish::Stop) && at == last {
                end = Some((info.id, info));
                break;
            }
            let piece = if self.known > 0 { &mut told } else { &mut piece };
            self.known = self.known.saturating_sub(1);
            stopped = self.reader.push(info.id, info, piece);
            if stopped {
                break;
            }
        }
        chunk.finish = match finish {
            _ if stopped => Some(FinishReason::Stop),
            Some(finish) => {
                let stopped = self.reader.finish(end, &mut piece);
                let length = finish == Finish::Length && !stopped;
                Some(if length { FinishReason::Length } else { FinishReason::Stop })
            }
            None => None,
        };
        chunk.text += &piece.text;
        chunk.tokens.append(&mut piece.tokens);
    }

    /// The echo; true when nothing else is wanted.
    fn tell_prompt(&mut self, chunk: &mut Chunk) -> Result<bool, RouterError> {
        let Some(mut echo) = self.echo.take() else { return Ok(false) };
        let mut scores = std::mem::take(&mut self.scores);
        if echo.scored {
            // The first token follows nothing: a worker may leave it out.
            if scores.len() + 1 == echo.ids.len() {
                scores.insert(0, unscored(echo.ids[0]));
            }
            if !scores.iter().map(|score| score.id).eq(echo.ids.iter().copied()) {
                let (got, want) = (scores.len(), echo.ids.len());
                let message = format!("worker: scored {got} prompt tokens that are not the {want}");
                return Err(RouterError::Internal(message));
            }
        } else {
            scores = echo.ids.iter().map(|&id| unscored(id)).collect();
        }
        let mut offset = 0;
        for info in scores {
            let id = info.id;
            chunk.tokens.push(Token { info, offset, end: false });
            offset += echo.detokenizer.push(id).chars().count();
        }
        self.reader.begin_at(echo.text.chars().count());
        chunk.text += &echo.text;
        Ok(echo.alone)
    }
}

fn unscored(id: u32) -> TokenInfo {
    TokenInfo { id, logprob: None, top: Vec::new() }
}
