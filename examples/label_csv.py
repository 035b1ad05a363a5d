"""A column of labels for a CSV file, 16 rows at a time (needs edgellm[structured]):

python examples/label_csv.py tickets.csv labelled.csv --column text

Started again after it was stopped, it goes on where it ended: rows that labelled.csv has are not asked for again.
"""

import argparse
import csv
from itertools import islice
from pathlib import Path

import edgellm

LABELS = ["account", "delivery", "payment"]
PROMPT = """Ticket: I cannot log in to my account.
Topic: account
Ticket: My parcel has not arrived.
Topic: delivery
Ticket: I was charged twice.
Topic: payment
Ticket: {}
Topic:"""

parser = argparse.ArgumentParser()
parser.add_argument("source", type=Path)
parser.add_argument("target", type=Path)
parser.add_argument("--column", required=True)
asked = parser.parse_args()

with (
    open(asked.source, newline="", encoding="utf-8") as source,
    open(asked.target, "a+", newline="", encoding="utf-8") as target,
):
    target.seek(0)
    n_done = max(0, sum(1 for _ in csv.reader(target)) - 1)
    rows = csv.DictReader(source)
    writer = csv.DictWriter(target, [*rows.fieldnames, "label"])
    if target.tell() == 0:
        writer.writeheader()
    rows = islice(rows, n_done, None)
    with edgellm.load("smollm2") as model:
        while batch := list(islice(rows, 16)):
            prompts = [PROMPT.format(" ".join(row[asked.column].split())) for row in batch]
            answers = model.generate_batch(prompts, choices=[f" {label}" for label in LABELS], temperature=0)
            writer.writerows({**row, "label": done.text.strip()} for row, done in zip(batch, answers, strict=True))
            target.flush()
            n_done += len(batch)
            print(f"{n_done} rows")
