"""Text after a prompt, handed over as it comes; prefill and decoding timed apart.

Prefill reads the prompt and gives the first token: it costs arithmetic. Decoding gives one token after another, and reads
every weight for each: it costs memory traffic. So they have a speed each, in tokens per second:

    prefill = prompt tokens / (t_1 - t_0)        decode = (n - 1) / (t_n - t_1)

t_0 when the prompt goes in, t_i when token i of n comes out.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from laconic.errors import BadInput
from laconic.pipeline.source_base import first_line
from laconic.tasks.base import quietly
from laconic.tasks.readers import Data
from laconic.tasks.view import ModelView

from .model import Opened, answering, check_verb
from .texts import tokenizer_for

__all__ = ["Generation", "generate"]

PROMPT = "the prompt"


@dataclass(frozen=True)
class Generation:
    """What a language model wrote.

    Attributes:
        text: without the prompt and without special tokens.
        prompt_tokens: read.
        new_tokens: written, the one that ends a text included.
        ended: "end" if the model ended its text, "length" if the bound did.
        prefill_seconds: until the first token.
        decode_seconds: from the first token to the last.
        notes: sentences on what was decided.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    ended: str
    prefill_seconds: float
    decode_seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt read in a second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """Tokens written in a second after the first; None if there is only one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None

    def to_json(self) -> dict[str, Any]:
        """As the command line prints it."""
        rates = {"prefill_tokens_per_second": self.prefill_rate, "decode_tokens_per_second": self.decode_rate}
        return {**asdict(self), **rates}


def generate(
    opened: Opened,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Let a language model go on from a prompt.

    Args:
        opened: the model.
        prompt: where to go on from; for an encoder-decoder, what the encoder reads.
        max_new_tokens: bound on what is written.
        temperature: 0 takes the most probable token each time; above it tokens are drawn from softmax(logits / T).
        top_k, top_p: draw among the k most probable, or the fewest that have p of the probability; by default all.
        seed: of the draws.
        chat: put the prompt into the tokenizer's chat template, as what the user says.
        on_text: is given the text piece by piece, as its tokens come.

    Raises:
        BadInput: it is no language model, has no tokenizer or chat template, or the prompt does not fit its window.
    """
    check_verb(opened, "generate")
    _check_options(max_new_tokens, temperature, top_k, top_p)
    view, notes = opened.view(), []
    tokenizer = tokenizer_for(view, PROMPT)
    inputs = _encode(tokenizer, prompt, chat, opened)
    length = inputs["input_ids"].shape[1]
    view.check_ids(inputs["input_ids"], Data(PROMPT))
    bound = _within_window(view, length, max_new_tokens, notes)
    settings = _settings(opened.model, tokenizer, bound, temperature, top_k, top_p)
    clock = _Clock(tokenizer, on_text)
    with quietly(), answering(opened, PROMPT), torch.random.fork_rng():
        torch.manual_seed(seed)
        on_device = {name: value.to(opened.device) for name, value in inputs.items()}
        model: Any = opened.model
        model.generate(**on_device, generation_config=settings, streamer=clock)
    ends = settings.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return Generation(
        text=clock.text,
        prompt_tokens=length,
        new_tokens=len(clock.tokens),
        ended="end" if clock.tokens[-1] in ends else "length",
        prefill_seconds=clock.times[1] - clock.times[0],
        decode_seconds=clock.times[-1] - clock.times[1],
        notes=notes,
    )


class _Clock(BaseStreamer):
    """Notes when each token came, and hands over the text as far as no later token will change it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None):
        self.tokenizer, self.on_text = tokenizer, on_text
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.text = self.shown = ""

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then each token."""
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            return
        self.tokens += value.reshape(-1).tolist()
        self.text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        # Half a character decodes to the replacement character, and the other half comes with the next token.
        if self.text.startswith(self.shown) and not self.text.endswith("\ufffd"):
            self._show()

    def end(self) -> None:
        """What was held back."""
        self._show()

    def _show(self) -> None:
        new = self.text[len(self.shown) :]
        if new and self.on_text is not None:
            self.on_text(new)
        self.shown = self.text


def _check_options(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise BadInput(f"temperature must be 0 or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise BadInput(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise BadInput(f"top_p must be above 0 and at most 1, not {top_p}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise BadInput("top_k and top_p choose what is drawn from, and at temperature 0 nothing is: pass temperature 1")


def _encode(tokenizer: Any, prompt: str, chat: bool, opened: Opened) -> dict[str, torch.Tensor]:
    """Token ids (1, n) and their mask."""
    if chat and not getattr(tokenizer, "chat_template", None):
        raise BadInput(f"the tokenizer of {opened.name} has no chat template: leave out --chat")
    with quietly():
        if chat:
            said = [{"role": "user", "content": prompt}]
            try:
                found = tokenizer.apply_chat_template(
                    said, add_generation_prompt=True, return_dict=True, return_tensors="pt"
                )
            except Exception as error:  # a template is a program of its own
                raise BadInput(f"the chat template of {opened.name} fails: {first_line(error)}") from error
        else:
            found = tokenizer(prompt, return_tensors="pt")
    ids = found["input_ids"].long()
    if ids.shape[1] == 0:
        raise BadInput(f"the prompt has no tokens in the vocabulary of {opened.name}: say more")
    mask = found["attention_mask"] if "attention_mask" in found else torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask}


def _within_window(view: ModelView, length: int, asked: int, notes: list[str]) -> int:
    """New tokens that fit behind the prompt."""
    window = view.positions()
    if window is None:
        return asked
    if getattr(view.source.config, "is_encoder_decoder", False):  # prompt and answer have a window each
        if length > window:
            raise BadInput(f"the prompt has {length} tokens, and {view.name} reads {window} at most: shorten it")
        return min(asked, window - 1)
    if length >= window:
        raise BadInput(
            f"the prompt has {length} tokens, and {view.name} reads {window} in all, its answer included: shorten it"
        )
    if length + asked > window:
        notes.append(f"{view.name} has room for {window - length} tokens behind the prompt, {asked} were asked for")
    return min(asked, window - length)


def _settings(
    model: Any, tokenizer: Any, bound: int, temperature: float, top_k: int | None, top_p: float | None
) -> Any:
    """The model's own generation config (which tokens end a text), with our way to choose one."""
    found = copy.deepcopy(model.generation_config)
    found.max_length, found.max_new_tokens, found.num_beams = None, bound, 1
    found.do_sample = temperature > 0
    found.temperature, found.top_k, found.top_p = temperature or 1.0, top_k or 0, top_p or 1.0
    if found.eos_token_id is None:
        found.eos_token_id = tokenizer.eos_token_id
    if found.pad_token_id is None:
        found.pad_token_id = tokenizer.pad_token_id
    return found
