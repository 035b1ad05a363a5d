"""Cases for the samplers, and what llama.cpp's own make of them.

python tests/golden/samplers_cases.py LIBLLAMA.so SMOLLM2.gguf     # writes samplers.json beside this file

LIBLLAMA.so is built of the version that `made_with` names; its sampler API is called through ctypes. Chains leave
tokens and logits; of mirostat it is recorded which tokens each step left, and which one it drew.
"""

import ctypes as ct
import json
import sys
from pathlib import Path

import numpy as np

N, MADE_WITH = 120, "llama.cpp 0c1e570 (llama-cpp-python 0.3.36)"
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
HISTORY = [1, 2, 3, 4, 1, 2, 9, 8, 7, 1, 2, 3, 100, 7, 7, 7, 1, 2, 3, 4, 5, 1, 2, 3]
ORDER = ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
CASES = [
    *({**OFF, "temperature": t} for t in (0.0, 0.3, 0.8, 1.5)),
    *({**OFF, "temperature": t, "dynatemp_range": r, "dynatemp_exponent": e}
      for t, r, e in ((0.8, 0.5, 1.0), (1.0, 0.7, 2.0), (0.5, 0.9, 0.5), (0.0, 1.2, 1.0))),
    *({**OFF, "top_k": k} for k in (1, 7, 40)),
    *({**OFF, "top_p": p} for p in (0.0, 0.1, 0.5, 0.9, 0.99)),
    *({**OFF, "min_p": p} for p in (0.01, 0.05, 0.5, 1.0)),
    *({**OFF, "typical_p": p} for p in (0.1, 0.5, 0.9, 0.99)),
    *({**OFF, "top_n_sigma": n} for n in (0.5, 1.0, 2.0)),
    *({**OFF, "xtc_probability": 1.0, "xtc_threshold": t} for t in (0.01, 0.05, 0.1, 0.3, 0.5, 0.6)),
    {**OFF, "repeat_penalty": 1.3},
    {**OFF, "repeat_penalty": 1.3, "repeat_last_n": 5},
    {**OFF, "frequency_penalty": 0.7},
    {**OFF, "presence_penalty": -1.5},
    {**OFF, "repeat_penalty": 0.8, "frequency_penalty": 0.3, "presence_penalty": 0.5, "repeat_last_n": 12},
    *({**OFF, "dry_multiplier": m, "dry_base": b, "dry_allowed_length": a, "dry_penalty_last_n": n}
      for m, b, a, n in ((0.8, 1.75, 2, 64), (1.5, 1.1, 0, 64), (0.5, 3.0, 1, 10), (2.0, 1.0, 3, 24),
                         (9.0, 900.0, 1, 64))),
    {**OFF, "logit_bias": {3: 2.5, 7: -100.0, 119: 9.0}},
    {},
    {"top_k": 20, "typical_p": 0.9, "xtc_probability": 1.0, "xtc_threshold": 0.05, "top_n_sigma": 2.0,
     "repeat_penalty": 1.1, "dry_multiplier": 0.8, "temperature": 0.7, "dynatemp_range": 0.2},
    {"samplers": ["temperature", "min_p", "top_p", "top_k"], "temperature": 2.0, "min_p": 0.1},
    {"samplers": ["top_k", "penalties", "dry", "top_n_sigma", "temperature"], "top_k": 30, "repeat_penalty": 1.5,
     "dry_multiplier": 1.0, "top_n_sigma": 1.0},
    {"samplers": ["xtc", "typ_p", "top_p"], "xtc_probability": 1.0, "xtc_threshold": 0.02, "typical_p": 0.8},
]  # fmt: skip
BREAKERS = ["\n", ":", '"', "*", " the cat", "é!"]
TEXTS = [
    "The dog ran off. The dog ran",
    'The dog said: "the end". The dog said: "the',
    "one two three\none two three four\none two three",
    "I saw the cat run. You saw the cat run. We saw the cat",
    "a café! and a b c, a café! and a b",
]
MIROSTAT = {"mirostat": 2, "mirostat_tau": 2.0, "mirostat_eta": 0.4, "temperature": 0.9}


def logits_of(case, n=N):
    """The logits of a case, from a generator whose numbers never change: some tokens fit, most don't."""
    random = np.random.RandomState(case)
    return (random.standard_normal(n) * 2 + 4 * (random.uniform(size=n) < 0.1)).astype(np.float32)


class Data(ct.Structure):
    _fields_ = [("id", ct.c_int32), ("logit", ct.c_float), ("p", ct.c_float)]


class DataArray(ct.Structure):
    _fields_ = [("data", ct.POINTER(Data)), ("size", ct.c_size_t), ("selected", ct.c_int64), ("sorted", ct.c_bool)]


class ModelParams(ct.Structure):
    _fields_ = [
        ("devices", ct.c_void_p), ("overrides", ct.c_void_p), ("layers", ct.c_int32), ("split", ct.c_int32),
        ("load", ct.c_int32), ("lazy", ct.c_int32), ("gpu", ct.c_int32), ("tensor_split", ct.c_void_p),
        ("progress", ct.c_void_p), ("data", ct.c_void_p), ("kv", ct.c_void_p), ("vocab_only", ct.c_bool),
        ("more", ct.c_bool * 5),
    ]  # fmt: skip


