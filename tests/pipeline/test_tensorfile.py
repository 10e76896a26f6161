"""Reading, checking and writing safetensors files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from laconic.errors import BadInput, LaconicError
from laconic.pipeline import tensorfile_reader, tensorfile_writer
from laconic.pipeline.tensorfile import TensorReader, TensorWriter, file_layout
from laconic.pipeline.tensorfile_format import DTYPES

DTYPES = list(DTYPES.values())


def tensor_of(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random bytes viewed as `dtype` (0 and 1 for bool)."""
    generator = torch.Generator().manual_seed(seed)
    top = 2 if dtype is torch.bool else 120  # below the exponents of nan and inf in every float format
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, top, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(*raw)


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with the given header, which may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def u8(begin: int, end: int, **changed: object) -> dict:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end], **changed}


# --- reading ------------------------------------------------------------------------------------------------


def test_reads_what_the_library_writes_in_every_dtype(tmp_path):
    # The library reads e8m0 and does not write it.
    names = {str(dtype): dtype for dtype in DTYPES if dtype is not torch.float8_e8m0fnu}
    tensors = {name: tensor_of(dtype, 3, 5) for name, dtype in names.items()}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "wide": torch.zeros(4, 0, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    with TensorReader(tmp_path / "t.safetensors") as reader:
        assert set(reader.names()) == set(tensors)
        assert reader.metadata == {"format": "pt"}
        assert reader.size == reader.header_bytes + sum(t.nbytes for t in tensors.values())
        for name, tensor in tensors.items():
            assert reader.spec(name) == (tensor.dtype, tuple(tensor.shape))
            assert same_bytes(reader.read(name), tensor)
        assert torch.equal(reader.read("torch.float32", 1, 3), tensors["torch.float32"][1:])
        assert reader.read("torch.bfloat16", 1, 1).shape == (0, 5)
        assert reader.read("wide", 1, 3).shape == (2, 0)
        with pytest.raises(IndexError, match="rows 1:4 of torch.bool"):
            reader.read("torch.bool", 1, 4)
        with pytest.raises(LaconicError, match="no tensor 'nobody'"):
            reader.read("nobody")


def test_reads_are_fresh_memory(tmp_path):
    save_file({"a": torch.ones(4)}, tmp_path / "t.safetensors")
    reader = TensorReader(tmp_path / "t.safetensors")
    reader.read("a").zero_()
    assert torch.equal(reader.read("a"), torch.ones(4))


def test_digest_is_streamed_and_knows_dtype_and_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile_reader, "CHUNK", 7)
    base = torch.arange(30, dtype=torch.int32)
    save_file(
        {"a": base, "b": base.reshape(5, 6).clone(), "c": base.clone().view(torch.float32)},
        tmp_path / "t.safetensors",
    )
    reader = TensorReader(tmp_path / "t.safetensors")
    assert reader.digest("a") == hashlib.sha256(b"I32:30:" + base.numpy().tobytes()).hexdigest()
    assert len({reader.digest(name) for name in "abc"}) == 3


def shards(folder: Path, total: int = 20) -> Path:
    save_file({"a": torch.ones(3)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return folder


def test_shards(tmp_path):
    with TensorReader(shards(tmp_path)) as reader:
        assert reader.names() == ["a", "b"] and reader.notes == []
        assert torch.equal(reader.read("a"), torch.ones(3)) and torch.equal(reader.read("b"), torch.zeros(2))
        assert reader.where("b")[0].name == "two.safetensors"
        assert reader.size == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))


