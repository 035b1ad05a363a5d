"""The data runs one way, and so do the imports; what starts often imports little."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import edgellm

ROOT = Path(edgellm.__file__).parents[1]

LAYERS = [
    ["errors", "arrays"],
    ["adapter", "config", "quant", "home", "footprint", "overflow", "tensor_writer", "answer_cache", "inbox"],
    ["tensor", "rope", "step", "catalog", "shared", "text_stream", "template_sandbox", "bpe", "tasks", "thoughts"],
    ["ops", "file", "tokenizer", "download", "isa"],
    ["architectures", "chat_template", "store"],
    ["loading", "kernels", "plan"],
    ["moves", "plan_text"],
    ["cache"],
    ["backends"],
    ["samplers", "breakers", "banned", "lookup"],
    ["sampling"],
    ["structured"],
    ["tools"],
    ["sequence"],
    ["logprobs"],
    ["generate"],
    ["prefix_cache", "cache_file"],
    ["scheduler", "beams", "embedding"],
    ["ranking"],
    ["answer"],
    ["request", "engine"],
    ["async_stream"],
    ["api"],
    ["chat", "perplexity", "bench", "session", "screen"],
    ["repl", "evaluation"],
    ["server"],
    ["options"],
    ["batch"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
"""Each may import those above it, and its own package."""


def package(module):
    """'edgellm.quant.q4' -> 'quant'."""
    return module.split(".")[1]


def modules(folder):
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        yield path, ".".join(("edgellm", *(part for part in parts if part != "__init__")))


def loaded_by(code):
    """Modules in sys.modules after some code, in a fresh interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(run.stdout.splitlines()[-1])


def test_every_module_has_a_layer():
    named = {package(name) for _, name in modules(ROOT / "edgellm") if name != "edgellm"}
    assert named == {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("layer", range(len(LAYERS)), ids=lambda i: "-".join(LAYERS[i]))
def test_a_layer_loads_only_what_is_above_it(layer):
    allowed = {name for above in LAYERS[:layer] for name in above}
    for name in LAYERS[layer]:
        if name == "__main__":
            continue
        inside = [module for _, module in modules(ROOT / "edgellm") if module.split(".")[1:2] == [name]]
        loaded = loaded_by("\n".join(f"import {module}" for module in inside))
        below = {package(module) for module in loaded if module.startswith("edgellm.")} - allowed - {name}
        assert not below, f"edgellm.{name} imports {below}"


def test_converters_are_imported_by_nothing_at_import_and_import_no_commands():
    loaded = {package(name) for name in loaded_by("import edgellm.converters") if name.startswith("edgellm.")}
    assert not loaded & {"api", "chat", "commands", "cli", "store", "backends", "generate"}


@pytest.mark.parametrize("code", ["import edgellm", "import edgellm; edgellm.EdgeError", "import edgellm.cli"])
def test_start_up_is_light(code):
    assert not {"numba", "llvmlite", "numpy", "tokenizers", "jinja2"} & set(loaded_by(code))


def test_help_is_light():
    code = "import sys\nfrom edgellm.cli import cli\ncli.main(['--help'], standalone_mode=False)"
    assert not {"numba", "llvmlite", "numpy", "tokenizers", "jinja2"} & set(loaded_by(code))


def test_a_first_token_imports_no_more_than_it_needs():
    code = "import edgellm\nedgellm.load('stories260k', backend='reference').generate('', max_tokens=1, temperature=0)"
    unneeded = {"numba", "jinja2", "numpy.ma", "numpy.random", "urllib.request", "asyncio", "sqlite3"}
    unneeded |= {"edgellm.structured"}
    assert not unneeded & set(loaded_by(code))


def test_a_chat_imports_what_tools_need_when_there_are_some():
    assert not {"edgellm.tools", "edgellm.structured", "sqlite3"} & set(loaded_by("import edgellm.chat"))


def test_public_names_are_what_all_says():
    assert sorted([*edgellm.__all__, "__version__"]) == sorted(dir(edgellm))
    for name in edgellm.__all__:
        assert getattr(edgellm, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        edgellm.nothing  # noqa: B018


def test_nothing_prints_except_where_it_is_the_job():
    """Library code returns or raises; what a person sees comes from commands, or tells why it takes long."""
    printing = {name for path, name in modules(ROOT / "edgellm") if "print" in _calls(path)}
    assert printing <= {"edgellm.store", "edgellm.shared", "edgellm.download", "edgellm.kernels"}


def _calls(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
