"""The zoo: tiny untrained models of every kind that laconic must handle.

Each entry builds in well under a second with a fixed seed, in eval mode, and brings inputs of its own. Widths
are 16 to 80, and many do not divide by 32, so that odd group sizes occur. Nothing is downloaded: transformers
models come from configs.

    for entry in ZOO.values():
        model = entry.build()
        floats = outputs(model, entry.example(model))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

Example = tuple[tuple, dict]
SEED = 0
VOCAB = 101


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: the key in `ZOO`.
        build: makes the model, seeded and in eval mode.
        example: `(model) -> (args, kwargs)`, real inputs on the model's device.
        auto: name of the transformers Auto class that loads it from a folder; None for plain torch modules.
        tied: whether two parameter names share one storage.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[nn.Module], Example]
    auto: str | None = None
    tied: bool = False


# --- plain torch models ---------------------------------------------------------------------------


class LSTMTagger(nn.Module):
    """Embedding, a two-layer bidirectional LSTM and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 24)
        self.lstm = nn.LSTM(24, 20, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(40, 7)

    def forward(self, ids: Tensor) -> Tensor:
        """Tags of token ids: (batch, length) -> (batch, length, 7)."""
        return self.head(self.lstm(self.embed(ids))[0])


class TorchTransformer(nn.Module):
    """`nn.TransformerEncoder`, which reads `self_attn.out_proj.weight` from the attention's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 48)
        layer = nn.TransformerEncoderLayer(48, 4, dim_feedforward=80, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(48, 5)

    def forward(self, ids: Tensor) -> Tensor:
        """Class scores of token ids: (batch, length) -> (batch, 5)."""
        return self.head(self.encoder(self.embed(ids)).mean(1))


class Attention(nn.Module):
    """A bare `nn.MultiheadAttention` between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(20, 40)
        self.attention = nn.MultiheadAttention(40, 4, batch_first=True)
        self.leave = nn.Linear(40, 20)

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention: (batch, length, 20) -> (batch, length, 20)."""
        h = self.enter(x)
        return self.leave(self.attention(h, h, h, need_weights=False)[0])


class RawParameters(nn.Module):
    """Parameters without a module class of their own: a matrix product, a scale, an einsum, a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(20, 48) / 20**0.5)
        self.scale = nn.Parameter(torch.rand(48) + 0.5)
        self.cube = nn.Parameter(torch.randn(3, 48, 36) / 48**0.5)
        self.rows = nn.ParameterList([torch.randn(36, 10) / 6, torch.randn(10)])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 20) -> (batch, 10)."""
        h = torch.tanh(x @ self.first) * self.scale
        h = torch.einsum("bi,eio->bo", h, self.cube)
        return h @ self.rows[0] + self.rows[1]


class CalledTwice(nn.Module):
    """One linear layer is used twice, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(20, 36)
        self.shared = nn.Linear(36, 36)
        self.never = nn.Linear(36, 36)
        self.leave = nn.Linear(36, 12)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 20) -> (batch, 12)."""
        h = torch.relu(self.enter(x))
        return self.leave(torch.relu(self.shared(torch.relu(self.shared(h)))))


class ConvNet(nn.Module):
    """Conv and batch-norm pairs (plain, grouped, residual), a linear and batch-norm pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.bn = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 20, 3, stride=2, bias=False)
        self.down_bn = nn.BatchNorm2d(20)
        self.both = nn.Conv2d(20, 20, 1)  # its output also goes to the residual sum: must not be folded
        self.both_bn = nn.BatchNorm2d(20)
        self.hidden = nn.Linear(20, 24)
        self.hidden_bn = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, 3, height, width) -> class scores (batch, 10)."""
        h = self.stem(x)
        h = torch.relu(self.bn(self.depthwise(h)) + h)
        h = torch.relu(self.down_bn(self.down(h)))
        both = self.both(h)
        h = torch.relu(self.both_bn(both) + both).mean((2, 3))
        return self.head(torch.relu(self.hidden_bn(self.hidden(h))))


# --- inputs ---------------------------------------------------------------------------------------


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _ids(model: nn.Module, batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(5, VOCAB, (batch, length), generator=_generator()).to(_device(model))


def _floats(*shape: int) -> Callable[[nn.Module], Tensor]:
    return lambda model: torch.randn(*shape, generator=_generator()).to(_device(model))


def _ones(model: nn.Module, batch: int = 2, length: int = 9) -> Tensor:
    return torch.ones(batch, length, dtype=torch.long, device=_device(model))


def _positional(make: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Example]:
    return lambda model: ((make(model),), {})


def _image(model: nn.Module) -> Example:
    return (), {"pixel_values": _floats(2, 3, 32, 32)(model)}


def _text(model: nn.Module) -> Example:
    return (), {"input_ids": _ids(model), "attention_mask": _ones(model)}


def _causal(model: nn.Module) -> Example:
    return (), {"input_ids": _ids(model), "attention_mask": _ones(model), "use_cache": False}


def _mamba(model: nn.Module) -> Example:
    return (), {"input_ids": _ids(model), "use_cache": False}


def _seq2seq(model: nn.Module) -> Example:
    inputs = {"input_ids": _ids(model), "attention_mask": _ones(model)}
    return (), {**inputs, "decoder_input_ids": _ids(model, length=5), "use_cache": False}


def _whisper(model: nn.Module) -> Example:
    decoder = _ids(model, length=5)
    return (), {"input_features": _floats(2, 20, 60)(model), "decoder_input_ids": decoder, "use_cache": False}


def _clip(model: nn.Module) -> Example:
    return (), {**_text(model)[1], **_image(model)[1]}


# --- transformers models --------------------------------------------------------------------------


def _hf(model_class: str, config_class: str, **options: Any) -> Callable[[], nn.Module]:
    """A builder of the class `model_class` from `config_class(**options)`, seeded, in eval mode."""

    def build() -> nn.Module:
        import transformers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            config = getattr(transformers, config_class)(**options)
            return _livened(getattr(transformers, model_class)(config)).eval()

    return build


def _plain(model_class: type[nn.Module]) -> Callable[[], nn.Module]:
    """A builder of a plain torch class, seeded, in eval mode."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return _livened(model_class()).eval()

    return build