def test_index_and_shards_disagree(tmp_path):
    shards(tmp_path, total=999)
    save_file({"b": torch.zeros(2), "c": torch.zeros(2)}, tmp_path / "two.safetensors")
    notes = " ".join(TensorReader(tmp_path).notes)
    assert "1 tensors in the shards are not in" in notes and "total_size 999, the shards hold 20" in notes
    save_file({"c": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(BadInput, match=r"says that b is in two.safetensors, but that file does not hold it"):
        TensorReader(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(BadInput, match=r"names two.safetensors \(1 tensors\), which is missing"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("shard", ["../two.safetensors", "/etc/passwd", "", 3])
def test_index_may_not_climb_out(tmp_path, shard):
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(BadInput, match="not a plain file name"):
        TensorReader(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "[" * 100_000]
)
def test_broken_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadInput, match="index.json is not a valid index"):
        TensorReader(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(BadInput, match="nowhere does not exist"):
        TensorReader(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds neither model.safetensors nor"):
        TensorReader(tmp_path)


LIES = {
    "hole": ({"a": u8(0, 4), "b": u8(8, 12)}, 12, "tensor b leaves a hole of 4 bytes behind a"),
    "hole at the start": ({"a": u8(4, 8)}, 8, "tensor a leaves a hole of 4 bytes behind the header"),
    "overlap": ({"a": u8(0, 4), "b": u8(2, 6)}, 6, "tensor b overlaps a"),
    "same place": ({"a": u8(0, 4), "b": u8(0, 4)}, 4, "tensor b overlaps a"),
    "cut short": ({"a": u8(0, 4), "b": u8(4, 12)}, 9, "tensor b ends at byte .*half a checkpoint"),
    "too long": ({"a": u8(0, 4)}, 9, "5 bytes behind its last tensor"),
    "bytes": (
        {"a": u8(0, 4, shape=[5])},
        4,
        r"tensor a of shape \[5\] and dtype U8 takes 5 bytes, .* gives it 4",
    ),
    "huge": ({"a": u8(0, 4, shape=[1 << 40, 1 << 40])}, 4, "tensor a of shape .* but the header gives it 4"),
    "dtype": ({"a": u8(0, 4, dtype="Q7")}, 4, "tensor a has dtype 'Q7', which laconic does not read"),
    "dtype list": ({"a": u8(0, 4, dtype=["U8"])}, 4, "which laconic does not read"),
    "negative": ({"a": u8(0, 4, shape=[-2, -2])}, 4, r"tensor a has shape \[-2, -2\]"),
    "shape text": ({"a": u8(0, 4, shape="4")}, 4, "tensor a has shape '4'"),
    "float shape": ({"a": u8(0, 4, shape=[4.0])}, 4, r"tensor a has shape \[4.0\]"),
    "backwards": ({"a": u8(0, 4, data_offsets=[4, 0])}, 4, r"tensor a has offsets \[4, 0\]"),
    "negative offset": ({"a": u8(0, 4, data_offsets=[-4, 0])}, 4, r"tensor a has offsets \[-4, 0\]"),
    "no shape": (
        {"a": {"dtype": "U8", "data_offsets": [0, 4]}},
        4,
        "tensor a lacks dtype, shape or data_offsets",
    ),
    "not a map": ({"a": 3}, 0, "tensor a lacks dtype, shape or data_offsets"),
    "twice": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":3}',
        0,
        "the header has the key 'a' twice",
    ),
    "not JSON": (b"{'a'", 0, "the header is not valid JSON"),
    "not UTF-8": (b"\xff\xfe", 0, "the header is not valid JSON"),
    "deep": (b"[" * 200_000, 0, "the header is not valid JSON"),
    "list": ([1], 0, "the header is not a JSON object"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "__metadata__ in the header is not a map of strings"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies(tmp_path, case):
    header, count, message = LIES[case]
    file = raw_file(tmp_path / "model.safetensors", header, bytes(count))
    with pytest.raises(BadInput, match=message) as caught:
        TensorReader(file)
    assert str(file) in str(caught.value)


def test_header_length(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(BadInput, match="claims a header of 500 bytes but has only 10 bytes: it is cut short"):
        TensorReader(raw_file(file, {}, length=500))
    with pytest.raises(BadInput, match="claims a header of .* above the format's 100 MB"):
        TensorReader(raw_file(file, {}, length=1 << 60))
    file.write_bytes(b"abc")
    with pytest.raises(BadInput, match="has only 3 bytes and is not a safetensors file"):
        TensorReader(file)


def test_file_shrinks_after_opening(tmp_path):
    save_file({"a": torch.ones(1000)}, tmp_path / "t.safetensors")
    reader = TensorReader(tmp_path / "t.safetensors")
    os.truncate(tmp_path / "t.safetensors", 500)
    with pytest.raises(BadInput, match="t.safetensors ended while a was read"):
        reader.read("a")


# --- writing ------------------------------------------------------------------------------------------------

SPECS = [
    ("big", torch.int32, (16, 8)),
    ("odd_words", torch.int32, (5, 7)),
    ("odd_half", torch.float16, (33, 3)),
    ("tiny", torch.float32, (3,)),
    ("shape", torch.int64, (2,)),
    ("flag", torch.bool, (1,)),
    ("scalar", torch.bfloat16, ()),
    ("empty", torch.float32, (0, 3)),
    ("codes", torch.uint8, (129,)),
]


def write_all(path: Path, order: list, metadata: dict | None = None) -> TensorWriter:
    with TensorWriter(path, order, metadata or {"format": "pt"}) as writer:
        for name, dtype, shape in order:
            writer.write(name, tensor_of(dtype, *shape))
    return writer


def test_the_library_reads_what_we_write(tmp_path):
    file = tmp_path / "t.safetensors"
    writer = write_all(file, SPECS)
    loaded = load_file(file)
    for name, dtype, shape in SPECS:
        assert same_bytes(loaded.pop(name), tensor_of(dtype, *shape))
    assert set(loaded) == set(writer.layout.padding) and loaded
    assert all(not tensor.any() for tensor in loaded.values())
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_alignment_and_every_byte_accounted_for(tmp_path):
    file = tmp_path / "t.safetensors"
    writer = write_all(file, SPECS)
    assert writer.header_bytes % 64 == 0
    for name, dtype, _ in SPECS:
        offset, nbytes = writer.layout.offsets[name]
        assert offset % (64 if nbytes >= 64 else dtype.itemsize) == 0
    tensors = sum(nbytes for _, nbytes in writer.layout.offsets.values())
    assert writer.header_bytes + writer.padding_bytes + tensors == writer.total_bytes == file.stat().st_size
    reader = TensorReader(file)
    assert set(reader.names()) == {name for name, _, _ in SPECS}
    assert (reader.header_bytes, reader.padding_bytes) == (writer.header_bytes, writer.padding_bytes)
    assert all(reader.where(name)[1] == writer.layout.offsets[name][0] for name in reader.names())


def test_even_widths_need_no_padding():
    specs = [(f"w{i}", dtype, (48, 64)) for i, dtype in enumerate(DTYPES)] + [("shape", torch.int64, (2,))]
    assert file_layout(specs).padding == {}


def test_bytes_do_not_depend_on_order(tmp_path):
    shuffled = SPECS.copy()
    random.Random(1).shuffle(shuffled)
    write_all(tmp_path / "a", SPECS, {"x": "1", "y": "2"})
    write_all(tmp_path / "b", shuffled, {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_existing_longer_file_is_replaced(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    write_all(tmp_path / "a", SPECS)
    write_all(tmp_path / "b", SPECS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_rows_in_any_order(tmp_path):
    tensor = tensor_of(torch.float32, 9, 5)
    with TensorWriter(tmp_path / "t", [("w", torch.float32, (9, 5))]) as writer:
        for start, stop in [(6, 9), (0, 2), (4, 6), (4, 4), (2, 5)]:
            assert writer.missing() == ["w"]
            writer.write_rows("w", start, tensor[start:stop])
        assert writer.missing() == []
    assert torch.equal(TensorReader(tmp_path / "t").read("w"), tensor)


def test_transposed_and_gradient_tensors_are_written(tmp_path):
    tensor = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    with TensorWriter(tmp_path / "t", [("w", torch.float32, (3, 2))]) as writer:
        writer.write("w", tensor.T)
    assert torch.equal(load_file(tmp_path / "t")["w"], tensor.T)


def test_incomplete_files_are_refused(tmp_path):
    writer = TensorWriter(tmp_path / "t", SPECS)
    writer.write("big", tensor_of(torch.int32, 16, 8))
    writer.write_rows("odd_words", 0, tensor_of(torch.int32, 4, 7))
    with pytest.raises(LaconicError, match="t is incomplete: odd_words, odd_half, tiny"):
        writer.close()
    with pytest.raises(LaconicError, match="is closed"):
        writer.write("big", tensor_of(torch.int32, 16, 8))
    with pytest.raises(KeyboardInterrupt), TensorWriter(tmp_path / "t", SPECS):
        raise KeyboardInterrupt  # what stopped the work is not hidden behind "incomplete"


def test_writes_are_checked(tmp_path):
    with pytest.raises(LaconicError), TensorWriter(tmp_path / "t", [("w", torch.float32, (4, 2))]) as writer:
        for name, tensor, message in [
            ("v", torch.zeros(4, 2), "'v' was not announced"),
            ("w", torch.zeros(4, 2).half(), "announced as torch.float32, given torch.float16"),
            ("w", torch.zeros(2, 4), r"announced with shape \(4, 2\), given \(2, 4\)"),
        ]:
            with pytest.raises(LaconicError, match=message):
                writer.write(name, tensor)
        for start, rows in [(3, 2), (-1, 1)]:
            with pytest.raises(LaconicError, match="do not fit into the shape"):
                writer.write_rows("w", start, torch.zeros(rows, 2))


@pytest.mark.parametrize("names", [["a", "a"], ["__pad_0"], ["__metadata__"]])
def test_names_that_cannot_be(names):
    with pytest.raises(ValueError, match="given twice or is reserved"):
        file_layout([(name, torch.float32, (2,)) for name in names])


def test_full_disk_is_found_up_front(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(tensorfile_writer.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BadInput, match=r"is full: t needs \d{5} bytes and 1000 are free; make room"):
        TensorWriter(tmp_path / "t", [("w", torch.float32, (3000,))])
    assert not (tmp_path / "t").exists()


def test_full_disk_while_reserving_and_writing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(tensorfile_writer.os, "posix_fallocate", full)
        with pytest.raises(BadInput, match="is full: t needs"):
            TensorWriter(tmp_path / "t", SPECS)
        assert not (tmp_path / "t").exists()
    writer = TensorWriter(tmp_path / "t", SPECS)
    monkeypatch.setattr(tensorfile_writer.os, "pwrite", full)
    with pytest.raises(BadInput, match="is full: t needs"):
        writer.write("big", tensor_of(torch.int32, 16, 8))
    writer.abandon()


def test_without_fallocate(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(tensorfile_writer.os, "posix_fallocate", unsupported)
    write_all(tmp_path / "a", SPECS)
    assert set(load_file(tmp_path / "a")) >= {name for name, _, _ in SPECS}


def test_views_equal_what_is_read_and_outlive_the_reader(tmp_path):
    tensors = {f"t{i}": tensor_of(dtype, i, 3, seed=i) for i, dtype in enumerate(DTYPES)}
    specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with TensorWriter(tmp_path / "a", specs) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    with TensorReader(tmp_path / "a") as reader:
        reader.prefetch()
        views = {name: reader.view(name) for name in reader.names()}
        assert all(same_bytes(views[name], reader.read(name)) for name in tensors)
    (tmp_path / "a").unlink()
    assert all(same_bytes(views[name], tensor) for name, tensor in tensors.items())


def test_a_view_that_is_written_to_leaves_the_file_alone(tmp_path):
    save_file({"a": torch.ones(64)}, tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with TensorReader(tmp_path / "a") as reader:
        view = reader.view("a")
        view.zero_()
        assert torch.equal(view, torch.zeros(64)) and torch.equal(reader.read("a"), torch.ones(64))
    assert (tmp_path / "a").read_bytes() == before


def test_unaligned_tensors_are_read(tmp_path):
    """Other writers do not align: an address that no float may have is copied to one that it may."""
    values = torch.arange(4.0)
    header = json.dumps({
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": {"dtype": "F32", "shape": [4], "data_offsets": [1, 17]},
    }).encode()  # fmt: skip
    header += b" " * (-len(header) % 8)
    raw_file(tmp_path / "a", header, b"\x07" + values.numpy().tobytes())
    with TensorReader(tmp_path / "a") as reader:
        assert reader.view("a").item() == 7 and torch.equal(reader.view("b"), values)
        assert reader.view("b").data_ptr() % 4 == 0


def test_reads_under_a_limit_on_address_space(tmp_path):
    """A 1 GB (sparse) file is read with only 256 MB of address space left: a memory map could not, and `view` reads instead."""
    rows, width = 1 << 14, 1 << 14
    size = rows * width * 4
    header = json.dumps({
        "w": {"dtype": "F32", "shape": [rows, width], "data_offsets": [0, size]},
        "v": {"dtype": "F32", "shape": [4], "data_offsets": [size, size + 16]},
    }).encode()  # fmt: skip
    file = raw_file(tmp_path / "model.safetensors", header)
    os.truncate(file, 8 + len(header) + size + 16)
    code = f"""
import resource
from laconic.pipeline.tensorfile import TensorReader
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
reader = TensorReader({str(file)!r})
reader.prefetch()
print(reader.read("w", {rows - 100}, {rows}).shape, reader.view("v").tolist())
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to know the address space in use")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"torch.Size([100, {width}]) [0.0, 0.0, 0.0, 0.0]", done.stderr
