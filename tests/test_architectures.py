"""What every architecture promises, on a tiny random model of it."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import tiny

from edgellm import architectures, quant
from edgellm.config import from_json, template
from edgellm.converters.naming import parts
from edgellm.errors import CheckpointError, UnsupportedError
from edgellm.generate import Slot
from edgellm.ops import Ops
from edgellm.rope import frequencies
from edgellm.step import Step
from edgellm.tensor import Tensor, Weights

NAMES = architectures.names()
IDS = [int(id) for id in np.random.default_rng(1).integers(0, 97, 40)]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def whole(backend, ids=IDS):
    """Logits after each token, in one step."""
    return Slot(backend, 64).extend(ids, wanted=range(len(ids)))


@pytest.mark.parametrize("name", NAMES)
def test_names_of_both_sources_cover_every_tensor(name):
    architecture = architectures.get(name)
    config = replace(architecture.Config.tiny(), tie_embeddings=False)
    wanted = {template(part)[0] for made_of in parts(architecture, config).values() for part in made_of}
    assert set(architecture.HF_NAMES) == set(architecture.GGUF_NAMES) >= wanted
    assert {name.split(".")[-1] for name in architecture.shapes(config)} >= set(architecture.pairs(config))


@pytest.mark.parametrize("name", NAMES)
def test_config_survives_json(name):
    config = architectures.get(name).Config.tiny()
    assert from_json(type(config), json.loads(json.dumps(asdict(config)))) == config


def test_config_of_a_file_made_before_fields_were_added():
    config = architectures.get("llama").Config.tiny()
    added = ("qkv_bias", "o_bias", "ffn_bias", "layer_types")
    assert from_json(type(config), {key: value for key, value in asdict(config).items() if key not in added}) == config
    for changed in ({**asdict(config), "new": 1}, {k: v for k, v in asdict(config).items() if k != "n_heads"}):
        with pytest.raises(CheckpointError, match=r"expected \[.*'n_heads'.*another version of edgellm"):
            from_json(type(config), changed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fmt", quant.names())
def test_shape_and_finiteness_in_every_format(name, fmt):
    logits = whole(tiny.backend(name, fmt))
    assert logits.shape == (40, 97)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", [[1] * 40, [39, 1], [7, 13, 20], [40]])
def test_any_chunking_gives_the_same_logits(name, sizes):
    backend = tiny.backend(name, max_rows=40)
    slot, found, at = Slot(backend, 64), [], 0
    for size in sizes:
        found.append(slot.extend(IDS[at : at + size], wanted=range(size)))
        at += size
    close(np.concatenate(found), whole(backend))


@pytest.mark.parametrize("name", NAMES)
def test_a_mixed_batch_equals_one_by_one(name):
    """Three sequences in one step: a first chunk, a later chunk and a decode, with gaps in what is wanted."""
    backend = tiny.backend(name)
    sequences = [(IDS[:5], IDS[5:9]), ([], IDS[9:20]), (IDS[20:38], IDS[38:39])]
    slots = [backend.open_slot() for _ in sequences]
    for slot, (before, _) in zip(slots, sequences, strict=True):
        if before:
            backend.run(Step.chunk(slot, 0, before))
    steps = [Step.chunk(slot, len(before), now) for slot, (before, now) in zip(slots, sequences, strict=True)]
    columns = [np.concatenate([getattr(step, key) for step in steps]) for key in ("tokens", "slots", "positions")]
    together = Step(*columns, wanted=np.array([1, 3, 8, 15]))
    apart = [whole(backend, [*before, *now])[len(before) :] for before, now in sequences]
    close(backend.run(together), [apart[0][1], apart[0][3], apart[1][4], apart[2][0]])


@pytest.mark.parametrize("name", NAMES)
def test_a_trimmed_slot_continues_as_a_fresh_one(name):
    backend = tiny.backend(name)
    slot = Slot(backend, 64)
    slot.extend(IDS)
    kept = slot.reuse([*IDS[:38], 5, 6])
    assert slot.ids == IDS[:kept]
    close(slot.extend([*IDS[:38], 5, 6][kept:]), whole(backend, [*IDS[:38], 5, 6])[-1:])


def test_a_window_hides_what_is_older():
    """With a window of 5 and 2 layers, a logit depends on the last 2 * (5 - 1) + 1 = 9 tokens."""
    backend = tiny.backend("mistral", sliding_window=5)
    changed = [*IDS[:20], (IDS[20] + 1) % 97, *IDS[21:]]
    difference = np.abs(whole(backend) - whole(backend, changed)).max(axis=1)
    assert (difference[20:29] > 1e-6).all()
    assert not difference[:20].any()
    close(whole(backend)[29:], whole(backend, changed)[29:])


def test_a_ring_of_a_windowed_layer_wraps_around():
    """Chunks of 3 rows in a ring of 5 + 3 positions, 40 tokens long."""
    slot = Slot(tiny.backend("mistral", max_rows=3), 64)
    close(slot.extend(IDS, wanted=range(40)), whole(tiny.backend("mistral")))


def test_a_window_that_lost_too_much_starts_again():
    backend = tiny.backend("mistral", max_rows=3)
    slot = Slot(backend, 64)
    slot.extend(IDS)
    assert slot.reuse([*IDS[:20], 5]) == 0
    assert slot.ids == []
    close(slot.extend([*IDS[:20], 5]), whole(tiny.backend("mistral"), [*IDS[:20], 5])[-1:])


def test_unknown_architecture_lists_the_known():
    with pytest.raises(UnsupportedError, match=r"'rwkv'.*llama, .*, smollm3"):
        architectures.get("rwkv")
    with pytest.raises(UnsupportedError, match=r"'llama2'.*the nearest is llama"):
        architectures.get("llama2")


HF = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 72, "intermediate_size": 104, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip


def test_config_from_hugging_face():
    config = architectures.get("llama").Config
    assert config.from_hf(HF) == config.tiny()
    assert config.from_hf({**HF, "tie_word_embeddings": True}).tie_embeddings
    new_style = {**HF, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert config.from_hf(new_style).rope_theta == 5e5
    assert config.from_hf(new_style).rope_scaling["type"] == "linear"
    assert architectures.get("mistral").Config.from_hf({**HF, "sliding_window": 5}).sliding_window == 5


BAD = {
    "zero heads": ({"num_attention_heads": 0}, CheckpointError, "num_attention_heads = 0"),
    "negative layers": ({"num_hidden_layers": -1}, CheckpointError, "num_hidden_layers = -1"),
    "layers as text": ({"num_hidden_layers": "2"}, CheckpointError, "num_hidden_layers = '2'"),
    "huge vocabulary": ({"vocab_size": 1 << 40}, CheckpointError, "vocab_size"),
    "missing": ({"hidden_size": None}, CheckpointError, "hidden_size = None"),
    "heads do not divide": ({"num_key_value_heads": 4}, CheckpointError, "not a multiple of n_kv_heads = 4"),
    "odd head": ({"head_dim": 13}, CheckpointError, "rotary heads of 13"),
    "infinite eps": ({"rms_norm_eps": float("inf")}, CheckpointError, "rms_norm_eps = inf"),
    "activation": ({"hidden_act": "relu"}, UnsupportedError, "'relu'"),
    "bias": ({"attention_bias": 1}, CheckpointError, "attention_bias = 1; expected true or false"),
    "rope type": ({"rope_scaling": {"type": "dynamic"}}, UnsupportedError, "'dynamic'"),
    "rope type a number": ({"rope_scaling": {"type": 3}}, CheckpointError, "of the type 3"),
    "rope factor": ({"rope_scaling": {"type": "linear", "factor": -1}}, CheckpointError, "factor = -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_configs(case):
    change, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        architectures.get("llama").Config.from_hf({**HF, **change})


def test_rope_scaling():
    plain = frequencies(64, 5e5, None, 1)
    close(plain[[0, 16, 31]], [1, 5e5 ** (-0.5), 5e5 ** (-31 / 32)])
    close(frequencies(64, 5e5, {"type": "linear", "factor": 4}, 1), plain / 4)
    close(frequencies(64, 5e5, {"type": "factors", "factors": [2.0] * 32}, 1), plain / 2)
    llama3 = {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
              "original_max_position_embeddings": 8192}  # fmt: skip
    ratio = plain / frequencies(64, 5e5, llama3, 1)
    turns = 8192 * plain / (2 * np.pi)
    close(ratio[turns > 4], 1)
    close(ratio[turns < 1], 8)
    assert (np.diff(ratio) >= -1e-6).all()


def test_rope_rotates_pairs_half_a_head_apart():
    from edgellm.backends.reference import _Ops

    ops = _Ops(Step.chunk(0, 3, [0]), {}, {})
    turned = ops.rope(np.arange(8, dtype=np.float32)[None], 4, np.array([1, 0.1], np.float32))
    cos, sin = np.cos([3, 0.3]), np.sin([3, 0.3])
    for head in (np.arange(4), np.arange(4, 8)):
        first, second = head[:2], head[2:]
        close(turned[0, head], np.concatenate([first * cos - second * sin, second * cos + first * sin]))


class Recorder:
    """Ops that only write down what was asked for; what they pass on can do nothing."""

    def __init__(self):
        self.plan = []

    def __getattr__(self, op):
        def record(*inputs, **options):
            self.plan.append((op, inputs, options))
            return object()

        return record


@pytest.mark.parametrize("name", NAMES)
def test_forward_can_be_recorded(name):
    """The model asks for its ops without looking at a value: the plan is the same whatever the step holds."""
    architecture = architectures.get(name)
    config, ops = architecture.Config.tiny(), Recorder()
    made = tiny.tensors(architecture, config)
    architecture.forward(config, Weights(made), ops)
    names = [op for op, *_ in ops.plan]
    assert (names[0], names[-1]) == ("embed", "logits")
    remembered = [{"attention": inputs[3:4], "short_conv": inputs[2:3]}.get(op) for op, inputs, _ in ops.plan]
    assert [layer for layer in remembered if layer] == [(i,) for i in range(config.n_layers)]
    assert len(architecture.caches(config)) == config.n_layers
    inputs = [x for _, inputs, _ in ops.plan for x in inputs]
    tensors = [x for one in inputs for x in (one if isinstance(one, list) else [one]) if isinstance(x, Tensor)]
    assert {tensor.name for tensor in tensors} == set(made)
    assert set(names) <= {op for op in vars(Ops) if not op.startswith("_")}
