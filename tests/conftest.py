import os
from pathlib import Path

import pytest

from edgellm import catalog, store
from edgellm.api import Model
from edgellm.download import fetch
from edgellm.errors import DownloadError
from edgellm.home import home

BUNDLED = Path(__file__).parents[1] / "models" / "stories260k.edge"


def shared(relative: str) -> Path:
    """A file or folder of the test data that is not in the repository; skips the test if it is not here."""
    folder = os.environ.get("EDGELLM_TEST_DATA")
    if not folder or not Path(folder, relative).exists():
        pytest.skip(f"no {relative} in EDGELLM_TEST_DATA ({folder or 'not set'})")
    return Path(folder, relative)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    skipped = len(terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(f"{skipped} tests were skipped; pytest -rs says why")


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("EDGELLM_NO_SKIPS") and reporter.stats.get("skipped") and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def stories() -> Model:
    """The bundled model: trained, tiny, 8 bits."""
    with Model(BUNDLED, backend="reference") as model:
        yield model


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2 as `edgellm pull` leaves it: fetched once into the user's cache."""
    try:
        return store.pull("smollm2")
    except DownloadError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


@pytest.fixture(scope="session")
def smollm2(smollm2_path) -> Model:
    with Model(smollm2_path, backend="reference") as model:
        yield model


@pytest.fixture(scope="module")
def smollm2_cpu(smollm2_path) -> Model:
    """As a program has it that says nothing of backends."""
    with Model(smollm2_path, backend="cpu") as model:
        yield model


@pytest.fixture(scope="module")
def stories_cpu() -> Model:
    with Model(BUNDLED, backend="cpu") as model:
        yield model


@pytest.fixture(scope="session")
def gemma3() -> Model:
    try:
        path = store.pull("gemma3-270m")
    except DownloadError as error:
        pytest.skip(f"Gemma 3 cannot be fetched: {error}")
    with Model(path, backend="reference") as model:
        yield model


def checkpoint(name: str) -> Path:
    """The GGUF that a known model is converted from, fetched once."""
    entry = catalog.get(name)
    path = home() / "tests" / Path(entry.file[0]).name.removesuffix(".part00")
    try:
        return path if path.exists() else fetch(
            entry.source, path.parent, file=entry.file, sha256=entry.sha256, size=entry.size
        )  # fmt: skip
    except DownloadError as error:
        pytest.skip(f"the GGUF of {name} cannot be fetched: {error}")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    return checkpoint("smollm2")


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    return checkpoint("gemma3-270m")
