"""Files of requests: every one is answered once, whatever ends the process, and as the server answers it."""

import json
import os
import signal
import subprocess
import sys

import pytest
from distributed import Client
from serving import until
from test_cli import edgellm

from edgellm.batch.files import Answered, Requests, Results
from edgellm.errors import ArgumentError

STORY = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
CHAT = {"messages": [{"role": "user", "content": "Name the capital of France."}], "max_tokens": 8, "temperature": 0}


def line(custom_id, body, url="/v1/completions", method="POST"):
    return {"custom_id": custom_id, "method": method, "url": url, "body": body}


def write(path, lines):
    path.write_text("".join(each if isinstance(each, str) else json.dumps(each) + "\n" for each in lines))
    return path


def by_custom_id(path):
    """custom_id -> result; each is there once."""
    found = [json.loads(raw) for raw in path.read_text().splitlines()]
    by_name = {each["custom_id"]: each for each in found}
    assert len(by_name) == len(found)
    return by_name


def batch(source, target, code=0):
    return edgellm("batch", source, target, "-m", "stories260k", code=code)


def test_lines_are_answered_as_the_server_answers(tmp_path):
    lines = [
        line("story", STORY),
        line("many", {**STORY, "n": 2, "logprobs": 1, "echo": True}),
        line("no field", {**STORY, "colour": 1}),
        line("no model", {**STORY, "model": "gpt-4"}),
        line("no url", STORY, url="/etc/passwd"),
        line("no method", STORY, method="GET"),
        line("streamed", {**STORY, "stream": True}),
        line("too long", {**STORY, "prompt": "word " * 1000}),
        '{"custom_id": "no number", "method": "POST", "url": "/v1/completions", "body": {"temperature": NaN}}\n',
        {"custom_id": "no body"},
        "\n",
        line("ü", STORY),
    ]
    run = batch(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", code=1)
    assert run.stdout.startswith("11 requests, 8 refused; ")
    found = by_custom_id(tmp_path / "out.jsonl")
    assert set(found["story"]) == {"id", "custom_id", "response", "error"}
    assert set(found["story"]["response"]) == {"status_code", "request_id", "body"}
    body = found["story"]["response"]["body"]
    assert (body["choices"][0]["text"], body["usage"]["completion_tokens"]) == (", there was a", 4)
    assert found["ü"]["response"]["body"]["choices"] == body["choices"]
    assert len(found["many"]["response"]["body"]["choices"]) == 2
    told = {name: (each["response"]["status_code"], each["response"]["body"]["error"]["message"])
            for name, each in found.items() if name not in ("story", "many", "ü")}  # fmt: skip
    expected = {
        "no field": (400, "colour is not known here"),
        "no model": (404, "there is no model 'gpt-4'"),
        "no url": (400, 'url is "/etc/passwd"; expected one of /v1/'),
        "no method": (400, 'method is "GET"; expected one of POST'),
        "streamed": (400, "stream is true"),
        "too long": (400, "tokens"),
        "no number": (400, "the number NaN"),
        "no body": (400, "method is missing"),
    }
    assert {name: status for name, (status, _) in told.items()} == {name: each[0] for name, each in expected.items()}
    assert all(expected[name][1] in message for name, (_, message) in told.items()), told


def test_what_is_there_is_kept_and_what_was_cut_is_done_again(tmp_path):
    source = write(tmp_path / "in.jsonl", [line(str(i), {**STORY, "seed": i}) for i in range(5)])
    target = tmp_path / "out.jsonl"
    batch(source, target)
    whole = target.read_bytes().splitlines(keepends=True)
    first = [json.loads(each) for each in whole[:2]]
    ids = {**{str(i): "another" for i in range(5)}, **{each["custom_id"]: each["id"] for each in first}}
    for cut in (whole[2][:7], whole[2][:-1], b"\0" * 50):
        target.write_bytes(whole[0] + whole[1] + cut)
        with Results(target, ids, source) as results:
            assert results.done == {each["custom_id"]: 200 for each in first}
        assert target.read_bytes() == whole[0] + whole[1]
    target.write_bytes(whole[0] + whole[1] + whole[2][:-1])
    assert "Answering 3 of 5" in batch(source, target).stderr
    assert target.read_bytes().startswith(whole[0] + whole[1] + b'{"id": "batch_req_')
    assert len(by_custom_id(target)) == 5
    before = target.read_bytes()
    more = write(source, [line(str(i), {**STORY, "seed": i}) for i in range(7)])
    batch(more, target)
    assert target.read_bytes().startswith(before)
    assert len(by_custom_id(target)) == 7


@pytest.mark.parametrize(("name", "n"), [("stories260k", 500), ("smollm2", 60)])
def test_killed_midway_it_goes_on(name, n, tmp_path, smollm2_path):
    """Twice, by a signal that nobody can handle."""
    bodies = [line(f"r{i}", {"prompt": f"{i} men", "max_tokens": 10 + i % 20, "seed": i}) for i in range(n)]
    source, target = write(tmp_path / "in.jsonl", bodies), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "edgellm", "batch", str(source), str(target), "-m", name]
    for least in (5, 20):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        until(lambda least=least: target.exists() and target.read_bytes().count(b"\n") >= least, 60)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    kept = target.read_bytes().rpartition(b"\n")[0]
    assert 20 <= kept.count(b"\n") + 1 < n
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"Answering {n - kept.count(bytes([10])) - 1} of {n}" in run.stderr
    assert target.read_bytes().startswith(kept)
    assert set(by_custom_id(target)) == {f"r{i}" for i in range(n)}


