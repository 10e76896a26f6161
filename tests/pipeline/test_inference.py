"""`laconic run`: text, vectors and labels of packed and float models; what it refuses; how fast it says it was."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import laconic
from laconic.errors import BadInput
from laconic.pipeline.inference import answer, embed, generate, open_model, predict, verb_for
from laconic.pipeline.inference.embed import pool, read_pooling
from laconic.pipeline.inference.generate import _Clock
from laconic.pipeline.source import resolve
from tests.pipeline.artifacts import round_records, rounded, write_artifact
from tests.pipeline.runs import Classifier, process, run_cli
from tests.tasks import models

transformers = pytest.importorskip("transformers")
PROMPT = "the white whale swam"
TEXTS = ["the whale swam", "the captain saw the old ship and the white whale in the sea", "cold sea", "ship"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made("llama")`: (float folder, artifact) of a tiny model with a tokenizer."""
    known: dict[str, tuple[Path, Path]] = {}
    names = {"classes": lambda: models.bert_classifier(names=["sea", "land", "air"])}

    def make(name: str) -> tuple[Path, Path]:
        if name not in known:
            transformers.utils.logging.disable_progress_bar()
            folder = tmp_path_factory.mktemp(name) / f"{name}-float"
            names.get(name, getattr(models, name, None))().save_pretrained(folder)
            if name != "vit":
                models.tokenizer().save_pretrained(folder)
            source = resolve(folder)
            known[name] = folder, write_artifact(folder.parent / name, source, round_records(source))
        return known[name]

    return make


@pytest.fixture
def llama(made):
    return open_model(made("llama")[1])


# --- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["float", "packed"])
def test_greedy_text_is_that_of_transformers(made, which):
    opened = open_model(made("llama")[which])
    pieces: list[str] = []
    found = generate(opened, PROMPT, max_new_tokens=12, on_text=pieces.append)
    tokenizer = models.tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(made("llama")[which])
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    new = wanted[0, ids.shape[1] :]
    assert found.text == tokenizer.decode(new, skip_special_tokens=True) == "".join(pieces)
    assert (found.prompt_tokens, found.new_tokens) == (ids.shape[1], len(new))
    assert found.ended == ("end" if new[-1] == tokenizer.eos_token_id else "length")


def test_pieces_come_as_their_tokens_do(llama):
    seen: list[int] = []
    forward = llama.model.forward

    def counted(*args, **kwargs):
        seen.append(len("".join(pieces)))
        return forward(*args, **kwargs)

    pieces: list[str] = []
    llama.model.forward = counted
    text = generate(llama, PROMPT, max_new_tokens=24, on_text=pieces.append).text
    assert len(seen) == 24 and seen == sorted(seen) and 0 < seen[12] < seen[-1] < len(text)


def test_half_a_character_is_held_back():
    """An emoji of four bytes over three tokens, between letters."""
    whole = "a\N{WHALE}b".encode()
    parts = {0: whole[:1], 1: whole[1:3], 2: whole[3:5], 3: whole[5:]}

    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return b"".join(parts[token] for token in tokens).decode(errors="replace")

    pieces: list[str] = []
    clock = _Clock(Bytes(), pieces.append)
    for token in (-1, 0, 1, 2, 3):
        clock.put(torch.tensor([token]))
    assert pieces == ["a", "\N{WHALE}", "b"] and len(clock.times) == 5
    clock.end()
    assert "".join(pieces) == clock.text