@torch.no_grad()
def _livened(model: nn.Module) -> nn.Module:
    """Make constant parameters and buffers (unit scales, zero biases) random, so that losing one shows."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.05 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


_TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BERT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}
_LLAMA = {**_BERT, **_TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 64}
_ENC_DEC = {
    "d_model": 40,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 72,
    "decoder_ffn_dim": 72,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **_TOKENS,
}
_CLIP_HALF = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}

_ENTRIES = (
    Entry(
        "bert",
        _hf("BertForMaskedLM", "BertConfig", **_BERT, vocab_size=VOCAB, max_position_embeddings=32),
        _text,
        auto="AutoModelForMaskedLM",
        tied=True,
    ),
    Entry(
        "distilbert",
        _hf(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=VOCAB,
            dim=40,
            n_layers=2,
            n_heads=4,
            hidden_dim=72,
            max_position_embeddings=32,
            num_labels=3,
        ),
        _text,
        auto="AutoModelForSequenceClassification",
    ),
    Entry(
        "gpt2",
        _hf("GPT2LMHeadModel", "GPT2Config", **_TOKENS, n_positions=32, n_embd=48, n_layer=2, n_head=4),
        _causal,
        auto="AutoModelForCausalLM",
        tied=True,
    ),
    Entry(
        "opt",
        _hf(
            "OPTForCausalLM",
            "OPTConfig",
            **_TOKENS,
            hidden_size=48,
            word_embed_proj_dim=24,  # the 350M model's two projections
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=72,
            max_position_embeddings=32,
        ),
        _causal,
        auto="AutoModelForCausalLM",
        tied=True,
    ),
    Entry(
        "llama",
        _hf("LlamaForCausalLM", "LlamaConfig", **_LLAMA, tie_word_embeddings=False),
        _causal,
        auto="AutoModelForCausalLM",
    ),
    Entry(
        "llama_tied",
        _hf("LlamaForCausalLM", "LlamaConfig", **_LLAMA, tie_word_embeddings=True),
        _causal,
        auto="AutoModelForCausalLM",
        tied=True,
    ),
    Entry(
        "gemma2",
        _hf("Gemma2ForCausalLM", "Gemma2Config", **_LLAMA, head_dim=12, sliding_window=4),
        _causal,
        auto="AutoModelForCausalLM",
        tied=True,
    ),
    Entry(
        "mixtral",
        _hf("MixtralForCausalLM", "MixtralConfig", **_LLAMA, num_local_experts=4, num_experts_per_tok=2),
        _causal,
        auto="AutoModelForCausalLM",
    ),
    Entry(
        "qwen2_moe",
        _hf(
            "Qwen2MoeForCausalLM",
            "Qwen2MoeConfig",
            **_LLAMA,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=40,
            shared_expert_intermediate_size=56,
            decoder_sparse_step=1,
        ),
        _causal,
        auto="AutoModelForCausalLM",
    ),
    Entry(
        "mamba",
        _hf(
            "MambaForCausalLM",
            "MambaConfig",
            **_TOKENS,
            hidden_size=40,
            state_size=8,
            num_hidden_layers=2,
            time_step_rank=6,
        ),
        _mamba,
        auto="AutoModelForCausalLM",
        tied=True,
    ),
    Entry(
        "t5",
        _hf(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=VOCAB,
            d_model=40,
            d_kv=10,
            d_ff=72,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        _seq2seq,
        auto="AutoModelForSeq2SeqLM",
        tied=True,
    ),
    Entry(
        "bart",
        _hf("BartForConditionalGeneration", "BartConfig", **_ENC_DEC, max_position_embeddings=32),
        _seq2seq,
        auto="AutoModelForSeq2SeqLM",
        tied=True,
    ),
    Entry(
        "whisper",
        _hf(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            **_ENC_DEC,
            num_mel_bins=20,
            max_source_positions=30,
            max_target_positions=16,
        ),
        _whisper,
        auto="AutoModelForSpeechSeq2Seq",
        tied=True,
    ),
    Entry(
        "vit",
        _hf("ViTForImageClassification", "ViTConfig", **_BERT, image_size=32, patch_size=8, num_labels=5),
        _image,
        auto="AutoModelForImageClassification",
    ),
    Entry(
        "swin",
        _hf(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=4,
            embed_dim=24,
            depths=[2, 1],
            num_heads=[2, 4],
            window_size=4,
            num_labels=5,
        ),
        _image,
        auto="AutoModelForImageClassification",
    ),
    Entry(
        "convnext",
        _hf(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[16, 24],
            depths=[1, 2],
            num_stages=2,
            num_labels=5,
        ),
        _image,
        auto="AutoModelForImageClassification",
    ),
    Entry(
        "resnet",
        _hf(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=16,
            hidden_sizes=[16, 24],
            depths=[1, 2],
            layer_type="basic",
            num_labels=5,
        ),
        _image,
        auto="AutoModelForImageClassification",
    ),
    Entry(
        "clip",
        _hf(
            "CLIPModel",
            "CLIPConfig",
            text_config={**_CLIP_HALF, **_TOKENS, "max_position_embeddings": 32},
            vision_config={**_CLIP_HALF, "image_size": 32, "patch_size": 8},
            projection_dim=24,
        ),
        _clip,
        auto="AutoModel",
    ),
    Entry(
        "wav2vec2",
        _hf(
            "Wav2Vec2ForCTC",
            "Wav2Vec2Config",
            **_BERT,
            vocab_size=VOCAB,
            conv_dim=[16, 24],
            conv_stride=[5, 4],
            conv_kernel=[10, 8],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        lambda model: ((), {"input_values": _floats(2, 800)(model)}),
        auto="AutoModelForCTC",
    ),
    Entry("lstm", _plain(LSTMTagger), _positional(_ids)),
    Entry("transformer_encoder", _plain(TorchTransformer), _positional(_ids)),
    Entry("multihead_attention", _plain(Attention), _positional(_floats(2, 7, 20))),
    Entry("raw_parameters", _plain(RawParameters), _positional(_floats(4, 20))),
    Entry("called_twice", _plain(CalledTwice), _positional(_floats(4, 20))),
    Entry("convnet", _plain(ConvNet), _positional(_floats(2, 3, 12, 12))),
)
ZOO: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}


def llama_1b_meta() -> tuple[nn.Module, Example]:
    """A Llama of 1.2 billion parameters (the shapes of Llama 3.2 1B, tied) on meta, and inputs for it."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.zeros(1, 16, dtype=torch.long)
    return model, ((), {"input_ids": ids, "use_cache": False})


def outputs(model: nn.Module, example: Example) -> list[Tensor]:
    """All floating tensors in the output, in order, at any depth of tuples, lists, mappings, dataclasses.

    Args:
        model: the model to run, without gradients.
        example: `(args, kwargs)` as an entry's `example` gives them.
    """
    args, kwargs = example
    with torch.no_grad():
        return list(_tensors(model(*args, **kwargs)))


def _tensors(value: object):
    """Yield the floating tensors inside `value`, depth first."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
