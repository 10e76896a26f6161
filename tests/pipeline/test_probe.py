"""`inspect --probe` and `calibrate-confidence`: on a task's model and data, from files, and every refusal."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from laconic.catalog.probes import probe_class, probes
from laconic.core.depth import IGNORED
from laconic.errors import BadInput
from laconic.norm import BBQ, CALIBRATORS, DepthUsefulness, load_calibrator, save_calibrator
from laconic.pipeline.calibrate import calibrate_confidence
from laconic.pipeline.labelled import calls_of
from laconic.pipeline.probe import READS, run_probe
from laconic.tasks.language import PerplexityTask
from tests.pipeline.runs import run_cli


def logits_file(path, n=400, k=3, hot=4.0):
    """Over-confident logits."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(k, (n,), generator=g)
    logits = torch.randn(n, k, generator=g) + 1.2 * torch.eye(k)[labels]
    np.savez(path, logits=(hot * logits).numpy(), labels=labels.numpy())
    return path


class Images(nn.Module):
    """A classifier of small pictures that says how bright they are."""

    input_range = (0.0, 255.0)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, images):
        return self.head(torch.relu(self.norm(self.conv(images / 255))).mean((2, 3)))


@pytest.fixture
def images(tmp_path):
    g = torch.Generator().manual_seed(0)
    path = tmp_path / "images.npz"
    np.savez(path, images=255 * torch.rand(60, 3, 12, 12, generator=g).numpy(), label=np.arange(60) % 3)
    return path


def example():
    return (torch.zeros(2, 3, 12, 12),), {}


@pytest.mark.parametrize("id", ["calibration", "robustness_probe", "neural_redshift", "elr_probe"])
def test_a_probe_on_a_model_and_data(id, images):
    options = {"robustness_probe": {"severities": (1,)}, "neural_redshift": {"grid": 8, "seeds": 1}}.get(id, {})
    record, finding = run_probe(
        probe_class(id), (Images(), example()), images, options=options, columns={"images": "images", "label": "label"}
    )
    assert record["table"] and record["cost"] and json.dumps(record, default=str)
    assert ElementTree.fromstring(finding.plot()).tag.endswith("svg")


class Residual(nn.Module):
    """x + F(x) on pictures."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.relu(x + self.norm(self.conv(x)))


class Deep(nn.Module):
    """A classifier of small pictures made of residual blocks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.Sequential(*(Residual() for _ in range(3))), nn.Linear(3, 3)

    def forward(self, images):
        return self.head(self.blocks(images / 255).mean((2, 3)))


@pytest.mark.parametrize("id", ["signal_propagation", "depth_usefulness"])
def test_the_depth_of_a_classifier(id, images):
    columns = {"images": "images", "label": "label"}
    record, finding = run_probe(probe_class(id), (Deep(), example()), images, columns=columns)
    assert [row["block"] for row in record["table"]][-3:] == [f"blocks.{i}" for i in range(3)]
    assert "cross-entropy" in " ".join(record["notes"]) and json.dumps(record, default=str, allow_nan=False)
    if id == "depth_usefulness":
        assert all(row["rise_error"] > 0 for row in record["table"])
    with pytest.raises(BadInput, match="Images has no residual blocks"):
        run_probe(probe_class(id), (Images(), example()), images, columns=columns)


def test_the_depth_of_a_language_model(tmp_path):
    from tests.core.test_placing import llama

    torch.manual_seed(0)
    model, inputs = llama()
    task = PerplexityTask("text", {"verify": torch.randint(23, (6, 7)).numpy()}, batch=4)
    batches = calls_of(model, task, "verify")
    assert [batch.examples for batch in batches] == [4, 2]
    finding = DepthUsefulness()(model, batches)
    nll = task.evaluate(model.eval(), "verify").per_example
    assert finding.loss == pytest.approx(float((nll[:, 0] / nll[:, 1]).mean()), rel=1e-5)
    masked = PerplexityTask(
        "text", {"verify": inputs["input_ids"].numpy()}, masks={"verify": np.array([[1] * 7, [1, 1, 1] + [0] * 4])}
    )
    [batch] = calls_of(model, masked, "verify")
    assert (batch.target != IGNORED).tolist() == [[True] * 6 + [False], [True, True] + [False] * 5]
    assert (batch.target[:, 0] == inputs["input_ids"][:, 1]).all()


def test_every_probe_says_what_it_reads():
    for id in probes():
        assert getattr(probe_class(id), "reads", "labelled") in READS, id
        assert probe_class(probe_class(id).__name__) is probe_class(id)


def test_the_command_writes_the_plot(images, tmp_path, capsys, monkeypatch):
    (tmp_path / "pictures_model.py").write_text(
        "from tests.pipeline.test_probe import Images, example\n\n\ndef build():\n    return Images(), example()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "plot.svg"
    given = ("inspect", "pictures_model:build", "--data", images, "--columns", "images=images,label=label")
    code, printed, said = run_cli(capsys, *given, "--probe", "calibration", "--set", "bins=7", "--out", out, "--json")
    assert code == 0, said
    assert json.loads(printed)["options"] == {"bins": 7} and out.read_text().startswith("<svg")
    code, printed, _ = run_cli(capsys, *given, "--probe", "CalibrationProbe")
    assert code == 0 and "as it is" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--probe", "none-such"), "there is no probe 'none-such': there are"),
        (("--probe", "calibration"), "looks at a model on examples: pass --data"),
        (("--data", "x.npz"), "belong to --probe"),
        (("--probe", "calibration", "--set", "bins"), "does not parse"),
        (("--probe", "calibration", "--set", "bans=3", "--data", "IMAGES"), "has no option 'bans': it has bins"),
        (("--probe", "calibration", "--out", "plot.jpg", "--data", "IMAGES"), "neither an SVG nor a PNG"),
        (("--probe", "calibration", "--out", "no/such/plot.svg", "--data", "IMAGES"), "there is no folder"),
        (("--probe", "calibration", "--data", "IMAGES"), "is neither a folder"),
    ],
)
def test_inspect_refuses_in_one_sentence(arguments, message, images, capsys):
    given = [str(images) if part == "IMAGES" else part for part in arguments]
    code, printed, said = run_cli(capsys, "inspect", "no-such-model", *given)
    assert code == 2 and not printed and message in said and said.count("\n") == 1


