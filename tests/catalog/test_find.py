"""Finding methods: by words, by binary codes, merged; their cache; on a real encoder, whether answers make sense."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from laconic.catalog import find as find_module
from laconic.catalog import read
from laconic.catalog.codes import Codes, encode
from laconic.catalog.encoder import NAME, Encoder, open_encoder
from laconic.catalog.find import cached_codes, fields, find, merge
from laconic.catalog.words import Words, split
from laconic.errors import BadInput
from laconic.tasks.fetch import cache_folder, is_fetched

from .trees import method, tree

# Summaries as cards have them, of methods with different aims.
CARDS = {
    "groupnorm": ("norm", "Group Normalization", "Normalizes groups of channels of each example, whatever the batch."),
    "powernorm": (
        "norm",
        "PowerNorm",
        "Normalizes by a running quadratic mean, so that text transformers train better.",
    ),
    "prune": (
        "sparse",
        "The Lottery Ticket Hypothesis",
        "Removes small weights and trains the rest again from the start.",
    ),
    "distil": ("distill", "Distilling the Knowledge", "Trains a small student on the soft answers of a large teacher."),
    "lowrank": ("optim", "GaLore", "Projects gradients to low rank, so that optimizer states take less memory."),
    "beams": ("generate", "Diverse Beam Search", "Decodes several sentences that differ from one another."),
    "matryoshka": (
        "embed",
        "Matryoshka Representation Learning",
        "Embeddings whose first coordinates work by themselves.",
    ),
    "evolve": ("search", "Regularized Evolution", "Searches architectures by mutating the best of a population."),
    "tent": ("adapt", "Tent", "Adapts a network to shifted test data without labels, by its own confidence."),
    "signs": ("binary", "XNOR-Net", "Stores weights and activations as single bits with a scale."),
}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    files = {
        f"{family}/_{id}.py": method(id, family, title=title, summary=summary, about=f"{summary}")
        for id, (family, title, summary) in CARDS.items()
    }
    return read(tree(tmp_path_factory.mktemp("cards"), files))


def ids(found) -> list[str]:
    return [hit.method.id for hit in found.hits]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Quantizing quantized quantizes quantization", ["quantize"] * 4),
        ("batches of batch, sizes", ["batch", "batch", "size"]),
        ("RMSNorm and LayerNorm", ["rmsnorm", "rms", "norm", "layernorm", "layer", "norm"]),
        ("int4 at 4 bits", ["int", "4", "4", "bit"]),
        ("what do I use for this", []),
        ("", []),
    ],
)
def test_words(text, words):
    assert split(text) == words


def test_bm25_is_the_formula():
    texts = ["a cat cat dog".replace("a ", ""), "dog", "bird"]
    scores = Words([[(text, 1)] for text in texts]).scores("cat")
    idf, mean = np.log1p((3 - 1 + 0.5) / (1 + 0.5)), 5 / 3
    assert scores[0] == pytest.approx(idf * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 3 / mean)))
    assert list(scores[1:]) == [0, 0]
    assert list(Words([[(text, 1)] for text in texts]).scores("fish")) == [0, 0, 0]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("student and teacher", "distil"),
        ("single bits", "signs"),
        ("powernorm", "powernorm"),
        ("memory of the optimizer", "lowrank"),
        ("architecture", "evolve"),
    ],
)
def test_by_words_alone(catalog, query, first):
    found = find(query, catalog, words_only=True)
    assert ids(found)[0] == first and found.how == "by words"


def test_nothing_shares_a_word(catalog):
    assert find("zebra", catalog, words_only=True).hits == ()


def test_the_limit(catalog):
    assert len(find("weights network trains", catalog, words_only=True, limit=2).hits) == 2


@pytest.mark.parametrize(("query", "limit", "says"), [("  ", 5, "the text to find is empty"), ("x", 0, "--limit is 0")])
def test_bad_input(catalog, query, limit, says):
    with pytest.raises(BadInput, match=says):
        find(query, catalog, limit=limit, words_only=True)


def test_an_empty_catalog(tmp_path):
    (tmp_path / "laconic").mkdir()
    found = find("anything", read(tmp_path / "laconic"))
    assert found.hits == () and "no method has landed" in found.how


def test_codes_are_signs_and_distances_are_hamming():
    generator = np.random.default_rng(0)
    embeddings = generator.standard_normal((50, 37)).astype(np.float32)  # 37 bits fill no whole bytes
    codes, query = encode(embeddings), generator.standard_normal(37).astype(np.float32)
    assert codes.bits.shape == (50, 5) and codes.bits.dtype == np.uint8
    signs = embeddings > embeddings.mean(0)
    want = (signs != (query > codes.mean)).sum(1)
    assert np.array_equal(codes.distances(query), want)
    indices, scores = codes.search(query, 50)
    naive = ((query - codes.mean) * (2.0 * signs - 1)).sum(1) / np.sqrt(37)
    assert np.allclose(scores, naive[indices], atol=1e-5) and np.all(np.diff(scores) <= 0)
    near = set(np.argsort(want, kind="stable")[:7])
    assert set(codes.search(query, 7)[0]) == near


def test_codes_find_what_embeddings_find():
    generator = np.random.default_rng(1)
    embeddings = generator.standard_normal((200, 384)).astype(np.float32)
    codes = encode(embeddings)
    noisy = embeddings + generator.standard_normal(embeddings.shape).astype(np.float32)
    assert [int(codes.search(query, 10)[0][0]) for query in noisy] == list(range(200))


def test_no_codes():
    codes = encode(np.zeros((0, 16), np.float32))
    assert codes.search(np.ones(16, np.float32), 3)[0].size == 0


def test_merging_by_ranks():
    assert [i for i, _ in merge([[1, 2, 3], [2, 3]])] == [2, 3, 1]
    assert merge([[4]]) == [(4, 1 / 11)] and merge([]) == []
    assert [i for i, _ in merge([[5, 6], [6, 5]])] == [5, 6]  # of equals the lower number


def test_every_field_has_its_owner(catalog):
    texts, owners = fields(list(catalog))
    assert len(texts) == len(owners) and set(owners) == set(range(len(CARDS)))
    for text, i in zip(texts, owners, strict=True):
        assert list(catalog)[i].card.summary.split()[0] in text


class Counted:
    """An embedding that counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, texts):
        self.calls += 1
        return np.array([[len(text), text.count("e"), 1] for text in texts], np.float32)


