"""A bot that answers line by line and remembers the conversation:  python examples/chat_bot.py < questions.txt"""

import sys

import edgellm

with edgellm.load("smollm2") as model:
    chat = model.chat(system="You are a helpful assistant. Answer in one short sentence.")
    for question in sys.stdin:
        with chat.stream(question.strip(), max_tokens=60, temperature=0) as answer:
            for piece in answer:
                print(piece.text, end="", flush=True)
        print()
