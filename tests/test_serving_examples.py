"""The examples of how a server is run: what they name is there, and a proxy before two replicas does what it says."""

import configparser
import http.client
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import click
import pytest
from serving import Server, until

from edgellm.cli import cli
from edgellm.commands.serve import command as serve

EXAMPLES = Path(__file__).parents[1] / "examples"
STORY = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "ignore_eos": True}


def served(arguments):
    """The options of `edgellm serve ARGUMENTS`; raises what click does for those that it has not."""
    with serve.make_context("serve", list(arguments)) as context:
        return context.params


def test_the_unit_is_one(tmp_path):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(EXAMPLES / "edgellm.service")
    service, keys = unit["Service"], tmp_path / "keys"
    keys.write_text("key")
    program, name, *arguments = shlex.split(service["ExecStart"].replace("%d", str(tmp_path)))
    assert (Path(program).name, name) == ("edgellm", "serve")
    options = served(arguments)
    assert options["api_key_file"] == keys
    assert int(service["TimeoutStopSec"]) > options["grace"]


def test_the_image_is_made_of_what_is_there():
    lines = (EXAMPLES / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    steps = [line.split(" ", 1) for line in lines if re.match(r"[A-Z]+ ", line)]
    copied = [path for name, rest in steps if name == "COPY" for path in rest.split()[:-1]]
    assert all((EXAMPLES.parent / path).exists() for path in copied)
    assert {"edgellm", "converters", "models", "pyproject.toml"} <= set(copied)
    every = dict(steps)
    assert json.loads(every["ENTRYPOINT"]) == ["edgellm"]
    name, *arguments = json.loads(every["CMD"])
    assert (name, served(arguments)["models"]) == ("serve", ("smollm2",))
    assert steps.index(["USER", "edgellm"]) < steps.index(["RUN", "edgellm pull smollm2 && edgellm warmup"])
    assert {"pull", "warmup"} <= set(cli.list_commands(click.Context(cli)))
    health = json.loads(every["HEALTHCHECK"].split("CMD")[1])
    with Server("stories260k") as server:
        code = health[2].replace(":8080/", f":{server.port}/")
        assert code != health[2]
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
        server.end()
        assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode == 1


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class Proxy(Server):
    """nginx with the configuration of the example, at other ports."""

    def __init__(self, folder, replicas):
        program = shutil.which("nginx", path="/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin:/opt/homebrew/bin")
        if not program:
            pytest.skip("there is no nginx")
        self.port = free_port()
        config = (EXAMPLES / "nginx.conf").read_text()
        for old, port in ((8080, self.port), (8081, replicas[0].port), (8082, replicas[1].port)):
            config, n = re.subn(rf"^( *(?:server|listen) 127\.0\.0\.1:){old}\b", rf"\g<1>{port}", config, flags=re.M)
            assert n == 1
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        config = config.replace("http {", f"http {{ access_log off; {paths}", 1)
        user = "" if os.geteuid() else "user root;"
        (folder / "nginx.conf").write_text(f"daemon off; {user} pid {folder}/pid; error_log {folder}/errors;\n{config}")
        self.process = subprocess.Popen([program, "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "errors"])
        until(self._is_there)

    def _is_there(self):
        assert self.process.poll() is None
        with socket.socket() as one:
            return one.connect_ex(("127.0.0.1", self.port)) == 0

    def __exit__(self, *error):
        self.process.terminate()
        assert self.process.wait(20) == 0


@pytest.fixture(scope="module")
def replicas():
    with Server("stories260k") as one, Server("stories260k") as two:
        yield one, two


def answered(replicas):
    """How many completions each has been asked for."""
    pattern = re.compile(r'^edgellm_requests_total{path="/v1/completions",status="\d+"} (\d+)$', re.M)
    return [sum(map(int, pattern.findall(each.get("/metrics")[1]))) for each in replicas]


def test_a_session_stays_with_its_replica(tmp_path, replicas):
    with Proxy(tmp_path, replicas) as proxy:
        chosen = {}
        headers = [{"X-Session-Id": f"s{i}"} for i in range(12)] + [{"Authorization": f"Bearer {i}"} for i in range(12)]
        for each in headers * 2:
            before = answered(replicas)
            status, found = proxy.post("/v1/completions", STORY, **each)
            assert (status, len(found["choices"])) == (200, 1)
            where = [now - then for now, then in zip(answered(replicas), before, strict=True)]
            assert sorted(where) == [0, 1]
            assert chosen.setdefault(str(each), where) == where
        assert len({tuple(where) for where in chosen.values()}) == 2
        assert proxy.get("/metrics")[0] == 404
        assert proxy.request("POST", "/v1/completions", b"a" * 10_500_000)[0] == 413


def test_tokens_come_through_as_they_are_made(tmp_path, replicas):
    """The head and the first events, long before the last."""
    with Proxy(tmp_path, replicas) as proxy:
        connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=60)
        with closing(connection):
            body = {**STORY, "max_tokens": 400, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body), {"X-Session-Id": "a"})
            response = connection.getresponse()
            parts = []
            while part := response.read1(65536):
                parts.append(part)
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert b"".join(parts).endswith(b"data: [DONE]\n\n")
        assert len(parts) > 20


def test_a_replica_that_is_gone_or_has_no_room_is_passed_over(tmp_path, replicas):
    full = "from edgellm.server.service import Service\nService.room = property(lambda self: 0)"
    with Server("stories260k", before=full) as other, Proxy(tmp_path, (replicas[1], other)) as proxy:
        assert other.post("/v1/completions", STORY)[0] == 503
        sessions = [{"X-Session-Id": f"s{i}"} for i in range(6)]
        assert {proxy.post("/v1/completions", STORY, **each)[0] for each in sessions} == {200}
        assert answered([other])[0] > 1
        other.end()
        assert {proxy.post("/v1/completions", STORY, **each)[0] for each in sessions} == {200}
