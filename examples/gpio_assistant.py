"""An assistant that switches pins of a Raspberry Pi (needs edgellm[structured]; on the Pi: pip install gpiozero lgpio):

echo "Turn the heater on." | python examples/gpio_assistant.py

Elsewhere it says what it would switch. The model's answer is a tool call whose arguments are what their schema allows:
no other device, no other state.
"""

import sys

import edgellm

PINS = {"lamp": 17, "fan": 27, "heater": 22}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "switch",
            "description": "Turn a device on or off.",
            "parameters": {
                "type": "object",
                "properties": {"device": {"enum": list(PINS)}, "state": {"enum": ["on", "off"]}},
                "required": ["device", "state"],
                "additionalProperties": False,
            },
        },
    }
]


class FakePin:
    def __init__(self, number):
        self.number = number

    def on(self):
        print(f"pin {self.number}: high")

    def off(self):
        print(f"pin {self.number}: low")


def pin(number):
    """A pin of this machine if it has some."""
    try:
        from gpiozero import LED
        from gpiozero.exc import BadPinFactory
    except ImportError:
        return FakePin(number)
    try:
        return LED(number)
    except BadPinFactory:
        return FakePin(number)


def example(text, device, state):
    """A turn that shows the model how it is done: a small one learns more from these than from the description."""
    call = {"type": "function", "function": {"name": "switch", "arguments": {"device": device, "state": state}}}
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "", "tool_calls": [call]}]


EXAMPLES = [
    *example("Turn the heater on.", "heater", "on"),
    *example("Please switch off the lamp.", "lamp", "off"),
    *example("Turn on the fan.", "fan", "on"),
]

with edgellm.load("smollm2") as model:
    pins = {device: pin(number) for device, number in PINS.items()}
    chat = model.chat()
    for line in sys.stdin:
        chat.messages = list(EXAMPLES)
        done = chat.send(line.strip(), tools=TOOLS, tool_choice="switch", temperature=0, max_tokens=60)
        for call in done.tool_calls:
            device, state = call.arguments["device"], call.arguments["state"]
            print(f"{line.strip()} -> {device} {state}")
            getattr(pins[device], state)()
