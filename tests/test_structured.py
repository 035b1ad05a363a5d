"""Answers after a schema, regex, choices or grammar: masks against the official suite, re, and a naive recognizer."""

import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import shared
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from json_schema_suite import BEGIN_MARK, BYTES, END, END_MARK, ByteTokenizer, accepts, document, files, run, written

from edgellm.api import Model
from edgellm.errors import ArgumentError, EdgeError, UnsupportedError
from edgellm.structured import digits
from edgellm.structured.constraint import Constraint, Vocabulary, grammar_for
from edgellm.structured.gbnf import Alt, Chars, Ref, Repeat, Seq, parse
from edgellm.structured.json_schema import FORMATS, KEYWORDS

DOCUMENT = Path(__file__).parents[1] / "docs" / "json-schema.md"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def allowed(constraint):
    """The bytes that may be next, and END."""
    return set(np.flatnonzero(constraint.mask(np.zeros(BYTES.n_tokens, np.float32)) == 0))


# JSON schemas.


@pytest.fixture(scope="module")
def results():
    return [run(path) for path in files(shared("data/json-schema-test-suite"))]


def test_the_official_suite(results):
    """All valid values of supported schemas pass, written in some order, and no invalid one."""
    for result in results[: [result.name for result in results].index("date-time")]:
        assert not result.accepted
        # Formats are kept to, where the suite has them as annotations.
        assert all("only an annotation" in name for name in result.rejected), result.rejected
        assert not [message for message, has_valid in result.impossible if has_valid]
    assert sum(result.supported for result in results) == 183


def test_the_official_suite_of_formats(results):
    assert not [name for result in results for name in result.accepted]


def test_what_is_refused_is_named(results):
    for result in results:
        for message in result.refused:
            named = re.search(r"keyword '(\S+)'|format|U\+0000|is of|multipleOf|oneOf|regexes|registry|Unimpl", message)
            assert named, message
            assert named[1] is None or named[1] not in KEYWORDS


def test_the_document_has_the_results(results):
    text = DOCUMENT.read_text(encoding="utf-8")
    assert document(text, results) == text
    prose = text.split(BEGIN_MARK)[0] + text.split(END_MARK)[1]
    assert {*KEYWORDS, *FORMATS} <= set(re.findall(r"`([\w$-]+)`", prose))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, "keyword 'not' at #"),
        ({"properties": {"a": {"items": {"minLenght": 3}}}}, "keyword 'minLenght' at #/properties/a/items"),
        ({"x-guidance": {"lenient": True}, "type": "string"}, "keyword 'x-guidance'"),
        ({"format": "iri"}, "format 'iri' at #"),
        ({"$schema": "http://json-schema.org/draft-04/schema#"}, "draft-04"),
        ({"const": "a\x7f"}, r"U\+007F"),
        ({"const": 10**23}, "the number 100000000000000000000000 at #, beyond 64 bits"),
        ({"items": {"enum": [[{"a": -(10**19)}]]}}, "the number -10000000000000000000 at #/items, beyond 64 bits"),
        ({"minimum": 2**63}, "the number 9223372036854775808 at #, beyond"),
        ({"minProperties": 2}, "minProperties of 2"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "https://example.com/a"}, "https://example.com/a"),
        ({"pattern": "(?=a)b"}, "look-around"),
        ({"properties": {f"p{n}": {} for n in range(100_000)}}, "more than 4000 properties"),
        ({"enum": list(range(100_000))}, "too big"),
        ({"type": "array", "minItems": 1000, "items": {"const": "a" * 1000}}, "more than 100000 characters"),
        (
            {"$defs": {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(5000)}, "$ref": "#/$defs/d0"},
            "references",
        ),
    ],
)
def test_what_is_not_supported_is_an_error(schema, message):
    with pytest.raises(UnsupportedError, match=message):
        Constraint(BYTES, grammar_for(json_schema=schema))


def nested(depth):
    return {"items": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("schema", "error", "message"),
    [
        ("{", ArgumentError, "not JSON"),
        ("[" * 100_000, ArgumentError, "not JSON"),
        ([], ArgumentError, r"has \[\] at #"),
        ({"properties": [1]}, ArgumentError, "#/properties"),
        ({"allOf": {}}, ArgumentError, "#/allOf"),
        ({"type": "strin"}, ArgumentError, "strin"),
        ({"enum": []}, ArgumentError, "Unsatisfiable"),
        (False, ArgumentError, "Unsatisfiable"),
        ({"$ref": "#/$defs/a"}, ArgumentError, "/\\$defs/a"),
        (nested(61), UnsupportedError, "60 levels"),
        ({"$ref": "#"}, ArgumentError, "endless"),
        ({"$anchor": "a", "allOf": [{"$ref": "#a"}]}, ArgumentError, "endless"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, ArgumentError, "endless"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, ArgumentError, "endless"),
    ],
)
def test_a_wrong_schema_is_an_error(schema, error, message):
    with pytest.raises(error, match=message):
        Constraint(BYTES, grammar_for(json_schema=schema))