def test_codes_are_kept_until_a_text_or_the_encoder_changes(tmp_path):
    embed, path = Counted(), tmp_path / "deep" / "codes.npz"
    first = cached_codes(["one", "three"], embed, "k", path)
    again = cached_codes(["one", "three"], embed, "k", path)
    assert embed.calls == 1 and isinstance(again, Codes)
    assert np.array_equal(first.bits, again.bits) and np.array_equal(first.mean, again.mean)
    cached_codes(["one", "four"], embed, "k", path)
    cached_codes(["one", "four"], embed, "other", path)
    assert embed.calls == 3
    assert [file.name for file in path.parent.iterdir()] == ["codes.npz"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut short", b"no archive at all"])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    embed, path = Counted(), tmp_path / "codes.npz"
    path.write_bytes(damage)
    cached_codes(["one"], embed, "k", path)
    cached_codes(["one"], embed, "k", path)
    assert embed.calls == 1


def test_without_the_encoder_it_goes_by_words_and_says_so(catalog, tmp_path):
    found = find("student and teacher", catalog, cache=tmp_path)
    assert ids(found)[0] == "distil" and "`laconic fetch minilm`" in found.how
    assert list(tmp_path.iterdir()) == []


def test_by_meaning_and_words(catalog, tmp_path, monkeypatch):
    """A made-up encoder for which the query means the last method: it comes first though no word is shared."""
    texts, owners = fields(list(catalog))

    class Fake(Encoder):
        key = "fake"

        def __call__(self, given):
            wanted = {text for text, owner in zip(texts, owners, strict=True) if owner == len(catalog) - 1}
            noise = np.random.default_rng(0).standard_normal((len(given), 64)).astype(np.float32)
            mark = np.array([text in wanted or text == "zebra" for text in given])
            return noise * ~mark[:, None] + np.sign(np.arange(64) % 3 - 0.5) * mark[:, None]

    monkeypatch.setattr("laconic.catalog.encoder.open_encoder", lambda cache, say: Fake(tmp_path))
    found = find_module.find("zebra", catalog, cache=tmp_path)
    assert found.hits[0].method is list(catalog)[-1] and "codes of 8 bytes" in found.how


def test_searching_by_words_needs_no_torch():
    code = "import sys, laconic.catalog.find, laconic.catalog.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.fetched
@pytest.mark.slow
@pytest.mark.skipif(not is_fetched("minilm"), reason="minilm is not fetched: run `laconic fetch minilm`")
def test_answers_make_sense(catalog, tmp_path):
    """Queries that share no telling word with the card that is meant."""
    encoder = open_encoder()
    assert encoder is not None and encoder.folder == cache_folder() / NAME
    texts, owners = fields(list(catalog))
    codes = cached_codes(texts, encoder, encoder.key, tmp_path / "codes.npz")
    wanted = {
        "train with batch size one": "groupnorm",
        "make a tiny copy of a big model": "distil",
        "vectors that can be cut short": "matryoshka",
        "generate varied outputs": "beams",
        "training does not fit on my GPU": "lowrank",
        "domain shift at inference": "tent",
        "throw away unimportant connections": "prune",
        "one-bit networks": "signs",
        "find a good network design automatically": "evolve",
    }
    ranks = {}
    for query, id in wanted.items():
        numbers = find_module.by_meaning(encoder([query])[0], codes, owners, limit=len(CARDS))
        ranks[query] = 1 + [list(catalog)[i].id for i in numbers].index(id)
    assert ranks["train with batch size one"] <= 3, ranks
    # The mean of reciprocal ranks; a random order of ten has 0.29.
    assert np.mean([1 / rank for rank in ranks.values()]) > 0.5, ranks