def test_a_reader_that_hangs_up_is_not_the_model_s_fault(llama):
    def hang_up(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        generate(llama, PROMPT, on_text=hang_up)


def test_speeds_are_of_prefill_and_decoding(llama):
    found = generate(llama, PROMPT, max_new_tokens=10)
    assert found.prefill_rate == found.prompt_tokens / found.prefill_seconds > 0
    assert found.decode_rate == (found.new_tokens - 1) / found.decode_seconds > 0
    assert generate(llama, PROMPT, max_new_tokens=1).decode_rate is None


def test_draws_follow_the_seed_and_leave_other_randomness_alone(llama):
    def draw(**options) -> str:
        return generate(llama, PROMPT, max_new_tokens=16, **{"temperature": 1.0, **options}).text

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    greedy = generate(llama, PROMPT, max_new_tokens=16).text
    assert draw(top_k=1) == greedy and draw(top_p=1e-6) == greedy and draw(temperature=1e-4) == greedy


def test_an_encoder_decoder_answers(made):
    found = generate(open_model(made("t5")[1]), PROMPT, max_new_tokens=5)
    assert found.new_tokens <= 5 and found.prompt_tokens == len(models.tokenizer()(PROMPT)["input_ids"])


def test_chat_goes_through_the_template(made, tmp_path):
    opened = open_model(made("llama")[1])
    with pytest.raises(BadInput, match="llama has no chat template: leave out --chat"):
        generate(opened, PROMPT, chat=True)
    source = resolve(made("llama")[0])
    folder = write_artifact(tmp_path / "chatty", source, round_records(source))
    (folder / "chat_template.jinja").write_text("the captain {{ messages[0].content }} the ship")
    chatty = open_model(folder)
    found, plain = generate(chatty, "saw", chat=True), generate(chatty, "the captain saw the ship")
    assert (found.text, found.prompt_tokens) == (plain.text, plain.prompt_tokens)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only the captain may speak') }}")
    with pytest.raises(BadInput, match="the chat template of chatty fails: only the captain may speak"):
        generate(open_model(folder), "saw", chat=True)


def test_the_window(llama):
    window, tokenizer = llama.config.max_position_embeddings, models.tokenizer()
    times = next(n for n in range(1, window) if len(tokenizer("whale " * n)["input_ids"]) >= window - 10)
    found = generate(llama, "whale " * times, max_new_tokens=60)
    assert 0 < found.new_tokens <= window - found.prompt_tokens
    assert f"has room for {window - found.prompt_tokens} tokens behind the prompt, 60 were asked for" in found.notes[0]
    with pytest.raises(BadInput, match=rf"tokens, and llama reads {window} in all"):
        generate(llama, "whale " * 2 * window)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 0.5}, "at temperature 0 nothing is"),
    ],
)
def test_options_of_generate(llama, options, says):
    with pytest.raises(BadInput, match=says):
        generate(llama, PROMPT, **options)


def test_a_tokenizer_of_another_model(made, tmp_path):
    source = resolve(models.seeded(
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(vocab_size=20, num_key_value_heads=1, **models.SMALL),
    ))  # fmt: skip
    folder = write_artifact(tmp_path / "small", source, round_records(source))
    models.tokenizer().save_pretrained(folder)
    with pytest.raises(BadInput, match="is outside the 20 tokens of small"):
        generate(open_model(folder), PROMPT)


