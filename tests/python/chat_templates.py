"""Renders chat templates as Hugging Face's transformers does, for a test that compares.

Reads from standard input one JSON object: {"templates": {name: source}, "conversations": [...],
"cases": [[template, conversation index]], "expressions": [source]}. Writes one JSON object:
{"renderings": [{"text": ...} or {"error": ...}], "expressions": [the same]}.
"""

import json
import sys
from datetime import datetime

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %}` marks what the assistant wrote; it changes no text."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def strftime_now(format):
    return datetime.now().strftime(format)


environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
)
environment.filters["tojson"] = tojson
environment.globals["raise_exception"] = raise_exception
environment.globals["strftime_now"] = strftime_now


def views(conversation):
    """What the conversation is shown as, best first: see text/src/template.rs.

    Hugging Face shows exactly what it is given. Callers give it the arguments of tool calls as
    objects, as text where the template joins them to text, and empty content for none where the
    template cannot take none.
    """

    def shown(as_text, missing_as_text):
        messages = []
        for message in conversation["messages"]:
            message = dict(message)
            if missing_as_text and message.get("content") is None:
                message["content"] = ""
            if "tool_calls" in message:
                calls = []
                for call in message["tool_calls"]:
                    function = dict(call["function"])
                    arguments = function.get("arguments")
                    if isinstance(arguments, str):
                        text = arguments if arguments.strip() not in ("", "null") else "{}"
                        function["arguments"] = text if as_text else json.loads(text)
                    elif as_text:
                        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
                    calls.append({**call, "function": function})
                message["tool_calls"] = calls
            messages.append(message)
        return messages

    for missing_as_text in (False, True):
        for as_text in (False, True):
            yield shown(as_text, missing_as_text)


def render(template, conversation):
    variables = {
        "bos_token": "<BOS>",
        "documents": None,
        "tools": conversation["tools"],
        "add_generation_prompt": conversation["add_generation_prompt"],
        **conversation["kwargs"],
    }
    first = None
    for messages in views(conversation):
        try:
            return {"text": template.render(messages=messages, **variables)}
        except jinja2.exceptions.TemplateError as error:
            if type(error) is jinja2.exceptions.TemplateError:
                return {"error": f"raised: {error}"}
            first = first or error
        except Exception as error:  # Whatever Python raises in an expression.
            first = first or error
    return {"error": f"{type(first).__name__}: {first}"}


def evaluate(source):
    try:
        return {"text": environment.from_string(source).render(none_value=None, a_list=[3, 1, 2])}
    except Exception as error:
        refused = type(error) is jinja2.exceptions.TemplateError
        return {"error": f"{'raised' if refused else type(error).__name__}: {error}"}


asked = json.load(sys.stdin)
templates = {name: environment.from_string(text) for name, text in asked["templates"].items()}
conversations = asked["conversations"]
json.dump(
    {
        "renderings": [render(templates[name], conversations[at]) for name, at in asked["cases"]],
        "expressions": [evaluate(source) for source in asked["expressions"]],
    },
    sys.stdout,
)
