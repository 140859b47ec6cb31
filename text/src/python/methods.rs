//! Methods of Python's strings, lists and dictionaries that templates call.
//!
//! What is not here is left to the template library's own imitation of Python.

use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::is_space;

/// Widths beyond this are refused: a template must not ask for gigabytes of padding.
const WIDTH_MAX: usize = 1 << 20;

/// For the environment: calls a method that a value does not have by itself.
pub fn call(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let known = match (value.kind(), value.as_str()) {
        (_, Some(text)) => string(text, method, args),
        (ValueKind::Seq, _) if method == "index" => Some(index(value, args)),
        (ValueKind::Seq | ValueKind::Map, _) if method == "copy" => {
            Some(from_args::<()>(args).map(|()| value.clone()))
        }
        _ => None,
    };
    known.unwrap_or_else(|| pycompat::unknown_method_callback(state, value, method, args))
}

fn string(text: &str, method: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match method {
        "strip" => strip(text, args, true, true),
        "lstrip" => strip(text, args, true, false),
        "rstrip" => strip(text, args, false, true),
        "split" => split(text, args, false),
        "rsplit" => split(text, args, true),
        "splitlines" => split_lines(text, args),
        "partition" => partition(text, args, |text, at| text.split_once(at), false),
        "rpartition" => partition(text, args, |text, at| text.rsplit_once(at), true),
        "removeprefix" => without(text, args, |prefix| text.strip_prefix(prefix)),
        "removesuffix" => without(text, args, |suffix| text.strip_suffix(suffix)),
        "isspace" => {
            from_args::<()>(args).map(|()| (!text.is_empty() && text.chars().all(is_space)).into())
        }
        "swapcase" => from_args::<()>(args).map(|()| swap_case(text).into()),
        "center" => center(text, args),
        "ljust" => pad(text, args, |_, _| 0),
        "rjust" => pad(text, args, |room, _| room),
        "zfill" => zero_fill(text, args),
        "index" => position(text, args, |text, part| text.find(part)),
        "rindex" => position(text, args, |text, part| text.rfind(part)),
        _ => return None,
    })
}

fn wrong(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, reason.into())
}

fn strip(text: &str, args: &[Value], left: bool, right: bool) -> Result<Value, Error> {
    let (chars,): (Option<&str>,) = from_args(args)?;
    let drop = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if left { text.trim_start_matches(drop) } else { text };
    Ok(Value::from(if right { text.trim_end_matches(drop) } else { text }))
}

/// `split` and `rsplit`: at a separator, else at runs of whitespace.
fn split(text: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let (separator, most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = match separator {
        None => named.get::<Option<Value>>("sep")?,
        given => given,
    };
    let most = match most {
        None => named.get::<Option<i64>>("maxsplit")?,
        given => given,
    };
    named.assert_all_used()?;
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX - 1);
    let separator = separator.filter(|separator| !separator.is_none());
    let parts: Vec<&str> = match separator.as_ref().map(|separator| separator.as_str()) {
        None => split_words(text, most, from_right),
        Some(None) => return Err(wrong("a separator must be text")),
        Some(Some("")) => return Err(wrong("empty separator")),
        Some(Some(separator)) if from_right => {
            let mut parts: Vec<_> = text.rsplitn(most + 1, separator).collect();
            parts.reverse();
            parts
        }
        Some(Some(separator)) => text.splitn(most + 1, separator).collect(),
    };
    Ok(parts.into_iter().map(Value::from).collect())
}

