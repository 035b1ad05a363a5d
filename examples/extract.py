"""Typed objects out of text, one line each (needs edgellm[structured]):

echo "Anna Schmidt, 34, moved to Berlin last year." | python examples/extract.py

The answer is JSON of the schema by construction: it always parses, and its types are right.
"""

import json
import sys
from dataclasses import dataclass, fields

import edgellm

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


@dataclass
class Person:
    name: str
    age: int
    city: str


def schema_of(kind):
    properties = {field.name: {"type": JSON_TYPES[field.type]} for field in fields(kind)}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


with edgellm.load("smollm2") as model:
    for line in sys.stdin:
        chat = model.chat("You extract facts from text as JSON.")
        question = f"Text: {line.strip()}\nExtract the name, age and city of the person."
        done = chat.send(question, json_schema=schema_of(Person), temperature=0, max_tokens=100)
        if done.finish_reason == "length":
            sys.exit(f"the answer to {line.strip()!r} was cut at 100 tokens; allow more")
        print(Person(**json.loads(done.text)))
