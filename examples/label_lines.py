"""Label lines of text by which label the model finds likelier next:  python examples/label_lines.py < reviews.txt"""

import sys

import edgellm

LABELS = ("good", "bad")
PROMPT = """Review: It broke at once.
Sentiment: bad
Review: I loved it.
Sentiment: good
Review: Waste of money.
Sentiment: bad
Review: Really nice!
Sentiment: good
Review: {}
Sentiment:"""

with edgellm.load("smollm2") as model:
    ids = {label: model.tokenize(f" {label}", add_special=False)[0] for label in LABELS}
    for line in sys.stdin:
        logits = model.logits(model.tokenize(PROMPT.format(line.strip())))[-1]
        print(max(LABELS, key=lambda label: logits[ids[label]]), line.strip(), sep="\t")
