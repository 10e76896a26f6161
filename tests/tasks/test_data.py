"""The user's data: which task comes of it, sound splits, and the sentence for everything that is wrong."""

from __future__ import annotations

import csv
import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from laconic.errors import BadInput
from laconic.tasks import load_task
from laconic.tasks.base import SPLITS
from laconic.tasks.fidelity import FidelityTask
from laconic.tasks.labels import AccuracyTask
from laconic.tasks.language import PerplexityTask
from laconic.tasks.metrics import compare
from tests.tasks.models import (
    PixelNet,
    bert,
    bert_classifier,
    llama,
    sentences,
    source,
    t5,
    vit,
    with_tokenizer,
)


def write_table(path, columns):
    """The same table as CSV, TSV, JSONL or Parquet."""
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def write_images(folder, classes=("cat", "dog"), each=6, size=(20, 12)):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            colour = [40 + i, 0, 0]
            Image.new("RGB", size, tuple(colour[label:] + colour[:label])).save(folder / name / f"{i}.png")
    return folder


def rows_of(task, split):
    rows = task.rows(split)
    values = rows["input_ids"] if isinstance(rows, dict) else rows[0]
    return {tuple(row.flatten().tolist()) for row in values}


def assert_disjoint(task):
    held = [rows_of(task, split) for split in SPLITS]
    assert sum(map(len, held)) == len(set.union(*held)) == sum(task.sizes.values())
    assert all(task.sizes[split] > 0 for split in SPLITS)


# Texts


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_tables_of_labelled_text_make_an_accuracy_task(tmp_path, ending):
    names = ["sea", "land", "air"]
    table = {"id": list(range(30)), "body": sentences(30), "topic": [names[i % 3] for i in range(30)]}
    path = write_table(tmp_path / f"d{ending}", table)
    model = bert_classifier(names=["land", "sea", "air"])
    task = load_task(path, with_tokenizer(model, tmp_path), {"text": "body", "label": "topic"})
    assert isinstance(task, AccuracyTask)
    assert task.sizes == {"calibrate": 6, "select": 6, "verify": 18}
    assert_disjoint(task)
    found = task.evaluate(model, "verify")
    assert 0 <= found.value <= 1 and set(found.answers) <= set(names)
    texts = dict(zip(table["body"], table["topic"], strict=True))
    labels = [["land", "sea", "air"].index(texts[text]) for text in found.examples]
    assert labels == task.labels["verify"].tolist()  # inputs, labels and examples are still in one row


def test_default_columns_are_text_and_label(tmp_path):
    path = write_table(tmp_path / "d.csv", {"text": sentences(20), "label": [i % 3 for i in range(20)]})
    task = load_task(path, with_tokenizer(bert_classifier(), tmp_path))
    assert isinstance(task, AccuracyTask)
    path = write_table(tmp_path / "e.jsonl", {"n": list(range(20)), "words": sentences(20)})
    assert load_task(path, with_tokenizer(bert(), tmp_path)).sizes["verify"] == 12


def test_text_for_an_encoder_makes_a_fidelity_task(tmp_path):
    (tmp_path / "d.txt").write_text("\n\n".join(sentences(25)))
    model = bert()
    task = load_task(tmp_path / "d.txt", with_tokenizer(model, tmp_path))
    assert isinstance(task, FidelityTask)
    assert task.sizes == {"calibrate": 5, "select": 5, "verify": 15}
    assert_disjoint(task)
    before = task.evaluate(model, "verify")
    assert before.value == 1.0
    worse = bert()
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    found = compare(before, task.evaluate(worse, "verify"), task.metric)
    assert 0 < found.low <= found.drop <= found.high < 200
    assert task.evaluate(worse, "verify", reference=before).value == pytest.approx(1 - found.drop / 100)
    assert compare(before, task.evaluate(bert(), "verify"), task.metric).drop == 0


def test_fidelity_does_not_look_at_padding(tmp_path):
    (tmp_path / "d.txt").write_text("\n".join(sentences(25)))
    model = bert()
    task = load_task(tmp_path / "d.txt", with_tokenizer(model, tmp_path))
    batch = task.batches("verify")[0]
    output = task.forward(model, batch)
    assert (batch["attention_mask"] == 0).any()
    assert not output[batch["attention_mask"] == 0].any()
    assert output[batch["attention_mask"] == 1].all(-1).any()


