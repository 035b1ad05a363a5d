"""How likely a query is after documents: the same in any group, and a ranking of them."""

import numpy as np
import pytest
from serving import Server

from edgellm.embedding import AT_ONCE, groups
from edgellm.ranking import Following

PASSAGES = {
    "How tall is the Eiffel Tower?": "With its antennas the iron tower in Paris stands 330 metres high.",
    "How do bees make honey?": "Foragers bring nectar to the hive, where water evaporates until the syrup is thick.",
    "What causes tides?": "The pull of the Moon raises bulges of water in the oceans, twice a day.",
    "How do I boil an egg?": "Put it into boiling water: six minutes for a soft yolk, ten for a hard one.",
    "What do antibiotics do?": "These medicines kill bacteria; against a cold or the flu they are of no use.",
}


def all_of(iterators):
    return [found for steps in iterators for step in steps for found in step]


def test_groups():
    assert list(groups([], 10)) == []
    assert [(each.start, each.stop) for each in groups([4, 6, 1, 30, 2, 2], 10)] == [(0, 2), (2, 3), (3, 4), (4, 6)]
    assert [each.stop for each in groups([1] * 40, 128)] == [AT_ONCE, 2 * AT_ONCE, 40]


def test_likelihoods_are_those_of_the_tokens_in_any_group(stories_cpu):
    texts = ["Once upon a time there was", "Lily had a dog. " * 30, "The", "A big red dog ran to the park and"]
    asked = []
    for text in texts:
        before = stories_cpu.tokenize(text)
        asked.append(Following([*before, *stories_cpu.tokenize(" a little girl", add_special=False)], len(before)))
    found = all_of(stories_cpu.likelihood_groups(asked))
    for each, mean in zip(asked, found, strict=True):
        logits = stories_cpu.logits(each.ids).astype(np.float64)[each.n_before - 1 : -1]
        of_tokens = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = of_tokens[np.arange(len(of_tokens)), each.ids[each.n_before :]].mean()
        assert mean == pytest.approx(expected, abs=1e-5)
        assert all_of(stories_cpu.likelihood_groups([each])) == [mean]


def test_embeddings_are_the_same_in_any_group(stories_cpu):
    texts = [stories_cpu.tokenize(text) for text in ("Once", "Lily had a dog. " * 30, "The big dog", "x")]
    for pooling in ("mean", "last"):
        together = all_of(stories_cpu.embed_groups(texts, pooling))
        alone = [all_of(stories_cpu.embed_groups([ids], pooling))[0] for ids in texts]
        np.testing.assert_array_equal(together, alone)
    assert not stories_cpu._backend._backend._slots


def test_what_is_stopped_midway_lets_go_of_its_slots(stories_cpu):
    (steps,) = stories_cpu.embed_groups([stories_cpu.tokenize("Lily had a dog. " * 30)])
    assert next(steps) == []
    assert len(stories_cpu._backend._backend._slots) == 1
    steps.close()
    assert not stories_cpu._backend._backend._slots


def test_a_ranking(smollm2_path):
    documents = [*PASSAGES.values()]
    documents[1] = {"text": documents[1]}
    with Server(smollm2_path) as server:
        for i, query in enumerate(PASSAGES):
            status, found = server.post("/v1/rerank", {"query": query, "documents": documents, "top_n": 2})
            assert status == 200
            assert [set(each) for each in found["results"]] == [{"index", "relevance_score"}] * 2
            assert found["results"][0]["index"] == i
        body = {"query": query, "documents": documents, "return_documents": True}
        results = server.post("/v1/rerank", body)[1]["results"]
        scores = [each["relevance_score"] for each in results]
        assert scores == sorted(scores, reverse=True)
        assert 0 < scores[-1] < scores[0] < 1
        assert {each["document"]["text"] for each in results} == set(PASSAGES.values())
        for fields, param in (
            ({"query": " "}, "query"), ({"documents": []}, "documents"), ({"top_n": 0}, "top_n"),
            ({"documents": ["a", "word " * 9000]}, "documents[1]"),
            ({"documents": [{"title": "a"}]}, "documents[0].title"),
        ):  # fmt: skip
            status, found = server.post("/v1/rerank", {**body, **fields})
            assert (status, found["error"]["param"]) == (400, param)
