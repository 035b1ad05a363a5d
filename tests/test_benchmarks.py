"""What the benchmarks compute from what they measured; the speeds themselves are not tested."""

import json
import re
import sys
from pathlib import Path

import pytest

import edgellm
from edgellm.kernels.bandwidth import read

ROOT = Path(edgellm.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "benchmarks"))

compare, constraints, limits, machine, peers, report, sample = map(
    __import__, ("compare", "constraints", "limits", "machine", "peers", "report", "sample")
)


def llama_bench(*tests):
    return json.dumps([{"build_commit": "0c1e570", "samples_ts": rates} for rates in tests])


# ---- outputs of other programs


def test_several_builds_of_llama_cpp_are_several_contenders():
    builds = tuple(peers.Llama(Path(folder)) for folder in ("/a/one/bin", "/a/two"))
    setup = compare.Setup({"same": Path("m.gguf"), "Q4_0": Path("m-Q4_0.gguf")}, {"same": "m.edge"}, builds, {}, 2)
    found = [each for each in compare.prefill(setup) if each.name == "llama.cpp Q4_0"]
    assert [each.variant for each in found] == ["fa 0, one", "fa 1, one", "fa 0, two", "fa 1, two"]
    assert [each.command[0] for each in found[1:3]] == ["/a/one/bin/llama-bench", "/a/two/llama-bench"]


def test_a_rate_of_llama_bench_is_the_median_of_its_runs():
    assert peers.bench_rate(llama_bench([90.0, 120.0, 100.0])) == 100.0


@pytest.mark.parametrize("output", ["", "error: no such file", "[]", llama_bench([1.0], [2.0]), '[{"avg_ts": 1}]'])
def test_other_output_of_llama_bench_is_an_error(output):
    with pytest.raises(peers.OutputError, match=r"llama-bench wrote .*; expected JSON of one test with samples_ts"):
        peers.bench_rate(output)


def test_a_rate_of_batched_bench():
    line = '{"n_kv_max": 2048, "pp": 64, "tg": 64, "pl": 16, "speed_pp": 600.1, "speed_tg": 401.4, "speed": 480.0}'
    assert peers.batched_rate(f"warming up\n\n{line}\n\n") == 401.4
    with pytest.raises(peers.OutputError, match="llama-batched-bench wrote ''"):
        peers.batched_rate("")


def test_rates_of_edgellm():
    bench = {"model": "smollm2", "tests": [{"test": "tg128", "median": 240.5, "runs": [240.5]}]}
    assert peers.edgellm_rate(f"some notice\n{json.dumps(bench)}\n") == 240.5
    assert peers.own_rate('{"tokens_per_second": 12.5}\n') == 12.5
    with pytest.raises(peers.OutputError, match=r"sample\.py wrote 'oh'; expected a line of JSON"):
        peers.own_rate("oh\n")


def test_llama_cpp_is_looked_for_where_it_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_BENCH", raising=False)
    assert peers.find_llama(None) is None
    program = tmp_path / "llama-bench"
    with pytest.raises(FileNotFoundError, match="expected the path of llama-bench"):
        peers.find_llama(str(program))
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert peers.find_llama(None) == peers.find_llama(str(program)) == peers.Llama(tmp_path)
    monkeypatch.setenv("LLAMA_BENCH", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        peers.find_llama(None)
    assert "no llama-quantize" in peers.Llama(tmp_path).lacks("llama-quantize")


# ---- processes


def test_a_process_is_measured():
    finished = machine.run([sys.executable, "-c", "x = bytearray(64_000_000); print(len(x))"], 60)
    assert finished.stdout == "64000000\n"
    assert finished.peak_mb > 64
    assert finished.seconds > 0


def test_a_process_that_fails_is_an_error_with_its_words():
    with pytest.raises(machine.ProcessError, match=r"ended with 3: last words"):
        machine.run([sys.executable, "-c", "import sys; print('last words', file=sys.stderr); sys.exit(3)"], 60)
    with pytest.raises(machine.ProcessError, match=r"did not end within 0 s: it wrote nothing"):
        machine.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)
    with pytest.raises(machine.ProcessError, match="no-such-program cannot be run"):
        machine.run(["no-such-program"], 1)


