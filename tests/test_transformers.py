"""The NumPy definition against transformers, on small random models in folders as transformers saves them.

tests/golden/transformers_cases.py has made what is expected, and says how.
"""

import numpy as np
import pytest
import safetensors.numpy
from transformers_cases import CASES, IDS, N_GREEDY, N_PROMPT, expected, weights, write_folder

from edgellm import architectures
from edgellm.api import Model
from edgellm.config import template
from edgellm.converters import convert
from edgellm.converters.naming import parts
from edgellm.loading import open_model

EXPECTED = expected()


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """The .edge file of a case."""
    folder = tmp_path_factory.mktemp("transformers")

    def path(case, format="f32"):
        target = folder / f"{case}.{format}.edge"
        if not target.exists():
            write_folder(folder / case, EXPECTED[case]["config"], EXPECTED[case]["shapes"])
            convert(folder / case, target, format=format, progress=False)
        return target

    return path


def test_every_case_is_here():
    assert set(EXPECTED) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens(converted, case):
    with Model(converted(case), backend="reference", context_length=128) as model:
        np.testing.assert_allclose(model.logits(IDS)[:, :6], EXPECTED[case]["logits"], atol=1e-4)
        answer = model.stream_ids(IDS[:N_PROMPT], temperature=0, max_tokens=N_GREEDY)
        assert [piece.id for piece in answer if piece.id is not None] == EXPECTED[case]["greedy"]


@pytest.mark.parametrize("case", CASES)
def test_q8_is_float32_and_noise(converted, case):
    """The error is at most a fifth of what logits vary, and changes at most 1 % of the best tokens that lead by 4 times
    as much. Other leads of a random model are ties for 8 bits, whoever rounds; so are all where logits are capped."""
    ids = np.random.RandomState(1).randint(0, 97, (4, 128)).tolist()
    exact = logits_of(converted(case), "reference", ids)
    second, first = np.sort(exact, axis=1)[:, -2:].T
    for backend in ("reference", "cpu"):
        found = logits_of(converted(case, "q8"), backend, ids)
        error = np.sqrt(np.square(found - exact).mean(axis=1))
        clear = first - second > 4 * error
        changed = found.argmax(axis=1) != exact.argmax(axis=1)
        assert np.median(error / exact.std(axis=1)) < 0.2
        assert np.sum(changed & clear) <= 0.01 * np.sum(clear)


def logits_of(path, backend, sequences):
    with Model(path, backend=backend, context_length=128) as model:
        return np.concatenate([model.logits(ids) for ids in sequences])


def test_cases_use_every_name(converted):
    """No name stands in a table of which nothing has shown that it is right."""
    used, architecture_names = set(), architectures.names()
    for case in CASES:
        loaded = open_model(converted(case))
        made_of = parts(loaded.architecture, loaded.config).values()
        keys = {template(part)[0] for each in made_of for part in each}
        used |= {(key, loaded.architecture.HF_NAMES[key]) for key in keys}
        loaded.file.close()
    assert {config["model_type"] for config in CASES.values()} == set(architecture_names)
    for name in architecture_names:
        assert set(architectures.get(name).HF_NAMES.items()) <= used, name


@pytest.mark.parametrize(("case", "base", "layer"), [("gpt2-tied-gelu", "transformer", "h.0.attn"),
                                                     ("gpt-neox", "gpt_neox", "layers.0.attention")])  # fmt: skip
def test_old_checkpoints_lack_the_first_word_and_hold_masks(tmp_path, converted, case, base, layer):
    """As those that were published with GPT-2 and Pythia do."""
    config, shapes = EXPECTED[case]["config"], EXPECTED[case]["shapes"]
    write_folder(tmp_path, config, shapes)
    tensors = {name.removeprefix(f"{base}."): values for name, values in weights(shapes).items()}
    masks = {f"{layer}.bias": np.ones((1, 1, 4, 4), bool), f"{layer}.masked_bias": np.array(-1e9, np.float32)}
    safetensors.numpy.save_file(tensors | masks, tmp_path / "model.safetensors")
    convert(tmp_path, tmp_path / "m.edge", format="f32", progress=False)
    first, second = open_model(tmp_path / "m.edge").file, open_model(converted(case)).file
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(tensor.data, second.tensors[name].data)
    first.close()
    second.close()
