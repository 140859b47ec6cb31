//! The conversation format of the original Qwen, which came as code instead of a template.
//!
//! It looks like ChatML, but role, newline and content are tokenized apart, so that no token spans
//! them. Tools and roles beyond system, user and assistant do not exist here. With the template
//! variable `max_window_size` (tokens), the oldest exchanges are left out until the system message
//! and the history fit below it, as the published chat function does.

use crate::chat::{Chat, Message};
use crate::error::TextError;
use crate::tokenizer::Vocabulary;

const SYSTEM: &str = "You are a helpful assistant.";
const START: &str = "<|im_start|>";
const END: &str = "<|im_end|>";

/// Text and its tokens side by side.
#[derive(Clone, Debug, Default)]
pub struct Composed {
    pub text: String,
    pub ids: Vec<u32>,
}

impl Composed {
    fn append(&mut self, other: &Self) {
        self.text.push_str(&other.text);
        self.ids.extend(&other.ids);
    }

    fn text(&mut self, vocabulary: &Vocabulary, text: &str) -> Result<(), TextError> {
        self.text.push_str(text);
        self.ids.extend(vocabulary.encode_protected(text)?);
        Ok(())
    }

    fn special(&mut self, vocabulary: &Vocabulary, token: &str) -> Result<(), TextError> {
        self.text.push_str(token);
        self.ids.push(vocabulary.specials.id(token).ok_or(TextError::NoTemplate)?);
        Ok(())
    }
}

/// The whole conversation.
pub fn compose(chat: &Chat, vocabulary: &Vocabulary) -> Result<Composed, TextError> {
    if chat.tools.is_some() || chat.messages.iter().any(|message| message.tool_calls.is_some()) {
        return Err(TextError::Refused("the original Qwen chat format has no tools".to_owned()));
    }
    let (system, turns) = match chat.messages.split_first() {
        Some((first, rest)) if first.role == "system" => (first.content.as_str(), rest),
        _ => (SYSTEM, chat.messages.as_slice()),
    };
    let mut all = message(vocabulary, &Message::new("system", system))?;
    let last_user = turns.iter().rposition(|turn| turn.role == "user").unwrap_or(0);
    let (history, tail) = turns.split_at(last_user);
    let history = exchanges(vocabulary, history)?;
    let window = window(chat)?;
    let mut size = all.ids.len();
    let fits = |exchange: &&Composed| {
        size += exchange.ids.len();
        size < window
    };
    let kept = history.iter().rev().take_while(fits).count();
    history[history.len() - kept..].iter().for_each(|exchange| all.append(exchange));
    for turn in tail {
        all.append(&following(vocabulary, turn)?);
    }
    if chat.continue_final_message {
        // The last message stays open.
        all.ids.pop();
        all.text.truncate(all.text.len() - END.len());
        return Ok(all);
    }
    all.text(vocabulary, "\n")?;
    if chat.add_generation_prompt {
        all.special(vocabulary, START)?;
        all.text(vocabulary, "assistant")?;
        all.text(vocabulary, "\n")?;
    }
    Ok(all)
}

/// The bound on system message and history, in tokens.
fn window(chat: &Chat) -> Result<usize, TextError> {
    let Some(value) = chat.args.get("max_window_size") else { return Ok(usize::MAX) };
    value.as_u64().and_then(|size| usize::try_from(size).ok()).ok_or_else(|| {
        TextError::Refused(format!("max_window_size must be a number of tokens, not {value}"))
    })
}

/// Groups of messages that begin at a user's.
fn exchanges(vocabulary: &Vocabulary, turns: &[Message]) -> Result<Vec<Composed>, TextError> {
    let mut groups: Vec<Composed> = Vec::new();
    for turn in turns {
        let composed = following(vocabulary, turn)?;
        match groups.last_mut() {
            Some(group) if turn.role != "user" => group.append(&composed),
            _ => groups.push(composed),
        }
    }
    Ok(groups)
}

fn following(vocabulary: &Vocabulary, turn: &Message) -> Result<Composed, TextError> {
    if !matches!(turn.role.as_str(), "user" | "assistant") {
        return Err(TextError::Refused(format!(
            "role {:?} is unknown here; the original Qwen chat format has one system message \
             first, then user and assistant",
            turn.role
        )));
    }
    let mut composed = Composed::default();
    composed.text(vocabulary, "\n")?;
    composed.append(&message(vocabulary, turn)?);
    Ok(composed)
}

fn message(vocabulary: &Vocabulary, turn: &Message) -> Result<Composed, TextError> {
    let mut composed = Composed::default();
    composed.special(vocabulary, START)?;
    for part in [&turn.role, "\n", turn.content.as_str()] {
        composed.text(vocabulary, part)?;
    }
    composed.special(vocabulary, END)?;
    Ok(composed)
}