# ---- the kernels of the limits


def test_the_kernels_compute_what_they_claim():
    """All lines are read, by as many passes as were asked for, and every row of the dot product is computed."""
    memory, out = limits.aligned(4096), limits.aligned(64)
    memory.view("f4")[:] = 1
    limits.compiled(read)(limits.address(memory), 64, 3, 0, limits.address(out))
    assert out.view("f4").tolist() == [192.0] * 16
    rows = 4
    weights, codes, scales, sums = (limits.aligned(n) for n in (512, 64, 64, 64 * rows))
    weights[:], codes[:], scales.view("f4")[:] = 3, 2, 1
    arguments = map(limits.address, (codes, scales))
    limits.compiled(limits.dot, rows)(limits.address(weights), 5, *arguments, limits.address(sums))
    assert sums.view("f4").tolist() == [5 * 4 * 3 * 2.0] * 16 * rows


def test_sizes_of_a_step():
    """stories260k: 5 layers, 64 wide, 8 heads of which 4 have keys, 172 inside, 512 tokens."""
    n_bytes, multiplications, cached = sample.step_sizes("stories260k")
    assert multiplications == 5 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 172)
    assert cached == 5 * 2 * 32 * 2
    assert n_bytes > multiplications


# ---- figures


def figures(**variants):
    return {
        name.replace("_", " "): {"tokens/s": rates, "foreign": [0.01] * len(rates)} for name, rates in variants.items()
    }


@pytest.fixture
def found():
    speed = {
        "edgellm": {"": {"tokens/s": [200.0, 240.0, 220.0], "foreign": [0.0, 0.02, 0.5]}},
        "llama.cpp": {"fa 0": {"tokens/s": [90.0, 95.0, 91.0]}, "fa 1": {"tokens/s": [100.0, 100.0, 100.0]}},
        "limit": {"": {"tokens/s": [400.0, 300.0, 400.0]}},
    }
    start = {
        "edgellm": {"": {"s": [1.0, 1.0], "MB": [280.0, 280.0]}},
        "llama.cpp": {"fa 0": {"s": [0.3, 0.5], "MB": [180.0, 180.0]}, "fa 1": {"s": [0.2, 0.3], "MB": [200.0, 200.0]}},
    }
    common = {"rounds": 3, "date": "2026-11-22 07:00 UTC"}
    return {
        "machine": {"cpu": "A CPU", "cores": 2, "kernel": "Linux 6", "python": "3.11"},
        "versions": {"edgellm": "0.1.0 (abc)", "llama.cpp": "b1"}, "threads": 2, "model": "small.gguf",
        "tests": {
            "decode": {
                "title": "decode", "targets": {"llama.cpp": 2.5, "limit": 0.5}, "figures": speed,
                "missing": {"xllamacpp": "not installed"}, **common,
            },
            "start": {"title": "start", "targets": {}, "figures": start, "missing": {}, **common},
        },
    }  # fmt: skip


def test_the_better_variant_stands_for_a_peer_in_each_figure(found):
    decode, seconds, megabytes = report.rows(found)
    assert [decode.cells["llama.cpp"].variant, decode.cells["llama.cpp"].median] == ["fa 1", 100.0]
    assert [seconds.cells["llama.cpp"].variant, seconds.cells["llama.cpp"].median] == ["fa 1", 0.25]
    assert [megabytes.cells["llama.cpp"].variant, megabytes.cells["llama.cpp"].median] == ["fa 0", 180.0]


def test_ratios_are_the_median_of_the_rounds(found):
    decode, seconds, megabytes = report.rows(found)
    assert decode.cells["llama.cpp"].ratio == 2.2
    assert decode.cells["limit"].ratio == 0.55  # of 0.5, 0.8 and 0.55
    assert seconds.cells["llama.cpp"].ratio == 0.25  # slower to start: below 1
    assert megabytes.cells["llama.cpp"].ratio == pytest.approx(180 / 280)


