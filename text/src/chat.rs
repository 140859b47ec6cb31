//! A conversation as a template sees it.

use serde_json::{Map, Value};

/// One turn of a conversation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message {
    /// Whatever the template knows: system, user, assistant, tool …
    pub role: String,
    pub content: String,
    /// The array of calls of an assistant's message.
    pub tool_calls: Option<Value>,
    /// Further fields that templates look at, e.g. `reasoning_content`, `name`, `tool_call_id`.
    pub extra: Map<String, Value>,
}

impl Message {
    /// A plain message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), ..Self::default() }
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

/// Turns `function.arguments` of each call from the JSON text that OpenAI clients send into the
/// object that templates print; what is no JSON object stays as it is.
pub fn parse_tool_arguments(tool_calls: &mut Value) {
    for call in tool_calls.as_array_mut().into_iter().flatten() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        if let Some(Ok(parsed @ Value::Object(_))) = arguments.as_str().map(serde_json::from_str) {
            *arguments = parsed;
        }
    }
}