def test_fidelity_of_large_outputs_keeps_the_same_coordinates(tmp_path, monkeypatch):
    monkeypatch.setattr("laconic.tasks.fidelity.KEPT_NUMBERS", 15 * 40)
    (tmp_path / "d.txt").write_text("\n".join(sentences(25)))
    model = bert()
    task = load_task(tmp_path / "d.txt", with_tokenizer(model, tmp_path))
    before, after = task.evaluate(model, "verify"), task.evaluate(model, "verify")
    assert before.outputs.shape == (15, 40)
    assert compare(before, after, task.metric).drop == 0


def test_encoder_decoder_reads_the_text_on_both_sides(tmp_path):
    (tmp_path / "d.txt").write_text("\n".join(sentences(20)))
    model = t5()
    task = load_task(tmp_path / "d.txt", with_tokenizer(model, tmp_path))
    batch = task.batches("verify")[0]
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])
    assert task.evaluate(model, "verify").value == 1.0


@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_text_for_a_language_model_makes_a_perplexity_task(tmp_path, ending):
    path = tmp_path / f"d{ending}"
    lines = sentences(120)
    path.write_text("\n".join(lines)) if ending == ".txt" else write_table(path, {"text": lines})
    model = llama()
    task = load_task(path, with_tokenizer(model, tmp_path), seq=16)
    assert isinstance(task, PerplexityTask)
    assert task.windows["verify"].shape[1] == 16
    assert_disjoint(task)
    found = task.evaluate(model, "verify")
    assert 100 < found.value < 1000  # untrained: about as many as there are tokens
    assert found.per_example.shape == (task.sizes["verify"], 2)
    other = load_task(path, with_tokenizer(model, tmp_path), seq=16, seed=1)
    assert rows_of(other, "verify") != rows_of(task, "verify")
    again = load_task(path, with_tokenizer(model, tmp_path), seq=16)
    assert torch.equal(again.windows["verify"], task.windows["verify"])


@pytest.mark.parametrize(
    ("seq", "sentence"),
    [(1, "d.txt: in windows of 1 token there is nothing to predict"), (65, "reads at most 64 tokens: take a seq of 64")],
)
def test_windows_that_a_language_model_cannot_be_measured_on(tmp_path, seq, sentence):
    (tmp_path / "d.txt").write_text("\n".join(sentences(120)))
    model = llama()
    model.config.max_position_embeddings = 64
    assert sentence in refusal(tmp_path / "d.txt", with_tokenizer(model, tmp_path), seq=seq)


def test_text_is_cut_to_the_length_asked(tmp_path):
    (tmp_path / "d.txt").write_text("\n".join(sentences(20)))
    task = load_task(tmp_path / "d.txt", with_tokenizer(bert(), tmp_path), seq=4)
    assert task.batches("verify")[0]["input_ids"].shape == (12, 4)
    assert task.batches("verify", seq=3)[0]["attention_mask"].shape == (12, 3)


def test_labels_that_are_of_no_use_are_noted(tmp_path):
    path = write_table(tmp_path / "d.csv", {"text": sentences(200), "label": [0] * 200})
    task = load_task(path, with_tokenizer(bert(), tmp_path))
    assert isinstance(task, FidelityTask)
    assert "the labels of d.csv are not used: m (BertModel) is no classifier" in task.notes
    task = load_task(path, with_tokenizer(llama(), tmp_path), seq=16)
    assert "the labels of d.csv are not used: m is a language model" in task.notes


def test_more_rows_than_needed_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr("laconic.tasks.data.MOST_ROWS", {"calibrate": 2, "select": 2, "verify": 5})
    (tmp_path / "d.txt").write_text("\n".join(sentences(40)))
    task = load_task(tmp_path / "d.txt", with_tokenizer(bert(), tmp_path))
    assert task.sizes == {"calibrate": 2, "select": 2, "verify": 5}
    assert task.notes == ["9 of the 40 examples of d.txt are used"]


# Images and arrays


def test_image_folder_for_a_transformers_classifier(tmp_path):
    size = {"height": 16, "width": 16}
    config = {
        "image_processor_type": "ViTImageProcessor",
        "size": size,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "preprocessor_config.json").write_text(json.dumps(config))
    model = vit()
    task = load_task(write_images(tmp_path / "d"), source(model, tmp_path / "m"))
    assert isinstance(task, AccuracyTask)
    assert task.batches("verify")[0]["pixel_values"].shape == (8, 3, 16, 16)
    found = task.evaluate(model, "verify")
    assert set(found.answers) <= {"cat", "dog"} and found.examples[0].split("/")[0] in ("cat", "dog")