def test_a_recursive_schema_is_fine():
    schema = {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False}
    grammar = grammar_for(json_schema=schema)
    assert accepts(grammar, '{"a": {"a":{}}}')
    assert not accepts(grammar, '{"a": {"b":{}}}')


@pytest.mark.parametrize("text", [r'{"\u0061": "x"}', r'{"a": "x"}', '{"a" : 1}', '{ "a": 1}', '{"a":  1}'])
def test_a_name_is_written_one_way(text):
    """By escapes, a name that is taken could come with another value."""
    assert not accepts(grammar_for(json_schema={"type": "object", "properties": {"a": {"type": "integer"}}}), text)


def test_a_schema_may_be_text():
    assert accepts(grammar_for(json_schema='{"type": "integer"}'), "12")
    assert accepts(grammar_for(json_schema="true"), '[1, {"a":null}]')


# Regexes and choices.


@pytest.mark.parametrize("regex", [r"\d{2}-[a-c]+", "(ab|c)*", "a|^b$", "[^a]?", "é+", "a/b", r"(?i)ab", "a.c"])
def test_a_regex_matches_as_a_whole(regex):
    grammar = grammar_for(regex=regex)
    for text in ("", "a", "b", "12-abc", "12-", "12-abcd", "ab", "abc", "abcab", "AB", "éé", "a/b", "a\nc", "axc"):
        assert accepts(grammar, text) == bool(re.fullmatch(regex, text)), text


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), min_size=1, max_size=5), st.data())
@example(["(", "a|b", "\n", " #-&~/"], None)
@settings(deadline=None)
def test_choices(choices, data):
    grammar = grammar_for(choices=choices)
    assert all(accepts(grammar, choice) for choice in choices)
    if data:
        other = data.draw(st.text(st.sampled_from("".join(choices)), max_size=6))
        assert accepts(grammar, other) == (other in choices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "("}, "unclosed group"),
        ({"regex": ""}, "not empty"),
        ({"regex": 3}, "regex has 3"),
        ({"regex": "a\ud800"}, "regex has .* whole characters"),
        ({"choices": ["a", "\udcff"]}, "choices has .* whole characters"),
        ({"grammar": 'root ::= "\ud800"'}, "grammar has .* whole characters"),
        ({"json_schema": {"pattern": "\ud800"}}, "the JSON schema's pattern at # has .* whole characters"),
        ({"choices": "yes"}, "a list"),
        ({"choices": []}, "at least one"),
        ({"choices": ["a", ""]}, "not empty"),
        ({"regex": "a", "choices": ["b"]}, "regex and choices are both given"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        Constraint(BYTES, grammar_for(**options))


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'edgellm\[structured\]'"):
        grammar_for(regex="a")


# GBNF.

JSON = r"""# a comment
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
SUMS = r"""root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""


@pytest.mark.parametrize(
    ("grammar", "inside", "outside"),
    [
        (JSON, ['{"a": [1,2.5e3,{"b":null}], "c": "é\\u00e9\\n"}', "{ }"], ["{a}", '{"a"}', "1"]),
        (SUMS, ["1=2\n", "a+(b*2 )\n= 3\n\n\nx=1\n"], ["1=2", "=2\n"]),  # a greedy num would swallow the last newline
        ('root ::= "a" root "b" |', ["", "ab", "aabb"], ["aab", "ba"]),
        ('root ::= [a-z]* "end" | "(" root ")"', ["end", "endend", "(xend)"], ["en", "endx"]),
        ('root ::= a b\na ::= "x" | "x" a "y"\nb ::= "y"*', ["x", "xy", "xxyyy"], ["xxx", "y"]),
        ('root ::= "a"{2} "b"{1,2} "c"{2,}', ["aabcc", "aabbccc"], ["abcc", "aabbbcc", "aabc"]),
        ("root ::= [^a-c\\]] . [-x] [x-]", ["d\n-x", "é😀x-"], ["a1xx", "]1xx", "d1ax"]),
        ('root ::= "\\x41\\u00e9\\U0001F600\\"\\\\"', ['Aé😀"\\'], ["A"]),
        ("root ::= (\n  [a]\n  # comment\n  | [b]\n)\n\n", ["a", "b"], ["ab"]),
        ("root ::= " + " | ".join(f'"w{n}"' for n in range(3000)), ["w0", "w2999"], ["w3000"]),
    ],
)
def test_gbnf(grammar, inside, outside):
    compiled = grammar_for(grammar=grammar)
    assert [text for text in inside if not accepts(compiled, text)] == []
    assert [text for text in outside if accepts(compiled, text)] == []


def ends(node, text, begin, rules):
    """Where a text of the node that begins at a place may end: the definition, slowly."""
    if isinstance(node, Chars):
        fits = begin < len(text) and any(first <= ord(text[begin]) <= last for first, last in node.ranges)
        return {begin + 1} if fits else set()
    if isinstance(node, Ref):
        return ends(rules[node.name], text, begin, rules)
    if isinstance(node, Alt):
        return set().union(*(ends(item, text, begin, rules) for item in node.items))
    if isinstance(node, Seq):
        places = {begin}
        for item in node.items:
            places = set().union(*(ends(item, text, place, rules) for place in places))
        return places
    assert isinstance(node, Repeat)
    found, places = set(), {begin}
    for n in range(node.least + len(text) + 2 if node.most is None else node.most + 1):
        found |= places if n >= node.least else set()
        places = set().union(*(ends(node.item, text, place, rules) for place in places))
    return found


PIECES = st.recursive(
    st.sampled_from(['"a"', '"b"', '"ab"', '"ba"', "[ab]", "one", "two", "root"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("*+?")).map(lambda pair: f"({pair[0]}){pair[1]}"),
        st.lists(inner, min_size=2, max_size=3).map(lambda items: "(" + " | ".join(items) + ")"),
        st.lists(inner, min_size=2, max_size=3).map(" ".join),
    ),
    max_leaves=6,
)
TEXTS = ["".join(letters) for n in range(5) for letters in product("ab", repeat=n)]


@given(PIECES, PIECES, PIECES)
@settings(deadline=None, max_examples=150)
def test_gbnf_has_the_texts_of_a_naive_recognizer(root, one, two):
    """No text is lost by lexemes, and none is gained."""
    text = f"root ::= {root}\none ::= {one}\ntwo ::= {two}"
    try:
        rules = parse(text)
    except ArgumentError as error:
        assume("never ends" not in str(error) and "left recursion" not in str(error))
        raise
    grammar = grammar_for(grammar=text)
    expected = {candidate for candidate in TEXTS if len(candidate) in ends(rules["root"], candidate, 0, rules)}
    assert {candidate for candidate in TEXTS if accepts(grammar, candidate)} == expected


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ("a ::= [a]", "no rule root; expected one beside a"),
        ('root ::= "a', r"line 1, column 10 \('\"a'\): the text that begins here has no end"),
        ("root ::= [a", "column 10 .*: the characters that begin here have no end"),
        ('root ::= "a" (\n', "column 14 .*: the parenthesis that begins here has no end"),
        ('root := "a"', "column 6 .*: expected ::="),
        ('root ::= "a"\n\nx ::= y', r"line 3, column 7 \('y'\): there is no rule 'y'"),
        ('root ::= root "a" | "b"', "line 1, column 1 .*: the rule 'root' begins with itself"),
        ('root ::= "c" a\na ::= "x"? b\nb ::= a "b" | "c"', "line 2, .* the rule 'a' begins with itself"),
        ('root ::= "a"\nx ::= "b" x', "line 2, column 1 .*: the rule 'x' never ends"),
        ('root ::= "a"\nroot ::= "b"', "line 2, column 1 .*: the rule 'root' is there already"),
        ('root ::= "a"{3,2}', "numbers that rise to 2000"),
        ('root ::= "a"{9999}', "numbers that rise to 2000"),
        ('root ::= "a"{x}', r"expected \{n\}"),
        ("root ::= [z-a]", "backwards"),
        ("root ::= [\\ud800]", "no such character"),
        ('root ::= "\\q"', r"expected one of \\n"),
        ('root ::= "\\U00110000"', r"expected one of \\n"),
        ('root ::= "a" )', "expected the end of the rule"),
        ("root ::= <think>", "tokens in grammars are not supported"),
        ("?", "expected a rule"),
    ],
)
def test_wrong_gbnf(grammar, message):
    with pytest.raises(ArgumentError, match=message):
        grammar_for(grammar=grammar)


