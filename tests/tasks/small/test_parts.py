"""The parts of small tasks: readers, networks and measures, each against the obvious."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from laconic.errors import BadInput
from laconic.tasks.fetch import BUNDLES, PACKAGES
from laconic.tasks.small import Rows, small
from laconic.tasks.small.knowledge import ranks
from laconic.tasks.small.mnist import read_idx
from laconic.tasks.small.networks import CharacterModel, ComplEx, GraphConvolution, TextClassifier
from laconic.tasks.small.spam import read_mail
from laconic.tasks.small.tables import read_table
from laconic.tasks.small.texts import UNKNOWN, encode, vocabulary, words

from .caches import folder, idx, make_cache


def test_rows():
    rows = Rows(torch.arange(5), torch.arange(10).view(5, 2))
    assert len(rows) == 5 and rows[2][1].tolist() == [4, 5]
    assert [part.tolist() for part in rows[torch.tensor([3, 0])]] == [[3, 0], [[6, 7], [0, 1]]]
    with pytest.raises(ValueError, match=r"\[5, 4\]"):
        Rows(torch.zeros(5), torch.zeros(4))


def test_packages_are_pinned_and_whole():
    for name, package in PACKAGES.items():
        assert len(package.sha256) == 64 and package.version and package.licence and package.megabytes, name
    for parts in BUNDLES.values():
        assert set(parts) <= set(PACKAGES)


def test_idx_files(tmp_path):
    values = np.arange(24).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(values))
    assert np.array_equal(read_idx(tmp_path / "a"), values)
    for broken, says in ((idx(values)[:-1], "holds 23 bytes"), (b"PNG" * 9, "no IDX file"), (b"", "no IDX file")):
        (tmp_path / "b").write_bytes(broken)
        with pytest.raises(BadInput, match=says):
            read_idx(tmp_path / "b")


def test_mails_are_subject_and_text():
    plain = b"Received: from secret.example\nSubject: Hello there\nX-Spam: yes\n\n<b>Buy</b> now\n"
    assert read_mail(plain).split() == ["Hello", "there", "Buy", "now"]
    parts = (
        b"Subject: two\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=x\n\n"
        b"--x\nContent-Type: text/plain; charset=utf-8\nContent-Transfer-Encoding: base64\n\naW5zaWRl\n"
        b"--x\nContent-Type: application/pdf\n\nbinary\n"
        b"--x\nContent-Type: text/plain\nContent-Disposition: attachment; filename=a.txt\n\nattached\n--x--\n"
    )
    assert read_mail(parts).split() == ["two", "inside"]
    assert read_mail(b"").split() == []


def test_words_and_their_ids():
    assert words("It's 10% OFF!!") == ["it's", "10", "%", "off", "!", "!"]
    ids = vocabulary([["b", "a", "b"], ["c", "a"]], most=4)
    assert ids == {"a": 2, "b": 3}  # both twice; by the alphabet
    assert encode([["b", "new", "a", "a"], []], ids, 3).tolist() == [[3, UNKNOWN, 2], [0, 0, 0]]


def test_the_vocabulary_is_that_of_the_training_texts(tmp_path):
    task = small("bbc", size=6, cache=make_cache(tmp_path))
    # Articles have their own number, so the others' numbers have to be unknown.
    assert (task.data["test"].columns[0] == UNKNOWN).any(1).all()
    assert not (task.data["train"].columns[0] == UNKNOWN).any()


def test_tables(tmp_path):
    (tmp_path / "t.dat").write_text("1.5, red, yes\n2.5,blue,no\n\n3.5, red, no\n")
    inputs, numeric, classes = read_table(tmp_path / "t.dat")
    assert inputs.tolist() == [[1.5, 0, 1], [2.5, 1, 0], [3.5, 0, 1]]
    assert numeric.tolist() == [True, False, False] and classes.tolist() == [1, 0, 0]
    (tmp_path / "t.dat").write_text("1,2,a\n1,a\n")
    with pytest.raises(BadInput, match="t.dat:2 has 2 fields and the first line 3"):
        read_table(tmp_path / "t.dat")
    (tmp_path / "t.dat").write_text("")
    with pytest.raises(BadInput, match="t.dat is empty"):
        read_table(tmp_path / "t.dat")


def test_table_columns_are_standardised_by_the_training_rows(tmp_path):
    task = small("table-colours", cache=make_cache(tmp_path))
    train = task.data["train"].columns[0]
    torch.testing.assert_close(train[:, 0].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(train[:, 0].std(correction=0), torch.tensor(1.0))
    assert set(train[:, 1].tolist()) <= {0.0, 1.0} and (train[:, 3] == 0).all()  # a colour; a constant


def test_unknown_tables_and_graphs(tmp_path):
    make_cache(tmp_path)
    with pytest.raises(BadInput, match="no table 'colors'; the nearest are table-colours"):
        small("table-colors", cache=tmp_path)
    with pytest.raises(BadInput, match="no small knowledge graph 'freebase'; there are nations, kinships, umls"):
        small("kg-freebase", cache=tmp_path)
    (folder(tmp_path, "pykeen") / "nations" / "test.txt").write_text("a\tb\n")
    with pytest.raises(BadInput, match="test.txt:1 has 2 fields"):
        small("kg-nations", cache=tmp_path)


def test_a_folder_without_mails(tmp_path):
    make_cache(tmp_path)
    for path in (folder(tmp_path, "spam-assassin") / "spam-2").iterdir():
        path.unlink()
    with pytest.raises(BadInput, match="spam-2 holds no e-mails"):
        small("spam", cache=tmp_path)


def test_the_same_mail_is_kept_once(tmp_path):
    make_cache(tmp_path)
    task = small("spam", cache=tmp_path)
    assert sum(map(len, task.data.values())) == 60 == 5 * 12
    ham = folder(tmp_path, "spam-assassin") / "easy-ham-1"
    (ham / "copy.txt").write_text("X-Other: header\n" + (ham / "00000.txt").read_text())
    assert sum(map(len, small("spam", cache=tmp_path).data.values())) == 60


def test_ranks_against_counting():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (30, 9), generator=generator).float()  # ties on purpose
    answers = torch.randint(0, 9, (30,), generator=generator)
    known = torch.rand(30, 9, generator=generator) < 0.3
    known[torch.arange(30), answers] = True
    for i, found in enumerate(ranks(scores, answers, known).tolist()):
        others = [scores[i, j].item() for j in range(9) if not known[i, j]]
        own = scores[i, answers[i]].item()
        assert found == 1 + sum(x > own for x in others) + sum(x == own for x in others) / 2
    lost = ranks(torch.full((1, 9), torch.nan), answers[:1], F.one_hot(answers[:1], 9).bool())
    assert lost.tolist() == [9.0]


def test_triples_are_asked_both_ways(tmp_path):
    task = small("kg-nations", cache=make_cache(tmp_path))
    queries, answers = task.data["train"].columns
    assert task.relations == 4 and len(queries) == 12
    forth = {(h, r, t) for (h, r), t in zip(queries[:6].tolist(), answers[:6].tolist(), strict=True)}
    back = {(h, r - 2, t) for (t, r), h in zip(queries[6:].tolist(), answers[6:].tolist(), strict=True)}
    assert forth == back and len(forth) == 6


def test_complex_is_the_complex_product():
    torch.manual_seed(0)
    model = ComplEx(7, 4, width=3)

    def parts(table: torch.Tensor) -> torch.Tensor:
        return torch.complex(*table.chunk(2, -1))

    e, r = parts(model.entities.weight.detach()), parts(model.relations.weight.detach())
    queries = torch.tensor([[0, 1], [6, 3], [2, 0]])
    wanted = [[(e[h] * r[k] * t.conj()).sum().real for t in e] for h, k in queries.tolist()]
    torch.testing.assert_close(model(queries).detach(), torch.tensor(wanted))


def test_the_graph_convolution_is_its_equation():
    torch.manual_seed(0)
    adjacency = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]])
    model = GraphConvolution(adjacency, classes=2, width=4)
    looped = adjacency + torch.eye(3)
    d = torch.diag(looped.sum(1) ** -0.5)
    a = d @ looped @ d
    first, second = model.first, model.second
    hidden = torch.relu(a @ model.nodes.weight @ first.weight.T + first.bias)
    wanted = a @ hidden @ second.weight.T + second.bias
    torch.testing.assert_close(model(torch.tensor([2, 0])), wanted[[2, 0]])


def test_padding_changes_nothing():
    torch.manual_seed(0)
    model = TextClassifier(20, 8, 3).eval()
    text = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[5, 6, 7, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(model(padded), model(text))
    assert torch.isfinite(model(torch.zeros(2, 8, dtype=torch.long))).all()


def test_a_character_sees_none_that_follows():
    torch.manual_seed(0)
    model = CharacterModel(20, 8).eval()
    one, other = torch.tensor([[1, 2, 3, 4, 5]]), torch.tensor([[1, 2, 3, 9, 9]])
    torch.testing.assert_close(model(one)[:, :3], model(other)[:, :3])
    assert not torch.allclose(model(one)[:, 3], model(other)[:, 3])


def test_bits_per_character(tmp_path):
    task = small("chars", size=10, cache=make_cache(tmp_path))
    assert len(task.alphabet) == 12
    ids, following = task.data["test"].columns
    assert torch.equal(ids[:, 1:], following[:, :-1])

    class Uniform(torch.nn.Module):
        def forward(self, ids):
            return torch.zeros(*ids.shape, len(task.alphabet) + 1)

    assert task.evaluate(Uniform()).value == pytest.approx(math.log2(13))


def test_windows_of_the_test_part_do_not_depend_on_the_seed(tmp_path):
    make_cache(tmp_path)
    one, other = (small("chars", seed=seed, size=10, cache=tmp_path).data for seed in (0, 1))
    assert torch.equal(one["test"].columns[0], other["test"].columns[0])
    assert not torch.equal(one["train"].columns[0], other["train"].columns[0])


def test_a_network_that_gives_no_numbers_is_measured():
    task = small("digits", size=20)

    class Broken(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), 10), torch.nan)

    assert task.evaluate(Broken()).value < 0.3


def test_the_halves_of_the_karate_club_are_both_labelled():
    for seed in range(5):
        task = small("karate", seed=seed)
        assert np.bincount(task.data["train"].columns[1].numpy()).tolist() == [2, 2]
        every = torch.cat([rows.columns[0] for rows in task.data.values()])
        assert sorted(every.tolist()) == list(range(34))
