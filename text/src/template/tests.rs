//! Templates of a few words, and what they make of conversations.

use serde_json::{Value, json};

use super::*;
use crate::{Content, Message};

fn render(source: &str, chat: &Chat) -> Result<String, TextError> {
    ChatTemplate::compile(source, BTreeMap::new())?.render(chat, &str::to_owned)
}

fn with_arguments(arguments: Value) -> Chat {
    let calls = json!([{"id": "1", "type": "function",
        "function": {"name": "f", "arguments": arguments}}]);
    let message = Message {
        role: "assistant".into(),
        content: Content::Null,
        tool_calls: Some(calls),
        ..Message::default()
    };
    Chat { messages: vec![message], ..Chat::default() }
}

#[test]
fn templates_see_what_hugging_face_shows_them() {
    let mut chat = Chat { messages: vec![Message::new("user", " a,b ")], ..Chat::default() };
    chat.args.insert("flag".into(), true.into());
    let source = "{% for m in messages %}\n  {% generation %}\n\
        {{ m.content.strip().split(',')[-1] }}\
        {% endgeneration %}\n{% break %}{% endfor %}{{ flag }} {{ none }} {{ tools is none }}\
        {{ missing is defined }} {{ {'a': [1, 'é']} | tojson }} \
        {{ {'b': 1} | tojson(indent=1) }}";
    let expected = "bTrue None TrueFalse {\"a\": [1, \"é\"]} {\n \"b\": 1\n}";
    assert_eq!(render(source, &chat).unwrap(), expected);
    let year = render("{{ strftime_now('%Y') }}", &chat).unwrap();
    assert!(year.parse::<u32>().unwrap() > 2024);
}

#[test]
fn none_has_no_elements_and_no_length() {
    let source = "{% if tools is iterable and tools | length > 0 %}some{% else %}none{% endif %}";
    assert_eq!(render(source, &Chat::default()).unwrap(), "none");
    assert!(render("{{ tools | length }}", &Chat::default()).is_err());
    let chat = Chat { tools: Some(json!([1])), ..Chat::default() };
    assert_eq!(render(source, &chat).unwrap(), "some");
}

#[test]
fn null_content_is_none_and_absent_content_is_undefined() {
    let mut chat = with_arguments(json!("{}"));
    let source = "{{ messages[0].content is none }} {{ messages[0].content is defined }} \
        {{ 'content' in messages[0] }}";
    assert_eq!(render(source, &chat).unwrap(), "True True True");
    chat.messages[0].content = Content::Absent;
    assert_eq!(render(source, &chat).unwrap(), "False False False");
    // A template that joins content was not written for null: it reads as empty there.
    chat.messages[0].content = Content::Null;
    let joins = "<{{ '' + messages[0].content }}>{{ messages[0].tool_calls[0].id }}";
    assert_eq!(render(joins, &chat).unwrap(), "<>1");
}

#[test]
fn arguments_are_an_object_and_text_for_templates_that_join_them() {
    let text = "{\"b\": 1,\"a\": [\"é\", 2.0]}";
    let arguments = "messages[0].tool_calls[0].function.arguments";
    let object = format!(
        "{{{{ {arguments} is mapping }}}} {{{{ {arguments} is string }}}} \
         {{{{ {arguments}.a[1] }}}} \
         {{% for k, v in {arguments}.items() %}}{{{{ k }}}}{{% endfor %}} \
         {{{{ {arguments} | length }}}} {{{{ {arguments} | tojson }}}}"
    );
    let joined = format!("{{{{ '<' + {arguments} + '>' }}}}");
    let concatenated = format!("{{{{ '<' ~ {arguments} ~ '>' }}}}{{{{ {arguments} }}}}");
    for given in [json!(text), serde_json::from_str(text).unwrap()] {
        let chat = with_arguments(given.clone());
        let expected = "True False 2.0 ba 2 {\"b\": 1, \"a\": [\"é\", 2.0]}";
        assert_eq!(render(&object, &chat).unwrap(), expected);
        // As the client wrote it, or as Python would have written the object.
        let shown = if given.is_string() { text } else { "{\"b\": 1, \"a\": [\"é\", 2.0]}" };
        assert_eq!(render(&joined, &chat).unwrap(), format!("<{shown}>"));
        assert_eq!(render(&concatenated, &chat).unwrap(), format!("<{shown}>{shown}"));
    }
}