def chain(n, sides):
    return "\n".join(sides.format(n, n + 1) for n in range(n)) + f'\nr{n} ::= "a"\nroot ::= r0'


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root ::= "' + "a" * 100_000 + '"', "characters"),
        ("root ::= " + "(" * 200 + '"a"' + ")" * 200, "100 parentheses"),
        (chain(3000, 'r{} ::= "x" r{}'), "500 rules"),
        (f"root ::= ({' | '.join(f'[a] [b]{n:b}'.replace('0', '[c]').replace('1', '[d]') for n in range(900))}) root?",
         "too large"),
    ],
)  # fmt: skip
def test_large_gbnf_is_refused(grammar, message):
    with pytest.raises(UnsupportedError, match=message):
        Constraint(BYTES, grammar_for(grammar=grammar))


def test_rules_that_double():
    assert accepts(grammar_for(grammar=chain(6, "r{0} ::= r{1} r{1}")), "a" * 64)
    with pytest.raises(UnsupportedError, match="more than 100000 characters"):
        grammar_for(grammar=chain(40, "r{0} ::= r{1} r{1}"))


# Answers.


def test_a_mask_begins_with_what_may_begin():
    constraint = Constraint(BYTES, grammar_for(json_schema=PERSON))
    assert allowed(constraint) == {ord("{")}
    for byte in b'{"name": "a", "age": 1':
        constraint.accept(byte)
    assert allowed(constraint) == set(b"0123456789,}")
    constraint.accept(ord("}"))
    assert constraint.is_done
    assert allowed(constraint) == {END}