/// Words, with what is left after `most` cuts as one more.
fn split_words(text: &str, most: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        rest = match from_right {
            true => rest.trim_end_matches(is_space),
            false => rest.trim_start_matches(is_space),
        };
        if rest.is_empty() {
            break;
        }
        let cut = match from_right {
            _ if parts.len() == most => None,
            true => rest.rfind(is_space),
            false => rest.find(is_space),
        };
        let Some(cut) = cut else {
            parts.push(rest);
            break;
        };
        let space = rest[cut..].chars().next().map_or(1, char::len_utf8);
        let (before, after) = (&rest[..cut], &rest[cut + space..]);
        let (word, left) = if from_right { (after, before) } else { (before, after) };
        parts.push(word);
        rest = left;
    }
    if from_right {
        parts.reverse();
    }
    parts
}

fn split_lines(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (keep, named): (Option<bool>, Kwargs) = from_args(args)?;
    let keep = keep.or(named.get("keepends")?).unwrap_or(false);
    named.assert_all_used()?;
    let ends = |c: char| {
        matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}')
            || matches!(c, '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(ends) {
        let first = rest[at..].chars().next().map_or(1, char::len_utf8);
        let end = at + if rest[at..].starts_with("\r\n") { 2 } else { first };
        lines.push(Value::from(if keep { &rest[..end] } else { &rest[..at] }));
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        lines.push(Value::from(rest));
    }
    Ok(Value::from(lines))
}

type Cut = for<'a> fn(&'a str, &str) -> Option<(&'a str, &'a str)>;

fn partition(text: &str, args: &[Value], cut: Cut, last: bool) -> Result<Value, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() {
        return Err(wrong("empty separator"));
    }
    let parts = match cut(text, separator) {
        Some((before, after)) => [before, separator, after],
        None if last => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

fn without<'a>(
    text: &'a str,
    args: &[Value],
    strip: impl FnOnce(&str) -> Option<&'a str>,
) -> Result<Value, Error> {
    let (part,): (&str,) = from_args(args)?;
    Ok(Value::from(strip(part).unwrap_or(text)))
}

fn swap_case(text: &str) -> String {
    let swap = |c: char| -> String {
        if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
    };
    text.chars().map(swap).collect()
}

/// Text in the middle of a width, with the odd character where Python has it.
pub fn center(text: &str, args: &[Value]) -> Result<Value, Error> {
    pad(text, args, |room, width| room / 2 + (room & width & 1))
}

/// `before` says how much of the room goes before the text, of the room and the whole width.
fn pad(
    text: &str,
    args: &[Value],
    before: impl FnOnce(usize, usize) -> usize,
) -> Result<Value, Error> {
    let (width, fill): (usize, Option<&str>) = from_args(args)?;
    let fill = fill.unwrap_or(" ");
    if width > WIDTH_MAX || fill.chars().count() != 1 {
        return Err(wrong(format!("padding takes a width up to {WIDTH_MAX} and one character")));
    }
    let room = width.saturating_sub(text.chars().count());
    let before = before(room, width);
    Ok(Value::from(format!("{}{text}{}", fill.repeat(before), fill.repeat(room - before))))
}

fn zero_fill(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (width,): (usize,) = from_args(args)?;
    if width > WIDTH_MAX {
        return Err(wrong(format!("padding takes a width up to {WIDTH_MAX}")));
    }
    let (sign, digits) = match text.starts_with(['+', '-']) {
        true => text.split_at(1),
        false => ("", text),
    };
    let zeros = "0".repeat(width.saturating_sub(text.chars().count()));
    Ok(Value::from(format!("{sign}{zeros}{digits}")))
}

type Find = fn(&str, &str) -> Option<usize>;

fn position(text: &str, args: &[Value], find: Find) -> Result<Value, Error> {
    let (part,): (&str,) = from_args(args)?;
    match find(text, part) {
        Some(at) => Ok(Value::from(text[..at].chars().count())),
        None => Err(wrong("substring not found")),
    }
}

fn index(list: &Value, args: &[Value]) -> Result<Value, Error> {
    let (item,): (&Value,) = from_args(args)?;
    let at = list.try_iter()?.position(|found| found == *item);
    at.map(Value::from).ok_or_else(|| wrong(format!("{item} is not in the list")))
}
