"""The NumPy definition against transformers, on the same small random weights (tests/golden/transformers.json)."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from edgellm import architectures, quant
from edgellm.backends import get
from edgellm.config import expand
from edgellm.converters.checkpoint import parts
from edgellm.file import pad_vector
from edgellm.generate import Slot, generate
from edgellm.sampling import Sampler, SamplingParams
from edgellm.tensor import Tensor

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from transformers_cases import CASES, IDS, weights  # noqa: E402

EXPECTED = json.loads((GOLDEN / "transformers.json").read_text())["cases"]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens(case):
    backend = _backend(CASES[case])
    logits = Slot(backend, 64).extend(IDS, wanted=range(len(IDS)))
    np.testing.assert_allclose(logits[:, :6], EXPECTED[case]["logits"], atol=1e-4)
    greedy = Sampler(SamplingParams(temperature=0))
    assert [*IDS[:4], *generate(Slot(backend, 64), IDS[:4], greedy, 20)] == EXPECTED[case]["greedy"]


def _backend(hf_config):
    architecture = architectures.get(hf_config["model_type"])
    config = architecture.Config.from_hf(hf_config)
    names, made_of = expand(architecture.HF_NAMES, config.n_layers), parts(architecture, config)
    values = weights({names[part]: shape for each in made_of.values() for part, shape in each.items()})
    stacked = {name: np.concatenate([values[names[part]] for part in each]) for name, each in made_of.items()}
    tensors = {name: _tensor(name, value) for name, value in stacked.items()}
    return get("reference")(architecture, config, tensors, 64, None)


def _tensor(name, values):
    data = pad_vector(values) if values.ndim == 1 else quant.get("f32").pack(quant.Quantized(values))
    return Tensor(name, values.shape, "f32", data)
