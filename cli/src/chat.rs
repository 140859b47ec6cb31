//! `lockstep chat`: a conversation in the terminal with a running router.

use std::io::{Write, stdout};

use anyhow::{Context, Result, bail};
use clap::Args;
use proto::v1::{
    ChatRequest, ListModelsRequest, Message, Sampling, inference_client::InferenceClient,
};
use rustyline::{DefaultEditor, error::ReadlineError};
use tonic::{Code, transport::Channel};

use crate::client;

/// Flags of `chat`.
#[derive(Args)]
pub struct ChatArgs {
    /// The router's gRPC address
    #[arg(long, default_value = "http://127.0.0.1:8001", env = "LOCKSTEP_ROUTER")]
    router: String,
    /// [default: the only model served]
    #[arg(long, env = "LOCKSTEP_MODEL")]
    model: Option<String>,
    /// The system prompt
    #[arg(long, env = "LOCKSTEP_SYSTEM")]
    system: Option<String>,
    /// New tokens of an answer, at most
    #[arg(long, env = "LOCKSTEP_MAX_TOKENS")]
    max_tokens: Option<u32>,
    /// 0 is greedy [default: the model's]
    #[arg(long, env = "LOCKSTEP_TEMPERATURE")]
    temperature: Option<f32>,
    /// Same seed, same answers [default: drawn by the router]
    #[arg(long, env = "LOCKSTEP_SEED")]
    seed: Option<u64>,
}

const HELP: &str = "/system TEXT sets the system prompt, /reset forgets the conversation, /quit \
                    ends; Ctrl-C stops an answer, Ctrl-D ends";

pub fn main(args: ChatArgs) -> Result<()> {
    crate::runtime()?.block_on(run(args))
}

async fn run(args: ChatArgs) -> Result<()> {
    let mut client = client::connect(&args.router).await?;
    let model = match args.model {
        Some(model) => model,
        None => only_model(&mut client).await?,
    };
    eprintln!("{model}; {HELP}");
    let sampling = Sampling {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        seed: args.seed,
        ..Sampling::default()
    };
    let mut chat = Conversation { client, model, sampling, system: args.system, turns: Vec::new() };
    let mut editor = DefaultEditor::new().context("cannot read the terminal")?;
    loop {
        let line = match tokio::task::block_in_place(|| editor.readline("> ")) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => {
                eprintln!("Ctrl-D ends");
                continue;
            }
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error).context("cannot read the terminal"),
        };
        let line = line.trim();
        if line.is_empty() {
            continue;
        }
        // Only history is lost where the line cannot be kept.
        let _kept = editor.add_history_entry(line);
        match Input::read(line) {
            Input::Quit => return Ok(()),
            Input::Reset => {
                chat.turns.clear();
                eprintln!("forgotten");
            }
            Input::System(text) => {
                chat.system = (!text.is_empty()).then(|| text.to_owned());
                eprintln!("system prompt {}", if text.is_empty() { "removed" } else { "set" });
            }
            Input::Unknown(word) => eprintln!("no command {word}; {HELP}"),
            Input::Say(text) => {
                if let Err(error) = chat.say(text).await {
                    eprintln!("error: {error:#}");
                }
            }
        }
    }
}

#[derive(Debug, PartialEq)]
enum Input<'a> {
    Say(&'a str),
    System(&'a str),
    Reset,
    Quit,
    Unknown(&'a str),
}

impl<'a> Input<'a> {
    fn read(line: &'a str) -> Self {
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match word {
            "/system" => Self::System(rest.trim()),
            "/reset" => Self::Reset,
            "/quit" | "/exit" => Self::Quit,
            _ if word.starts_with('/') => Self::Unknown(word),
            _ => Self::Say(line),
        }
    }
}

async fn only_model(client: &mut InferenceClient<Channel>) -> Result<String> {
    let listed = client.list_models(ListModelsRequest {}).await.map_err(client::explain)?;
    let models: Vec<_> = listed.into_inner().models.into_iter().map(|model| model.id).collect();
    match models.as_slice() {
        [only] => Ok(only.clone()),
        [] => bail!("the router serves no model yet; is a worker ready?"),
        several => bail!("several models are served; choose one with --model: {several:?}"),
    }
}

struct Conversation {
    client: InferenceClient<Channel>,
    model: String,
    sampling: Sampling,
    system: Option<String>,
    turns: Vec<Message>,
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.into(), content: content.into(), ..Message::default() }
}

impl Conversation {
    /// Sends a message and shows the answer as it comes. What failed is not remembered.
    async fn say(&mut self, text: &str) -> Result<()> {
        self.turns.push(message("user", text));
        let answer = self.answer().await;
        match answer {
            Ok(answer) => {
                self.turns.push(message("assistant", &answer));
                Ok(())
            }
            Err(error) => {
                self.turns.pop();
                Err(error)
            }
        }
    }

    async fn answer(&mut self) -> Result<String> {
        let system = self.system.iter().map(|text| message("system", text));
        let request = ChatRequest {
            model: self.model.clone(),
            messages: system.chain(self.turns.iter().cloned()).collect(),
            sampling: Some(self.sampling.clone()),
            ..ChatRequest::default()
        };
        let mut answer = String::new();
        let interrupted = tokio::signal::ctrl_c();
        tokio::pin!(interrupted);
        let mut stream = tokio::select! {
            opened = self.client.chat(request) => opened.map_err(client::explain)?.into_inner(),
            _ = &mut interrupted => bail!("stopped"),
        };
        loop {
            tokio::select! {
                part = stream.message() => match part {
                    Ok(Some(part)) => {
                        answer.push_str(&part.text);
                        show(&part.text)?;
                    }
                    Ok(None) => break,
                    Err(status) if status.code() == Code::Cancelled => break,
                    Err(status) => {
                        println!();
                        return Err(client::explain(status));
                    }
                },
                // Dropping the stream is what stops the answer.
                _ = &mut interrupted => {
                    show(" …")?;
                    break;
                }
            }
        }
        println!();
        Ok(answer)
    }
}

fn show(text: &str) -> Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("standard output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_unless_they_begin_with_a_slash() {
        assert_eq!(Input::read("hello /reset"), Input::Say("hello /reset"));
        assert_eq!(Input::read("/system  Be brief. "), Input::System("Be brief."));
        assert_eq!(Input::read("/system"), Input::System(""));
        assert_eq!(Input::read("/reset"), Input::Reset);
        assert_eq!(Input::read("/rest"), Input::Unknown("/rest"));
    }
}