def test_two_at_once_do_not_meet(tmp_path):
    source = write(tmp_path / "in.jsonl", [line(str(i), {**STORY, "max_tokens": 60}) for i in range(40)])
    command = [sys.executable, "-m", "edgellm", "batch", str(source), str(tmp_path / "out"), "-m", "stories260k"]
    both = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(by_custom_id(tmp_path / "out")) == 40


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line("a", {}), line("b", {}), line("a", STORY)], "custom_id 'a' in line 1 and in line 3"),
        ([line("a", {}), "{\n"], "line 2 is no JSON"),
        (["[" * 100_000 + "\n"], "line 1 is no JSON"),
        ([line(3, {})], "line 1 has no custom_id"),
        (["7\n"], "line 1 has no custom_id"),
        (['{"custom_id": "\\ud800"}\n'], "half a character"),
    ],
    ids=str,
)
def test_files_that_are_no_requests(tmp_path, lines, message):
    assert message in batch(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", code=2).stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_files_of_other_results_stay_as_they_are(tmp_path):
    source = write(tmp_path / "in.jsonl", [line("a", STORY), line("b", STORY)])
    requests, target = Requests(source), tmp_path / "out.jsonl"
    with Results(target, requests.ids("model"), source) as results:
        results.add(Answered("a", 200, "1", b"{}"))
    ours = target.read_text()
    other = write(tmp_path / "other.jsonl", [line("a", {**STORY, "max_tokens": 5}), line("b", STORY)])
    for content, ids in [
        (ours, requests.ids("another model")),
        (ours, Requests(other).ids("model")),
        (ours * 2, requests.ids("model")),
        (ours + '{"dear": "diary"}\n', requests.ids("model")),
        (ours + "dear diary", requests.ids("model")),
        (ours + "[" * 100_000 + "\n", requests.ids("model")),
    ]:
        target.write_text(content)
        with pytest.raises(ArgumentError, match=r"out\.jsonl line [12] is no result of"), Results(target, ids, source):
            pass
        assert target.read_text() == content
    with pytest.raises(ArgumentError, match="is the file of requests too"), Results(source, {}, source):
        pass


def test_a_file_that_changes_meanwhile(tmp_path):
    requests = Requests(write(tmp_path / "in.jsonl", [line("a", STORY)]))
    assert [each.custom_id for each in requests.without({})] == ["a"]
    write(tmp_path / "in.jsonl", [line("a", {**STORY, "max_tokens": 5})])
    with pytest.raises(ArgumentError, match="has changed meanwhile"):
        list(requests.without({}))


@pytest.fixture(scope="module")
def cluster():
    """A scheduler and two workers in processes of their own; (address, processes)."""
    code = (
        "from distributed import LocalCluster\n"
        "if __name__ == '__main__':\n"
        "    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster:\n"
        "        print(cluster.scheduler_address, flush=True)\n"
        "        input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    ) as process:  # fmt: skip
        yield process.stdout.readline().strip()
        process.communicate("\n")


def worker_ids(address):
    with Client(address) as client:
        return list(client.run(os.getpid).values())


def test_a_cluster_that_loses_a_worker(tmp_path, cluster):
    n = 200
    lines = [line(f"r{i}", {**STORY, "max_tokens": 120, "ignore_eos": True}) for i in range(n)]
    source, target = write(tmp_path / "in.jsonl", [*lines, line("bad", {})]), tmp_path / "out.jsonl"
    one, two = worker_ids(cluster)
    process = subprocess.Popen(
        [sys.executable, "-m", "edgellm", "batch", source, target, "-m", "stories260k", "--cluster", cluster],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        until(lambda: target.exists() and target.read_bytes().count(b"\n") >= 32, 60)
        os.kill(one, signal.SIGKILL)
        assert process.stdout.read().startswith(f"{n + 1} requests, 1 refused; ")
        assert process.wait() == 1
    assert two in worker_ids(cluster)
    found = by_custom_id(target)
    assert set(found) == {*(f"r{i}" for i in range(n)), "bad"}
    texts = {each["response"]["body"]["choices"][0]["text"] for name, each in found.items() if name != "bad"}
    assert len(texts) == 1
    target.write_bytes(target.read_bytes()[:-300])
    run = edgellm("batch", source, target, "-m", "stories260k", code=1)
    assert "Answering 1 of 201" in run.stderr
    assert len(by_custom_id(target)) == n + 1


def test_clusters_that_are_not_there(tmp_path, cluster):
    source = write(tmp_path / "in.jsonl", [line("a", STORY)])
    for address, message in [("tcp://127.0.0.1:1", "there is no Dask scheduler at"), ("?", "no Dask scheduler at ?")]:
        run = edgellm("batch", source, tmp_path / "out", "-m", "stories260k", "--cluster", address, code=2)
        assert message in run.stderr
    edgellm("batch", source, tmp_path / "out", "-m", "nothing", "--cluster", cluster, code=6)


@pytest.mark.parametrize(("package", "extra"), [("starlette", "serve"), ("distributed", "cluster")])
def test_extras_are_named_where_they_are_missing(tmp_path, package, extra):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('no', name='{package}')")
    source = write(tmp_path / "in.jsonl", [line("a", STORY)])
    run = edgellm("batch", source, tmp_path / "out", "--cluster", "tcp://127.0.0.1:1", code=5, path=tmp_path)
    assert f"batches need the package {package}; run pip install 'edgellm[{extra}]'" in run.stderr