# --- embed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["float", "packed"])
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_vectors_are_means_of_hidden_states(made, which, batch):
    opened = open_model(made("bert")[which])
    found = embed(opened, TEXTS, batch=batch)
    tokenizer = models.tokenizer()
    for text, vector in zip(TEXTS, found.values, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            mean = opened.model(input_ids=ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (mean / mean.norm()).numpy(), atol=2e-6)
    assert found.tokens == sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert "no file says how to pool" in found.notes[0]


def test_of_a_model_with_a_head_the_base_embeds(made):
    with_head = open_model(made("classes")[0])
    ids = models.tokenizer()(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = with_head.model.bert(input_ids=ids).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(embed(with_head, TEXTS[:1]).values[0], (mean / mean.norm()).numpy(), atol=2e-6)
    assert embed(open_model(made("t5")[0]), TEXTS).values.shape == (4, 16)  # the encoder's


def test_pooling_against_its_equations():
    hidden = torch.randn(3, 5, 4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    for n, (first, stop) in enumerate([(0, 5), (0, 2), (2, 5)]):
        rows = hidden[n, first:stop]
        wanted = {"mean": rows.mean(0), "max": rows.max(0).values, "cls": rows[0], "last": rows[-1]}
        for way, vector in wanted.items():
            torch.testing.assert_close(pool(hidden, mask, (way,))[n], vector / vector.norm())
        both = torch.cat([wanted["cls"], wanted["mean"]])
        torch.testing.assert_close(pool(hidden, mask, ("cls", "mean"))[n], both / both.norm())


def sentence_files(folder: Path, *, modules=("Transformer", "Pooling", "Normalize"), pooling=None, **more) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    rows = [
        {
            "idx": i,
            "name": str(i),
            "path": paths.get(kind, f"{i}_{kind}"),
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    for name, value in more.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_the_files_of_sentence_transformers(made, tmp_path):
    switches = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    source = resolve(made("bert")[0])
    folder = write_artifact(tmp_path / "sentences", source, round_records(source))
    sentence_files(
        folder, pooling=switches, sentence_bert_config={"max_seq_length": 5, "do_lower_case": True},
        config_sentence_transformers={"prompts": {"query": "sea "}, "default_prompt_name": "query"},
    )  # fmt: skip
    said = read_pooling(folder)
    assert (said.ways, said.tokens, said.lower, said.prompt) == (("cls",), 5, True, "sea ")
    opened = open_model(folder)
    found = embed(opened, ["The OLD ship and the white whale", "ship"])
    assert found.notes == ["1 of 2 texts were cut to 5 tokens"]
    ids = models.tokenizer()("sea the old ship and the white whale", truncation=True, max_length=5)["input_ids"]
    with torch.no_grad():
        first = opened.model(input_ids=torch.tensor([ids])).last_hidden_state[0, 0]
    np.testing.assert_allclose(found.values[0], (first / first.norm()).numpy(), atol=2e-6)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"modules": ("Transformer", "Pooling", "Dense")}, "modules.json has a Dense layer, which is not run here"),
        ({"modules": ("Transformer",)}, "names no pooling"),
        ({"pooling": {"pooling_mode_weightedmean_tokens": True}}, "pools by pooling_mode_weightedmean_tokens"),
        ({"pooling": {"pooling_mode": "attention"}}, "pools by attention"),
        ({"pooling": {"pooling_mode_cls_token": False}}, "pools by nothing"),
        ({"pooling": {"pooling_mode": "mean", "include_prompt": False}}, "leaves the prompt out"),
        ({"modules": 7}, "modules.json cannot be read"),
    ],
)
def test_pooling_that_is_not_known(tmp_path, files, says):
    if files.get("modules") == 7:
        sentence_files(tmp_path)
        (tmp_path / "modules.json").write_text("7")
    else:
        sentence_files(tmp_path, **files)
    with pytest.raises(BadInput, match=says):
        read_pooling(tmp_path)


def test_a_pooling_folder_that_climbs_out(tmp_path):
    sentence_files(tmp_path)
    rows = [{"type": "a.Pooling", "path": "../elsewhere"}]
    (tmp_path / "modules.json").write_text(json.dumps(rows))
    with pytest.raises(BadInput, match="climbs out of its own"):
        read_pooling(tmp_path)


# --- predict ----------------------------------------------------------------------------------------------------------


def test_labels_of_texts(made):
    opened = open_model(made("classes")[1])
    found = predict(opened, TEXTS, batch=2)
    for text, logits, row in zip(TEXTS, found.outputs, range(4), strict=True):
        ids = models.tokenizer()(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            wanted = opened.model(input_ids=ids).logits[0]
        np.testing.assert_allclose(logits, wanted.numpy(), atol=2e-6)
        label, p = found.best(row, 2)[0]
        assert label == ["sea", "land", "air"][int(wanted.argmax())]
        assert p == pytest.approx(float(wanted.softmax(0).max()), abs=1e-5)
    assert found.names == TEXTS and len(found.best(0, 2)) == 2 and not found.notes


def test_several_labels_at_once_and_regression(made, tmp_path):
    for name, config in {
        "many": {"problem_type": "multi_label_classification"},
        "one": {"problem_type": "regression"},
    }.items():
        model = models.bert_classifier(3)
        model.config.update(config)
        model.save_pretrained(tmp_path / name)
        models.tokenizer().save_pretrained(tmp_path / name)
    many = predict(open_model(tmp_path / "many"), TEXTS[:2])
    assert many.probabilities is not None
    np.testing.assert_allclose(many.probabilities, 1 / (1 + np.exp(-many.outputs)), rtol=1e-5)
    one = predict(open_model(tmp_path / "one"), TEXTS[:2])
    assert one.probabilities is None and "output" in one.to_json(5)["answers"][0]


def images(folder: Path, n: int = 3) -> list[Path]:
    from PIL import Image

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    files = [folder / f"{i}.png" for i in range(n)]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(file)
    return files


def test_labels_of_images(made, tmp_path):
    folder, artifact = made("vit")
    files = images(tmp_path / "pictures")
    with pytest.raises(BadInput, match=r"has no preprocessor_config\.json"):
        predict(open_model(folder), [str(files[0])])
    size = {"height": 16, "width": 16}
    for one in (folder, artifact):
        transformers.ViTImageProcessor(size=size).save_pretrained(one)
    opened = open_model(artifact)
    whole = predict(opened, [str(tmp_path / "pictures")], batch=2)
    assert whole.names == [str(file) for file in files]
    for row, file in enumerate(files):
        np.testing.assert_allclose(predict(opened, [str(file)]).outputs[0], whole.outputs[row], atol=2e-6)
    assert [label for label, _ in whole.best(0, 5)] == sorted(
        ("LABEL_0", "LABEL_1"), key=lambda name: -whole.outputs[0, int(name[-1])]
    )
    with pytest.raises(BadInput, match="nowhere.png is neither an image nor a folder of images"):
        predict(opened, ["nowhere.png"])


def test_tensors_of_any_module(tmp_path):
    model = Classifier().eval()
    folder = rounded(model, tmp_path / "out")
    x = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    with pytest.raises(BadInput, match="cannot build by itself.*--into"):
        open_model(folder)
    opened = open_model(folder, into="tests.pipeline.runs:Classifier")
    found = predict(opened, [str(tmp_path / "x.npz")], batch=2)
    with torch.no_grad():
        wanted = laconic.load(folder, into=Classifier())(torch.from_numpy(x))
    np.testing.assert_allclose(found.outputs, wanted.numpy(), atol=1e-6)
    assert found.probabilities is not None and "softmax" in found.notes[0]
    assert found.best(0, 1)[0][0] == str(int(wanted[0].argmax()))
    with pytest.raises(BadInput, match=r"out fails on the inputs in enter: RuntimeError"):
        np.savez(tmp_path / "y.npz", x=x[:, :3])
        predict(opened, [str(tmp_path / "y.npz")])


def test_images_of_a_plain_module_need_its_example(tmp_path):
    model = models.seeded(models.PixelNet)
    folder = rounded(model, tmp_path / "out")
    (file,) = images(tmp_path / "pictures", 1)
    opened = open_model(folder, into=(models.PixelNet(), torch.zeros(1, 3, 8, 8)))
    found = predict(opened, [str(file)])
    assert found.outputs.shape == (1, 2) and "resized to 8 x 8" in found.notes[0]
    opened.source = None
    with pytest.raises(BadInput, match="does not say what shape its inputs have"):
        predict(opened, [str(file)])


def test_tensors_of_a_model_without_labels(made, tmp_path):
    np.savez(tmp_path / "ids.npz", input_ids=np.arange(12).reshape(2, 6))
    found = predict(open_model(made("bert")[1]), [str(tmp_path / "ids.npz")])
    assert found.outputs.shape == (2, 6, 16) and found.probabilities is None
    with pytest.raises(BadInput, match="one NPZ file is read at a time"):
        predict(open_model(made("bert")[1]), [str(tmp_path / "ids.npz"), "more"])


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "verb"),
    [("llama", "generate"), ("t5", "generate"), ("bert", "embed"), ("classes", "predict"), ("vit", "predict")],
)
def test_what_a_model_is_made_for(made, name, verb):
    for folder in made(name):
        assert verb_for(open_model(folder)) == verb


