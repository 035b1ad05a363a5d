"""The command line as a person or a script meets it: each in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import BUNDLED, shared

from edgellm import architectures
from edgellm.commands import generate
from edgellm.options import SamplingOption
from edgellm.sampling import SamplingParams

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    "batch", "bench", "chat", "convert", "doctor", "eval", "export", "fit", "generate", "list", "perplexity", "pull",
    "rm", "serve", "show", "tokenize", "warmup",
]  # fmt: skip


def edgellm(*arguments, stdin="", home=None, path=None, code=0):
    """Run a command; returns it with its stdout and stderr, and checks that no traceback shows. Modules in `path` come
    before others."""
    folders = {"EDGELLM_HOME": home, "PYTHONPATH": path}
    environment = {**os.environ, **{name: str(folder) for name, folder in folders.items() if folder}}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "edgellm", *map(str, arguments)],
        input=stdin.encode() if isinstance(stdin, str) else stdin, capture_output=True, env=environment, timeout=300,
        check=False,
    )  # fmt: skip
    run.stdout, run.stderr = run.stdout.decode(), run.stderr.decode()
    assert "Traceback" not in run.stderr
    assert run.returncode == code, run.stderr
    return run


def test_help_lists_every_command():
    text = edgellm("--help").stdout
    assert re.findall(r"^  (\w+)  +[A-Z]", text, re.MULTILINE) == COMMANDS
    for command in COMMANDS:
        shown = edgellm(command, "--help").stdout
        assert "--debug" in shown
        assert f"edgellm {command}" in shown


def test_version():
    assert re.fullmatch(r"edgellm, version \d+\.\d+\.\d+\n", edgellm("--version").stdout)


def test_generate():
    run = edgellm("generate", "Once upon a time", "-m", "stories260k", "--temp", 0, "-n", 8, "--stats")
    assert run.stdout == ", there was a little girl\n"
    assert re.search(r"\[ prompt: 5 tokens \(0 cached\), .* answer: 8 tokens", run.stderr)


def test_fit():
    shown = edgellm("fit", "stories260k", "--ctx", 128).stdout
    assert re.search(r"^cache +\d+\.\d KB  what 128 tokens leave", shown, re.MULTILINE)
    assert re.search(r"\d+ t/s  at most, with a full context \d+;", shown)
    facts = json.loads(edgellm("fit", "stories260k", "--ctx", 128, "--json").stdout)
    assert facts["total"] == facts["weights"] + facts["cache"] + facts["arena"]
    reference = json.loads(edgellm("fit", "stories260k", "--backend", "reference", "--json").stdout)
    assert (reference["arena"], reference["adapters"]) == (0, 0)
    assert "adapters" not in shown


def test_a_cache_of_8_bits(tmp_path):
    """Heads of stories260K are so short that whole vectors take more."""
    facts = [json.loads(edgellm("fit", "stories260k", "--kv", kv, "--json").stdout) for kv in ("f16", "q8")]
    assert [each["kv"] for each in facts] == ["f16", "q8"]
    assert facts[0]["cache"] != facts[1]["cache"]
    run = edgellm("generate", "Once upon a time", "-m", "stories260k", "--temp", 0, "-n", 8, "--kv", "q8")
    assert run.stdout == ", there was a little girl\n"
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little girl named Lily.\n" * 20)
    found, other = (
        json.loads(edgellm("perplexity", "stories260k", text, "--ctx", 64, "--kv", kv, "--json").stdout)["value"]
        for kv in ("q8", "f16")
    )
    assert 0 < abs(found / other - 1) < 0.05
    assert "'q4' is not one of 'f16', 'q8'" in edgellm("chat", "Hi", "--kv", "q4", code=2).stderr


def test_doctor():
    found = json.loads(edgellm("doctor", "--json").stdout)
    assert found["self-test"]["reference"].startswith("', there was a little girl")
    assert "of the reference's largest" in found["self-test"]["kernels"]
    assert "chosen" in found["kernels"].values()
    lines = edgellm("doctor").stdout.splitlines()
    assert {"versions", "machine", "kernels", "caches", "memory", "self-test"} <= set(lines)


def test_generate_with_drafts():
    def done(*options):
        return json.loads(
            edgellm("generate", "Once upon a time", "-m", BUNDLED, "--temp", 0, "--json", *options).stdout
        )

    plain, drafted = done("-n", 150), done("-n", 150, "--speculate", 4)
    assert drafted["ids"] == plain["ids"]
    assert plain["timings"]["drafted_tokens"] == 0
    assert 0 < drafted["timings"]["accepted_tokens"] <= drafted["timings"]["drafted_tokens"]
    run = edgellm("generate", "Once upon a time", "-m", BUNDLED, "-n", 150, "--temp", 0, "--speculate", 4, "--stats")
    assert re.search(r"tokens/s \| drafts: \d+ of \d+ tokens accepted \]$", run.stderr.strip())
    assert "--speculate" in edgellm("generate", "Once", "--speculate", -1, code=2).stderr


def test_generate_json():
    options = ["--temp", 0, "-n", 8, "--stop", " girl", "--stop", "zzz", "--ctx", 64, "-t", 1, "--backend", "reference"]
    run = edgellm("generate", "Once upon a time", "-m", BUNDLED, "--json", *options)
    done = json.loads(run.stdout)
    assert set(done) == {"text", "ids", "prompt_ids", "finish_reason", "dropped_tokens", "timings"}
    assert (done["text"], done["finish_reason"]) == (", there was a little", "stop")
    assert done["prompt_ids"][0] == 1


def test_several_answers():
    arguments = ["generate", "Once", "-m", "stories260k", "-n", 8, "--seed", 3, "--temp", 1.5]
    lines = edgellm(*arguments, "--answers", 3, "--json").stdout.splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert len(set(texts)) == 3
    assert edgellm(*arguments).stdout == f"{texts[0]}\n"
    assert edgellm(*arguments, "--answers", 3).stdout == "".join(f"{i + 1}:{text}\n" for i, text in enumerate(texts))


def test_sampling_options_reach_the_sampler():
    def said(*options):
        return edgellm("generate", "Once", "-m", "stories260k", "-n", 12, *options).stdout

    greedy = said("--temp", 0)
    assert said("--top-k", 1, "--temp", 2) == greedy
    assert said("--min-p", 1, "--top-k", 0, "--top-p", 1, "--temp", 2) == greedy
    assert said("--top-p", 0, "--temp", 2) == greedy
    assert said("--temp", 2, "--seed", 1) == said("--temp", 2, "--seed", 1) != said("--temp", 2, "--seed", 2)
    for changes in (["--repeat-penalty", 3], ["--presence-penalty", -9],
                    ["--frequency-penalty", -9, "--repeat-last-n", 8], ["--logit-bias", "412+99"],
                    ["--xtc-probability", 1, "--xtc-threshold", 0.01],
                    ["--dry-multiplier", 99, "--dry-allowed-length", 0, "--dry-sequence-breaker", "none"],
                    ["--dynatemp-range", 9, "--dynatemp-exp", 0.1, "--seed", 1]):  # fmt: skip
        assert said("--temp", 0, *changes) != greedy
    assert said("--temp", 2, "--seed", 1, "--typical", 0) == said("--temp", 2, "--seed", 2, "--typical", 0)
    assert said("--temp", 2, "--top-nsigma", 0.01) == greedy
    assert said("--mirostat", 2, "--mirostat-ent", 0.001) == greedy
    assert said("--samplers", "top_k;min_p", "--top-k", 1) == greedy
    assert "little girl" in greedy
    assert "little girl" not in said("--temp", 0, "--ban", "little girl")


def test_sampling_options_that_are_wrong():
    arguments = ["generate", "Once", "-m", "stories260k"]
    assert "'7' is no bias" in edgellm(*arguments, "--logit-bias", "7", code=2).stderr
    assert "samplers has 'topk'; expected" in edgellm(*arguments, "--samplers", "topk", code=2).stderr
    assert "top_k is 3, but mirostat" in edgellm(*arguments, "--mirostat", 2, "--top-k", 3, code=2).stderr


def test_defaults_of_sampling_options_are_those_of_python():
    context = generate.command.make_context("generate", ["Once"])
    params = {param.name for param in generate.command.params if isinstance(param, SamplingOption)}
    assert params == SamplingParams.__dataclass_fields__.keys()
    assert SamplingParams(**{name: context.params[name] for name in params}) == SamplingParams()


def test_tokenize():
    ids = ["tokenize", "-m", "stories260k", "--ids"]
    assert json.loads(edgellm(*ids, "Once upon a time").stdout) == [1, 403, 407, 261, 378]
    assert json.loads(edgellm(*ids, "--no-special", "Once upon a time").stdout) == [403, 407, 261, 378]
    assert json.loads(edgellm(*ids, "--no-special", "</s>").stdout) == [2]
    assert 2 not in json.loads(edgellm(*ids, "--no-special", "--no-parse-special", "</s>").stdout)
    assert edgellm("tokenize", "-m", "stories260k", "Once").stdout == "      1  '<s>'\n    403  '\u2581Once'\n"


def test_tokenize_a_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"Once\r\nupon")
    found = json.loads(edgellm("tokenize", "-m", "stories260k", "--ids", "--file", path).stdout)
    assert found == json.loads(edgellm("tokenize", "-m", "stories260k", "--ids", "Once\r\nupon").stdout)
    path.write_bytes(b"a\xff")
    assert "is not UTF-8: byte 0xff at 1" in edgellm("tokenize", "--file", path, code=2).stderr
    assert "either TEXT or --file" in edgellm("tokenize", code=2).stderr


def test_show():
    text = edgellm("show", "stories260k", "--tensors").stdout
    assert re.search(r"^license +MIT$", text, re.MULTILINE)
    assert re.search(r"^layers\.0\.q +64 x 64 +q8 +", text, re.MULTILINE)
    facts = json.loads(edgellm("show", BUNDLED, "--json", "--tensors").stdout)
    assert facts["config"]["n_layers"] == 5
    assert facts["bytes"] == BUNDLED.stat().st_size
    assert len(facts["tensors"]) == 5 * 8 + 2


def test_perplexity(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time, there was a little girl named Lily. She loved to play outside.\n" * 30)
    run = edgellm("perplexity", "stories260k", text, "--ctx", 64, "--chunks", 3)
    assert re.fullmatch(r"perplexity \d+\.\d{4} \+/- \d+\.\d{4} \(93 tokens in 3 chunks of 64\)\n", run.stdout)
    result = json.loads(edgellm("perplexity", "stories260k", text, "--ctx", 64, "--chunks", 3, "--json").stdout)
    assert result["chunks"] == 3
    assert run.stdout.startswith(f"perplexity {result['value']:.4f}")
    short = edgellm("perplexity", "stories260k", text, "--ctx", 512, "--chunks", 0, code=2)
    assert "--chunks" in short.stderr
    text.write_text("Once")
    assert "has 2 tokens; at least 1024" in edgellm("perplexity", "stories260k", text, code=2).stderr


def test_bench():
    run = edgellm("bench", "stories260k", "-p", 16, "-n", 4, "-r", 3, "--depth", 8, "--json")
    pp, tg = json.loads(run.stdout)["tests"]
    assert (pp["test"], tg["test"], len(pp["runs"])) == ("pp16", "tg4", 3)
    assert 0 < tg["min"] <= tg["median"] <= tg["max"]
    assert re.search(r"^tg4 +\d+\.\d\d  \[", edgellm("bench", "stories260k", "-p", 0, "-n", 4).stdout, re.MULTILINE)
    run = edgellm("bench", "stories260k", "-p", 0, "-n", 4, "-r", 1, "--kv", "q8", "--json")
    assert json.loads(run.stdout)["kv"] == "q8"


def test_eval(tmp_path):
    data = tmp_path / "lambada_openai.jsonl"
    stories = [
        "Once upon a time, there was a little girl named Lily",
        "Tom saw a big red ball and wanted to play with it",
    ]
    data.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories * 2))
    run = edgellm("eval", "lambada", "stories260k", "--data", data, "--limit", 3, "--backend", "reference")
    line = r"\n{} +(\d+\.\d{{4}}) \+/- (\d+\.\d{{4}})"
    shown = re.fullmatch(
        rf"lambada, stories260K, reference: 3 questions{line.format('acc')}{line.format('perplexity')}\n", run.stdout
    )
    options = ["--data", tmp_path, "--limit", 3, "--backend", "reference", "-t", 1, "--json"]
    result = json.loads(edgellm("eval", "lambada", "stories260k", *options).stdout)
    facts = {"task": "lambada", "model": "stories260K", "backend": "reference", "threads": 1, "questions": 3, "cut": 0}
    assert result == {**facts, "kv": "f16", "results": result["results"]}
    half = json.loads(edgellm("eval", "lambada", "stories260k", *options, "--kv", "q8").stdout)
    assert half["kv"] == "q8"
    assert 0 < abs(half["results"]["perplexity"]["value"] / result["results"]["perplexity"]["value"] - 1) < 0.1
    values = [result["results"][name][key] for name in ("acc", "perplexity") for key in ("value", "error")]
    assert [f"{value:.4f}" for value in values] == [*shown.groups()]


def test_eval_says_that_it_cut_a_context(tmp_path):
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"text": "The sun was hot and the day was long. " * 60 + "Tom went home."}) + "\n")
    data.write_text(data.read_text() * 2)
    run = edgellm("eval", "lambada", "stories260k", "--data", data)
    assert "2 of them are longer than the model's context and were cut at the front" in run.stdout


def test_export(tmp_path):
    run = edgellm("export", "stories260k", tmp_path / "s.gguf")
    assert re.search(r"^Q8_0 +31 .* 0\.00e\+00$", run.stdout, re.MULTILINE)
    assert re.search(r"s\.gguf: llama, q8, \d+\.\d s$", run.stdout.strip())
    again = ["generate", "Once", "-m", tmp_path / "s.gguf", "-n", 4, "--temp", 0, "--backend", "reference"]
    assert edgellm(*again, home=tmp_path / "home").stdout == " upon a time,\n"


def test_convert_pull_list_rm(tmp_path):
    source, home = shared("data/stories260K"), tmp_path / "home"
    run = edgellm("convert", source / "hf", tmp_path / "s.edge", "--format", "q8", "--name", "mine", home=home)
    assert re.search(r"^q8 +31 ", run.stdout, re.MULTILINE)
    assert re.search(r"^total +42 ", run.stdout, re.MULTILINE)
    assert json.loads(edgellm("show", tmp_path / "s.edge", "--json").stdout)["name"] == "mine"
    run = edgellm("pull", source / "gguf" / "stories260K-Q8_0.gguf", "--name", "tiny", home=home)
    assert run.stdout.startswith("tiny: ")
    assert re.search(r"^tiny +\d+\.\d KB", edgellm("list", home=home).stdout, re.MULTILINE)
    assert (
        edgellm("generate", "Once", "-m", "tiny", "-n", 4, "--temp", 0, *SLOW[2:], home=home).stdout
        == " upon a time,\n"
    )
    assert edgellm("rm", "tiny", home=home).stdout == "Deleted tiny.\n"
    assert "tiny" not in edgellm("list", home=home).stdout
    edgellm("rm", "tiny", home=home, code=6)


def test_readme_has_the_table_of_architectures():
    table = re.search(r"<!-- edgellm list --architectures -->\n(.*?)<!-- end -->", README, re.DOTALL)[1]
    assert table == edgellm("list", "--architectures").stdout
    assert re.findall(r"^\| (\w+) +\|", table, re.MULTILINE) == ["architecture", *architectures.names()]


def test_a_gguf_is_converted_once(tmp_path):
    path = shared("data/stories260K/gguf/stories260K-F32.gguf")
    arguments = ["generate", "Once", "-m", path, "-n", 4, "--temp", 0, *SLOW[2:]]
    first = edgellm(*arguments, home=tmp_path)
    again = edgellm(*arguments, home=tmp_path)
    assert first.stdout == again.stdout == " upon a time,\n"
    assert "onvert" in first.stderr
    assert again.stderr == ""


def test_warmup(tmp_path, monkeypatch):
    """On the kernels that other tests use; --clear in a home of its own."""
    pytest.importorskip("numba")
    line = r"\d+ kernels for \w+ on [\w-]+: (all were there|\d+ compiled in \d+\.\d s)\.\n"
    assert re.fullmatch(line, edgellm("warmup").stdout)
    assert edgellm("warmup").stdout.endswith(": all were there.\n")
    listed = [text for text in edgellm("warmup", "--list").stdout.splitlines() if " current " in text]
    assert len(listed) == 1
    assert re.match(r"[\w-]+-[0-9a-f]{16} +\d+ kernels +[\d.]+ [KM]?B  used \d{4}-\d\d-\d\d  current  +\w+", listed[0])
    other = tmp_path / "kernels" / "z-0123456789abcdef"
    other.mkdir(parents=True)
    (other / "run.run-avx2.kernel").write_bytes(bytes(2000))
    assert re.search(
        r"^z-0123456789abcdef +1 kernels +2.0 KB .* stale +avx2$", edgellm("warmup", "--list", home=tmp_path).stdout
    )
    assert edgellm("warmup", "--clear", home=tmp_path).stdout == "Deleted 2.0 KB of compiled kernels.\n"
    assert edgellm("warmup", "--clear", home=tmp_path).stdout == "Deleted 0 B of compiled kernels.\n"
    assert edgellm("warmup", "--list", home=tmp_path).stdout == ""
    assert not (tmp_path / "kernels").exists()
    assert "exclude each other" in edgellm("warmup", "--list", "--clear", code=2).stderr
    (tmp_path / "file").write_bytes(b"")
    assert "set EDGELLM_HOME" in edgellm("warmup", home=tmp_path / "file", code=1).stderr


# In a home of its own a test has no compiled kernels.
SLOW = ["-m", "stories260k", "--backend", "reference"]
ERRORS = {
    "unknown command": (["chatt"], 2, "Commands: batch, bench, chat"),
    "unknown option": (["chat", "--tmp", 1], 2, "--tmp"),
    "negative temperature": (["generate", "x", "--temp", -1], 2, "--temp"),
    "top-p over 1": (["generate", "x", "--top-p", 1.5], 2, "--top-p"),
    "no number": (["generate", "x", "-n", "many"], 2, "-n"),
    "empty stop": (["generate", "x", *SLOW, "--stop", ""], 2, "stop string is empty"),
    "empty prompt": (["chat", ""], 2, "prompt is empty"),
    "a model for a prompt": (["chat", "stories260k"], 2, "a model, not a text; .* chat -m stories260k'"),
    "a file for a prompt": (["generate", str(BUNDLED)], 2, "is a model, not a text"),
    "banned bytes": (["generate", "x", *SLOW, "--ban", "\udcff"], 2, "banned_strings has .* whole characters"),
    "tiny penalty": (["generate", "x", *SLOW, "--repeat-penalty", "1e-300"], 2, "repeat_penalty is 1e-300; expected"),
    "too many answers": (["generate", "x", "--answers", 10**11], 2, "not in the range 1<=x<=10000"),
    "a cache of nothing": (["chat", "hi", "--save-cache"], 2, "--session FILE; give that too"),
    "nothing to measure": (["bench", "stories260k", "-p", 0, "-n", 0], 2, "-p and -n are both 0"),
    "unknown model": (["chat", "hi", "-m", "nothing"], 6, "there is no model 'nothing'"),
    "missing file": (["generate", "x", "-m", "no/such.edge"], 6, "such.edge"),
    "unknown backend": (["generate", "x", "-m", "stories260k", "--backend", "cuda"], 10, "'cuda'.*reference"),
    "context too short": (["generate", "x", *SLOW, "--ctx", 8, "-n", 20], 8, "and 20 more .* holds 8"),
    "context too long": (["generate", "x", *SLOW, "--ctx", 9999], 2, "1 to 512"),
    "no chat template": (["chat", "hi", *SLOW], 9, "chat template"),
    "not a .edge file": (["show", str(ROOT / "README.md")], 6, r"README\.md is no model"),
    "wrong target": (["convert", str(BUNDLED), "x.gguf"], 2, r"must end in \.edge"),
    "already converted": (["convert", str(BUNDLED), "x.edge"], 5, "not a checkpoint"),
    "no folder": (["convert", str(BUNDLED), "no/x.edge"], 2, "does not exist"),
    "eval without data": (["eval", "piqa", "stories260k"], 2, r"fetch piqa\.jsonl from https://github.*--data"),
    "unknown task": (["eval", "mmlu", "stories260k"], 2, "'mmlu' is not one of 'arc_challenge'"),
    "no questions": (
        ["eval", "piqa", "stories260k", "--data", str(BUNDLED.parent / "catalog.json")],
        2,
        "line 1: no JSON",
    ),
    "export to another kind": (["export", "stories260k", "x.edge"], 2, r"must end in \.gguf"),
    "no folder to export to": (["export", "stories260k", "no/x.gguf"], 2, "does not exist"),
    "remove bundled": (["rm", "stories260k"], 2, "comes with edgellm"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_a_sentence_and_a_code(case, tmp_path):
    arguments, code, words = ERRORS[case]
    run = edgellm(*arguments, home=tmp_path, code=code)
    assert run.stdout == ""
    assert re.search(words, run.stderr), run.stderr


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "bad.edge"
    content = bytearray(BUNDLED.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    run = edgellm("generate", "x", "-m", path, home=tmp_path, code=3)
    assert re.search(r"bad\.edge: tensor '.*' does not match its checksum", run.stderr)
    path.write_bytes(content[:-1])
    assert "cut short" in edgellm("generate", "x", "-m", path, home=tmp_path, code=3).stderr


def test_debug_shows_the_traceback():
    run = subprocess.run(
        [sys.executable, "-m", "edgellm", "generate", "x", "-m", "nothing", "--debug"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "ModelNotFoundError" in run.stderr


def test_chat_answers_once(smollm2_path):
    run = edgellm("chat", "Name the capital of France.", "--temp", 0, "-n", 20)
    assert "Paris" in run.stdout
    run = edgellm("chat", "What is the capital of this country?", "--temp", 0, "-n", 20, stdin="France is in Europe.\n")
    assert "Paris" in run.stdout
    assert "not UTF-8" in edgellm("chat", stdin=b"\xff", code=2).stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupted_generation_exits_with_130():
    command = [sys.executable, "-m", "edgellm", "generate", "Once", "-m", "stories260k", "--ignore-eos"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode in (130, 0)  # 0: it was done already
    assert b"Traceback" not in error


def test_a_closed_pipe_is_quiet():
    command = f"{sys.executable} -m edgellm generate Once -m stories260k --ignore-eos | head -c 5"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert run.stderr == ""


def quick_start(language):
    """The lines of README's quick start in a language."""
    return re.search(rf"## Quick start.*?```{language}\n(.*?)```", README, re.DOTALL)[1]


