"""The claim of `pc_codec`: bits per pixel of pictures it has not seen, against general compressors.

Both arms know the training pictures. The general compressors are given them before the test pictures, and what the test
pictures add is counted (zlib gets the last 32 kB as its dictionary, which is all that it can use); the best of the
three counts. The circuit is learned from them; its pseudocount is the best of three on the validation pictures. The
bytes of the circuit are not counted, as in the paper: they stand for the training pictures that the others keep.
"""

from __future__ import annotations

import bz2
import lzma
import zlib

import torch

from laconic.generate import PCCodec, learn_hclt
from laconic.tasks.small import small

LEVELS = 17  # of a pixel: 0 .. 16
LATENTS, STEPS, PSEUDOCOUNTS = 8, 50, (0.1, 1.0, 10.0)


def added_bytes(train: bytes, test: bytes) -> int:
    """Bytes that the test pictures add behind the training pictures, by the best of three compressors."""
    best = 9 | lzma.PRESET_EXTREME
    deflate = zlib.compressobj(9, zdict=train[-32768:])
    return min(
        len(deflate.compress(test) + deflate.flush()),
        len(bz2.compress(train + test)) - len(bz2.compress(train)),
        len(lzma.compress(train + test, preset=best)) - len(lzma.compress(train, preset=best)),
    )


def run(arm: str, seed: int, quick: bool = False) -> float:
    """Bits per pixel of the test pictures, packed as one message; `quick` tests the code and shows nothing."""
    task = small("digits", seed=seed, size=100 if quick else None)
    pixels = {split: (rows[:][0] * (LEVELS - 1)).round().long() for split, rows in task.data.items()}
    train, validate, test = (pixels[split] for split in ("train", "validate", "test"))
    if arm == "pc_codec":
        circuits = [
            learn_hclt(train, LEVELS, latents=LATENTS, steps=3 if quick else STEPS, pseudocount=alpha, seed=seed)
            for alpha in PSEUDOCOUNTS
        ]
        with torch.no_grad():
            codec = PCCodec(max(circuits, key=lambda circuit: float(circuit.log_prob(validate).sum())))
        packed = codec.encode(test)
        if not torch.equal(codec.decode(packed), test):
            raise RuntimeError("the pictures do not come back")
        print(f"{len(packed)} bytes for {len(test)} pictures; the circuit takes {codec.model_bytes}")
        size = len(packed)
    else:
        size = added_bytes(train.byte().numpy().tobytes(), test.byte().numpy().tobytes())
    return 8 * size / test.numel()