def test_image_folder_for_a_plain_module(tmp_path):
    model = PixelNet()
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]]))
        model.head.bias.zero_()
    task = load_task(write_images(tmp_path / "d"), source(model, None, torch.zeros(1, 3, 8, 10)))
    assert task.notes == ["pixels were resized to 8 x 10 and scaled to 0..1"]
    assert task.batches("verify")[0][0].shape == (8, 3, 8, 10)
    assert task.evaluate(model, "verify").value == 1.0
    model.input_range = (0.0, 255.0)
    raw = load_task(tmp_path / "d", source(model, None, torch.zeros(1, 3, 8, 10)))
    torch.testing.assert_close(raw.rows("verify")[0], task.rows("verify")[0] * 255)


def test_unlabelled_images_make_a_fidelity_task(tmp_path):
    write_images(tmp_path / "d", each=12)
    task = load_task(tmp_path / "d" / "cat", source(PixelNet(), None, torch.zeros(1, 3, 8, 8)))
    assert isinstance(task, FidelityTask) and task.sizes["verify"] == 8


def test_npz_with_labels_for_a_plain_module(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 3, 4, 4))
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(30) % 2)
    task = load_task(tmp_path / "d.npz", source(PixelNet()))
    assert isinstance(task, AccuracyTask)
    assert_disjoint(task)
    assert task.rows("verify")[0].dtype == torch.float32
    assert task.evaluate(PixelNet(), "verify").per_example.shape == (18,)


def test_npz_named_after_inputs(tmp_path):
    ids = np.random.default_rng(0).integers(0, 300, (20, 9))
    np.savez(tmp_path / "d.npz", tokens=ids, attention_mask=np.ones_like(ids))
    model = bert()
    task = load_task(tmp_path / "d.npz", source(model), {"input_ids": "tokens"})
    assert set(task.batches("verify")[0]) == {"input_ids", "attention_mask"}
    assert task.evaluate(model, "select").value == 1.0
    model = llama()
    task = load_task(tmp_path / "d.npz", source(model), {"input_ids": "tokens"})
    assert isinstance(task, PerplexityTask)
    assert task.evaluate(model, "verify").per_example[:, 1].tolist() == [8.0] * 12


def test_npz_labels_that_are_not_classes_are_noted(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.ones((20, 3, 2, 2)), y=np.linspace(0, 1, 20))
    task = load_task(tmp_path / "d.npz", source(PixelNet()))
    assert isinstance(task, FidelityTask)
    assert task.notes == [
        "the labels of d.npz are not used: they are float64 of shape (20,), not one class for each row"
    ]


def test_npz_for_a_module_without_class_outputs(tmp_path):
    class Same(nn.Module):
        def forward(self, x):
            return 2 * x

    np.savez(tmp_path / "d.npz", x=np.ones((20, 3, 2, 2)), y=np.zeros(20, int))
    task = load_task(tmp_path / "d.npz", source(Same()))
    assert isinstance(task, FidelityTask)
    assert "has the shape (2, 3, 2, 2), not one number for each class" in task.notes[0]


# What is wrong with the data


def refusal(data, model_source, columns=None, **options):
    with pytest.raises(BadInput) as refused:
        load_task(data, model_source, columns, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "file, content, said",
    [
        ("d.txt", "  \n ", "d.txt is empty"),
        ("d.jsonl", "\n", "d.jsonl is empty: it has no row"),
        ("d.csv", "", "d.csv is empty: it has no row"),
        ("d.csv", "text,label\n", "d.csv is empty: it has no row"),
        (
            "d.csv",
            "text\nCall me Ishmael\n",
            "d.csv has 1 example, too few to split into calibrate, select and verify: at least 10",
        ),
        ("d.txt", "Call me Ishmael", "d.txt has 1 example, too few to split"),
        ("d.csv", "text,label\n" + "a,1\n" * 12 + "b\n", "line 14: 1 fields where the header has 2"),
        ("d.csv", "text,text\na,b\n", "two columns of the same name"),
        ("d.csv", 'text\n"a\n', "no sound CSV file"),
        ("d.csv", "text,n\na,1\n,2\n", "row 2: the column 'text' is empty"),
        ("d.jsonl", '{"text": "a"}\n{"text": 3}', "row 2: the column 'text' holds int, not text"),
        ("d.jsonl", '{"text": "a"}\n{"te', "line 2: not JSON"),
        ("d.jsonl", '["a"]', "line 1: each line must be a JSON object, found list"),
        ("d.csv", "a,b\nx,y\n", "say which column is the text, e.g. text=a; it has: a, b"),
        ("d.xlsx", "x", "a format that is not read here"),
        ("d.parquet", "x", "cannot be read as Parquet"),
        ("d.npz", "x", "cannot be read as NPZ"),
    ],
)
def test_broken_text_files(tmp_path, file, content, said):
    (tmp_path / file).write_text(content)
    assert said in refusal(tmp_path / file, with_tokenizer(bert_classifier(), tmp_path))


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    assert "d.txt is not UTF-8 text (byte 3 is 0xe9)" in refusal(tmp_path / "d.txt", source(bert()))