def test_quick_start_commands(smollm2_gguf, smollm2_path, tmp_path):
    (tmp_path / "model.gguf").symlink_to(smollm2_gguf)
    (tmp_path / "wiki.test.txt").write_text(README)
    (tmp_path / "hellaswag_val_full.txt").write_text(
        "Tea: A man boils water. he\n2\nis red.\nis.\ndrinks it.\nran.\n" * 4
    )
    (tmp_path / "requests.jsonl").write_text(
        '{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi", "max_tokens": 4}}'
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for line in quick_start("sh").splitlines():
        run = subprocess.run(
            ["bash", "-c", line], input="Hi", cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip
        assert run.returncode == 0, (line, run.stderr)
        assert run.stdout.strip(), line


def test_quick_start_program(smollm2_path):
    run = subprocess.run([sys.executable, "-c", quick_start("python")], capture_output=True, text=True, check=True)
    assert "Paris" in run.stdout


def test_the_readme_names_every_file():
    tree = re.search(r"## The files\n\n```\n(.*?)```", README, re.DOTALL)[1]
    named = set(re.findall(r"[\w./]+\.py|[\w/]+/", tree))
    there = {path.name for path in (ROOT / "edgellm").glob("*.py") if not path.name.startswith("__")}
    there |= {f"{path.name}/" for path in (ROOT / "edgellm").iterdir() if (path / "__init__.py").exists()}
    there |= {"converters/", "models/", "examples/", "benchmarks/", "tests/"}
    assert there - named == set()
    assert {name for name in named if name.endswith(".py")} <= there
