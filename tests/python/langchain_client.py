"""The unmodified `langchain-openai` client against a running router, with its defaults.

Reads the router's address from LOCKSTEP_TEST_HTTP.
"""

import asyncio
import os
import unittest

import openai
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

BASE = os.environ["LOCKSTEP_TEST_HTTP"] + "/v1"
CAPITAL = "What is the capital of France? Answer in one word."


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"18 degrees in {city}"


class Langchain(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with openai.OpenAI(base_url=BASE, api_key="none") as client:
            cls.model = client.models.list().data[0].id

    def chat(self, **more):
        return ChatOpenAI(base_url=BASE, api_key="none", model=self.model, **more)

    def test_chat_with_defaults(self):
        # By default draws differ each time, and a model this small may never come to an end.
        chat = self.chat(max_tokens=64)
        answer = chat.invoke([SystemMessage("Be brief."), HumanMessage(CAPITAL)])
        self.assertTrue(answer.content)
        usage = answer.usage_metadata
        self.assertEqual(usage["total_tokens"], usage["input_tokens"] + usage["output_tokens"])

    def test_a_stream_is_the_same_answer(self):
        for more in ({}, {"stream_usage": True}):
            chat = self.chat(temperature=0, max_tokens=12, **more)
            whole = chat.invoke(CAPITAL).content
            self.assertIn("Paris", whole)
            chunks = list(chat.stream(CAPITAL))
            self.assertEqual("".join(chunk.content for chunk in chunks), whole)
            self.assertEqual(any(chunk.usage_metadata for chunk in chunks), bool(more))

    def test_tools_in_history(self):
        call = {"name": "weather", "args": {"city": "Paris"}, "id": "call_1", "type": "tool_call"}
        messages = [
            HumanMessage("What is the weather in Paris?"),
            AIMessage(content="", tool_calls=[call]),
            ToolMessage("18 degrees, sunny", tool_call_id="call_1", name="weather"),
        ]
        answer = self.chat(max_tokens=12).bind_tools([weather]).invoke(messages)
        self.assertTrue(answer.content)

    def test_overflow_is_recognised(self):
        chat = self.chat(max_retries=0)
        with self.assertRaises(ContextOverflowError):
            chat.invoke("word " * 20_000)
        with self.assertRaises(ContextOverflowError):
            list(chat.stream("word " * 20_000))
        with self.assertRaises(ContextOverflowError):
            self.chat(max_retries=0, max_tokens=1_000_000).invoke(CAPITAL)

    def test_text_completion_with_defaults(self):
        model = OpenAI(base_url=BASE, api_key="none", model=self.model, max_tokens=8)
        self.assertTrue(model.invoke("One, two, three,"))
        self.assertTrue("".join(model.stream("One, two, three,")))

    def test_many_at_once(self):
        chat = self.chat(temperature=0, max_tokens=8)
        answers = chat.batch([CAPITAL] * 8) + [asyncio.run(chat.ainvoke(CAPITAL))]
        self.assertEqual(len({answer.content for answer in answers}), 1)


if __name__ == "__main__":
    unittest.main()