def test_missing_column_lists_those_that_exist(tmp_path):
    path = write_table(tmp_path / "d.csv", {"body": sentences(12), "topic": ["a"] * 12})
    said = refusal(path, source(bert()), {"text": "boddy"})
    assert said.endswith("d.csv has no column 'boddy' (named for text); it has: body, topic")
    assert "columns: lable=topic makes no sense for d.csv; the roles here are text, image, label" in refusal(
        path, source(bert()), {"lable": "topic"}
    )


def test_too_few_tokens_for_a_language_model(tmp_path):
    (tmp_path / "d.txt").write_text("Call me Ishmael.")
    said = refusal(tmp_path / "d.txt", with_tokenizer(llama(), tmp_path))
    assert (
        "too few to split into calibrate, select and verify: at least 160 are needed (10 windows of 16)"
        in said
    )


def test_wrong_modality(tmp_path):
    (tmp_path / "d.txt").write_text("\n".join(sentences(20)))
    said = refusal(tmp_path / "d.txt", source(vit(), tmp_path))
    assert said.startswith(
        "d.txt holds text, but m (ViTForImageClassification) reads images (pixel_values): "
    )
    assert said.endswith("give a folder of images")
    write_images(tmp_path / "pictures")
    said = refusal(tmp_path / "pictures", source(bert(), tmp_path))
    assert said.startswith("pictures holds images, but m (BertModel) reads text (input_ids): give a text,")
    np.savez(tmp_path / "d.npz", x=np.ones((20, 3, 8, 8)))
    said = refusal(tmp_path / "d.npz", source(bert()))
    assert "the array 'input_ids' holds float64, but m (BertModel) reads token ids" in said
    np.savez(tmp_path / "d.npz", pixel_values=np.ones((20, 3, 8, 8)))
    said = refusal(tmp_path / "d.npz", source(bert()))
    assert "has the arrays pixel_values, but m (BertModel) reads input_ids" in said


def test_text_for_a_plain_module_and_for_a_folder_without_tokenizer(tmp_path):
    (tmp_path / "d.txt").write_text("\n".join(sentences(20)))
    assert "m (PixelNet) has no tokenizer with it" in refusal(tmp_path / "d.txt", source(PixelNet()))
    (tmp_path / "empty").mkdir()
    said = refusal(tmp_path / "d.txt", source(bert(), tmp_path / "empty"))
    assert "there is no tokenizer in" in said and "looked for tokenizer.json" in said


def test_unreadable_tokenizer(tmp_path):
    (tmp_path / "d.txt").write_text("\n".join(sentences(20)))
    (tmp_path / "tokenizer.json").write_text("{")
    assert f"the tokenizer in {tmp_path} cannot be read" in refusal(
        tmp_path / "d.txt", source(bert(), tmp_path)
    )


def test_tokenizer_of_another_model(tmp_path):
    (tmp_path / "d.txt").write_text("\n".join(sentences(20)))
    stub = with_tokenizer(bert(), tmp_path)
    stub.config.vocab_size = 50
    said = refusal(tmp_path / "d.txt", stub)
    assert "is outside the 50 tokens of m; is the tokenizer its own?" in said


def test_labels_beyond_the_classes(tmp_path):
    path = write_table(tmp_path / "d.csv", {"text": sentences(12), "label": [0, 1, 2, 7] * 3})
    said = refusal(path, with_tokenizer(bert_classifier(3), tmp_path))
    assert said == "d.csv: the label 7 is beyond the 3 classes of m (0 to 2)"
    np.savez(tmp_path / "d.npz", x=np.ones((12, 3, 2, 2)), y=np.arange(12))
    assert "the label 11 is beyond the 2 classes of m" in refusal(tmp_path / "d.npz", source(PixelNet()))
    np.savez(tmp_path / "d.npz", x=np.ones((12, 3, 2, 2)), y=np.arange(12) - 1)
    assert "the label -1 is negative" in refusal(tmp_path / "d.npz", source(PixelNet()))


