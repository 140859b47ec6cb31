//! `lockstep chat`: a conversation in the terminal with a running router.

use std::io::{IsTerminal, Write, stdin, stdout};

use anyhow::{Context, Result, bail};
use clap::Args;
use proto::v1::{
    ChatRequest, ListModelsRequest, Message, Sampling, inference_client::InferenceClient,
};
use rustyline::{DefaultEditor, error::ReadlineError};
use tonic::transport::Channel;

use crate::{address, client, security::ToolTlsArgs};

/// Flags of `chat`.
#[derive(Args)]
pub struct ChatArgs {
    /// The router's gRPC address
    #[arg(long, value_parser = address::http, default_value = "http://127.0.0.1:8001",
        env = "LOCKSTEP_ROUTER")]
    router: String,
    /// The name of the model to ask for [default: the only one served]
    #[arg(long, env = "LOCKSTEP_NAME")]
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
    #[command(flatten)]
    tls: ToolTlsArgs,
}

const HELP: &str = "/system TEXT sets the system prompt, /reset forgets the conversation, /quit \
                    ends; Ctrl-C stops an answer, Ctrl-D ends";

pub fn main(args: ChatArgs) -> Result<()> {
    crate::runtime()?.block_on(run(args))
}

async fn run(args: ChatArgs) -> Result<()> {
    let mut client = client::connect(&args.router, &args.tls).await?;
    let model = match args.model {
        Some(model) => model,
        None => only_model(&mut client).await?,
    };
    let sampling = Sampling {
        max_tokens: args.max_tokens,
        temperature: args.temperature,
        seed: args.seed,
        ..Sampling::default()
    };
    let chat = Conversation { client, model, sampling, system: args.system, turns: Vec::new() };
    match stdin().is_terminal() {
        true => talk(chat).await,
        false => read(chat).await,
    }
}

/// Lines of a person: what goes wrong is told, and the next line is asked for.
async fn talk(mut chat: Conversation) -> Result<()> {
    eprintln!("{}; {HELP}", chat.model);
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
        if !line.trim().is_empty() {
            // Only history is lost where the line cannot be kept.
            let _kept = editor.add_history_entry(line.trim());
        }
        match chat.take(&line).await {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => eprintln!("error: {error:#}"),
        }
    }
}

/// Lines of a file or a pipe: the first that goes wrong ends all, since later ones build on it.
async fn read(mut chat: Conversation) -> Result<()> {
    let mut lines = stdin().lines();
    for number in 1.. {
        let Some(line) = tokio::task::block_in_place(|| lines.next()) else { break };
        let line = line.context("cannot read standard input")?;
        let at = || format!("line {number} of standard input");
        if !chat.take(&line).await.with_context(at)? {
            break;
        }
    }
    Ok(())
}

#[derive(Debug, PartialEq)]
enum Input<'a> {
    Nothing,
    Say(&'a str),
    System(&'a str),
    Reset,
    Quit,
    Unknown(&'a str),
}

impl<'a> Input<'a> {
    fn read(line: &'a str) -> Self {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match word {
            "/system" => Self::System(rest.trim()),
            "/reset" => Self::Reset,
            "/quit" | "/exit" => Self::Quit,
            "" => Self::Nothing,
            _ if word.starts_with('/') => Self::Unknown(word),
            _ => Self::Say(line),
        }
    }
}

async fn only_model(client: &mut InferenceClient<Channel>) -> Result<String> {
    let listed = client.list_models(ListModelsRequest {}).await.map_err(client::explain)?;
    let own = listed.into_inner().models.into_iter().filter(|model| model.root.is_empty());
    let models: Vec<_> = own.map(|model| model.id).collect();
    match models.as_slice() {
        [only] => Ok(only.clone()),
        [] => bail!("the router serves no model yet; is a worker ready?"),
        several => {
            bail!("several models are served; name one with --model: {}", several.join(", "))
        }
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
    /// Does what a line says; false ends the conversation.
    async fn take(&mut self, line: &str) -> Result<bool> {
        match Input::read(line) {
            Input::Nothing => {}
            Input::Quit => return Ok(false),
            Input::Reset => {
                self.turns.clear();
                eprintln!("forgotten");
            }
            Input::System(text) => {
                self.system = (!text.is_empty()).then(|| text.to_owned());
                eprintln!("system prompt {}", if text.is_empty() { "removed" } else { "set" });
            }
            Input::Unknown(word) => bail!("no command {word}; {HELP}"),
            Input::Say(text) => self.say(text).await?,
        }
        Ok(true)
    }

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
        let mut finish = String::new();
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
                        if !part.finish_reason.is_empty() {
                            finish = part.finish_reason;
                        }
                    }
                    Ok(None) => break,
                    Err(status) => {
                        crate::print("")?;
                        return Err(client::explain(status));
                    }
                },
                // Dropping the stream is what stops the answer.
                _ = &mut interrupted => {
                    crate::print(" …")?;
                    return if stdin().is_terminal() { Ok(answer) } else { bail!("stopped") };
                }
            }
        }
        crate::print("")?;
        match finish.as_str() {
            "" => bail!("the router ended the answer without saying why"),
            "length" => eprintln!(
                "(truncated: the answer reached --max-tokens or the end of the model's context)"
            ),
            _ => {}
        }
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
        assert_eq!(Input::read(" \t"), Input::Nothing);
    }
}