def test_the_text_shows_targets_foreign_load_and_what_is_missing(found):
    shown = report.text(found)
    assert re.search(r"edgellm +220 +\[200-240\] +foreign 0\.50", shown)
    assert re.search(r"llama\.cpp +fa 1 +100 .*2\.20 times, target 2\.5: missed", shown)
    assert re.search(r"limit +400 .*55 % of it, target 50 %: met", shown)
    assert "xllamacpp       missing: not installed" in shown


def test_the_table_of_the_readme(found):
    lines = report.markdown(found).splitlines()
    assert lines[:5] == [
        "| | edgellm | llama.cpp | xllamacpp | of the limit |",
        "|---|---|---|---|---|",
        "| decode, tokens/s | **220** | 100 (2.20) | missing | 55 % |",
        "| start, s | **1.00** | 0.25 (0.25) | - | - |",
        "| start, MB | **280** | 180 (0.64) | - | - |",
    ]
    assert "A CPU, 2 cores, Linux 6" in lines[6]
    assert lines[-2] == "Rounds: 3. Other programs kept at most 0.50 CPUs busy meanwhile."
    assert lines[-1] == "To repeat it: `python benchmarks/compare.py --llama-bench PATH --rounds 3 --threads 2`"


def test_a_readme_gets_its_table_once_more(found):
    readme = "before\n<!-- figures of old.json -->\nold\n<!-- end of figures -->\nafter\n"
    written = report.with_table(readme, "new.json", found)
    assert written.startswith("before\n<!-- figures of new.json -->\n| | edgellm |")
    assert written.endswith("<!-- end of figures -->\nafter\n")
    assert report.with_table(written, "new.json", found) == written
    with pytest.raises(report.ReportError, match="no place for the table"):
        report.with_table("nothing", "new.json", found)
    with pytest.raises(report.ReportError, match="several places for the table"):
        report.with_table(2 * readme, "new.json", found)


def test_the_readme_has_the_table_of_the_committed_figures():
    name = report.BLOCK.search(README)["file"]
    assert report.with_table(README, name, report.load(ROOT / name)) == README


def test_figures_are_kept_and_read_again(tmp_path, found):
    path = tmp_path / "figures.json"
    compare.write(path, found)
    assert report.load(path) == found
    assert '"tokens/s": [200.0, 240.0, 220.0]' in path.read_text()
    assert list(tmp_path.iterdir()) == [path]
    for wrong in ("{", "[]", "{}"):
        path.write_text(wrong)
        with pytest.raises(report.ReportError, match=r"figures\.json"):
            report.load(path)


def test_figures_of_another_machine_are_not_mixed(tmp_path, found):
    path = tmp_path / "figures.json"
    assert compare.merged(path, found) == found
    compare.write(path, found)
    decode = {**found, "tests": {"decode": {**found["tests"]["decode"], "rounds": 9}}}
    merged = compare.merged(path, decode)
    assert [merged["tests"][name]["rounds"] for name in ("decode", "start")] == [9, 3]
    with pytest.raises(compare.SetupError, match="figures of another threads: 2, and now it is 1"):
        compare.merged(path, {**found, "threads": 1})
    path.write_text("{}")
    with pytest.raises(compare.SetupError, match="remove that file or give another"):
        compare.merged(path, found)


# ---- rounds


@pytest.fixture
def setup():
    return compare.Setup({}, {}, (), {}, 2)


def printing(name, figure, variant=""):
    code = f"print({json.dumps(json.dumps({'tokens_per_second': figure}))})"
    return compare.Contender(name, [sys.executable, "-c", code], compare.rate(peers.own_rate), variant)


