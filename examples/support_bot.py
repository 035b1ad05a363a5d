"""A customer service bot that answers after examples, and repeated questions at once:

python examples/support_bot.py [answers.db] < questions.txt

Greedy answers are determined, so the same question has the same answer: it is made once, and kept in the file for the
next time, also after a restart.
"""

import sys

import edgellm

SYSTEM = "You answer customers of Bean & Leaf, a shop for coffee and tea."
KNOWN = {
    "When are you open?": "We are open from Monday to Saturday, from 9 to 18 o'clock.",
    "How long does delivery take?": "Delivery takes two to three days.",
    "What does delivery cost?": "Delivery costs 4 euros; from 30 euros on it is free.",
    "Can I return an order?": "Yes, you can return an order within 14 days.",
    "How can I pay?": "You can pay by card or by bank transfer.",
    "Where is your coffee roasted?": "Our coffee is roasted in Bremen every Tuesday.",
}
EXAMPLES = [
    {"role": role, "content": text}
    for question, answer in KNOWN.items()
    for role, text in (("user", question), ("assistant", answer))
]

path = sys.argv[1] if len(sys.argv) > 1 else None
with edgellm.AnswerCache(path) as cache, edgellm.load("smollm2", answer_cache=cache) as model:
    for line in sys.stdin:
        question = " ".join(line.split())
        chat = model.chat(SYSTEM)
        chat.messages += EXAMPLES
        done = chat.send(question, temperature=0, max_tokens=60)
        print(f"> {question}\n{done.text}{' (asked before)' if done.from_cache else ''}")
