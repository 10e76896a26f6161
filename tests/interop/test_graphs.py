"""ONNX in ONNX Runtime and OpenVINO, and torch.export: the same outputs as ours, the same codes inside."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import laconic
from laconic.errors import BadInput
from laconic.interop.graphs import export_onnx, export_torch
from laconic.nn import packed_specs
from laconic.pipeline.export import export
from tests.interop.models import drawn, logits, rounded_to
from tests.pipeline.artifacts import rounded
from tests.pipeline.runs import environ

LACKING = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
onnx_writer = pytest.mark.skipif(
    bool(LACKING), reason=f"{', '.join(LACKING)}, which ONNX is written with, not installed"
)
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 96}
IDS = [3, 17, 5, 90, 9, 9, 44]


class Net(nn.Module):
    """A convolution, an embedding's worth of linear layers, and a row whose groups end short."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.Linear(8 * 36, 80)
        self.out = nn.Linear(80, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 8, 6, 6) -> (batch, 10)."""
        return self.out(torch.relu(self.wide(torch.relu(self.conv(x)).flatten(1))))


def net() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Net().eval(), torch.randn(5, 8, 6, 6)


def in_onnxruntime(file: Path, *inputs: np.ndarray) -> np.ndarray:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime, which the file is replayed in, is not installed")
    options = runtime.SessionOptions()  # by default it rounds the inputs of products with 4-bit weights
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return session.run(None, {one.name: x for one, x in zip(session.get_inputs(), inputs, strict=True)})[0]


def in_openvino(file: Path, *inputs: np.ndarray) -> np.ndarray:
    openvino = pytest.importorskip("openvino", reason="openvino, which the file is replayed in, is not installed")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(file), "CPU", EXACT_OPENVINO)
    return compiled(list(inputs))[compiled.output(0)]


# By default it rounds the inputs of products with compressed weights.
EXACT_OPENVINO = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
PROGRAMS = pytest.mark.parametrize("program", [in_onnxruntime, in_openvino], ids=["onnxruntime", "openvino"])


@onnx_writer
@PROGRAMS
@pytest.mark.parametrize(
    ("scheme", "kinds"),
    [
        ("v1/int4/group32/float16/minmax/zint/nearest", {"UINT4"}),
        ("v1/int8/channel/float32/minmax/znone/nearest", {"INT8"}),
        ("v1/int6/channel/float32/minmax/zint/nearest", {"UINT8"}),
        ("v1/ternary/channel/float32/absmean/znone/nearest", {"INT4"}),
    ],
)
def test_a_module_in_onnx(tmp_path, scheme, kinds, program):
    from onnx import TensorProto, load

    from laconic.numerics import Scheme

    model, x = net()
    packed = laconic.load(rounded(model, tmp_path / "artifact", Scheme.parse(scheme)), into=Net())
    said = export_onnx(packed, ((x[:1],), {}), tmp_path / "m.onnx")
    stored = {one.name: one for one in load(tmp_path / "m.onnx").graph.initializer}
    held = {TensorProto.DataType.Name(one.data_type) for name, one in stored.items() if name.endswith(".codes")}
    assert held == kinds
    grouped = "group" in scheme
    assert [row["type"] for row in said.rows] == ["float" if grouped else "QDQ", "QDQ", "QDQ"]
    assert "no groups of inputs of a convolution" in said.notes[0] if grouped else not said.notes
    found = program(tmp_path / "m.onnx", x.numpy())  # another batch than the example's
    expected = packed(x).detach().numpy()
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@onnx_writer
@PROGRAMS
def test_a_language_model_in_onnx(tmp_path, program):
    artifact = rounded_to(
        drawn(**SMALL, tied=True), tmp_path / "artifact", "v1/int4/group32/float16/minmax/zint/nearest"
    )
    said = export(artifact, "onnx", tmp_path / "m.onnx")
    packed = laconic.load(artifact)
    assert said["types"] == {"QDQ": 8}
    assert __file__.rpartition("/tests/")[0].encode() not in (tmp_path / "m.onnx").read_bytes()
    ids = np.array([IDS, IDS[::-1]])
    inputs = _inputs(tmp_path / "m.onnx", ids)
    found = program(tmp_path / "m.onnx", *inputs)
    for row, tokens in enumerate((IDS, IDS[::-1])):
        expected = logits(packed, tokens).numpy()
        assert np.abs(found[row] - expected).max() < 1e-4 * np.abs(expected).max()


def _inputs(file: Path, ids: np.ndarray) -> list[np.ndarray]:
    import onnx

    names = [one.name for one in onnx.load(file).graph.input]
    assert names[0] == "input_ids"
    return [ids if name == "input_ids" else np.ones_like(ids) for name in names]


@onnx_writer
def test_what_onnx_has_no_numbers_for_is_float_with_a_note(tmp_path):
    from laconic.numerics import Scheme

    model, x = net()
    scheme = Scheme.parse("v1/levelsnf4/channel/float32/minmax/znone/nearest")
    packed = laconic.load(rounded(model, tmp_path / "artifact", scheme), into=Net())
    said = export_onnx(packed, ((x,), {}), tmp_path / "m.onnx")
    assert [row["type"] for row in said.rows] == ["float"] * 3 and "ONNX has no such numbers as" in said.notes[0]
    assert np.allclose(in_onnxruntime(tmp_path / "m.onnx", x.numpy()), packed(x).detach().numpy(), atol=1e-5)


def test_without_onnx_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    model, x = net()
    with pytest.raises(BadInput, match="pip install onnx onnxscript"):
        export_onnx(model, ((x,), {}), tmp_path / "m.onnx")


# --- torch.export ----------------------------------------------------------------------------------------------------

REPLAY = """
import sys, torch, laconic.nn
program = torch.export.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
torch.save(program.module()(*x)[0], sys.argv[3])
ops = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
assert any("laconic.linear" in op for op in ops), ops
"""


def replayed(file: Path, *inputs: torch.Tensor) -> torch.Tensor:
    """What a process that knows the ops alone says."""
    torch.save(inputs, file.with_suffix(".in"))
    command = [sys.executable, "-c", REPLAY, str(file), str(file.with_suffix(".in")), str(file.with_suffix(".out"))]
    done = subprocess.run(command, env=environ(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return torch.load(file.with_suffix(".out"), weights_only=True)


def test_torch_export_keeps_weights_packed(tmp_path):
    model, x = net()
    packed = laconic.load(rounded(model, tmp_path / "artifact"), into=Net())
    said = export_torch(packed, ((x[:1],), {}), tmp_path / "m.pt2")
    assert len(said.rows) == 3 and all(row["exact"] for row in said.rows)
    assert (tmp_path / "m.pt2").stat().st_size < sum(p.numel() * 4 for p in model.parameters())
    assert torch.allclose(replayed(tmp_path / "m.pt2", x), packed(x), atol=1e-6)
    assert len(packed_specs(packed)) == 3


def test_torch_export_of_a_language_model(tmp_path):
    pytest.importorskip("transformers")
    artifact = rounded_to(drawn(**SMALL), tmp_path / "artifact", "v1/int4/group32/float16/minmax/zint/nearest")
    said = export(artifact, "torch", tmp_path / "m.pt2")
    assert said["exact"] and "import laconic.nn before" in said["notes"][-1]
    program = torch.export.load(tmp_path / "m.pt2")
    ids = torch.tensor([IDS, IDS])
    wanted = [spec for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    found = program.module()(*[ids, *[torch.ones_like(ids)] * (len(wanted) - 1)])[0]
    assert torch.allclose(found[0], logits(laconic.load(artifact), IDS), atol=1e-4)


def test_a_model_that_cannot_be_exported_gets_a_sentence(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            raise RuntimeError("not today")

    with pytest.raises(BadInput, match="Odd cannot be exported by torch.export: RuntimeError: not today"):
        export_torch(Odd(), ((torch.zeros(1, 2),), {}), tmp_path / "m.pt2")
