"""A server in a process of its own, as tests talk to it."""

import contextlib
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time

BREAKS_MIDWAY = """\
from edgellm.sampling import Sampler
call = Sampler.__call__
def broken(self, logits, ids):
    if len(ids) > 9: raise KeyError('plugh')
    return call(self, logits, ids)
Sampler.__call__ = broken"""
"""For a Server's `before`: an answer that samples fails after some tokens."""


class Server:
    def __init__(self, *arguments, before="pass"):
        """`before` is code that the process runs first."""
        code = f"from edgellm.cli import main\n{before}\nmain()"
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, "serve", *map(str, arguments), "--port", "0"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.lines = []
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+?:(\d+)/v1", line)
        if not found:
            raise AssertionError(self.process.communicate()[1])
        self.port = int(found[1])
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self._reader.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def request(self, method, path, body=None, headers=None, timeout=60):
        """(status, headers, body as it came); a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, raw, headers or {})
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def post(self, path, body, **headers):
        """(status, JSON), or the text of a stream."""
        return self._read(*self.request("POST", path, body, headers))

    def get(self, path, **headers):
        """(status, JSON or other text)."""
        return self._read(*self.request("GET", path, headers=headers))

    @staticmethod
    def _read(status, headers, raw):
        return status, json.loads(raw) if headers["content-type"] == "application/json" else raw.decode()

    def metric(self, name):
        return float(re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics")[1], re.MULTILINE)[1])

    def log(self):
        """Lines of the log so far, that of the last request included."""
        return [json.loads(line) for line in self.lines]

    def end(self, number=signal.SIGTERM, timeout=30):
        self.process.send_signal(number)
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        return code

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join(10)
        self.process.stdout.close()
        self.process.stderr.close()


def until(condition, seconds=20):
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
