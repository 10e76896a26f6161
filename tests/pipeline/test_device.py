"""Compression on a GPU: run where there is one."""

from __future__ import annotations

import pytest
import torch

import laconic
from laconic.pipeline.compress import compress

from .runs import save, token_file

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


def test_a_gpu_gives_an_artifact_like_that_of_the_cpu(tmp_path):
    folder, data = save("llama", tmp_path / "float"), token_file(tmp_path / "t.npz")
    found = {d: compress(folder, data, "size=4x", out=tmp_path / d, device=d) for d in ("cpu", "cuda")}
    assert found["cuda"].met and found["cuda"].ratio == pytest.approx(found["cpu"].ratio, rel=0.05)
    assert found["cuda"].drop == pytest.approx(found["cpu"].drop, abs=2.0)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        here = laconic.load(found["cuda"].out)(ids).logits
        there = laconic.load(found["cuda"].out, device="cuda")(ids.cuda()).logits.cpu()
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)