#[test]
fn arguments_of_nothing_are_an_empty_object_and_other_json_is_parsed_once() {
    let arguments = "messages[0].tool_calls[0].function.arguments";
    let both = format!("{{{{ {arguments} | tojson }}}}{{{{ '' ~ {arguments} }}}}");
    for nothing in [json!(""), json!(" \n"), json!("null"), json!(null), json!({})] {
        assert_eq!(render(&both, &with_arguments(nothing)).unwrap(), "{}{}");
    }
    let mut absent = with_arguments(json!(""));
    absent.messages[0].tool_calls = Some(json!([{"function": {"name": "f"}}]));
    assert_eq!(render(&both, &absent).unwrap(), "{}{}");
    let tojson = format!("{{{{ {arguments} | tojson }}}}");
    for (given, shown) in
        [("[1, 2]", "[1, 2]"), ("\"x\"", "\"x\""), ("7", "7"), (" {\"a\":1} ", "{\"a\": 1}")]
    {
        assert_eq!(render(&tojson, &with_arguments(json!(given))).unwrap(), shown);
    }
    let error = render(&tojson, &with_arguments(json!("{\"a\": "))).unwrap_err();
    assert!(matches!(error, TextError::Input(_)), "{error}");
    let error = error.to_string();
    assert!(error.contains("messages[0].tool_calls[0].function.arguments is not JSON"), "{error}");
}

#[test]
fn python_and_jinja_offer_what_templates_use() {
    for (expression, expected) in [
        ("'a,b,c'.rsplit(',', 1)", "['a,b', 'c']"),
        ("'one two_3, é!' | wordcount", "3"),
        ("'x' is sequence", "True"),
        ("none is sequence", "False"),
        ("{'a': 1} | attr('a')", ""),
        ("{'a': 1} is sequence", "True"),
        ("[true, none, 1.0, 'é\\n'] | string", "[True, None, 1.0, 'é\\n']"),
        ("[true, none] | join('-')", "True-None"),
        ("' \\x1c a '.strip()", "a"),
        ("'a b  c'.split(maxsplit=1)", "['a', 'b  c']"),
        ("'a=b=c'.partition('=')", "('a', '=', 'b=c')"),
        ("'ab'.center(5, '*')", "**ab*"),
        ("'-7'.zfill(4)", "-007"),
        ("['a', 'b'].index('b')", "1"),
    ] {
        let rendered = render(&format!("{{{{ {expression} }}}}"), &Chat::default());
        assert_eq!(rendered.unwrap(), expected, "{expression}");
    }
    let joiner =
        "{% set comma = joiner() %}{% for i in range(3) %}{{ comma() }}{{ i }}{% endfor %}";
    assert_eq!(render(joiner, &Chat::default()).unwrap(), "0, 1, 2");
}

#[test]
fn a_refusal_is_in_the_templates_own_words() {
    let error = render("{{ raise_exception('no such role') }}", &Chat::default()).unwrap_err();
    assert!(matches!(&error, TextError::Refused(text) if text == "no such role"), "{error}");
    let chat = Chat { messages: vec![Message::new("wizard", "")], ..Chat::default() };
    let error = render(CHATML, &chat).unwrap_err();
    assert!(matches!(&error, TextError::Refused(text) if text.contains("wizard")), "{error}");
}

#[test]
fn hostile_templates_end() {
    for source in [
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 1000000000000 }}",
        "{{ 'a'.center(1000000000000) }}",
        "{{ strftime_now('%Q%!') }}",
        "{{ messages | tojson(bogus=1) }}",
        "{% if",
        "{{ messages[7].role.strip() }}",
    ] {
        assert!(matches!(render(source, &Chat::default()), Err(TextError::Template(_))));
    }
}
