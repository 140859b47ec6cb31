//! How a line looks to machines: one JSON object, the fields of its spans beside its own, each
//! once; an inner span's value stands for an outer one's, the line's own for both.

use std::fmt;

use serde_json::{Map, Value, json};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

use super::LogFormat;

/// Formats events; the fields' format has to be `JsonFields`.
pub(super) struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Map::new();
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(own) = span.extensions().get::<FormattedFields<N>>() {
                merge(&mut fields, &own.fields);
            }
        }
        let mut own = String::new();
        context.field_format().format_fields(Writer::new(&mut own), event)?;
        merge(&mut fields, &own);
        let message = fields.remove("message").unwrap_or_default();
        let meta = event.metadata();
        writer.write_str(&object(*meta.level(), meta.target(), message, fields))
    }
}

fn merge(fields: &mut Map<String, Value>, text: &str) {
    if let Ok(Value::Object(more)) = serde_json::from_str(text) {
        fields.extend(more);
    }
}

/// A line of JSON: when, how grave, from where, what, and the rest.
fn object(level: Level, target: &str, message: Value, mut fields: Map<String, Value>) -> String {
    let mut line = format!(
        "{{\"timestamp\":{},\"level\":\"{level}\",\"target\":{},\"message\":{message}",
        json!(now()),
        json!(target)
    );
    for name in ["timestamp", "level", "target", "message"] {
        fields.remove(name);
    }
    for (name, value) in fields {
        line.push_str(&format!(",{}:{value}", json!(name)));
    }
    line.push_str("}\n");
    line
}

fn now() -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _written = SystemTime.format_time(&mut Writer::new(&mut text));
    text
}

/// A line in either format, its newline included, from whoever has no event to give.
pub(super) fn line(
    format: LogFormat,
    level: Level,
    message: &str,
    fields: Map<String, Value>,
) -> String {
    const TARGET: &str = "lockstep";
    match format {
        LogFormat::Json => object(level, TARGET, message.into(), fields),
        LogFormat::Human => {
            let fields = fields.iter().map(|(name, value)| format!(" {name}={value}"));
            format!("{} {level:>5} {TARGET}: {message}{}\n", now(), fields.collect::<String>())
        }
    }
}

/// What a line says to people, where it is one of JSON: its message.
pub(super) fn message(line: &str) -> Option<String> {
    let Value::Object(fields) = serde_json::from_str(line).ok()? else { return None };
    Some(fields.get("message")?.as_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{self, Write},
        sync::{Arc, Mutex},
    };
    use tracing_subscriber::fmt::format::JsonFields;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_fields_of_spans_stand_in_the_line_once() {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = tracing_subscriber::fmt()
            .fmt_fields(JsonFields::new())
            .event_format(Json)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let outer = tracing::info_span!("outer", request_id = "a", model = "m");
            let _outer = outer.enter();
            let _inner = tracing::info_span!("inner", request_id = "b").entered();
            tracing::info!(tokens = 3, model = "own", "said \"so\"");
        });
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.matches("request_id").count(), 1, "{text}");
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["request_id"], "b");
        assert_eq!(value["model"], "own");
        assert_eq!(value["tokens"], 3);
        assert_eq!(value["message"], "said \"so\"");
        assert_eq!(value["level"], "INFO");
        assert!(value["timestamp"].as_str().unwrap().ends_with('Z'));
        assert!(value.get("span").is_none() && value.get("spans").is_none());
    }

    #[test]
    fn a_line_without_an_event_has_the_same_shape() {
        let fields = || Map::from_iter([("lines".to_owned(), json!(7))]);
        let text = line(LogFormat::Json, Level::WARN, "dropped\n", fields());
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&value["lines"], &value["level"]), (&json!(7), &json!("WARN")));
        assert_eq!(text.matches('\n').count(), 1);
        assert_eq!(message(&text).as_deref(), Some("dropped\n"));
        let text = line(LogFormat::Human, Level::WARN, "dropped", fields());
        assert!(text.ends_with(" WARN lockstep: dropped lines=7\n"), "{text}");
    }
}
