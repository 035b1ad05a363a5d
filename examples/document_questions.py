"""Questions about a text file:

python examples/document_questions.py FILE "Who designed it?" "What does it cost?"

A text of up to MOST_TOKENS is read once, with the first question; the others begin at once, as what prompts begin with
alike is kept. Of a longer one, the passages that have the question's words are read for it (ranked by BM25).
"""

import math
import re
import sys
from collections import Counter

import edgellm

MOST_TOKENS = 1000
SYSTEM = "Answer the question with the help of the text, in one short sentence."


def words(text):
    return re.findall(r"\w+", text.lower())


def passages(text, n_words=100, overlap=20):
    """The text in pieces that overlap."""
    found = text.split()
    return [" ".join(found[at : at + n_words]) for at in range(0, len(found), n_words - overlap)]


def nearest(texts, question, n=3, k=1.2, b=0.75):
    """The n texts with most of the question's words, which count more if few texts have them (BM25)."""
    counts = [Counter(words(text)) for text in texts]
    mean = sum(count.total() for count in counts) / len(counts)

    def score(count):
        total = 0.0
        for word in set(words(question)):
            n_with = sum(word in each for each in counts)
            rarity = math.log(1 + (len(counts) - n_with + 0.5) / (n_with + 0.5))
            total += rarity * count[word] * (k + 1) / (count[word] + k * (1 - b + b * count.total() / mean))
        return total

    best = sorted(range(len(texts)), key=lambda i: score(counts[i]), reverse=True)[:n]
    return [texts[i] for i in sorted(best)]


path, *questions = sys.argv[1:]
with open(path, encoding="utf-8") as file:
    text = file.read()

with edgellm.load("smollm2") as model:
    is_short = len(model.tokenize(text)) <= MOST_TOKENS
    for question in questions:
        shown = text if is_short else "\n...\n".join(nearest(passages(text), question))
        prompt = f"Text: {shown}\n\nQuestion: {question}"
        done = model.chat(SYSTEM).send(prompt, max_tokens=60, stop="\n", temperature=0)
        print(f"{question}\n  {done.text}")
        print(f"  ({done.timings.cached_tokens} of {done.timings.prompt_tokens} tokens were read before)")
