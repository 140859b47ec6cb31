//! Everything that can go wrong in the router, one variant for each answer that a client gets.

use engine::EngineError;
use std::{net::SocketAddr, time::Duration};

/// Why the router could not start, or why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// An address is taken or not ours.
    #[error("cannot listen on {address}: {source}; choose another address or port 0")]
    Bind { address: SocketAddr, source: std::io::Error },
    /// Neither HTTP nor gRPC was asked for.
    #[error("nothing to serve: give an http or a grpc address")]
    NoListener,
    /// What cannot be the origin of a web page.
    #[error("'{0}' is no origin; write scheme://host[:port] in lowercase without a path, or *")]
    Origin(String),
    /// The protocol descriptors do not load: a fault of the build.
    #[error("reflection: {0}")]
    Reflection(String),
    /// The operating system gave no random bytes.
    #[error("no random numbers: {0}")]
    Random(String),
    /// The client's fault, at `param` where one is to blame.
    #[error("{message}")]
    Invalid { param: Option<String>, message: String },
    /// Prompt and answer do not fit the model's context. In OpenAI's words and with its code in
    /// them: client libraries look for either in the message.
    #[error("{}", overflow(from, *prompt, *new, *context))]
    ContextExceeded {
        /// The parameter that the prompt came by.
        from: &'static str,
        prompt: usize,
        new: usize,
        context: usize,
    },
    #[error("the model '{model}' does not exist; served: {served}")]
    ModelNotFound { model: String, served: String },
    #[error("no such route: {0}")]
    RouteNotFound(String),
    #[error("method {0} is not allowed here")]
    MethodNotAllowed(String),
    /// The body is larger than the limit.
    #[error("the body exceeds {limit} bytes; shorten it or raise the router's body limit")]
    TooLarge { limit: usize },
    /// The body is compressed in a way that nobody here knows.
    #[error("content-encoding '{0}' is not supported; send gzip, deflate, zstd or none")]
    Encoding(String),
    /// The body did not arrive in time.
    #[error("the body did not arrive within {0:?}")]
    BodyDeadline(Duration),
    /// Everything is full; worth another try after `retry_after`.
    #[error("overloaded: {reason}; try again in {} s", retry_after.as_secs())]
    Overloaded { reason: String, retry_after: Duration },
    /// The request's time limit passed; it waited for this then.
    #[error(
        "timeout: the request's limit of {} s passed while it waited {waited}",
        limit.as_secs_f64()
    )]
    Timeout { limit: Duration, waited: String },
    /// Nobody can serve this now.
    #[error("unavailable: {0}")]
    Unavailable(String),
    /// A worker, or the model's own files, failed in a way that another try will not mend.
    #[error("internal: {0}")]
    Internal(String),
}

/// Whether the prompt leaves no room for any answer.
pub(crate) fn prompt_too_long(prompt: usize, context: usize) -> bool {
    prompt >= context
}

fn overflow(from: &str, prompt: usize, new: usize, context: usize) -> String {
    let limit = format!("This model's maximum context length is {context} tokens. However, you");
    if prompt_too_long(prompt, context) {
        return format!(
            "{limit} requested {prompt} tokens in the {from} alone. Please reduce the length of \
             the {from} (context_length_exceeded)."
        );
    }
    let all = prompt.saturating_add(new);
    format!(
        "{limit} requested {all} tokens ({prompt} in the {from}, {new} in the completion). Please \
         reduce the length of the {from} or max_tokens (context_length_exceeded)."
    )
}

/// What the engine's checks say of a request.
impl From<EngineError> for RouterError {
    fn from(error: EngineError) -> Self {
        let param = error.parameter().map(str::to_owned);
        Self::Invalid { param, message: error.to_string() }
    }
}

impl RouterError {
    /// The client's fault, at a named parameter.
    pub(crate) fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { param: Some(param.into()), message: message.into() }
    }
}
