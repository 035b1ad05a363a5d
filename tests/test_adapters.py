"""Low-rank adapters: as PEFT computes them, as the merged weights, and each chat with its own."""

import asyncio
import gc
import json
from dataclasses import replace
from functools import cache

import adapters
import every_op
import fresh
import gguf
import numpy as np
import peft_cases
import pytest
import tiny
import torch_pickles
from click.testing import CliRunner
from conftest import BUNDLED
from gguf_cases import checksum
from test_gguf_models import CHANGES, write_gguf
from transformers_cases import IDS, expected, weights, write_folder

from edgellm import architectures
from edgellm.adapter import Adapter, LowRank, combined
from edgellm.answer_cache import AnswerCache
from edgellm.api import Model, load
from edgellm.backends.reference import matrix, vector
from edgellm.cli import cli
from edgellm.converters import convert, open_adapter, read, read_adapter
from edgellm.converters.adapter import merged
from edgellm.errors import ArgumentError, CheckpointError, ModelNotFoundError, UnsupportedError
from edgellm.generate import Slot, generate
from edgellm.loading import open_model
from edgellm.sampling import Sampler, SamplingParams
from edgellm.scheduler import Scheduler

HF, EXPECTED = expected(), peft_cases.expected()
CONTEXT, LENGTH = 320, 200
GREEDY = SamplingParams(temperature=0)
OPTIONS = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Of a case: the model's .edge file in float32, and the adapter's folder."""
    folder = tmp_path_factory.mktemp("peft")

    def paths(case):
        model, adapter = folder / f"{case}.edge", folder / f"{case}.lora"
        if not model.exists():
            write_folder(folder / case, HF[case]["config"], HF[case]["shapes"])
            convert(folder / case, model, format="f32", progress=False)
            peft_cases.write_adapter(adapter, EXPECTED[case]["config"], EXPECTED[case]["shapes"])
        return model, adapter

    return paths


# ---- other implementations


@pytest.mark.parametrize("case", EXPECTED)
def test_logits_are_peft_s(folders, case):
    path, folder = folders(case)
    with Model(path, backend="reference", context_length=128) as model:
        model.adapter = model.load_adapter(folder)
        np.testing.assert_allclose(model.logits(IDS)[:, :6], EXPECTED[case]["logits"], atol=1e-4)


@pytest.mark.parametrize("case", EXPECTED)
def test_merged_weights_give_peft_s_logits(folders, tmp_path, case):
    _, folder = folders(case)
    convert(folder.with_suffix(""), tmp_path / "m.edge", format="f32", adapters=[(folder, 1.0)], progress=False)
    with Model(tmp_path / "m.edge", backend="reference", context_length=128) as model:
        np.testing.assert_allclose(model.logits(IDS)[:, :6], EXPECTED[case]["logits"], atol=1e-4)


@pytest.mark.parametrize("case", sorted(EXPECTED.keys() - {"gpt2"}))  # transposed, which llama.cpp cannot load either
def test_llama_cpp_s_file_has_the_same(folders, tmp_path, case):
    """But for scales that are not the same for all matrices: its converter leaves them out."""
    path, _ = folders(case)
    loaded, config = open_model(path), {**EXPECTED[case]["config"], "alpha_pattern": {}, "use_rslora": False}
    peft_cases.write_adapter(tmp_path / "peft", config, EXPECTED[case]["shapes"])
    write_gguf_adapter(tmp_path / "a.gguf", case)
    first, second = (read_adapter(tmp_path / name, loaded.architecture, loaded.config) for name in ("peft", "a.gguf"))
    assert first.keys() == second.keys()
    for name, pair in first.items():
        np.testing.assert_allclose(second[name].b @ second[name].a, pair.b @ pair.a, atol=1e-5, err_msg=name)
    loaded.file.close()


def write_gguf_adapter(path, case, **metadata):
    """As convert_lora_to_gguf.py: the changes to a matrix are those to the second one's rows."""
    config, left = HF[case]["config"], dict(EXPECTED[case]["gguf"])
    kind = getattr(architectures.get(config["model_type"]), "GGUF_ARCHITECTURE", config["model_type"])
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    change, values = CHANGES.get(config["model_type"], lambda config, name, values: values), {}
    for name, value in weights(EXPECTED[case]["shapes"]).items():
        module, which = name.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
        made = change(config, f"{module}.weight", value) if which == "B" else value
        values[f"{names.get_name(module)}.weight.lora_{which.lower()}"] = made
    for name, value in values.items():
        assert checksum(value) == left.pop(name), name
    assert not left
    said = {"general.architecture": kind, "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    write_as_gguf(
        path, values, {**said, "adapter.lora.alpha": float(EXPECTED[case]["config"]["lora_alpha"]), **metadata}
    )