class Llama:
    """The library, and SmolLM2's vocabulary."""

    def __init__(self, library, gguf):
        self.lib = ct.CDLL(library)
        self.lib.llama_model_default_params.restype = ModelParams
        params = self.lib.llama_model_default_params()
        params.vocab_only = True
        model = self.call("llama_model_load_from_file", gguf.encode(), params)
        self.vocab = self.call("llama_model_get_vocab", model)

    def call(self, name, *arguments):
        function = getattr(self.lib, name)
        function.restype = ct.c_void_p
        return function(*(ct.c_float(x) if isinstance(x, float) else ct.c_void_p(x) if isinstance(x, int) and x > 2**31
                          else x for x in arguments))  # fmt: skip

    def tokenize(self, text):
        found = (ct.c_int32 * 1000)()
        n = self.lib.llama_tokenize(
            ct.c_void_p(self.vocab), text.encode(), len(text.encode()), found, 1000, False, True
        )
        return list(found[:n])

    def chain(self, params, ids, logits):
        """{token: logit} of what the samplers leave."""
        array = self.candidates(logits)
        for sampler in self.samplers(params):
            for id in ids:
                self.lib.llama_sampler_accept(ct.c_void_p(sampler), id)
            self.lib.llama_sampler_apply(ct.c_void_p(sampler), ct.byref(array))
        return {array.data[i].id: array.data[i].logit for i in range(array.size) if array.data[i].logit > -np.inf}

    def candidates(self, logits):
        data = (Data * len(logits))(*((i, float(logit), 0.0) for i, logit in enumerate(logits)))
        return DataArray(data, len(logits), -1, False)

    def samplers(self, params):
        p = {"temperature": 0.8, "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "top_k": 40, "top_p": 0.95,
             "min_p": 0.05, "typical_p": 1.0, "top_n_sigma": -1.0, "xtc_probability": 0.0, "xtc_threshold": 0.1,
             "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repeat_last_n": 64,
             "dry_multiplier": 0.0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": 64,
             "dry_sequence_breakers": [], "logit_bias": {}, "samplers": ORDER, **params}  # fmt: skip
        if p["logit_bias"]:

            class Bias(ct.Structure):
                _fields_ = [("token", ct.c_int32), ("bias", ct.c_float)]

            bias = (Bias * len(p["logit_bias"]))(*p["logit_bias"].items())
            yield self.call("llama_sampler_init_logit_bias", N, len(bias), bias)
        breakers = (ct.c_char_p * len(p["dry_sequence_breakers"]))(
            *(text.encode() for text in p["dry_sequence_breakers"])
        )
        made = {
            "penalties": (p["repeat_last_n"], p["repeat_penalty"], p["frequency_penalty"], p["presence_penalty"]),
            "dry": (self.vocab, p["dry_multiplier"], p["dry_base"], p["dry_allowed_length"], p["dry_penalty_last_n"],
                    breakers, ct.c_size_t(len(breakers))),
            "top_n_sigma": (p["top_n_sigma"],), "top_k": (p["top_k"],),
            "typ_p": (p["typical_p"], ct.c_size_t(0)), "top_p": (p["top_p"], ct.c_size_t(0)),
            "min_p": (p["min_p"], ct.c_size_t(0)),
            "xtc": (p["xtc_probability"], p["xtc_threshold"], ct.c_size_t(0), ct.c_uint32(1)),
            "temperature": (p["temperature"], p["dynatemp_range"], p["dynatemp_exponent"]),
        }  # fmt: skip
        made["penalties"] = (N, *made["penalties"])
        names = {"typ_p": "typical", "temperature": "temp_ext"}
        for name in p["samplers"]:
            yield self.call(f"llama_sampler_init_{names.get(name, name)}", *made[name])

    def mirostat(self, params, steps):
        temperature = self.call("llama_sampler_init_temp", params["temperature"])
        sampler = self.call(
            "llama_sampler_init_mirostat_v2", ct.c_uint32(1), params["mirostat_tau"], params["mirostat_eta"]
        )
        for step in range(steps):
            array = self.candidates(logits_of(step))
            for each in (temperature, sampler):
                self.lib.llama_sampler_apply(ct.c_void_p(each), ct.byref(array))
            left = sorted(array.data[i].id for i in range(array.size))
            yield {"left": left, "token": array.data[array.selected].id}


def main(library, gguf):
    llama = Llama(library, gguf)
    chains = [llama.chain(params, HISTORY, logits_of(i)) for i, params in enumerate(CASES)]
    dry = {**OFF, "dry_multiplier": 1.0, "dry_sequence_breakers": BREAKERS}
    texts = [llama.tokenize(text) for text in TEXTS]
    zeros = np.zeros(49152, np.float32)
    made = {
        "made_with": MADE_WITH,
        "chains": [{id: round(logit, 5) for id, logit in sorted(left.items())} for left in chains],
        "dry": [{"ids": ids, "changed": {id: round(x, 5) for id, x in llama.chain(dry, ids, zeros).items() if x != 0}}
                for ids in texts],
        "mirostat": list(llama.mirostat(MIROSTAT, 25)),
    }  # fmt: skip
    text = json.dumps(made).replace("}, {", "},\n {").replace(', "', ',"').replace('": ', '":')
    Path(__file__).with_name("samplers.json").write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
