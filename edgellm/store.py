"""What lies in the user's cache: models by name, and checkpoints converted once. Finds the .edge file a user means.

    models/NAME.edge           pulled, until removed
    converted/HASH-vN.edge     made of a local checkpoint with that content, for format version N
    downloads/NAME/            while a pull is under way, or was interrupted
    hashes.json verified.json origins.json    what was found out about files, see shared.Memo

Opens no .edge file: edgellm.loading does.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from edgellm import catalog
from edgellm.errors import ArgumentError, EdgeError, ModelNotFoundError, UnsupportedError
from edgellm.home import home
from edgellm.shared import Memo, alone, make_folder, temporary_name

SUFFIXES = (".edge", *catalog.CHECKPOINTS)
"""What ends in one of these is a path, not a name."""
SOURCES = ("hf:", "https:", "http:")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
"""Names that Windows gives to devices, with any extension."""


@dataclass(frozen=True)
class Installed:
    name: str
    path: Path
    size: int


# ---- finding


def resolve(model: str) -> Path:
    """The .edge file of a name or a path: fetched and converted first if it must be, which stderr tells.

    Raises ModelNotFoundError if nothing is there, and the errors of `pull` and of the conversion.
    """
    if model.startswith(SOURCES):
        raise ModelNotFoundError(f"{model} is a source, not a model that is here; run 'edgellm pull {model}' first")
    if _is_path(model):
        return _at_path(Path(os.path.expanduser(model)))
    if path := location(model):
        return path
    entry = _entry(model)
    if entry.bundled is None:
        _say(f"{entry.name} is not here yet: fetching it ({(entry.size or 0) / 1e6:,.0f} MB) from {entry.source}")
    return pull(model)


def is_model(text: str) -> bool:
    """Whether it is the name of a model that is here or known, or a model's file."""
    if _is_path(text):
        return text.lower().endswith(SUFFIXES) and Path(os.path.expanduser(text)).is_file()
    return text in catalog.entries() or location(text) is not None


def path_and_scale(text: str) -> tuple[str, float]:
    """An adapter as a user writes it: "a" -> ("a", 1.0), "b:0.5" -> ("b", 0.5)."""
    path, colon, scale = text.rpartition(":")
    if colon and not Path(text).exists():
        with suppress(ValueError):
            return path, float(scale)
    return text, 1.0


def location(name: str) -> Path | None:
    """Where the model of that name lies, pulled or bundled; None if it is not here."""
    entry = catalog.entries().get(name)
    path = _model(name) if entry is None or entry.bundled is None else entry.bundled
    return path if _is_name(name) and path.is_file() else None


def installed() -> list[Installed]:
    """The pulled models, by name."""
    found = ((path, path.stat().st_size) for path in sorted(_model("").parent.glob("*.edge")) if _is_name(path.stem))
    return [Installed(path.stem, path, size) for path, size in found]


def here() -> dict[str, Path]:
    """Every model that is here by a name: first the default one, then those that were pulled, then bundled ones."""
    known = catalog.entries().values()
    names = [catalog.DEFAULT, *(each.name for each in installed()), *(each.name for each in known)]
    return {name: path for name in names if (path := location(name)) is not None}


def remove(name: str) -> None:
    """Delete a pulled model, or what an interrupted pull left of it.

    Raises ArgumentError for a bundled one, ModelNotFoundError for one that is not here.
    """
    entry = catalog.entries().get(name)
    if entry is not None and entry.bundled is not None:
        raise ArgumentError(f"{name} comes with edgellm and cannot be removed; only pulled models can")
    download = home() / "downloads" / name
    if not _is_name(name) or not (location(name) or download.is_dir()):
        names = ", ".join(each.name for each in installed()) or "none"
        raise ModelNotFoundError(f"no model {name!r} was pulled; pulled are: {names}")
    try:
        _model(name).unlink(missing_ok=True)
    except OSError as error:
        raise EdgeError(f"{_model(name)} cannot be deleted: {error.strerror}; is it in use?") from error
    shutil.rmtree(download, ignore_errors=True)


def _is_path(model: str) -> bool:
    return "/" in model or os.sep in model or model.lower().endswith(SUFFIXES) or model in (".", "..", "~")


def _is_name(name: str) -> bool:
    plain = len(name) <= 100 and re.fullmatch(r"[a-z0-9_][a-z0-9._-]*", name) is not None
    return plain and not name.endswith(SUFFIXES) and not _RESERVED.fullmatch(name)