def write_as_gguf(path, values, metadata):
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture" and value is not None:
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)
    for name, value in values.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_merged_gguf_model(folders, tmp_path):
    """Whose rows of queries and keys are in another order."""
    path, folder = folders("llama")
    write_gguf(tmp_path / "model.gguf", "llama")
    convert(tmp_path / "model.gguf", tmp_path / "m.edge", format="f32", adapters=[(folder, 1.0)], progress=False)
    changed, plain = open_model(tmp_path / "m.edge"), open_model(path)
    pairs = read_adapter(folder, plain.architecture, plain.config)
    for name, tensor in plain.file.tensors.items():
        values, found = (values_of(each) for each in (tensor, changed.file.tensors[name]))
        expected = values + pairs[name].b @ pairs[name].a if name in pairs else values
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)
    changed.file.close()
    plain.file.close()


def values_of(tensor):
    return matrix(tensor) if len(tensor.shape) == 2 else vector(tensor)


def test_a_folder_with_pytorch_s_weights(folders, tmp_path):
    _, folder = folders("llama")
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    torch_pickles.save(tmp_path / "adapter_model.bin", weights(EXPECTED["llama"]["shapes"]))
    first, second = open_adapter(folder).pairs, open_adapter(tmp_path).pairs
    assert first.keys() == second.keys()
    for name, pair in first.items():
        np.testing.assert_array_equal(pair.b, second[name].b)


# ---- trained weights


