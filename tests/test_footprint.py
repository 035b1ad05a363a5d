"""What a model takes of memory, and what there is: known before it runs."""

import os

import numpy as np
import pytest
import tiny
from conftest import BUNDLED

from edgellm import api
from edgellm.architectures import get
from edgellm.errors import OutOfMemoryError
from edgellm.footprint import Footprint, Share, available_memory, resident_memory
from edgellm.generate import Slot


def test_memory_of_a_machine(tmp_path):
    meminfo, group = tmp_path / "meminfo", tmp_path / "group"
    assert available_memory(meminfo, group) is None
    meminfo.write_text("MemTotal:  2000 kB\nMemAvailable:   1000 kB\n")
    assert available_memory(meminfo, group) == 1_024_000
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    assert available_memory(meminfo, group) == 1_024_000
    (group / "memory.max").write_text("500000\n")
    (group / "memory.current").write_text("300000\n")
    (group / "memory.stat").write_text("anon 100000\nfile 200000\n")
    assert available_memory(meminfo, group) == 400_000
    meminfo.write_text("nothing\n")
    assert available_memory(meminfo, group) == 400_000


def test_a_context_that_does_not_fit():
    footprint = Footprint(weights=10**12, cache=800, arena=200)
    footprint.check(1000, 400)
    footprint.check(None, 400)
    with pytest.raises(OutOfMemoryError, match=r"context of 400 tokens.* at most 200 tokens"):
        footprint.check(600, 400)


def test_adapters_count():
    footprint = Footprint(weights=10**12, cache=800, arena=200, adapters=100)
    footprint.check(1100, 400)
    with pytest.raises(OutOfMemoryError, match=r"0 MB, adapters of 0 MB included, and .* at most 150 tokens"):
        footprint.check(600, 400)
    assert footprint.total == 10**12 + 1100
    assert footprint.share(1100, 1) == Share(1, 0)
    assert footprint.share(1099, 1) is None
    assert footprint.held(Share(2, 5)) == 10**12 + 100 + 200 + 1600 + 5


def test_what_a_model_may_take():
    """One more context than there are slots: of those at rest."""
    footprint = Footprint(weights=7, cache=100, arena=50)
    assert footprint.share(None, 16) == Share(16, 100)
    assert footprint.share(1750, 16) == Share(16, 100)
    assert footprint.share(1749, 16) == Share(15, 100)
    assert footprint.share(349, 16) == Share(1, 100)
    assert footprint.share(200, 16) == Share(1, 50)
    assert footprint.share(149, 16) is None
    assert footprint.share(0, 16) is None
    assert footprint.share(370, 3, least=3) == Share(3, 20)
    assert footprint.share(349, 3, least=3) is None
    assert footprint.held(Share(3, 20)) == 377


def test_loading_refuses_early(monkeypatch):
    monkeypatch.setattr(api, "available_memory", lambda: 1000)
    with pytest.raises(OutOfMemoryError, match="ask for a context of at most 0 tokens"):
        api.load(BUNDLED)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_caches_are_of_the_size_that_was_told(name):
    """Float32 keys and values; a window of 5 keeps as many positions and those of a step."""
    backend, caches = tiny.backend(name), get(name).caches(get(name).Config.tiny())
    cache = Slot(backend, 64)
    held = backend._slots[0].rings
    assert backend.footprint.cache == sum(array.nbytes for ring in held for array in ring._arrays)
    positions = 64 if name == "llama" else min(64, 5 + backend.MAX_ROWS)
    assert backend.footprint.cache == len(caches) * 2 * 4 * positions * 2 * 12
    cache.close()


def test_kernels_touch_no_more_than_was_told():
    backend = tiny.backend("llama", "q8", "cpu", context_length=256)
    slot = backend._new_slot()
    assert backend.footprint.cache == slot._memory.nbytes
    assert backend.footprint.weights == sum(
        tensor.data.nbytes for tensor in tiny.tensors(get("llama"), get("llama").Config.tiny(), "q8").values()
    )
    assert np.isfinite(backend.footprint.arena)


@pytest.mark.parametrize(("name", "head_dim"), [("llama", 64), ("llama", 96), ("qwen3", 128), ("gemma3_text", 256)])
def test_a_cache_of_8_bits_takes_half(name, head_dim):
    """8 bits for each number, 16 for the scale of 32 of a key, and of a value."""
    half, whole = (
        tiny.backend(name, "f32", "cpu", context_length=2048, head_dim=head_dim, kv=kv).bytes_of(2048)
        for kv in ("q8", "f16")
    )
    assert half / whole == (2 * head_dim + head_dim / 16 + 2) / (4 * head_dim) < 0.53


def test_resident_memory(tmp_path):
    statm = tmp_path / "statm"
    assert resident_memory(statm) is None
    statm.write_text("")
    assert resident_memory(statm) is None
    statm.write_text("900 25 3 1 0 8 0\n")
    assert resident_memory(statm) == 25 * os.sysconf("SC_PAGE_SIZE")