@pytest.mark.parametrize(
    ("name", "verb", "inputs", "says"),
    [
        ("bert", "generate", ["x"], "bert is a BertModel, which does not write text, and cannot generate: run it with embed"),
        ("classes", "generate", ["x"], "cannot generate: run it with predict"),
        ("vit", "embed", ["x"], "which reads images, and cannot embed from text: run it with predict"),
        ("llama", "predict", ["x"], "no classifier of texts or images: give an NPZ file"),
        ("bert", "predict", ["x"], "no classifier of texts or images"),
        ("vit", "predict", [], "there is no input: name images"),
        ("llama", "sing", ["x"], "sing is no verb: those that there are: generate, embed, predict"),
        ("llama", "generate", [""], "the prompt is empty"),
        ("llama", "generate", [], "there is no prompt: type it"),
        ("llama", "generate", ["a", "b"], "2 prompts were given"),
        ("bert", "embed", ["a", " "], "text 2 is empty"),
    ],
)  # fmt: skip
def test_verbs_that_do_not_fit(made, name, verb, inputs, says):
    with pytest.raises(BadInput, match=says):
        answer(made(name)[1], inputs, verb=verb)


def test_a_plain_module_knows_of_no_text(tmp_path):
    folder = rounded(Classifier().eval(), tmp_path / "out")
    opened = open_model(folder, into=Classifier())
    assert verb_for(opened) == "predict"
    with pytest.raises(BadInput, match="a module that knows of no text, and cannot embed: run it with predict"):
        embed(opened, ["x"])