def _entry(name: str) -> catalog.Entry:
    """The catalog's entry of that name; raises ModelNotFoundError that tells what there is."""
    if (entry := catalog.entries().get(name)) is not None:
        return entry
    error = catalog.unknown(name, (each.name for each in installed()))
    raise ModelNotFoundError(f"{error}; the folder of that name is ./{name}") if Path(name).is_dir() else error


def _model(name: str) -> Path:
    return home() / "models" / f"{name}.edge"


# ---- local paths


def _at_path(path: Path) -> Path:
    if _is_edge(path):
        return path
    _check_checkpoint(path)
    return _converted(path)


def _is_edge(path: Path) -> bool:
    return path.suffix.lower() == ".edge" and os.path.isfile(path)


def _check_checkpoint(path: Path) -> None:
    """Raises ModelNotFoundError unless a file that can be a checkpoint or a Hugging Face folder is there."""
    if not os.path.exists(path):  # False also where Path.exists raises: a name too long, a folder closed to us
        raise ModelNotFoundError(f"there is no file or folder {path}; check the path, or give a name that is pulled")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelNotFoundError(f"the folder {path} has no config.json; expected a Hugging Face checkpoint")
    if path.is_file() and path.suffix.lower() not in catalog.CHECKPOINTS:
        raise ModelNotFoundError(f"{path} is no model; expected a folder, or a file {', '.join(SUFFIXES)}")
    if path.suffix.lower() in catalog.WEIGHTS and not (path.parent / "config.json").is_file():
        raise ModelNotFoundError(f"{path} has no config.json beside it; expected that and the tokenizer")


def _converted(path: Path) -> Path:
    """The .edge file made of a local checkpoint; made on first use, found by the checkpoint's content afterwards."""
    from edgellm.file import VERSION

    target = home() / "converted" / f"{_content(path)[:32]}-v{VERSION}.edge"
    if not target.is_file():
        with alone(target):
            if not target.is_file():
                _say(f"converting {path} (once: the result is kept in {target.parent})")
                _converters().convert(path, target, name=_title(path), origin=path.name)
    return target


def _converters() -> Any:
    """The package edgellm.converters: outside this folder in the repository, where mypy does not find it."""
    return import_module("edgellm.converters")


def _title(path: Path) -> str:
    """What a checkpoint calls itself by its path."""
    return path.resolve().name if path.is_dir() else path.stem


def _content(path: Path) -> str:
    """The sha256 of all that a conversion reads; of a file that did not change since, as remembered."""
    memo, digest = Memo("hashes.json"), hashlib.sha256()
    try:
        for part in _parts(path):
            digest.update(f"{part.name if part != path else ''} {_hash(part, memo)}\n".encode())
    except OSError as error:
        raise ModelNotFoundError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _hash(path: Path, memo: Memo) -> str:
    from edgellm.download import file_sha256

    if (known := memo.get(path)) is not None:
        return known
    found = file_sha256(path)
    memo.put(path, found)
    return found


def _parts(path: Path) -> list[Path]:
    """The files that make up a checkpoint."""
    from edgellm.download import CHECKPOINT_FILES

    if path.is_dir():
        found = {part for pattern in (*CHECKPOINT_FILES, "*.bin") for part in path.glob(pattern) if part.is_file()}
        return sorted(found)
    patterns = () if path.suffix.lower() == ".gguf" else ("*.json", "*.jinja", "tok*")
    beside = {part for pattern in patterns for part in path.parent.glob(pattern) if part.is_file()}
    return [path, *sorted(beside - {path})]


# ---- pulling


@dataclass(frozen=True)
class _Job:
    """What to pull. `identity` tells one source from another under the same name."""

    name: str
    source: str
    identity: str
    format: str | None
    origin: str
    entry: catalog.Entry | None = None


def pull(name_or_source: str, *, name: str | None = None, format: str | None = None) -> Path:
    """Fetch and convert a catalog name, an hf: or https: source or a local path; at once if it is here already.

    It is kept under `name`, by default the catalog's or one made of the source, with the format if one is given.
    Raises ModelNotFoundError for what is none of these, UnsupportedError before fetching what could not run,
    ArgumentError for a name that is not allowed or taken, DownloadError, and the errors of the conversion.
    """
    elsewhere = name_or_source.startswith(SOURCES) or _is_path(name_or_source)
    entry = None if elsewhere else _entry(name_or_source)
    if entry is not None and entry.bundled is not None:
        return _bundled(entry, name if name is not None else format)
    job = _plan(name_or_source, entry, name, format)
    target = _model(job.name)
    if not _here(job, target):
        _check_runs(job)
        with alone(home() / "downloads" / job.name):
            if not _here(job, target):
                _install(job, target)
    return target