@pytest.fixture(scope="module")
def smollm2_adapters(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [adapters.written(folder / f"{seed}", smollm2, seed=seed, size=0.4) for seed in (0, 1)]


def test_an_adapter_is_the_merged_weights(smollm2, smollm2_adapters, monkeypatch):
    ids = smollm2.tokenize("The capital of France is Paris, a city on the Seine. It has")
    adapter, plain = smollm2.load_adapter(smollm2_adapters[0], scale=0.7), smollm2.logits(ids)
    monkeypatch.setattr(smollm2, "adapter", adapter)
    found = smollm2.logits(ids)
    monkeypatch.setattr(smollm2, "adapter", None)
    np.testing.assert_array_equal(smollm2.logits(ids), plain)
    dense = smollm2._backend._backend._dense
    for name, (a, b) in adapter.pairs.items():
        monkeypatch.setitem(dense, name, dense[name] + b @ a)
    expected = smollm2.logits(ids)
    assert np.abs(expected - plain).mean() > 0.5
    np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.fixture(scope="module")
def smollm2_cpu(smollm2_path):
    pytest.importorskip("numba")
    with Model(smollm2_path, backend="cpu", context_length=512) as model:
        yield model


def test_the_cpu_backend_is_the_reference_and_noise(smollm2, smollm2_cpu, smollm2_adapters, monkeypatch):
    """No more of it than without an adapter, which has none of its own: its values stay float32."""
    ids, error = smollm2.tokenize("Once upon a time there was a little girl who lived in a house by the sea. " * 3), {}
    for made in ("plain", "adapted"):
        for model in (smollm2, smollm2_cpu):
            adapter = model.load_adapter(smollm2_adapters[0]) if made == "adapted" else None
            monkeypatch.setattr(model, "adapter", adapter)
        exact, found = (model.logits(ids) for model in (smollm2, smollm2_cpu))
        error[made] = np.sqrt(np.square(found - exact).mean()) / exact.std()
    assert error["adapted"] < 1.5 * error["plain"] < 0.1


def test_an_adapter_beside_a_cache_of_8_bits(smollm2_path, smollm2_cpu, smollm2_adapters):
    """As near to the same with float16 as answers without the adapter are; and one at a time what a batch gives."""
    ids = smollm2_cpu.tokenize("Once upon a time there was a little girl who lived in a house by the sea. " * 6)
    with Model(smollm2_path, backend="cpu", context_length=512, kv="q8") as model:
        error = {}
        for made in ("plain", "adapted"):
            for each in (model, smollm2_cpu):
                each.adapter = each.load_adapter(smollm2_adapters[0]) if made == "adapted" else None
            exact, found = smollm2_cpu.logits(ids), model.logits(ids)
            error[made] = np.sqrt(np.square(found - exact).mean()) / exact.std()
        prompts, options = ["The sea is", "Once upon a time"], {**OPTIONS, "adapter": model.adapter}
        batch = [done.ids for done in model.generate_batch(prompts, **options)]
        assert batch == [model.generate(prompt, **options).ids for prompt in prompts]
        assert batch != [model.generate(prompt, **{**options, "adapter": None}).ids for prompt in prompts]
    smollm2_cpu.adapter = None
    assert 0 < error["adapted"] < 1.5 * error["plain"] < 0.1


def test_two_chats_at_a_time_with_an_adapter_each(smollm2_cpu, smollm2_adapters):
    a, b = (smollm2_cpu.load_adapter(path) for path in smollm2_adapters)
    asked = ["Name a colour.", "And another one?"]

    def alone(adapter):
        chat = smollm2_cpu.chat("You are brief.", adapter=adapter)
        return [chat.send(text, **OPTIONS).ids for text in asked]

    async def together():
        chats = [smollm2_cpu.chat("You are brief.", adapter=adapter) for adapter in (a, None, b)]
        said = [await asyncio.gather(*(chat.asend(text, **OPTIONS) for chat in chats)) for text in asked]
        return [[answer.ids for answer in answers] for answers in zip(*said, strict=True)]

    found = asyncio.run(together())
    assert found == [alone(a), alone(None), alone(b)]
    assert found[0] != found[1] != found[2]


def test_a_chat_goes_on_with_another_adapter(smollm2_cpu, smollm2_adapters):
    a, b = (smollm2_cpu.load_adapter(path) for path in smollm2_adapters)
    chat, other = smollm2_cpu.chat(adapter=a), smollm2_cpu.chat(adapter=b)
    chat.send("Name a colour.", **OPTIONS)
    other.messages, chat.adapter = list(chat.messages), b
    first, second = (each.send("And another one?", **OPTIONS) for each in (chat, other))
    assert first.ids == second.ids
    assert first.timings.cached_tokens == 0
    assert chat.send("And one more?", **OPTIONS).timings.cached_tokens > 0


# ---- bits


@cache
def pairs_of(name, seed=0):
    """For every matrix that rows are multiplied with, of ranks that are not alike."""
    architecture = every_op if name == "every_op" else architectures.get(name)
    config = every_op.Config() if name == "every_op" else tiny.config(name)
    rng, shapes = np.random.default_rng(seed), architecture.shapes(config)
    result = {}
    for tensor, shape in shapes.items():
        parts = tensor.split(".")  # layer.number.name; an expert's have more
        if len(shape) == 2 and len(parts) == 3 and parts[0] == "layers" and parts[2] != "taps":
            rank = int(rng.integers(1, 20))
            result[tensor] = LowRank(adapters.normal(rng, rank, shape[1]) / 8, adapters.normal(rng, shape[0], rank) / 4)
    return result


@cache
def adapter(name, seed=0):
    return Adapter(f"{name} {seed}", "", pairs_of(name, seed))


def ids_of(seed=0):
    return [int(id) for id in np.random.default_rng(seed).integers(0, 97, LENGTH)]


def backend(name, fmt, kind, n_threads=None):
    if name == "every_op":
        return every_op.backend(fmt, kind, CONTEXT, n_threads)
    return tiny.backend(name, fmt, kind, CONTEXT, n_threads=n_threads)


NAMES = ["every_op", "llama", "gemma3_text", "gpt2", "lfm2", "olmoe", "phi3"]


@pytest.mark.parametrize("name", NAMES)
def test_the_cpu_backend_s_logits_are_the_reference_s(name):
    pytest.importorskip("numba")
    exact, found = (
        Slot(backend(name, "f32", kind), CONTEXT, adapter(name)).extend(ids_of()[:60], wanted=range(60))
        for kind in ("reference", "cpu")
    )
    np.testing.assert_allclose(found, exact, atol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_bits_depend_on_nothing_else(name):
    """Not on threads, chunks, or what is computed between with another adapter, or none."""
    pytest.importorskip("numba")
    rng, found = fresh.rng("adapters", name), []
    for n_threads in (1, 2, 3):
        made = backend(name, "q4m", "cpu", n_threads)
        slots = {each: Slot(made, CONTEXT, each) for each in (adapter(name), None, adapter(name, 1))}
        logits = {each: [] for each in slots}
        while any(len(slot.ids) < LENGTH for slot in slots.values()):
            each = list(slots)[rng.integers(3)]
            n = int(rng.choice([1, 1, 5, 40, 130]))
            ids = ids_of()[len(slots[each].ids) :][:n]
            if ids:
                logits[each].append(slots[each].extend(ids, wanted=range(len(ids))))
        found.append([np.concatenate(of) for of in logits.values()])
        made.close()
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    assert np.abs(found[0][0] - found[0][1]).mean() > 0.01


@pytest.mark.parametrize("kind", ["reference", "cpu"])
def test_sequences_of_several_adapters(kind):
    """Each is as it would be alone; none waits until others are at their end."""
    made = backend("llama", "q8" if kind == "cpu" else "f32", kind)
    used = [adapter("llama"), None, adapter("llama", 1), adapter("llama"), None]
    prompts = [ids_of()[:40], ids_of()[:40], ids_of()[:40], ids_of()[:30], ids_of(3)[:20]]

    def alone(prompt, each):
        return list(generate(Slot(made, CONTEXT, each), prompt, Sampler(GREEDY), 20))

    scheduler, said, order = Scheduler(made, CONTEXT), {}, []
    sequences = [
        scheduler.submit(prompt, Sampler(GREEDY), 20, adapter=each) for prompt, each in zip(prompts, used, strict=True)
    ]
    while scheduler.is_busy:
        progresses = scheduler.step()
        assert len({progress.sequence.adapter for progress in progresses}) <= 1
        order += [progress.sequence.adapter for progress in progresses[:1]]
        for progress in progresses:
            said.setdefault(progress.sequence, []).extend(progress.ids)
    assert [said[sequence] for sequence in sequences] == [alone(*each) for each in zip(prompts, used, strict=True)]
    assert all(len(set(order[i : i + 3])) == 3 for i in range(3, 30, 3))
    scheduler.close()
    made.close()


def test_an_adapter_that_nobody_has_is_forgotten():
    pytest.importorskip("numba")
    made, brief = backend("llama", "q8", "cpu"), Adapter("brief", "", pairs_of("llama", 5))
    made.adapt(brief)
    assert len(made._adapted) == 1
    del brief
    assert len(made._adapted) == 0
    made.close()


# ---- stories260K: the API and the command line


@pytest.fixture(scope="module")
def stories_adapters(stories, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    return [adapters.written(folder / f"{seed}", stories, seed=seed, size=1.0) for seed in (0, 1)]


def test_answers_of_one_model(stories_adapters):
    with load(BUNDLED, backend="reference") as model:
        a, b = (model.load_adapter(path) for path in stories_adapters)
        texts = [model.generate("Once upon a time", adapter=each, **OPTIONS) for each in (None, a, b, a, a)]
        assert len({answer.text for answer in texts}) == 3
        assert texts[1].text == texts[3].text == texts[4].text
        assert [answer.timings.cached_tokens for answer in texts[:3]] == [0, 0, 0]
        assert texts[4].timings.cached_tokens > 0
        many = model.generate_many("Once upon a time", 2, adapter=a, **OPTIONS)
        batch = model.generate_batch(["Once upon a time"], adapter=b, **OPTIONS)
        assert [answer.text for answer in (*many, *batch)] == [texts[1].text] * 2 + [texts[2].text]


def test_an_answer_cache_keeps_adapters_apart(stories_adapters):
    with AnswerCache() as cache, load(BUNDLED, backend="reference", answer_cache=cache) as model:
        a, again = (model.load_adapter(stories_adapters[0]) for _ in "12")
        texts = [model.generate("Once upon a time", adapter=each, **OPTIONS).text for each in (None, a, again)]
        assert texts[0] != texts[1] == texts[2]
        assert len(cache) == 2


def test_a_model_loaded_with_adapters(stories_adapters):
    """All of them together, each times its scale."""
    with load(BUNDLED, backend="reference") as model:
        made = combined(
            [model.load_adapter(path, scale) for path, scale in zip(stories_adapters, (0.5, -1), strict=True)]
        )
        text = model.generate("Once upon a time", adapter=made, **OPTIONS).text
        plain = model.generate("Once upon a time", **OPTIONS).text
    with load(BUNDLED, backend="reference", adapters=[*zip(stories_adapters, (0.5, -1), strict=True)]) as model:
        assert model.generate("Once upon a time", **OPTIONS).text == text != plain
        assert model.generate("Once upon a time", adapter=None, **OPTIONS).text == plain


def test_a_saved_cache_is_its_adapter_s(stories_adapters, tmp_path):
    with load(BUNDLED, backend="reference") as model:
        a, b = (model.load_adapter(path) for path in stories_adapters)
        model.generate("Once upon a time", adapter=a, **OPTIONS)
        n = model.save_cache(tmp_path / "cache")
        for other in (b, None, model.load_adapter(stories_adapters[0], 0.5)):
            with pytest.raises(ArgumentError, match="made with another adapter"):
                model.load_cache(tmp_path / "cache", adapter=other)
    with load(BUNDLED, backend="reference") as model:
        again = model.load_adapter(stories_adapters[0])
        assert len(model.load_cache(tmp_path / "cache", adapter=again).ids) == n
        assert model.generate("Once upon a time", adapter=again, **OPTIONS).timings.cached_tokens > 0


def test_an_adapter_of_another_model_is_refused(stories, smollm2, stories_adapters):
    made = stories.load_adapter(stories_adapters[0])
    with pytest.raises(ArgumentError, match="was not loaded for this model"):
        smollm2.generate("A", adapter=made)
    with pytest.raises(ArgumentError, match="was not loaded for this model"):
        stories.generate("A", adapter=str(stories_adapters[0]))
    with pytest.raises(ArgumentError, match="the scale of an adapter is nan"):
        stories.load_adapter(stories_adapters[0], float("nan"))
    with pytest.raises(CheckpointError, match="this model's has 576 x 576: load it with the model"):
        smollm2.load_adapter(stories_adapters[0])


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_command_line(stories, stories_adapters, tmp_path):
    path, start = stories_adapters[0], ("generate", "Once upon a time", "-m", "stories260k", "--temp", "0", "-n", "12")
    a, half = stories.load_adapter(path), stories.load_adapter(path, 0.5)
    options = {"temperature": 0, "max_tokens": 12}
    for given, adapter in ((path, a), (f"{path}:0.5", half)):
        done = run(*start, "--lora", given, "--backend", "reference")
        assert done.exit_code == 0, done.output
        assert done.stdout == stories.generate("Once upon a time", adapter=adapter, **options).text + "\n"
    assert isinstance(run(*start, "--lora", tmp_path / "nonesuch").exception, ModelNotFoundError)
    assert run("bench", "stories260k", "-p", "4", "-n", "2", "-r", "1", "--lora", path).exit_code == 0


@pytest.mark.parametrize("kind", ["cpu", "reference"])
def test_memory(stories_adapters, kind):
    """The kernels have the values once more, in their order."""
    options = ("fit", "stories260k", "--backend", kind, "--json")
    plain = json.loads(run(*options).stdout)
    found = json.loads(run(*options, "--lora", stories_adapters[0], "--lora", f"{stories_adapters[1]}:0.5").stdout)
    with load(BUNDLED, backend=kind, adapters=[(stories_adapters[0], 1.0), (stories_adapters[1], 0.5)]) as model:
        held, footprint = model.adapter.n_bytes, model.footprint
        assert {name: found[name] for name in ("weights", "adapters", "cache", "arena")} == vars(footprint)
        model.adapter = None
        gc.collect()
        assert model.footprint.adapters == 0
    assert plain["adapters"] == 0
    assert held <= found["adapters"] <= 2.2 * held
    assert found["total"] == sum(found[name] for name in ("weights", "adapters", "cache", "arena"))
    if kind == "cpu":
        assert found["bytes_per_token"] > plain["bytes_per_token"]
        assert "adapters " in run(*options[:-1], "--lora", stories_adapters[0]).stdout


def test_show(stories_adapters, tmp_path):
    done = run("show", stories_adapters[0], "--json")
    assert json.loads(done.stdout).items() >= {"kind": "PEFT adapter", "matrices": 35, "ranks": [8]}.items()
    write_as_gguf(tmp_path / "a.gguf", IN_GGUF, GGUF)
    done = run("show", tmp_path / "a.gguf")
    assert "changes         blk.N.attn_v.weight\n" in done.stdout
    assert "weights         768\n" in done.stdout
    done = run("convert", tmp_path / "a.gguf", tmp_path / "m.edge")
    assert "is an adapter; expected a model" in str(done.exception)


def test_convert_merges(folders, tmp_path):
    path, folder = folders("qwen2")
    done = run("convert", folder.with_suffix(""), tmp_path / "m.edge", "--format", "f32", "--lora", f"{folder}:0.5")
    assert done.exit_code == 0, done.output
    with Model(path, backend="reference") as model, Model(tmp_path / "m.edge", backend="reference") as other:
        model.adapter = model.load_adapter(folder, 0.5)
        np.testing.assert_allclose(model.logits(IDS), other.logits(IDS), atol=1e-3)


# ---- what is refused

NAME = "base_model.model.model.layers.0.self_attn.q_proj"
VALUES = {f"{NAME}.lora_A.weight": np.ones((8, 64), "f"), f"{NAME}.lora_B.weight": np.ones((64, 8), "f")}
CONFIGS = {
    "another kind": ({"peft_type": "IA3"}, UnsupportedError, "peft_type = 'IA3'"),
    "no kind": ({"peft_type": None}, UnsupportedError, "peft_type = None"),
    "DoRA": ({"use_dora": True}, UnsupportedError, "use_dora = True, which this version does not compute"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, UnsupportedError, "modules_to_save"),
    "biases": ({"bias": "all"}, UnsupportedError, "bias = 'all'"),
    "a bias of b": ({"lora_bias": True}, UnsupportedError, "lora_bias"),
    "layers twice": ({"layer_replication": [[0, 2]]}, UnsupportedError, "layer_replication"),
    "tokens": ({"trainable_token_indices": [1]}, UnsupportedError, "trainable_token_indices"),
    "invocation": ({"alora_invocation_tokens": [1]}, UnsupportedError, "alora_invocation_tokens"),
    "another base": ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "changes the model's own weights"),
    "alpha nan": ({"lora_alpha": float("nan")}, CheckpointError, "lora_alpha = nan; expected a number"),
    "alpha text": ({"lora_alpha": "16"}, CheckpointError, "lora_alpha = 16; expected a number"),
    "no rank": ({"r": 0}, CheckpointError, "r = 0; expected a whole number above 0"),
    "another rank": ({"r": 16}, CheckpointError, "has rank 8; adapter_config.json says 16"),
    "an expression": ({"alpha_pattern": {"(a+)+$": 1}}, UnsupportedError, "takes names of modules"),
    "no patterns": ({"rank_pattern": [8]}, CheckpointError, "rank_pattern = .8.; expected an object"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_config_that_is_refused(stories, tmp_path, what):
    changes, error, message = CONFIGS[what]
    adapters.write(tmp_path / "a", VALUES, **changes)
    with pytest.raises(error, match=message) as raised:
        stories.load_adapter(tmp_path / "a")
    assert str(tmp_path) in str(raised.value)


ONE = np.ones((8, 64), "f")
TENSORS = {
    "another model's": (
        {name.replace("layers.0", "layers.7"): values for name, values in VALUES.items()},
        CheckpointError, "1 of the adapter's 1 matrices are none of this model: model.layers.7",
    ),
    "other sizes": ({**VALUES, f"{NAME}.lora_A.weight": np.ones((8, 32), "f")}, CheckpointError,
                    "a matrix of 64 x 32; this model's has 64 x 64"),
    "ranks that differ": ({**VALUES, f"{NAME}.lora_A.weight": np.ones((4, 64), "f")}, CheckpointError,
                          r"expected \(rank, inputs\) and \(outputs, rank\)"),
    "no rank": ({f"{NAME}.lora_A.weight": np.ones((0, 64), "f"), f"{NAME}.lora_B.weight": np.ones((64, 0), "f")},
                CheckpointError, r"expected \(rank, inputs\)"),
    "a vector": ({**VALUES, f"{NAME}.lora_A.weight": np.ones(64, "f")}, CheckpointError, r"expected \(rank, inputs\)"),
    "half": ({f"{NAME}.lora_A.weight": ONE}, CheckpointError, "lora_a alone"),
    "none": ({}, CheckpointError, "holds no pairs"),
    "nan": ({**VALUES, f"{NAME}.lora_A.weight": ONE * np.nan}, CheckpointError, "not finite"),
    "DoRA": ({**VALUES, f"{NAME}.lora_magnitude_vector": np.ones(64, "f")}, UnsupportedError, "lora_magnitude_vector"),
    "an embedding": ({**VALUES, "base_model.model.model.embed_tokens.lora_embedding_A": ONE}, UnsupportedError,
                     "lora_embedding_A"),
    "a norm": ({**VALUES, "base_model.model.model.norm.weight": np.ones(64, "f")}, UnsupportedError, "norm.weight"),
    "logits": ({"base_model.model.lm_head.lora_A.weight": ONE, "base_model.model.lm_head.lora_B.weight": ONE.T},
               UnsupportedError, "changes lm_head.weight; this version computes"),
}  # fmt: skip


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_are_refused(stories, tmp_path, what):
    values, error, message = TENSORS[what]
    adapters.write(tmp_path / "a", values)
    with pytest.raises(error, match=message):
        stories.load_adapter(tmp_path / "a")


def test_experts_are_refused(tmp_path):
    architecture = architectures.get("olmoe")
    name = "base_model.model.model.layers.0.mlp.experts.0.up_proj"
    adapters.write(tmp_path / "a", {f"{name}.lora_A.weight": ONE, f"{name}.lora_B.weight": ONE.T})
    with pytest.raises(UnsupportedError, match=r"experts\.0\.up_proj\.weight; this version computes adapters"):
        read_adapter(tmp_path / "a", architecture, architecture.Config.tiny())


GGUF = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 16.0}
IN_GGUF = {"blk.0.attn_v.weight.lora_a": ONE, "blk.0.attn_v.weight.lora_b": np.ones((32, 8), "f")}
FILES = {
    "a model": ({"general.type": "model"}, IN_GGUF, CheckpointError, "expected 'adapter': is it a model"),
    "another kind": ({"adapter.type": "vector"}, IN_GGUF, UnsupportedError, "adapter.type = 'vector'"),
    "another architecture": ({"general.architecture": "gemma"}, IN_GGUF, CheckpointError, "'gemma'; expected 'llama'"),
    "alpha nan": ({"adapter.lora.alpha": float("nan")}, IN_GGUF, CheckpointError, "adapter.lora.alpha = nan"),
    "a norm": ({}, {**IN_GGUF, "blk.0.attn_norm.weight": np.ones(64, "f")}, UnsupportedError, "attn_norm.weight"),
    "an embedding": ({}, {"token_embd.weight.lora_a": ONE, "token_embd.weight.lora_b": ONE.T}, UnsupportedError,
                     "changes token_embd.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_gguf_files_that_are_refused(stories, tmp_path, what):
    changes, values, error, message = FILES[what]
    write_as_gguf(tmp_path / "a.gguf", values, {**GGUF, **changes})
    with pytest.raises(error, match=message):
        stories.load_adapter(tmp_path / "a.gguf")


def test_a_gguf_file_without_alpha_is_not_scaled(tmp_path):
    """As llama.cpp has it."""
    scales = []
    for alpha in (16.0, None, 0.0):
        write_as_gguf(tmp_path / "a.gguf", IN_GGUF, {**GGUF, "adapter.lora.alpha": alpha})
        scales.append(float(open_adapter(tmp_path / "a.gguf").pairs["blk.0.attn_v.weight"].b[0, 0]))
    assert scales == [2.0, 1.0, 1.0]


def test_what_is_not_there(stories, tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such adapter"):
        stories.load_adapter(tmp_path / "nonesuch")
    (tmp_path / "a").mkdir()
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        stories.load_adapter(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(adapters.CONFIG))
    with pytest.raises(CheckpointError, match=r"none of adapter_model\.safetensors"):
        stories.load_adapter(tmp_path / "a")


def test_ternary_weights_are_not_merged(tmp_path):
    write_folder(tmp_path / "m", HF["bitnet"]["config"], HF["bitnet"]["shapes"])
    with pytest.raises(UnsupportedError, match="ternary"):
        merged(replace(read(tmp_path / "m"), ternary=True), tmp_path / "a")