@pytest.mark.parametrize("schema", [{"type": "integer"}, {"type": "number"}, {"type": "number", "maximum": 1}])
def test_digits_in_a_row_end(schema):
    """No schema bounds how many a number has, and a model goes on with them as long as it may."""
    digit = b"0.%s" % (b"1" * digits.MOST) if "maximum" in schema else b"1" * digits.MOST
    constraint = Constraint(BYTES, grammar_for(json_schema={"prefixItems": [{"type": "string"}, schema]}))
    for byte in b'["a\\"%s", ' % (b"2" * 50) + digit:
        assert byte in allowed(constraint)
        constraint.accept(byte)
    assert allowed(constraint) & set(b"0123456789,]") == set(b",]")


def test_digits_that_a_schema_demands_come():
    grammar = grammar_for(json_schema={"type": "number", "minimum": 1e-25, "maximum": 2e-25})
    assert accepts(grammar, "0.0000000000000000000000001")
    assert not accepts(grammar, "0.00000000000000000000000015")
    assert accepts(grammar_for(regex="[0-9]+"), "1" * 100)


def test_tokens_of_several_digits():
    class Pairs(ByteTokenizer):
        """Two digits are a token too."""

        n_tokens, pairs = 357, [b"%02d" % n for n in range(100)]

        def token_bytes(self, id):
            return super().token_bytes(id) if id <= END else self.pairs[id - END - 1]

    constraint = Constraint(Vocabulary(Pairs()), grammar_for(json_schema={"type": "integer"}))
    for _ in range(digits.MOST - 1):
        constraint.accept(ord("1"))
    (left,) = np.nonzero(constraint.mask(np.zeros(357, np.float32)) == 0)
    assert set(left) == {*b"0123456789", END}


def test_a_token_that_is_not_allowed_is_an_error():
    constraint = Constraint(BYTES, grammar_for(regex="ab"))
    with pytest.raises(ArgumentError, match="the regex cannot be used"):
        constraint.accept(ord("b"))


def test_a_model_without_an_end_is_done_where_nothing_can_follow():
    class Endless(ByteTokenizer):
        n_tokens, eos_ids = 256, ()

    constraint = Constraint(Vocabulary(Endless()), grammar_for(regex="a"))
    assert not constraint.is_done
    constraint.accept(ord("a"))
    assert constraint.is_done


@pytest.mark.parametrize("options", [{}, {"speculate": 6}])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 7, "top_k": 0}])
def test_an_answer_of_stories(stories, sampling, options):
    answer = stories.generate("Once", json_schema=PERSON, max_tokens=200, **sampling, **options)
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), PERSON)
    assert answer.text == stories.generate("Once", json_schema=PERSON, max_tokens=200, **sampling).text


def test_an_answer_that_is_cut_is_the_beginning_of_one(stories):
    answer = stories.generate("Once", regex="[a-z]{40}", max_tokens=5)
    assert (answer.finish_reason, len(answer.ids)) == ("length", 5)
    assert re.fullmatch("[a-z]{1,40}", answer.text)


