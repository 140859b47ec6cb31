"""A gRPC client that knows nothing but the address: everything else comes from server reflection.

Reads the router's addresses from LOCKSTEP_TEST_GRPC and LOCKSTEP_TEST_HTTP.
"""

import json
import os
import unittest
import urllib.request

import grpc

from reflection import Caller

ADDRESS = os.environ["LOCKSTEP_TEST_GRPC"].removeprefix("http://")
HTTP = os.environ["LOCKSTEP_TEST_HTTP"]
QUESTION = "What is the capital of France? Answer in one word."


class Reflection(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.caller = Caller(ADDRESS)
        cls.call = cls.caller.call
        cls.model = cls.call("lockstep.v1.Inference/ListModels").models[0].id

    @classmethod
    def tearDownClass(cls):
        cls.caller.close()

    def refused(self, code, word, name, **fields):
        with self.assertRaises(grpc.RpcError) as caught:
            self.call(name, **fields)
        self.assertEqual(caught.exception.code(), code)
        self.assertIn(word, caught.exception.details())

    def test_services_are_listed(self):
        services = set(self.caller.services())
        self.assertLessEqual({"lockstep.v1.Inference", "grpc.health.v1.Health"}, services)

    def test_health(self):
        self.assertEqual(self.call("grpc.health.v1.Health/Check").status, 1)

    def test_text_becomes_ids_that_stand_for_it(self):
        tokens = self.call("lockstep.v1.Inference/Tokenize", model=self.model, text="Hello, wörld")
        self.assertEqual(b"".join(tokens.pieces).decode(), "Hello, wörld")
        self.assertEqual(len(tokens.ids), len(tokens.pieces))
        self.assertGreater(tokens.context_max, 0)

    def test_text_and_its_ids_are_continued_alike(self):
        sampling = {"temperature": 0.0, "max_tokens": 8, "logprobs": 2}
        ids = self.call("lockstep.v1.Inference/Tokenize", model=self.model, text="One, two,").ids
        name = "lockstep.v1.Inference/Generate"
        by_text = self.call(name, model=self.model, text="One, two,", sampling=sampling)
        by_ids = self.call(name, model=self.model, ids={"ids": ids}, sampling=sampling)
        text = "".join(part.text for part in by_text)
        self.assertTrue(text)
        self.assertEqual(text, "".join(part.text for part in by_ids))
        tokens = [token for part in by_text for token in part.tokens]
        self.assertEqual(len(tokens), by_text[-1].usage.completion_tokens)
        self.assertTrue(all(len(token.top) == 2 and token.logprob <= 0 for token in tokens))
        self.assertEqual([part.finish_reason for part in by_text if part.finish_reason], ["length"])

    def test_chat_answers_the_same_over_both_doors(self):
        messages = [{"role": "user", "content": QUESTION}]
        parts = self.call(
            "lockstep.v1.Inference/Chat",
            model=self.model,
            messages=messages,
            sampling={"temperature": 0.0, "max_tokens": 16},
        )
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 16}
        request = urllib.request.Request(
            HTTP + "/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            http = json.load(answer)["choices"][0]["message"]["content"]
        text = "".join(part.text for part in parts)
        self.assertIn("Paris", text)
        self.assertEqual(text, http)

    def test_compressed_calls_are_answered_alike(self):
        fields = dict(model=self.model, text="Hello, wörld " * 100)
        plain = self.call("lockstep.v1.Inference/Tokenize", **fields).ids
        for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            caller = Caller(ADDRESS, compression)
            self.addCleanup(caller.close)
            packed = caller.call("lockstep.v1.Inference/Tokenize", **fields).ids
            self.assertEqual(packed, plain)
            self.assertEqual(caller.call("grpc.health.v1.Health/Check").status, 1)

    def test_a_message_over_the_limit_exhausts_it(self):
        code, name = grpc.StatusCode.RESOURCE_EXHAUSTED, "lockstep.v1.Inference/Generate"
        self.refused(code, "4194304 bytes", name, model=self.model, text="x" * (5 << 20))

    def test_errors_have_codes_and_words(self):
        generate, invalid = "lockstep.v1.Inference/Generate", grpc.StatusCode.INVALID_ARGUMENT
        self.refused(grpc.StatusCode.NOT_FOUND, "absent", generate, model="absent", text="x")
        self.refused(invalid, "", generate, model=self.model)
        for name, value in [("temperature", -1.0), ("top_p", float("nan")), ("min_p", 2.0)]:
            with self.subTest(name=name):
                self.refused(
                    invalid, name, generate, model=self.model, text="x", sampling={name: value}
                )
        self.refused(invalid, "", generate, model=self.model, ids={"ids": [2**31]})


if __name__ == "__main__":
    unittest.main()
