//! Filters of Jinja that the template library lacks or has otherwise.

use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Value};
use minijinja_contrib::filters;

use crate::python::json::{JsonStyle, dumps};
use crate::python::{is_space, methods, values};

/// Adds all of them.
pub fn add(environment: &mut Environment<'_>) {
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: Value| values::text(&value));
    environment.add_filter("join", join);
    environment.add_filter("trim", trim);
    environment.add_filter("wordcount", word_count);
    environment.add_filter("attr", attribute);
    environment.add_filter("center", center);
    environment.add_filter("truncate", truncate);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("striptags", filters::striptags);
    environment.add_filter("filesizeformat", filters::filesizeformat);
}

fn trim(value: Value, chars: Option<String>) -> String {
    let drop = |c: char| chars.as_ref().map_or_else(|| is_space(c), |chars| chars.contains(c));
    values::text(&value).trim_matches(drop).to_owned()
}

fn join(
    list: Value,
    separator: Option<String>,
    attribute: Option<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let separator = separator.or(named.get("d")?).unwrap_or_default();
    let attribute = attribute.or(named.get("attribute")?);
    named.assert_all_used()?;
    let mut out = String::new();
    for (at, item) in list.try_iter()?.enumerate() {
        if at > 0 {
            out.push_str(&separator);
        }
        let item = match &attribute {
            Some(attribute) => match attribute.as_str() {
                Some(path) => path.split('.').try_fold(item, |item, name| item.get_attr(name))?,
                None => item.get_item(attribute)?,
            },
            None => item,
        };
        out.push_str(&values::text(&item));
    }
    Ok(out)
}

/// Runs of letters, digits and underscores.
fn word_count(value: Value) -> usize {
    let text = values::text(&value);
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.filter(|word| !word.is_empty()).count()
}

/// An attribute, never an item: what JSON gives a template has no attributes.
fn attribute(value: Value, name: String) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Undefined => {
            Err(Error::new(ErrorKind::UndefinedError, format!("undefined has no {name}")))
        }
        ValueKind::Plain => value.get_attr(&name),
        _ => Ok(Value::UNDEFINED),
    }
}

fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::BadSerialization, "undefined has no JSON"));
    }
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (item_separator, key_separator) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(other) => {
            let reason = format!("tojson takes 2 separators, not {}", other.len());
            return Err(Error::new(ErrorKind::InvalidOperation, reason));
        }
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = JsonStyle {
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent,
        item_separator,
        key_separator,
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let json = serde_json::to_value(&value)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from(dumps(&json, &style)))
}

fn center(value: Value, width: Option<usize>) -> Result<Value, Error> {
    methods::center(&values::text(&value), &[width.unwrap_or(80).into()])
}

/// Text that is longer than `length` and some leeway, cut at a word unless `killwords`.
fn truncate(value: Value, options: Rest<Value>) -> Result<String, Error> {
    type Options = (Option<usize>, Option<bool>, Option<String>, Option<usize>, Kwargs);
    let (length, kill, end, leeway, named): Options = from_args(&options)?;
    let length = length.or(named.get("length")?).unwrap_or(255);
    let kill = kill.or(named.get("killwords")?).unwrap_or(false);
    let end = end.or(named.get("end")?).unwrap_or_else(|| "...".to_owned());
    let leeway = leeway.or(named.get("leeway")?).unwrap_or(5);
    named.assert_all_used()?;
    let text = values::text(&value);
    let room = length.checked_sub(end.chars().count()).ok_or_else(|| {
        Error::new(ErrorKind::InvalidOperation, format!("a length of {length} has no room"))
    })?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let kept: String = text.chars().take(room).collect();
    let kept = if kill { &kept } else { kept.rsplit_once(' ').map_or(&kept[..], |cut| cut.0) };
    Ok(format!("{kept}{end}"))
}

/// A whole number; what is none becomes the default.
fn int(value: Value, default: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    let default = default.or(named.get("default")?).unwrap_or_else(|| 0.into());
    let base = named.get::<Option<u32>>("base")?.filter(|base| (2..=36).contains(base));
    named.assert_all_used()?;
    let whole = |float: f64| (float.abs() < 1e18).then(|| Value::from(float as i64));
    let read = match (value.kind(), value.as_str()) {
        (_, Some(text)) => {
            let text = text.trim_matches(is_space);
            let number = i64::from_str_radix(text, base.unwrap_or(10)).ok().map(Value::from);
            number.or_else(|| whole(text.parse().ok()?))
        }
        (ValueKind::Undefined, _) => return Err(Error::from(ErrorKind::UndefinedError)),
        (ValueKind::Number, _) if value.is_integer() => Some(value),
        (ValueKind::Number, _) => f64::try_from(value).ok().and_then(whole),
        (ValueKind::Bool, _) => Some(i64::from(value.is_true()).into()),
        _ => None,
    };
    Ok(read.unwrap_or(default))
}

/// A number with a fraction; what is none becomes the default.
fn float(value: Value, default: Option<Value>, named: Kwargs) -> Result<Value, Error> {
    let default = default.or(named.get("default")?).unwrap_or_else(|| 0.0.into());
    named.assert_all_used()?;
    let read = match (value.kind(), value.as_str()) {
        (_, Some(text)) => text.trim_matches(is_space).parse::<f64>().ok(),
        (ValueKind::Undefined, _) => return Err(Error::from(ErrorKind::UndefinedError)),
        (ValueKind::Bool, _) => Some(f64::from(u8::from(value.is_true()))),
        _ => f64::try_from(value).ok(),
    };
    Ok(read.map_or(default, Value::from))
}