def test_no_tokenizer(made, tmp_path):
    source = resolve(made("llama")[0])
    bare = rounded(source.load(), tmp_path / "bare")
    with pytest.raises(BadInput, match=r"there is no tokenizer in .*bare"):
        generate(open_model(bare), PROMPT)
    with pytest.raises(BadInput, match="has no tokenizer with it"):
        generate(open_model(source.load()), PROMPT)


@pytest.mark.parametrize(
    ("verb", "options", "says"),
    [
        ("embed", {"temperature": 1.0}, "--temperature is an option of generate, and embed is run"),
        ("generate", {"batch": 4}, "--batch is an option of embed and predict, and generate is run"),
        ("generate", {"out": "x.npz"}, "--out is an option of embed and predict"),
        ("embed", {"out": "x.txt"}, "must end with .npz"),
    ],
)
def test_options_of_another_verb(made, verb, options, says):
    with pytest.raises(BadInput, match=says):
        answer(made("llama")[1], ["x"], verb=verb, **options)


# --- the command line -------------------------------------------------------------------------------------------------


def test_text_goes_to_stdout_and_figures_to_stderr(made, capsys):
    folder = made("llama")[1]
    code, printed, said = run_cli(capsys, "run", folder, PROMPT, "--max-new-tokens", 8)
    assert code == 0 and printed.endswith("\n") and printed.count("\n") >= 1
    assert "llama is a LlamaForCausalLM, so it is run with generate" in said
    assert "answer 8 tokens at" in said and "of memory" in said
    for option in ("--stream", "--no-stream"):
        assert run_cli(capsys, "run", folder, "generate", PROMPT, "--max-new-tokens", 8, option, "--quiet") == (
            0,
            printed,
            "",
        )


def test_json_is_one_line(made, capsys):
    code, printed, said = run_cli(capsys, "run", made("llama")[1], "generate", PROMPT, "--max-new-tokens", 4, "--json")
    line = json.loads(printed)
    assert (code, said, printed.count("\n")) == (0, "", 1)
    assert (line["verb"], line["class"], line["new_tokens"]) == ("generate", "LlamaForCausalLM", 4)
    assert line["decode_tokens_per_second"] > 0 and line["peak_rss_bytes"] > 0 and line["load_seconds"] > 0
    line = json.loads(run_cli(capsys, "run", made("classes")[1], "whale", "ship", "--top-k", 2, "--json")[1])
    assert [len(one["labels"]) for one in line["answers"]] == [2, 2]
    line = json.loads(run_cli(capsys, "run", made("bert")[1], "whale", "ship", "--json")[1])
    assert np.shape(line["embeddings"]) == (2, 16)