def test_label_that_the_config_does_not_know(tmp_path):
    path = write_table(tmp_path / "d.csv", {"text": sentences(12), "label": ["sea", "moon"] * 6})
    said = refusal(path, with_tokenizer(bert_classifier(names=["sea", "land"]), tmp_path))
    assert said == "d.csv: the label 'moon' is not a class of m; its classes are sea, land"


def test_image_that_cannot_be_read(tmp_path):
    folder = write_images(tmp_path / "d")
    good = (folder / "cat" / "0.png").read_bytes()
    for broken in (b"not an image", good[: len(good) // 2], good[:20] + b"\xff" + good[21:]):
        (folder / "cat" / "3.png").write_bytes(broken)
        said = refusal(folder, source(PixelNet(), None, torch.zeros(1, 3, 8, 8)))
        assert "the image " in said and "3.png cannot be read" in said


def test_image_folders_that_make_no_sense(tmp_path):
    (tmp_path / "d").mkdir()
    assert "holds no image (.png" in refusal(tmp_path / "d", source(vit()))
    write_images(tmp_path / "d")
    Image.new("RGB", (4, 4)).save(tmp_path / "d" / "stray.png")
    assert "beside them (stray.png)" in refusal(tmp_path / "d", source(vit()))
    (tmp_path / "d" / "stray.png").unlink()
    assert "m has no preprocessor_config.json" in refusal(tmp_path / "d", source(vit(), tmp_path))
    assert "is no batch of images" in refusal(tmp_path / "d", source(PixelNet(), None, torch.zeros(1, 5)))


def test_images_named_in_a_table(tmp_path):
    write_images(tmp_path / "d")
    files = [f"d/{name}/{i}.png" for name in ("cat", "dog") for i in range(6)]
    path = write_table(tmp_path / "d.csv", {"file": files, "label": [0] * 6 + [1] * 6})
    stub = source(PixelNet(), None, torch.zeros(1, 3, 8, 8))
    assert load_task(path, stub, {"image": "file"}).batches("verify")[0][0].shape == (8, 3, 8, 8)
    path = write_table(tmp_path / "e.csv", {"file": [*files[1:], "d/gone.png"]})
    assert "gone.png cannot be read: " in refusal(path, stub, {"image": "file"})


def test_npz_that_makes_no_sense(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, x=np.array([{}, 1], dtype=object))
    assert "holds Python objects, which are never loaded" in refusal(path, source(PixelNet()))
    np.savez(path, x=np.ones((12, 3)), y=np.ones(11))
    assert "all arrays must have the same number of rows, found {'x': 12, 'labels': 11}" in refusal(
        path, source(PixelNet())
    )
    np.savez(path, x=np.ones((0, 3)))
    assert "is empty" in refusal(path, source(PixelNet()))
    np.savez(path, x=np.full((12, 3, 2, 2), np.nan))
    assert "the array 'x' holds values that are not finite" in refusal(path, source(PixelNet()))
    np.savez(path, x=np.array(["a"] * 12))
    assert "holds <U1, not numbers" in refusal(path, source(PixelNet()))
    assert "no array 'z' (named for x); it has: x" in refusal(path, source(PixelNet()), {"x": "z"})


def test_optional_package_that_is_missing(tmp_path, monkeypatch):
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else real(name))
    said = refusal(tmp_path / "d.parquet", source(bert()))
    assert "d.parquet is a Parquet file, which the package pyarrow reads; run `pip install pyarrow`" in said


def test_names_that_do_not_exist(tmp_path):
    said = refusal("minilm-bbcc", None)
    assert "it is not one of the tasks minilm-bbc, cifar-cnn, smollm-moby, tiny-lm" in said
    assert "no such file" in refusal(tmp_path / "gone.csv", source(bert()))


def test_options_that_make_no_sense(tmp_path):
    (tmp_path / "d.txt").write_text("\n".join(sentences(20)))
    assert refusal(tmp_path / "d.txt", source(bert()), batch=0) == "batch must be at least 1, not 0"
    assert refusal(tmp_path / "d.txt", source(bert()), seq=-1) == "seq must be at least 1, not -1"
    assert "is data for a model, and none was given" in refusal(tmp_path / "d.txt", None)
    assert "this format has no columns" in refusal(tmp_path / "d.txt", source(bert()), {"text": "a"})
    assert "columns were named (text=a), but tiny-lm has none" in refusal("tiny-lm", None, {"text": "a"})