def test_rounds_take_turns_and_a_peer_that_fails_is_named(monkeypatch, setup, capsys):
    broken = compare.Contender("llama.cpp", ["no-such-program"], compare.rate(peers.bench_rate), "fa 1")
    contenders = [printing("edgellm", 20.0), printing("llama.cpp", 10.0, "fa 0"), broken]
    test = compare.Test("decode", "tokens/s", lambda setup: list(contenders), {}, ("llama.cpp", "xllamacpp"))
    monkeypatch.setitem(compare.TESTS, "decode", test)
    found = compare.measure("decode", setup, 2, {"xllamacpp": "not installed"})
    assert found["figures"]["edgellm"][""]["tokens/s"] == [20.0, 20.0]
    assert list(found["figures"]["llama.cpp"]) == ["fa 0"]
    assert found["missing"].keys() == {"xllamacpp", "llama.cpp fa 1"}
    order = re.findall(r"decode (\d)/2: ([a-z.]+)", capsys.readouterr().err)
    assert order == [("1", "edgellm"), ("1", "llama.cpp"), ("1", "llama.cpp"), ("2", "edgellm"), ("2", "llama.cpp")]


def test_a_sample_is_taken_again_while_others_are_at_work(monkeypatch):
    loads = iter([0.9, 0.1, 0.9, 0.5, 0.7, None])

    def run(command, timeout, neighbour):
        load = next(loads)
        return machine.Finished(json.dumps({"tokens_per_second": load or 0.0}), "", 1.0, 1.0, load)

    monkeypatch.setattr(machine, "run", run)
    contender = printing("edgellm", 1.0)
    assert compare.sample(contender, busy=False) == ({"tokens/s": 0.1}, 0.1)
    assert compare.sample(contender, busy=False) == ({"tokens/s": 0.5}, 0.5)
    assert compare.sample(contender, busy=False) == ({"tokens/s": 0.0}, None)


def test_a_failure_of_edgellm_ends_the_run(monkeypatch, setup):
    broken = compare.Contender("edgellm", ["no-such-program"], compare.rate(peers.own_rate))
    monkeypatch.setitem(compare.TESTS, "decode", compare.Test("decode", "tokens/s", lambda setup: [broken]))
    with pytest.raises(machine.ProcessError):
        compare.measure("decode", setup, 1, {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tests", "decode,nothing"], "unknown test 'nothing'; known: decode, "),
        (["--rounds", "0"], "--rounds is 0; expected 1 or more"),
        (["--threads", "-1"], "--threads is -1"),
        (["--gguf", "nothing.gguf"], "there is no file nothing.gguf"),
        (["--out", "nowhere/x.json"], "there is no folder"),
    ],
)
def test_wrong_arguments(arguments, words, capsys):
    with pytest.raises(SystemExit):
        compare.parse(arguments)
    assert words in capsys.readouterr().err


# ---- answers after a schema


def test_the_figures_of_schemas_are_those_of_their_document():
    """And what they claim: no answer that ends is wrong, nine of ten end, a first mask is there at once."""
    document = (ROOT / "docs" / "json-schema.md").read_text(encoding="utf-8")
    name = report.BLOCK.search(document)["file"]
    kept = json.loads((ROOT / name).read_text(encoding="utf-8"))
    assert constraints.with_tables(document, name, kept) == document
    assert kept["answers"].keys() == constraints.SAMPLING.keys()
    for found in kept["answers"].values():
        total, ended, wrong, _ = (sum(row[key] for row in found.values()) for key in constraints.COUNTS)
        assert found.keys() == constraints.SCHEMAS.keys()
        assert (total, wrong) == (1000, 0)
        assert ended >= 900
    assert max(cost["first mask ms"] for cost in kept["costs"]["schemas"].values()) < 50


def test_answers_after_schemas_are_counted_and_not_made_twice(capsys):
    class Model:
        def generate_many(self, prompt, n, **options):
            texts = ['{"value": 3}', '{"value": 300}', "{"]
            return [edgellm.Completion(text, [1, 2], "length" if text == "{" else "stop", [], None) for text in texts]

    found, kept = {}, []
    constraints.answers(Model(), 60, found, {}, lambda: kept.append(len(found)))
    assert found["tree"] == {"answers": 3, "ended": 2, "wrong": 1, "tokens": 6}
    assert kept == list(range(1, 21))
    shown = capsys.readouterr().out
    assert "WRONG, tree, seed 1: '{\"value\": 300}': 300 is greater than the maximum of 99" in shown
    assert "not ended, tree, seed 2" in shown
    constraints.answers(None, 60, found, {}, lambda: kept.append(0))
    assert len(kept) == 20