def test_list_names_all_probes(capsys):
    code, printed, _ = run_cli(capsys, "inspect", "--probe", "list")
    assert code == 0 and all(f"{id}: " in printed for id in probes())


# --- calibrate-confidence ---------------------------------------------------------------------------


def test_calibration_from_logits(tmp_path, capsys):
    file, out = logits_file(tmp_path / "logits.npz"), tmp_path / "out"
    code, printed, said = run_cli(capsys, "calibrate-confidence", file, "--out", out, "--json")
    assert code == 0, said
    record = json.loads(printed)
    rows = {row["method"]: row for row in record["table"]}
    assert set(rows) == {"as it is", *CALIBRATORS} and record["fitted_on"] == record["judged_on"] == 200
    assert rows["temperature"]["ece"] < 0.5 * rows["as it is"]["ece"]
    assert rows["temperature"]["nll"] < rows["as it is"]["nll"]
    assert rows["temperature"]["accuracy"] == rows["as it is"]["accuracy"]
    assert load_calibrator(out).temperature_ > 2
    assert (out / "reliability.svg").read_text().startswith("<svg")
    assert json.loads((out / "report.json").read_text())["kept"] == "temperature"
    code, _, said = run_cli(capsys, "calibrate-confidence", file, "--out", out)
    assert code == 2 and "pass --overwrite" in said
    code, printed, _ = run_cli(capsys, "calibrate-confidence", file, "--out", out, "--overwrite", "--keep", "vector")
    assert code == 0 and "vector is saved" in printed


@pytest.mark.parametrize("kind", CALIBRATORS)
def test_a_saved_calibrator_gives_the_same_bits(kind, tmp_path):
    g = torch.Generator().manual_seed(1)
    logits, labels = 3 * torch.randn(120, 4, generator=g).double(), torch.randint(4, (120,), generator=g)
    fitted = CALIBRATORS[kind]().fit(logits, labels)
    save_calibrator(fitted, tmp_path / "c", {"why": "a test"})
    new = torch.randn(30, 4, generator=g).double()
    assert torch.equal(load_calibrator(tmp_path / "c").transform(new), fitted.transform(new))


def test_bbq_is_the_mean_of_its_histograms():
    g = torch.Generator().manual_seed(2)
    x, right = torch.rand(200, generator=g), torch.randint(2, (200,), generator=g)
    got = BBQ().fit(x, right).transform(torch.tensor([0.0, 0.3, 1.0]))
    assert torch.isfinite(got).all() and (got > 0).all() and (got < 1).all()


def test_calibration_of_a_model(images):
    record = calibrate_confidence(
        (Images(), example()), images, columns={"images": "images", "label": "label"}, methods=("temperature",)
    )
    assert record["out"] is None and [row["method"] for row in record["table"]] == ["as it is", "temperature"]


def broken(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"logits": np.zeros((30, 3))}, "has no array 'labels', only logits"),
        ({"logits": np.zeros((30, 3)), "labels": np.zeros(29, int)}, "(n,) are needed"),
        ({"logits": np.zeros((30, 3)), "labels": np.full(30, 3)}, "labels go from 3 to 3"),
        ({"logits": np.full((30, 3), np.nan), "labels": np.zeros(30, int)}, "90 of the logits are not finite"),
        ({"logits": np.zeros((30, 3)), "labels": np.zeros(30)}, "the labels are float64"),
        ({"logits": np.zeros((0, 3)), "labels": np.zeros(0, int)}, "at least one whole number"),
        ({"logits": np.zeros((8, 3)), "labels": np.zeros(8, int)}, "20 are the least"),
        ({"logits": np.zeros(30), "labels": np.zeros(30, int)}, "logits are float64 (30,)"),
    ],
)
def test_calibration_refuses_in_one_sentence(arrays, message, tmp_path, capsys):
    code, printed, said = run_cli(capsys, "calibrate-confidence", broken(tmp_path / "x.npz", **arrays))
    assert code == 2 and not printed and message in said and said.count("\n") == 1


def test_more_refusals(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("not a zip file")
    file = logits_file(tmp_path / "logits.npz")
    for arguments, message in (
        ((tmp_path / "text.npz",), "cannot be read as an NPZ file"),
        ((tmp_path / "absent.npz",), "cannot be read as an NPZ file"),
        ((file, "--method", "magic"), "'magic' is no calibrator: there are temperature"),
        ((file, "--bins", "0"), "at least one is needed"),
        ((), "needs labelled examples"),
    ):
        code, _, said = run_cli(capsys, "calibrate-confidence", *arguments)
        assert code == 2 and message in said and said.count("\n") == 1, said
    for text in ('{"kind": "magic", "version": 1}', "[]", "{"):
        folder = tmp_path / "c"
        save_calibrator(CALIBRATORS["temperature"](), folder)
        (folder / "calibrator.json").write_text(text)
        with pytest.raises(Exception, match="is of kind|holds no calibrator"):
            load_calibrator(folder)
