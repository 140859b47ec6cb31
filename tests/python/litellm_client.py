"""The unmodified `litellm` client against a running router, by both providers that people set for
servers of their own.

Reads the router's address from LOCKSTEP_TEST_HTTP.
"""

import asyncio
import os
import unittest

# Prices of models come from the network otherwise.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm  # noqa: E402
import openai  # noqa: E402

BASE = os.environ["LOCKSTEP_TEST_HTTP"] + "/v1"
PROVIDERS = ("openai", "hosted_vllm")
CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Paris"}'},
}
TOOL_HISTORY = [
    {"role": "user", "content": "What is the weather in Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "18 degrees, sunny"},
]


class Litellm(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with openai.OpenAI(base_url=BASE, api_key="none") as client:
            cls.model = client.models.list().data[0].id

    def where(self, provider):
        return {"model": f"{provider}/{self.model}", "api_base": BASE, "api_key": "none"}

    def each(self):
        return [self.where(provider) for provider in PROVIDERS]

    def test_chat_with_defaults(self):
        for where in self.each():
            # By default draws differ each time, and a model this small may never come to an end.
            answer = litellm.completion(messages=CAPITAL, max_tokens=64, **where)
            self.assertTrue(answer.choices[0].message.content)
            usage = answer.usage
            self.assertEqual(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)

    def test_a_stream_is_the_same_answer(self):
        for where in self.each():
            ask = dict(messages=CAPITAL, temperature=0, max_tokens=12, **where)
            whole = litellm.completion(**ask).choices[0].message.content
            self.assertIn("Paris", whole)
            stream = litellm.completion(stream=True, stream_options={"include_usage": True}, **ask)
            chunks = list(stream)
            deltas = [c.choices[0].delta.content or "" for c in chunks if c.choices]
            self.assertEqual("".join(deltas), whole)
            built = litellm.stream_chunk_builder(chunks, messages=CAPITAL)
            self.assertEqual(built.choices[0].message.content, whole)

    def test_tools_in_history(self):
        for where in self.each():
            ask = dict(messages=TOOL_HISTORY, tools=[WEATHER], max_tokens=12, **where)
            self.assertTrue(litellm.completion(**ask).choices[0].message.content)

    def test_overflow_is_recognised(self):
        for where in self.each():
            for stream in (False, True):
                long = [{"role": "user", "content": "word " * 20_000}]
                with self.assertRaises(litellm.ContextWindowExceededError):
                    litellm.completion(messages=long, stream=stream, num_retries=0, **where)
            with self.assertRaises(litellm.ContextWindowExceededError):
                litellm.completion(messages=CAPITAL, max_tokens=1_000_000, num_retries=0, **where)

    def test_unknown_models_are_not_found(self):
        with self.assertRaises(litellm.NotFoundError):
            where = self.where("openai") | {"model": "openai/absent"}
            litellm.completion(messages=CAPITAL, num_retries=0, **where)

    def test_text_completion(self):
        where = self.where("text-completion-openai")
        answer = litellm.text_completion(prompt="One, two, three,", max_tokens=8, **where)
        self.assertTrue(answer.choices[0].text)

    def test_many_at_once(self):
        async def all_of_them():
            ask = dict(messages=CAPITAL, temperature=0, max_tokens=8, **self.where("openai"))
            return await asyncio.gather(*(litellm.acompletion(**ask) for _ in range(8)))

        answers = asyncio.run(all_of_them())
        self.assertEqual(len({answer.choices[0].message.content for answer in answers}), 1)


if __name__ == "__main__":
    unittest.main()
