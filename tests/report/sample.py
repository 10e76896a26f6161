"""A made-up record with the shape of a real one, as if a sentence encoder had been compressed."""

from __future__ import annotations

import numpy as np

INT8, INT4 = "v1/int8/channel/float16/minmax/znone/nearest", "v1/int4/group64/float16/mse/zint/nearest"
PARTS = (  # path within a block, rows, columns, operation
    ("attention.self.query.weight", 384, 384),
    ("attention.self.key.weight", 384, 384),
    ("attention.self.value.weight", 384, 384),
    ("attention.output.dense.weight", 384, 384),
    ("intermediate.dense.weight", 1536, 384),
    ("output.dense.weight", 384, 1536),
)
SENTENCE = "{:.2f}x smaller, drop 0.1 points (95 %: -0.2 to 0.5): met and certified"
HOSTILE = '<script>alert("x")</script>'


def histogram(rng: np.random.Generator, outliers: float) -> dict:
    """Counts of a normal sample with a few values `outliers` times as far out."""
    x = rng.standard_normal(4000) * 0.05
    x[:6] *= outliers
    counts, edges = np.histogram(x, bins=48)
    largest = float(np.abs(x).max())
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "absmax": largest,
        "outlier_ratio": largest / float(np.abs(x).std()),
    }


def unit(rng: np.random.Generator, name: str, rows: int, columns: int, op: str, bits: int, i: int) -> dict:
    """One weight with a scheme."""
    n = rows * columns
    loss = 0.004 * 2.0 ** (8 - bits) * float(rng.uniform(0.6, 1.6)) / 3
    return {
        "name": name,
        "kind": "weight",
        "op": op,
        "scheme": INT4 if bits == 4 else INT8,
        "bits": bits,
        "bytes_before": 4 * n,
        "bytes_after": n * bits // 8 + 2 * rows,
        "method": "gptq" if op == "linear" else "rtn",
        "loss": loss,
        "reason": None,
        "calls": 1,
        "macs": 64 * n if op == "linear" else 0,
        "ms": n / 2.1e6 if op == "linear" else 0.04,
        "histogram": histogram(rng, float(rng.uniform(1, 6))),
        "activation": histogram(rng, 14.0 if i % 17 == 5 else 2.0) if op == "linear" else None,
    }


def make_units(rng: np.random.Generator, count: int) -> list[dict]:
    """An embedding table and as many linear layers as make up `count`."""
    units = [unit(rng, "embeddings.word_embeddings.weight", 30522, 384, "embedding", 8, 0)]
    block = 0
    while len(units) < count:
        for path, rows, columns in PARTS[: count - len(units)]:
            bits = 4 if "intermediate" in path or block % 3 == 1 else 8
            units.append(
                unit(rng, f"encoder.layer.{block}.{path}", rows, columns, "linear", bits, len(units))
            )
        block += 1
    odd = units[-1]
    odd.update(
        scheme=None,
        bits=None,
        method=None,
        loss=None,
        bytes_after=odd["bytes_before"],
        reason="excluded by --exclude 'output.*'",
    )
    return units


