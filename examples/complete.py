"""Continue a text, printed as it comes:  python examples/complete.py "Once upon a time" stories260k"""

import sys

import edgellm

prompt, model_name = [*sys.argv[1:], *["Once upon a time", "stories260k"][len(sys.argv) - 1 :]]

with edgellm.load(model_name) as model, model.stream(prompt, max_tokens=60, temperature=0) as stream:
    print(prompt, end="")
    for piece in stream:
        print(piece.text, end="", flush=True)
    print(f"\n({stream.completion.timings.generated_per_second:.0f} tokens/s)")
