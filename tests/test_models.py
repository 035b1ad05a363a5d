"""Several models in one server: loaded when they are asked for, unloaded when they rest or others need the room."""

import asyncio
import json
import math
import shutil
import threading
from contextlib import asynccontextmanager

import pytest
from conftest import BUNDLED
from serving import Server, until
from test_cli import edgellm

from edgellm.api import Model
from edgellm.errors import ModelNotFoundError, OutOfMemoryError
from edgellm.footprint import Share
from edgellm.scheduler import AT_ONCE
from edgellm.server.errors import RequestError
from edgellm.server.metrics import Metrics
from edgellm.server.models import Models, Terms
from edgellm.server.schema import Duration, seconds_of

STORY = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0}
LONG = {"prompt": "Once upon a time", "ignore_eos": True, "max_tokens": 500, "temperature": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: shutil.copy(BUNDLED, folder / f"{name}.edge") for name in "abc"}


@pytest.fixture(scope="module")
def footprint():
    with Model(BUNDLED) as model:
        return model.footprint


@pytest.fixture(scope="module")
def full(footprint):
    """Bytes of a model with all slots."""
    return footprint.held(Share(AT_ONCE, footprint.cache))


def run(files, scenario, **terms):
    """What a scenario does with models, in an event loop of its own; they are closed at its end."""

    async def inside():
        models = Models(files, Terms(Model, **terms), Metrics())
        try:
            await scenario(models)
        finally:
            await models.close()
            assert not models.loaded

    asyncio.run(inside())


@asynccontextmanager
async def using(models, name, keep_alive=None):
    served = await models.take(name, keep_alive)
    try:
        yield served
    finally:
        models.release(served)


async def use(models, name, keep_alive=None):
    async with using(models, name, keep_alive) as served:
        return served.model.generate("Once", max_tokens=2, temperature=0).text


