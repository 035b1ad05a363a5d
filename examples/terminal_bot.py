"""A bot that remembers the conversation; Ctrl-C stops an answer, Ctrl-D leaves:

python examples/terminal_bot.py ["You are a poet."]
"""

import contextlib
import sys

import edgellm

system = sys.argv[1] if len(sys.argv) > 1 else "You are a helpful assistant. Answer in one short sentence."

with edgellm.load("smollm2") as model, contextlib.suppress(EOFError):
    chat = model.chat(system)
    while True:
        question = input("> ")
        with (
            contextlib.suppress(KeyboardInterrupt),  # what was said stays in the conversation
            chat.stream(question, max_tokens=200, temperature=0, overflow="shift") as answer,
        ):
            for piece in answer:
                print(piece.text, end="", flush=True)
        print()