def _bundled(entry: catalog.Entry, wish: str | None) -> Path:
    if wish is not None:
        raise ArgumentError(f"{entry.name} comes with edgellm as it is; another name or format cannot be given to it")
    if (path := location(entry.name)) is None:
        raise ModelNotFoundError(f"{entry.bundled} is missing from this installation; install edgellm again")
    return path


def _plan(wanted: str, entry: catalog.Entry | None, name: str | None, format: str | None) -> _Job:
    if entry is not None:
        default, source, identity, origin = entry.name, entry.source, entry.source, entry.source
    elif wanted.startswith(SOURCES):
        default, source, identity, origin = _name_of(wanted), wanted, wanted, wanted.partition("?")[0]
    else:
        path = Path(os.path.expanduser(wanted))
        if not _is_edge(path):
            _check_checkpoint(path)
        default, source, origin = _safe(_title(path)), str(path), path.name
        identity = f"{path.resolve()} (sha256 {_content(path)[:12]})"
    suffix = "" if format is None else f"-{format}"
    chosen = default + suffix if name is None else name
    _check_name(chosen, entry)
    if format is not None and source.partition("?")[0].lower().endswith(".edge"):
        raise ArgumentError(f"{origin} is converted already; a format can be given for a checkpoint only")
    return _Job(chosen, source, identity if format is None else f"{identity} as {format}", format, origin, entry)


def _name_of(source: str) -> str:
    """A name for what comes from a source: the repository's or the file's."""
    last = source.partition("?")[0].rstrip("/").rpartition("/")[2]
    is_file = not source.startswith("hf:") or source.count("/") > 1
    return _safe(os.path.splitext(unquote(last))[0] if is_file else last)


def _safe(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip(".-")


def _check_name(name: str, entry: catalog.Entry | None) -> None:
    if not _is_name(name):
        raise ArgumentError(
            f"{name!r} cannot be a model's name; give one of a-z 0-9 . _ - that starts with a letter, "
            f"a digit or _, has no file's extension and is no device of Windows"
        )
    if name in catalog.entries() and (entry is None or entry.name != name):
        raise ArgumentError(f"the name {name!r} belongs to a model of the catalog; choose another name")


def _here(job: _Job, target: Path) -> bool:
    """Whether the job is done already; raises ArgumentError if another model has the name."""
    if not target.is_file():
        return False
    origin = Memo("origins.json").get(target)
    if origin not in (None, job.identity):
        raise ArgumentError(
            f"the name {job.name!r} is taken by a model from {origin}; choose another name, or remove that model first"
        )
    return True


def _check_runs(job: _Job) -> None:
    """Refuse before fetching what would not convert afterwards."""
    formats = _converters().FORMATS
    if job.format not in (None, *formats):
        raise ArgumentError(f"unknown format {job.format!r}; expected one of {', '.join(formats)}")
    if job.entry is not None:
        from edgellm import architectures

        try:
            architectures.get(job.entry.architecture)
        except UnsupportedError as error:
            raise UnsupportedError(f"{job.entry.name}: {error}; nothing was fetched") from error


def _install(job: _Job, target: Path) -> None:
    """Fetch, convert, store. An interruption leaves the download, from which the next pull goes on."""
    folder = home() / "downloads" / job.name
    checkpoint = _fetched(job, folder)
    make_folder(target.parent)
    try:
        if checkpoint.suffix.lower() == ".edge":
            _copy(checkpoint, target)
        else:
            _converters().convert(
                checkpoint,
                target,
                format=job.format,
                name=job.name,
                license=job.entry.license if job.entry else None,
                origin=job.origin,
            )
    except EdgeError as error:
        if not isinstance(error.__cause__, OSError):  # a full disk: the download will do when there is room
            shutil.rmtree(folder, ignore_errors=True)
        raise
    Memo("origins.json").put(target, job.identity)
    shutil.rmtree(folder, ignore_errors=True)


def _fetched(job: _Job, folder: Path) -> Path:
    from edgellm.download import fetch

    if job.entry is not None:
        return fetch(job.source, folder, file=job.entry.file, sha256=job.entry.sha256, size=job.entry.size)
    return fetch(job.source, folder) if job.source.startswith(SOURCES) else Path(job.source)


def _copy(source: Path, target: Path) -> None:
    temporary = temporary_name(target)
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise EdgeError(f"{source} cannot be copied to {target}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


# ---- checksums


def verified(path: Path) -> bool:
    """Whether `mark_verified` was called for this file, and it did not change since."""
    return Memo("verified.json").get(path) is not None


def mark_verified(path: Path) -> None:
    """Remember that the checksums of this file were found right."""
    Memo("verified.json").put(path, "yes")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
