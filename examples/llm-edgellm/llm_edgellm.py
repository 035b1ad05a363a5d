"""A plugin of llm: each model of `edgellm list` as edgellm/NAME, with conversations, options and schemas."""

from functools import cache

import llm
from pydantic import Field

import edgellm
from edgellm import catalog, store


@llm.hookimpl
def register_models(register):
    for name in sorted({*catalog.entries(), *(each.name for each in store.installed())}):
        register(EdgeModel(name), AsyncEdgeModel(name))


@cache
def loaded(name):
    """A model is loaded once, and stays: a chat asks it again and again."""
    return edgellm.load(name)


class Shared:
    """What a model of llm and its twin for event loops have in common."""

    can_stream = True
    supports_schema = True

    class Options(llm.Options):
        max_tokens: int | None = Field(None, ge=0, description="Most tokens of an answer")
        temperature: float | None = Field(None, ge=0, description="0 always takes the likeliest token; default 0.8")
        seed: int | None = Field(None, ge=0, description="For the same answer again")
        top_k: int | None = Field(None, ge=0, description="Sample from so many of the likeliest tokens; default 40")
        top_p: float | None = Field(None, ge=0, le=1, description="... that together are so likely; default 0.95")
        min_p: float | None = Field(None, ge=0, le=1, description="... that are so likely beside the first; 0.05")
        repeat_penalty: float | None = Field(None, gt=0, description="Make recent tokens less likely; 1 is off")
        regex: str | None = Field(None, description="What the answer must match")

    def __init__(self, name):
        self.name, self.model_id = name, f"edgellm/{name}"

    def begun(self, prompt):
        """The chat so far, what is said next, and the options of Chat.stream."""
        messages = [
            {"role": each.role, "content": "".join(part.text for part in each.parts)} for each in prompt.messages
        ]
        if not messages or messages[-1]["role"] != "user":
            raise llm.ModelError(f"nothing was said to {self.model_id}; expected a prompt")
        chat = loaded(self.name).chat()
        chat.messages = messages[:-1]
        options = {name: value for name, value in prompt.options if value is not None}
        if prompt.schema:
            options["json_schema"] = prompt.schema
        return chat, messages[-1]["content"], options


class EdgeModel(Shared, llm.Model):
    def execute(self, prompt, stream, response, conversation):
        chat, text, options = self.begun(prompt)
        with chat.stream(text, **options) as answer:
            for piece in answer:
                yield piece.text
        tell_usage(response, answer.completion)


class AsyncEdgeModel(Shared, llm.AsyncModel):
    async def execute(self, prompt, stream, response, conversation):
        chat, text, options = self.begun(prompt)
        async with chat.astream(text, **options) as answer:
            async for piece in answer:
                yield piece.text
        tell_usage(response, answer.completion)


def tell_usage(response, done):
    response.set_usage(input=len(done.prompt_ids), output=done.timings.generated_tokens)