def test_stop_strings_end_an_answer_too(stories):
    answer = stories.generate("Once", regex="(ab)+", stop=["bab"], max_tokens=50)
    assert (answer.text, answer.finish_reason) == ("a", "stop")


def test_a_grammar_and_no_end_contradict_each_other(stories):
    with pytest.raises(ArgumentError, match="regex and ignore_eos"):
        stories.generate("Once", regex="a", ignore_eos=True)


def test_logits_processors_are_called_in_order(stories):
    seen = []

    def only_five(ids, logits):
        seen.append(len(ids))
        return np.where(np.arange(len(logits)) == 5, logits, -np.inf)

    def six_instead(ids, logits):
        return np.roll(logits, 1)

    prompt_ids = stories.tokenize("Once")
    answer = stories.generate("Once", logits_processors=[only_five, six_instead], max_tokens=3)
    assert answer.ids == [6, 6, 6]
    assert seen == [len(prompt_ids) + n for n in range(3)]
    with pytest.raises(ArgumentError, match=r"shape \(1,\); expected"):
        stories.generate("Once", logits_processors=[lambda ids, logits: logits[:1]], max_tokens=3)


def test_processors_do_not_break_a_grammar(stories):
    answer = stories.generate("Once", regex="[ab]{8}", logits_processors=[lambda ids, logits: -logits], max_tokens=20)
    assert re.fullmatch("[ab]{8}", answer.text)


def test_smollm2_tokens_are_let_through(smollm2):
    """Valid values of the suite, as SmolLM2 writes them."""
    vocabulary = Vocabulary(smollm2.tokenizer)
    n = 0
    for path in files(shared("data/json-schema-test-suite"))[:46]:
        for group in json.loads(path.read_text(encoding="utf-8")):
            try:
                grammar = grammar_for(json_schema=group["schema"])
                Constraint(vocabulary, grammar)
            except EdgeError:
                continue
            for text in (text for test in group["tests"] for text in written(test["data"])):
                ids = smollm2.tokenize(text, add_special=False, parse_special=False)
                assert accepts(grammar, text) == accepts(grammar, text, vocabulary, ids)
                n += 1
    assert n > 700


SCHEMAS = json.loads((Path(__file__).parents[1] / "benchmarks" / "schemas.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compiled(smollm2_path):
    with Model(smollm2_path) as model:
        yield model


@pytest.mark.parametrize("name", SCHEMAS)
def test_random_answers_of_smollm2(compiled, name):
    """A sample of what benchmarks/constraints.py --answers 1000 does."""
    schema = SCHEMAS[name]
    answers = [
        compiled.generate(f"A {name} in JSON: ", json_schema=schema, max_tokens=512, temperature=1.5, seed=seed,
                          top_k=0, top_p=1, min_p=0)
        for seed in range(2)
    ]  # fmt: skip
    for answer in answers:
        if answer.finish_reason == "length":
            assert name in ("tree", "counts of words")  # which have no bounds
            continue
        jsonschema.validate(json.loads(answer.text), schema, format_checker=jsonschema.FormatChecker())


def test_the_command_line(tmp_path):
    def edgellm(*arguments):
        command = [sys.executable, "-m", "edgellm", "generate", "Once", "-m", "stories260k", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    (tmp_path / "schema.json").write_text(json.dumps(PERSON))
    (tmp_path / "bits.gbnf").write_text("root ::= [01]{8}")
    for schema in (str(tmp_path / "schema.json"), json.dumps(PERSON)):
        jsonschema.validate(json.loads(edgellm("--json-schema", schema, "--seed", "1").stdout), PERSON)
    assert re.fullmatch(r"[01]{8}\n", edgellm("--grammar", str(tmp_path / "bits.gbnf")).stdout)
    assert re.fullmatch(r"\d\d:\d\d\n", edgellm("--regex", r"[0-9]{2}:[0-9]{2}").stdout)
    assert edgellm("--choices", "red|green").stdout in ("red\n", "green\n")
    for arguments, code, message in (
        (["--json-schema", "missing.json"], 2, "missing.json cannot be read"),
        (["--json-schema", '{"not": {}}'], 5, "the keyword 'not' at #"),
        (["--grammar", str(tmp_path)], 2, "cannot be read"),
        (["--regex", "("], 2, "unclosed group"),
        (["--regex", "a", "--choices", "b"], 2, "regex and choices are both given"),
    ):
        done = edgellm(*arguments)
        assert (done.returncode, message in done.stderr) == (code, True), done.stderr
