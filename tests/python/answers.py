"""Prints the greedy answers to ten questions, 64 tokens each, as one line of JSON.

Each question is asked over HTTP and over gRPC, all at once, and must be answered alike. Reads the
router's addresses from LOCKSTEP_TEST_HTTP and LOCKSTEP_TEST_GRPC.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import openai

from reflection import Caller

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours of the rainbow.",
    "Write one sentence about the sea.",
    "How many legs does a spider have?",
    "Explain in simple words why the sky is blue.",
    "Tell a short story about a fox and a crow.",
    "List the days of the week.",
    "What does a baker do in the morning?",
    "Translate 'good evening' into Spanish.",
    "Why do leaves fall in autumn?",
]
TOKENS = 64


def main():
    http = openai.OpenAI(base_url=os.environ["LOCKSTEP_TEST_HTTP"] + "/v1", api_key="none")
    grpc = Caller(os.environ["LOCKSTEP_TEST_GRPC"].removeprefix("http://"))
    model = http.models.list().data[0].id

    def over_http(messages):
        answer = http.chat.completions.create(
            model=model,
            messages=messages,
            temperature=0,
            max_tokens=TOKENS,
            extra_body={"ignore_eos": True},
        )
        return answer.choices[0].message.content

    def over_grpc(messages):
        sampling = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True}
        name = "lockstep.v1.Inference/Chat"
        parts = grpc.call(name, model=model, messages=messages, sampling=sampling)
        ids = [token.id for part in parts for token in part.tokens]
        return {"text": "".join(part.text for part in parts), "ids": ids}

    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    with ThreadPoolExecutor(2 * len(chats)) as pool:
        texts = [pool.submit(over_http, chat) for chat in chats]
        answers = [pool.submit(over_grpc, chat).result() for chat in chats]
        texts = [text.result() for text in texts]
    for question, text, answer in zip(QUESTIONS, texts, answers):
        if text != answer["text"] or len(answer["ids"]) != TOKENS:
            sys.exit(f"{question}: {text!r} over HTTP, {answer} over gRPC")
    print(json.dumps(answers))


main()
