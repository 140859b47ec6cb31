//! A conversation whose last message goes on, as Hugging Face's `continue_final_message` means it:
//! what the template puts behind that message is left out.

use crate::chat::Chat;
use crate::error::TextError;

/// As much of the rendered conversation as the model is to read. `mark` is what became of each text
/// before the template saw it.
///
/// # Errors
/// `Input` where the last message has no text, or the template does not show it as it is.
pub fn part<'a>(
    rendered: &'a str,
    chat: &Chat,
    mark: &dyn Fn(&str) -> String,
) -> Result<&'a str, TextError> {
    if !chat.continue_final_message {
        return Ok(rendered);
    }
    let refuse = |reason: &str| Err(TextError::Input(format!("continue_final_message: {reason}")));
    let last = mark(chat.messages.last().map_or("", |message| message.content.as_str()));
    let text = last.trim();
    if text.is_empty() {
        return refuse("the last message has no text that could go on");
    }
    let Some(start) = rendered.rfind(text) else {
        return refuse("the chat template leaves the last message out, or changes its text");
    };
    // Whitespace at its end counts where the template left it there.
    let whole = last.trim_start();
    let len = if rendered[start..].starts_with(whole) { whole.len() } else { text.len() };
    Ok(&rendered[..start + len])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Message;

    fn cut(rendered: &str, last: &str) -> Result<String, TextError> {
        let messages = vec![Message::new("user", "ok"), Message::new("assistant", last)];
        let chat = Chat { messages, continue_final_message: true, ..Chat::default() };
        part(rendered, &chat, &str::to_owned).map(str::to_owned)
    }

    #[test]
    fn what_follows_the_last_message_is_left_out() {
        assert_eq!(cut("<u>ok<e><a>ok<e>", "ok").unwrap(), "<u>ok<e><a>ok");
        assert_eq!(cut("<a>It is <e>", " It is ").unwrap(), "<a>It is ");
        assert_eq!(cut("<a>It is<e>", " It is ").unwrap(), "<a>It is");
        for (rendered, last) in [("<a><e>", " "), ("<a>other<e>", "ok!")] {
            let error = cut(rendered, last).unwrap_err();
            assert!(matches!(error, TextError::Input(_)), "{error}");
        }
    }

    #[test]
    fn without_the_wish_nothing_is() {
        assert_eq!(part("<a>x<e>", &Chat::default(), &str::to_owned).unwrap(), "<a>x<e>");
    }
}