def make_ledger(units: list[dict]) -> list[dict]:
    """The units, and beside each linear a bias and a norm that stay as they are."""
    rows = []
    for u in units:
        columns = 1536 if u["name"].endswith("layer.output.dense.weight") else 384
        dtype = "int32" if u["scheme"] else "float32"
        rows.append(
            {
                "name": u["name"],
                "dtype": dtype,
                "shape": [u["bytes_before"] // 4 // columns, columns],
                "bytes": u["bytes_after"],
                "scheme": u["scheme"],
                "method": u["method"],
                "reason": u["reason"],
            }
        )
        if u["op"] == "linear":
            rows.append(
                {
                    "name": u["name"].replace("weight", "bias"),
                    "dtype": "float32",
                    "shape": [384],
                    "bytes": 1536,
                    "scheme": None,
                    "method": None,
                    "reason": "one dimension: too small to be worth a scheme",
                }
            )
    rows.append(
        {
            "name": "embeddings.position_ids",
            "dtype": "int64",
            "shape": [1, 512],
            "bytes": 4096,
            "scheme": None,
            "method": None,
            "reason": "not floating point",
        }
    )
    return rows


def make_tried(size: int) -> list[dict]:
    """Candidates on the select split, and the chosen one on both."""
    found = [
        ("int8 everywhere", 1.06, 0.02, 0.2),
        ("int8, table int4", 0.93, 0.31, 0.3),
        ("int4 in the MLPs", 1.0, 0.08, 0.3),
        ("int4 everywhere", 0.72, 1.62, 0.6),
        ("int4 but the first block", 0.79, 0.9, 0.5),
        ("int4, round to nearest", 0.72, 2.9, 0.7),
        ("int3 everywhere", 0.57, 7.4, 1.2),
        ("int2", 0.43, 38.0, 2.5),
    ]
    rows = [
        {
            "name": name,
            "size": round(size * share),
            "drop": drop,
            "low": drop - spread,
            "high": drop + spread,
            "split": "select",
            "chosen": name == "int4 in the MLPs",
        }
        for name, share, drop, spread in found
    ]
    rows.append(
        {
            "name": "int4 in the MLPs",
            "size": size,
            "drop": 0.1,
            "low": -0.2,
            "high": 0.5,
            "split": "verify",
            "chosen": True,
        }
    )
    return rows


def make_record(count: int = 40, seed: int = 0) -> dict:
    """A whole record with `count` units."""
    rng = np.random.default_rng(seed)
    units = make_units(rng, count)
    ledger = make_ledger(units)
    header, padding = 18_432, 1_216
    after = sum(row["bytes"] for row in ledger) + header + padding
    before = sum(u["bytes_before"] for u in units) + 1536 * count
    texts = (
        "Shares in the phone maker fell after it warned that sales would be weaker than hoped.",
        "The striker scored twice as the visitors came from behind to win the replay.",
        f"An article that tries to be markup: {HOSTILE} & more <b>of it</b>.",
        "Viewers voted the sitcom's last episode the best of the decade, ahead of two dramas.",
    )
    topics = ("business", "sport", "tech", "entertainment", "politics")
    return {
        "version": 1,
        "command": 'laconic compress minilm --task minilm-bbc --budget "size=4x, drop=1" --out small',
        "seed": seed,
        "verdict": {
            "met": True,
            "certified": True,
            "exit_code": 0,
            "sentence": SENTENCE.format(before / after),
        },
        "model": {"name": "minilm", "kind": "transformers", "class": "BertModel", "parameters": before // 4},
        "task": {
            "id": "minilm-bbc",
            "metric": "same-topic retrieval P@1",
            "higher_is_better": True,
            "bounded": True,
            "unit": "points",
            "verify_n": 1725,
        },
        "budget": {
            "size": {"text": "4x", "bytes": round(before / 4)},
            "drop": 1.0,
            "latency": None,
            "memory": None,
        },
        "before": {"size": before, "value": 0.9571, "latency_ms": 41.23, "peak_rss": 812_000_000},
        "after": {"size": after, "value": 0.9561, "latency_ms": 47.9, "peak_rss": 571_000_000},
        "ratio": before / after,
        "drop": 0.1,
        "drop_low": -0.2,
        "drop_high": 0.5,
        "flips": 27,
        "also": {"linear probe accuracy": [0.9733, 0.9728]},
        "latency": {"batch": 8, "seq": 64, "threads": 2, "rounds": 20, "ratio": 0.861, "sentence": None},
        "coverage": 0.9962,
        "units_reused": 12,
        "units_total": count,
        "seconds": {
            "total": 164.2,
            "stages": {
                "load": 3.1,
                "calibrate": 21.0,
                "sensitivity": 48.2,
                "solve": 61.7,
                "repair": 8.9,
                "verify": 19.4,
                "save": 1.9,
            },
        },
        "peak_rss_bytes": 1_412_000_000,
        "tried": make_tried(after),
        "units": units,
        "ledger": ledger,
        "ledger_header": header,
        "ledger_padding": padding,
        "changed": [
            {"example": texts[i % 4], "before": topics[i % 5], "after": topics[(i + 2) % 5]}
            for i in range(27)
        ],
        "notes": [
            "The kernel for int4 weights is plain PyTorch on this machine: run `laconic doctor` to see why.",
            f"A hostile note {HOSTILE}",
        ],
        "machine": {
            "cpu": "Example CPU at 2.6 GHz",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 25_276_510_208,
            "os": "Linux 6.1",
        },
        "versions": {"laconic": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "kernels": {"present": True, "isa": "avx2", "ops": {"unpack": "C++", "linear": "PyTorch reference"}},
        "out": "small",
        "report": "small/report.html",
    }


def make_plan(count: int = 40) -> dict:
    """What would be planned for the same model."""
    record = make_record(count)
    units = [
        {key: u[key] for key in ("name", "op", "scheme", "bytes_before", "bytes_after", "reason")}
        | {"kernel": "reference" if u["bits"] == 4 else "C++"}
        for u in record["units"]
    ]
    size = record["before"]["size"]
    return {
        "model": "minilm",
        "size_before": size,
        "size_after": record["after"]["size"],
        "least": size // 13,
        "peak_rss_estimate": 1_300_000_000,
        "seconds_estimate": 171.0,
        "units": units,
        "notes": [],
    }
