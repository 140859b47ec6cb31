//! A conversation as a client sent it.

use serde_json::{Map, Value};

/// What a message says; templates tell nothing, null and empty text apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Content {
    #[default]
    Absent,
    Null,
    Text(String),
}

impl Content {
    /// Nothing and null read as empty.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Absent | Self::Null => "",
            Self::Text(text) => text,
        }
    }
}

impl<T: Into<String>> From<T> for Content {
    fn from(text: T) -> Self {
        Self::Text(text.into())
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message {
    /// Whatever the template knows: system, user, assistant, tool …
    pub role: String,
    pub content: Content,
    /// The array of calls of an assistant's message, as OpenAI's API has it. Arguments may be JSON
    /// text or an object; templates see an object.
    pub tool_calls: Option<Value>,
    /// Further fields that templates look at, e.g. `reasoning_content`, `name`, `tool_call_id`.
    pub extra: Map<String, Value>,
}

impl Message {
    /// A plain message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Content::from(content), ..Self::default() }
    }
}

/// What a chat request says to the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chat {
    pub messages: Vec<Message>,
    /// The array of tool definitions.
    pub tools: Option<Value>,
    /// Further template variables, e.g. `enable_thinking`.
    pub args: Map<String, Value>,
    /// Whether the rendered text ends where the assistant begins.
    pub add_generation_prompt: bool,
    /// Whether it ends where the last message's text does, so that the answer goes on there.
    pub continue_final_message: bool,
}
