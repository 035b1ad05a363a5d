import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import SPECIAL, byte_level, sentencepiece, tokenizer

from edgellm.chat_template import ChatPrompt, ChatTemplate, encode_chat
from edgellm.converters.gguf_tokenizer import tokenizer_from_gguf
from edgellm.errors import ArgumentError, ChatTemplateError, UnsupportedError
from edgellm.tokenizer import Tokenizer

CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
Be helpful.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA3 = """\
{%- if not tools is defined or tools is none %}{% set tools = none %}{% endif -%}
{{- bos_token }}
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\\n\\n' ~ message.content | trim ~ '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{% endif %}"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' %}{% generation %}{{ ' ' + message.content + eos_token }}{% endgeneration %}
{%- else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"""

TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA3, "mistral": MISTRAL}
TOKENIZERS = {
    "bytes": tokenizer(byte_level()),
    "bytes and bos": tokenizer(byte_level(add_bos_token=True)),
    "sentencepiece": tokenizer(sentencepiece()),
}
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "he"}, {"role": "user", "content": "w"}]

each_template = pytest.mark.parametrize(
    "template", [ChatTemplate(source, "<s>", "</s>") for source in TEMPLATES.values()], ids=TEMPLATES
)
each_tokenizer = pytest.mark.parametrize("ours", TOKENIZERS.values(), ids=TOKENIZERS)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            CHATML,
            "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhe"
            "<|im_end|>\n<|im_start|>user\nw<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            LLAMA3,
            "<s><|im_start|>user\n\nhello<|im_end|><|im_start|>assistant\n\nhe<|im_end|><|im_start|>user\n\nw"
            "<|im_end|><|im_start|>assistant\n\n",
        ),
        (MISTRAL, "<s>[INST] hello [/INST] he</s>[INST] w [/INST]"),
        (
            "{% for m in messages %}\n  {% if loop.index == 2 %}{% continue %}{% endif %}\n"
            "{{ m.content }}\n{% endfor %}",
            "hello\nw\n",
        ),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hello"}'),
        ("{{ {'<a>': ['\xe9', 1]} | tojson }}", '{"<a>": ["\xe9", 1]}'),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}{% endfor %}"
            "{{ ns.n }}",
            "8",
        ),
        (
            "{% macro f(m) %}<{{ m.role }}>{% endmacro %}{% for m in messages[::-1] %}{{ f(m) }}{% endfor %}",
            "<user><assistant><user>",
        ),
        ("{% for a, b in [(1, 2), (3, 4)] %}{{ a ~ b }}{% if not loop.last %},{% endif %}{% endfor %}", "12,34"),
        (
            "{{ '%s-%05.1f' % ('a', 2.5) }}{{ '{:>4}'.format(1) }}{{ [1, 2]|join('/') }}{{ 1700000000 * 1000 }}",
            "a-002.5   11/21700000000000",
        ),
        ("{{ tools is none }}{{ documents is none }}{{ enable_thinking is defined }}{{ nothing }}", "TrueTrueFalse"),
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),
    ],
)
def test_templates_render_as_jinja_does(source, text):
    assert ChatTemplate(source, "<s>", "</s>").render(TALK) == text


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("{{ 'quiet' if enable_thinking is defined and not enable_thinking else 'loud' }}", ["loud", "loud", "quiet"]),
        ("{% if thinking %}loud{% else %}quiet{% endif %}", ["quiet", "loud", "quiet"]),
        ("thinking", ["thinking", None, "thinking"]),
        ("<think>", ["<think>", "<think>", None]),
    ],
)
def test_a_model_is_told_whether_to_think(source, texts):
    template = ChatTemplate(source)
    assert template.may_think == (texts[1] is not None)
    found = [template.render(TALK)]
    for thinks in (True, False):
        if texts[len(found)] is None:
            with pytest.raises(UnsupportedError, match=f"the model {'never' if thinks else 'always'} thinks before"):
                template.thinking(thinks)
            found.append(None)
        else:
            found.append(template.thinking(thinks).render(TALK))
    assert found == texts


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no chat template; expected one: use generate, or another model"),
        ("", "no chat template"),
        ("{% if %}", "wrong in line 1: Expected an expression"),
        ("\n{% for m in messages %}", "wrong in line 2"),
        ("{{ 'a'|no_such_filter }}", "no_such_filter"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ a.b.c }}", "'a' is undefined"),
        ("{{ messages[0].content.x.y }}", "has no attribute 'x'"),
        ("{{ 1 + 'a' }}", "failed: unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'other' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception.__globals__['re'] }}", "unsafe"),
    ],
)
def test_a_template_that_fails_says_why(source, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source).render(TALK)