def test_prompts_from_standard_input_and_files(made, capsys, tmp_path, monkeypatch):
    folder, options = made("llama")[1], ("--max-new-tokens", 6, "--quiet")
    typed = run_cli(capsys, "run", folder, "generate", PROMPT, *options)
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert run_cli(capsys, "run", folder, "generate", "-", *options) == typed
    (tmp_path / "p.txt").write_text(PROMPT + "\n")
    assert run_cli(capsys, "run", folder, "--file", tmp_path / "p.txt", *options) == typed
    (tmp_path / "p.bin").write_bytes(b"\xff\xfe\x00")
    for arguments, says in {
        ("generate", PROMPT, "--file", tmp_path / "p.txt"): "give one of them",
        ("generate", "--file", tmp_path / "none.txt"): "is no file",
        ("generate", "--file", tmp_path / "p.bin"): "is not UTF-8",
        ("generate", "--columns", "text=a", PROMPT): "--columns is an option of",
    }.items():
        code, _, said = run_cli(capsys, "run", folder, *arguments)
        assert code == 2 and says in said and said.count("\n") == 1


def test_vectors_from_lines_and_tables_to_a_file(made, capsys, tmp_path, monkeypatch):
    folder = made("bert")[1]
    wanted = embed(open_model(folder), TEXTS).values
    (tmp_path / "t.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"body": text, "n": "1"}) + "\n" for text in TEXTS))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(TEXTS)))
    for arguments in (
        ("--file", tmp_path / "t.txt"), ("--file", tmp_path / "t.jsonl", "--columns", "text=body"), ("-",), TEXTS,
    ):  # fmt: skip
        out = tmp_path / "e.npz"
        code, printed, said = run_cli(capsys, "run", folder, "embed", *arguments, "--out", out)
        assert (code, printed) == (0, f"{out}\n"), said
        with np.load(out) as found:
            np.testing.assert_array_equal(found["embeddings"], wanted)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["e.npz", "t.jsonl", "t.txt"]
        out.unlink()
    code, printed, _ = run_cli(capsys, "run", folder, *TEXTS)
    assert code == 0 and printed.count("1.00") >= 4


def test_tables_of_labels(made, capsys, tmp_path):
    code, printed, said = run_cli(capsys, "run", made("classes")[1], "the whale", "--out", tmp_path / "p.npz")
    assert code == 0 and "predict" in said
    with np.load(tmp_path / "p.npz") as found:
        assert found["labels"].tolist() == ["sea", "land", "air"] and found["probabilities"].shape == (1, 3)
    code, printed, _ = run_cli(capsys, "run", made("classes")[1], "predict", "the whale")
    assert code == 0 and all(label in printed for label in ("sea", "land", "air"))
    np.savez(tmp_path / "ids.npz", input_ids=np.arange(12).reshape(2, 6))
    code, printed, _ = run_cli(capsys, "run", made("bert")[1], "predict", tmp_path / "ids.npz")
    assert code == 0 and "a tensor of 6 x 16" in printed


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere", "generate", "x"), "nowhere is neither a folder"),
        (("MODEL", "generate", "x", "--device", "abacus"), "'abacus' is not a device"),
        (("MODEL", "embed", "x", "--out", "/no/such/folder/e.npz"), "cannot be written"),
        (("FLOAT", "generate", "x", "--into", "minilm"), "is no artifact of laconic"),
    ],
)
def test_bad_input_is_one_sentence(made, capsys, arguments, says):
    places = {"MODEL": made("llama")[1], "FLOAT": made("llama")[0]}
    code, printed, said = run_cli(capsys, "run", *(places.get(one, one) for one in arguments))
    assert (code, printed) == (2, "") and says in said and said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_a_gpu_that_is_not_there(made, capsys):
    code, _, said = run_cli(capsys, "run", made("llama")[1], "generate", "x", "--device", "cuda")
    assert code == 2 and "the device cuda is not usable here" in said


def test_in_a_process_of_its_own(made):
    done = process("run", made("llama")[1], "generate", PROMPT, "--max-new-tokens", 8)
    assert (
        done.returncode == 0
        and done.stdout == generate(open_model(made("llama")[1]), PROMPT, max_new_tokens=8).text + "\n"
    )
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