async def soon(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to be")


def test_those_who_ask_at_once_wait_for_one_load(files):
    async def scenario(models):
        assert models.status("a") == "unloaded"
        asked = [asyncio.create_task(models.take("a")) for _ in range(8)]
        leaves = asyncio.create_task(models.take("a"))
        await asyncio.sleep(0)
        assert models.status("a") == "loading"
        leaves.cancel()
        served = await asyncio.gather(*asked)
        assert (len({id(each) for each in served}), served[0].users) == (1, 8)
        assert models.status("a") == "loaded"
        assert 'edgellm_model_loads_total{model="a"} 1' in models._metrics.text({})

    run(files, scenario)


def test_the_one_used_longest_ago_makes_room(files, full):
    async def scenario(models):
        for name in "aba":
            assert await use(models, name)
        assert list(models.loaded) == ["a", "b"]
        await use(models, "c")
        assert list(models.loaded) == ["a", "c"]
        assert models.n_bytes == 2 * full

    run(files, scenario, memory=2 * full)


def test_one_that_answers_stays_and_others_wait(files, full):
    async def scenario(models):
        order = []

        async def ask(name):
            async with using(models, name):
                order.append(name)

        async with using(models, "a") as served:
            first = asyncio.create_task(ask("b"))
            await soon(lambda: served.is_leaving)
            # Who comes later waits for his turn: else b would never get one.
            second = asyncio.create_task(ask("a"))
            await asyncio.sleep(0.05)
            assert (list(models.loaded), order) == (["a"], [])
            assert served.model.generate("Once", max_tokens=3).ids
        await asyncio.gather(first, second)
        assert order == ["b", "a"]

    run(files, scenario, memory=full)


def test_waiting_has_an_end(files, full):
    async def scenario(models):
        async with using(models, "a"):
            with pytest.raises(RequestError, match="the model b was not loaded in time") as found:
                await models.take("b", seconds=0.05)
            assert found.value.status == 504
        await soon(lambda: "b" in models.loaded)
        assert models.loaded["b"].users == 0

    run(files, scenario, memory=full)


def test_fewer_slots_where_memory_is_short(files, footprint, full):
    """Beside others no fewer than four; alone, one at least."""
    arena = footprint.arena + footprint.weights

    def share(served):
        return served.model.at_once, served.model.prefix_cache._most_bytes

    async def beside(models):
        await use(models, "a")
        await use(models, "b")
        assert share(models.loaded["b"]) == (4, footprint.cache)
        await use(models, "c")
        assert list(models.loaded) == ["b", "c"]
        assert share(models.loaded["c"])[0] == AT_ONCE
        assert models.n_bytes <= models.terms.memory

    run(files, beside, memory=full + arena + 5 * footprint.cache)

    async def alone(models):
        await use(models, "a")
        assert share(models.loaded["a"]) == (1, footprint.cache // 2)

    run(files, alone, memory=arena + footprint.cache + footprint.cache // 2)
    # What is free without anybody's saying: the weights may be dropped, and read again.
    run(files, alone, available=footprint.arena + footprint.cache + footprint.cache // 2)


def test_one_that_never_fits_is_refused_with_both_numbers(files, footprint, full):
    async def scenario(models):
        message = r"could not be loaded: a takes 8 MB with 20 slots, and models may take 6 MB; .*--memory"
        with pytest.raises(RequestError, match=message) as found:
            await use(models, "a")
        assert (found.value.status, found.value.headers) == (503, {"x-should-retry": "false"})

    run(files, scenario, memory=6_000_000, slots=20)

    async def first(models):
        with pytest.raises(OutOfMemoryError):
            await models.preload()

    run(files, first, memory=full // 10)


def test_named_models_are_loaded_first_while_there_is_room(files, full):
    async def scenario(models):
        await models.preload()
        assert list(models.loaded) == ["a", "b"]
        assert models.loaded["a"].seconds_left == math.inf

    run(files, scenario, memory=2 * full)


def test_a_load_that_fails_says_so_and_spoils_nothing(files, tmp_path):
    path = tmp_path / "d.edge"
    path.write_bytes(BUNDLED.read_bytes()[:-64])

    async def scenario(models):
        found = await asyncio.gather(*(models.take("d") for _ in range(3)), return_exceptions=True)
        assert {str(error) for error in found} == {str(found[0])}
        assert "the model d could not be loaded: d.edge: " in str(found[0])
        assert str(tmp_path) not in str(found[0])
        assert found[0].status == 503
        assert await use(models, "a")
        path.write_bytes(BUNDLED.read_bytes())
        assert await use(models, "d")

    run({**files, "d": path}, scenario)


def test_how_long_a_model_stays(files):
    async def scenario(models):
        await use(models, "a")
        assert 250 < models.loaded["a"].seconds_left <= 300
        await use(models, "a", keep_alive=0)
        await soon(lambda: not models.loaded)
        async with using(models, "a", keep_alive=0.02), using(models, "b", keep_alive=math.inf):
            await asyncio.sleep(0.1)
            assert list(models.loaded) == ["a", "b"]
        await use(models, "a")
        await soon(lambda: list(models.loaded) == ["b"])
        await use(models, "b", keep_alive=0)
        await soon(lambda: not models.loaded)

    run(files, scenario, keep_alive=300)


def test_only_names_that_are_there(files):
    async def scenario(models):
        for name in ("d", "", "a.edge", str(files["a"]), "../a", "/etc/passwd", "a\0", "a/../a", "x" * 10_000):
            with pytest.raises(ModelNotFoundError, match="expected one of a, b, c"):
                models.name_of(name)
        assert models.name_of(None) == "a"

    run(files, scenario)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(5, 5), (0, 0), (-1, math.inf), ("5m", 300), ("1h30m", 5400), ("90s", 90), ("1.5h", 5400), ("300", 300),
     ("-1", math.inf), ("-1m", math.inf), ("0", 0), ("500ms", 0.5), (1.5, 1.5)],
)  # fmt: skip
def test_times(given, seconds):
    assert seconds_of(given) == Duration().read(given, "keep_alive") == seconds


@pytest.mark.parametrize("given", ["", "m", "5x", "5 m", "m5", "--1", "1e3", "nan", True, [], 10**400, "9" * 40])
def test_what_is_no_time(given):
    with pytest.raises(RequestError, match="keep_alive is"):
        Duration().read(given, "keep_alive")


# Over HTTP.


def statuses(server):
    return {each["id"]: each["status"]["value"] for each in server.get("/v1/models")[1]["data"]}


def test_a_server_with_several_models(files, full):
    with Server(*files.values(), "--memory", str(2 * full)) as server:
        assert statuses(server) == {"a": "loaded", "b": "loaded", "c": "unloaded"}
        assert {each["max_model_len"] for each in server.get("/v1/models")[1]["data"]} == {512}
        texts = {server.post("/v1/completions", {**STORY, "model": name})[1]["choices"][0]["text"] for name in "abcab"}
        assert texts == {", there was a"}
        assert server.post("/v1/completions", STORY)[1]["model"] == "a"
        assert server.get("/v1/models/c")[1]["status"] == {"value": "unloaded"}
        assert server.get("/props?model=b")[1]["models"] == {"a": "loaded", "b": "loaded", "c": "unloaded"}
        assert server.get("/health")[1]["models_loaded"] == server.get("/ready")[1]["models_loaded"] == 2
        assert server.metric("edgellm_models_loaded") == 2
        assert server.metric("edgellm_models_bytes") == 2 * full
        assert server.metric('edgellm_model_loads_total{model="a"}') == 2
        assert server.metric('edgellm_model_unloads_total{model="c"}') == 1
        server.post("/v1/completions", {**STORY, "model": "a", "keep_alive": 0})
        until(lambda: statuses(server)["a"] == "unloaded")
        status, found = server.post("/v1/completions", {**STORY, "model": "gpt-4"})
        assert (status, found["error"]["code"]) == (404, "model_not_found")
        assert "there is no model 'gpt-4'; expected one of a, b, c" in found["error"]["message"]
        status, found = server.post("/v1/completions", {**STORY, "keep_alive": "5 minutes"})
        assert (status, found["error"]["param"]) == (400, "keep_alive")


def test_all_of_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELLM_HOME", str(tmp_path))
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(BUNDLED, folder / "tales.edge")
    with Server() as server:
        assert statuses(server) == {"tales": "loaded", "stories260k": "unloaded"}
        shutil.copy(BUNDLED, folder / "more.edge")
        assert statuses(server) == {"more": "unloaded", "tales": "loaded", "stories260k": "unloaded"}
        assert server.post("/v1/completions", {**STORY, "model": "more"})[0] == 200
        (folder / "tales.edge").unlink()
        assert server.post("/v1/completions", {**STORY, "model": "tales"})[0] == 404
        for name in ("../models/more", str(folder / "more.edge"), "more.edge", "smollm2"):
            assert server.post("/v1/completions", {**STORY, "model": name})[0] == 404


def test_others_are_answered_while_a_model_is_loaded(files, tmp_path):
    """The load goes on when a file is gone."""
    hold = tmp_path / "hold"
    before = (
        "import pathlib, time\n"
        "from edgellm.api import Model\n"
        "begin = Model.__init__\n"
        "def slow(self, path, **more):\n"
        f"    while pathlib.Path({str(hold)!r}).exists(): time.sleep(0.01)\n"
        "    begin(self, path, **more)\n"
        "Model.__init__ = slow"
    )
    with Server(*list(files.values())[:2], "--memory", "2MB", "--slots", 2, "--queue", 1, before=before) as server:
        found = []
        body = {**STORY, "model": "b"}
        threads = [
            threading.Thread(target=lambda: found.append(server.request("POST", "/v1/completions", body)))
            for _ in range(5)
        ]
        assert statuses(server) == {"a": "loaded", "b": "unloaded"}
        hold.touch()
        for thread in threads:
            thread.start()
        until(lambda: statuses(server)["b"] == "loading" and len(found) == 2)
        assert {(status, headers["retry-after"]) for status, headers, _ in found} == {(503, "2")}
        assert server.get("/ready")[1]["error"]["type"] == "unavailable_error"
        assert server.get("/health")[1] == {"status": "ok", "models_loaded": 1}
        hold.unlink()
        for thread in threads:
            thread.join()
        assert sorted(status for status, _, _ in found) == [200, 200, 200, 503, 503]
        assert json.loads(found[-1][2])["model"] == "b"


def test_options_that_are_wrong():
    assert "'much' is no size; expected a number of bytes" in edgellm("serve", "--memory", "much", code=2).stderr
    assert "'soon' is no time; expected one such as" in edgellm("serve", "--keep-alive", "soon", code=2).stderr
    run = edgellm("serve", "stories260k", "--memory", "100KB", code=11)
    assert "stories260k takes 1 MB with 1 slot, and models may take 0 MB" in run.stderr