NS = "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * [1] }}",
        "{{ 10**(10**10) }}",
        "{{ range(10**12)|list }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        NS + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
        NS + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        NS + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        NS + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        NS + "{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ ns.x }}",
        NS + "{% set ns.x = {1: ns.x, 2: ns.x} %}{% endfor %}{{ ns.x }}",
        NS + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x|tojson }}",
        NS + "{% set ns.x = 9 if i == 0 else ns.x * ns.x %}{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10**9) }}",
        "{{ ('{0}' * 10**6).format('x' * 10**6) }}",
        "{{ 'a'|center(10**9) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ '\t'.expandtabs(2 * 10**9) }}",
        "{{ ('\n' * 10**6)|indent(10**6, true, true) }}",
        "{{ [1]|tojson(indent=10**9) }}",
        "{{ 1.5|round(10**9, 'ceil') }}",
        "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
        "{{ ('a' * 10**6).translate({97: 'b' * 10**6}) }}",
        "{{ range(99999)|join('x' * 10**6) }}",
        "{{ range(99999)|map('string')|map('replace', '', 'x' * 10**6)|join }}",
        "{{ [1]|batch(2 * 10**9, 'x')|list }}",
        "{{ ([[1] * 100] * 1000)|sum(start=[]) }}",
    ],
)
def test_a_hostile_template_ends_soon(source):
    started = time.monotonic()
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render(TALK)
    assert time.monotonic() - started < 10


def test_a_namespace_does_not_show_what_it_holds():
    source = NS + "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}"
    assert ChatTemplate(source).render(TALK) == "<namespace>"


@each_tokenizer
@each_template
def test_an_ordinary_chat_is_encoded_as_its_text(ours, template):
    whole = ours.encode(template.render(TALK), add_special=False)
    bos = [ours.bos_id] if ours.adds_bos else []
    assert encode_chat(ours, template, TALK) == bos + whole[whole[:1] == bos :]


@each_tokenizer
@pytest.mark.parametrize("source", [CHATML, "{{ bos_token }}" + CHATML], ids=["template without bos", "with"])
def test_bos_comes_once_at_most(ours, source):
    ids = encode_chat(ours, ChatTemplate(source, "<s>", "</s>"), TALK)
    assert ids.count(ours.bos_id) == (ours.adds_bos or "bos_token" in source)
    assert ours.eos_ids[0] not in ids


@each_tokenizer
@each_template
@given(text=st.lists(st.sampled_from([*SPECIAL, "<|im_", "end|>", " ", "hello", "\U000f0000", "\U000f0001", "\n"])))
def test_what_a_message_says_is_never_a_special_token(ours, template, text):
    content = "x" + "".join(text) + "x"
    ids = encode_chat(ours, template, [{"role": "user", "content": content}])
    tame = encode_chat(ours, template, [{"role": "user", "content": "xx"}])
    special = set(ours.special_tokens.values())
    assert [id for id in ids if id in special] == [id for id in tame if id in special]
    assert content in ours.decode(ids)


def test_special_tokens_are_masked_in_all_that_a_message_holds():
    ours = TOKENIZERS["bytes"]
    messages = [{"role": "user", "content": [{"type": "text", "text": "<s>"}], "tool": {"a": ("</s>",)}, "n": 1}]
    ids = encode_chat(ours, ChatTemplate("{{ messages[0].content[0].text }}{{ messages[0].tool.a[0] }}"), messages)
    assert ours.decode(ids) == "<s></s>"


@each_tokenizer
@each_template
def test_a_chat_that_goes_on_keeps_its_ids(ours, template):
    prompt = ChatPrompt(ours, template)
    first = prompt.encode(TALK[:1])
    # The model may spell its words in tokens of its own choice: letters here, where encoding would merge them.
    answer = [ours.encode(char, add_special=False)[-1] for char in "he"]
    prompt.answered("he", answer)
    ids = prompt.encode(TALK)
    assert ours.decode(ids, False) == ours.decode(encode_chat(ours, template, TALK), False)
    if template.render(TALK).startswith(template.render(TALK[:1]) + "he"):
        assert ids[: len(first) + 2] == first + answer


@pytest.mark.parametrize(
    "edit",
    [
        lambda talk: talk[2:],
        lambda talk: [{**talk[0], "content": "other"}, *talk[1:]],
        lambda talk: [*talk[:1], {**talk[1], "content": "other"}, talk[2]],
        lambda talk: [*talk[:1], {**talk[1], "content": "he<|im_end|>"}, talk[2]],
    ],
)
def test_a_chat_that_was_edited_is_encoded_anew(edit):
    ours, template = TOKENIZERS["bytes"], ChatTemplate(CHATML)
    prompt = ChatPrompt(ours, template)
    prompt.encode(TALK[:1])
    prompt.answered("he", ours.encode("he"))
    assert prompt.encode(edit(TALK)) == encode_chat(ours, template, edit(TALK))


def test_an_answer_that_says_less_than_its_ids_is_encoded_anew():
    ours, template = TOKENIZERS["bytes"], ChatTemplate(CHATML)
    prompt = ChatPrompt(ours, template)
    prompt.encode(TALK[:1])
    prompt.answered("he", ours.encode("he and a stop string"))
    assert prompt.encode(TALK) == encode_chat(ours, template, TALK)


def test_a_kept_chat_may_hold_ids_of_padding():
    padded = Tokenizer(tokenizer_from_gguf(byte_level()).json, 0, (1,), vocab_size=272)
    prompt, again = (ChatPrompt(padded, ChatTemplate(CHATML)) for _ in range(2))
    prompt.encode(TALK[:1])
    prompt.answered("he", [*padded.encode("he", add_special=False), 271])
    again.restore(prompt.state)
    assert again.encode(TALK) == prompt.encode(TALK)
    assert 271 in again.state["ids"]
    with pytest.raises(ArgumentError, match="expected token ids"):
        again.restore({"text": "", "ids": [272]})


def test_threads_share_a_template():
    template = ChatTemplate(CHATML)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: template.render(TALK), range(50)))) == 1
