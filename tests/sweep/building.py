"""A small random model of a class with inputs that it runs on, or the reason why there is none."""

import itertools
from typing import Any

import torch
from torch import nn

from . import inputs as examples
from .catalogue import Unit, config_class, model_class, tensors
from .small import PAD, START, Sizes, small

MOST_PARAMETERS = 45_000_000


class NotBuilt(Exception):
    """There is no small model of the class to attach to."""


def build(unit: Unit) -> tuple[Any, examples.Inputs]:
    """The first of several small configs whose model runs; in evaluation mode."""
    reasons: list[str] = []
    try:
        cls = model_class(unit)
    except Exception as error:
        raise NotBuilt(f"class: {first_line(error)}") from None
    for sizes in TRIES:
        try:
            model = made(cls, config_for(unit, cls, sizes))
        except NotBuilt:
            raise
        except Exception as error:
            reasons.append(f"model: {first_line(error)}")
            continue
        found = runs(model, reasons)
        if found is not None:
            return model, found
        reasons.append("no inputs: " + ", ".join(required(model)))
    raise NotBuilt(reasons[0])


def required(model: Any) -> list[str]:
    return [n for n, p in examples.names_of(model).items() if p.default is p.empty]


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def made(cls: Any, config: Any) -> Any:
    try:
        with torch.device("meta"):
            numbers = sum(p.numel() for p in cls(config).parameters())
    except Exception:  # many look at numbers while they are made
        numbers = 0
    if numbers > MOST_PARAMETERS:
        raise ValueError(f"{numbers / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = cls(config)
    if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
        raise ValueError("too many parameters")
    spread(model)
    return model.eval()


def runs(model: Any, reasons: list[str]) -> examples.Inputs | None:
    """The first inputs on which the plain model runs, twice to the same finite numbers."""
    cached = "use_cache" in examples.names_of(model)
    every = examples.candidates(model)
    without = ({**inputs, "use_cache": False} for inputs in examples.candidates(model)) if cached else ()
    for inputs in itertools.chain(every, without):
        try:
            one, two = (list(tensors(forward(model, inputs))) for _ in range(2))
        except Exception as error:
            reasons.append(f"forward: {first_line(error)}")
            continue
        if not one:
            reasons.append("forward: no tensor in the output")
        elif not all(torch.equal(a, b) for a, b in zip(one, two, strict=True)):
            finite = all(t.isfinite().all() for t in one)
            reasons.append("forward: " + ("two runs differ" if finite else "the output is not finite"))
        elif not all((t.isfinite() | t.isneginf()).all() for t in one if not t.is_complex()):
            reasons.append("forward: the output is not finite")
        else:
            return inputs
    return None


def forward(model: Any, inputs: examples.Inputs, call: Any = None, **more: Any) -> Any:
    """One run without gradients; the same dice each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return (call or model)(**inputs, **more)


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Weights as large as in a trained model, and none that switches a layer off; usual starts hardly move anything."""
    generator = torch.Generator().manual_seed(0)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if not p.numel():
            continue
        if not p.isfinite().all():  # nobody wrote it
            p.copy_(0.5 + 0.1 * noise)
        if p.ndim >= 2:
            if id(p) in embeddings:
                p.copy_(0.7 * noise)
            elif float(p.std()) > 0 or float(p.abs().max()) == 0:  # not what holds one number
                p.copy_(noise / p[0].numel() ** 0.5)
        elif name.endswith("bias"):
            p.copy_(0.1 * noise)
        elif float(p.abs().mean()) < 1e-2:  # LayerScale, gates
            p.copy_(0.5 + 0.1 * noise)


def _composite(unit: Unit) -> Any:
    """Models that are made of two others."""
    import transformers as T

    sizes, cls = Sizes(), config_class(unit)
    if unit.model_type == "vision-text-dual-encoder":
        return cls.from_vision_text_configs(small(T.ViTConfig, sizes), small(T.BertConfig, sizes))
    first = {
        "encoder-decoder": T.BertConfig,
        "vision-encoder-decoder": T.ViTConfig,
        "speech-encoder-decoder": T.Wav2Vec2Config,
    }
    text = small(T.BertConfig, sizes, is_decoder=True, add_cross_attention=True)
    config = cls.from_encoder_decoder_configs(small(first[unit.model_type], sizes), text)
    config.pad_token_id, config.decoder_start_token_id = PAD, START
    return config


COMPOSITE = ("encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder", "vision-text-dual-encoder")
# By model type, where names alone do not tell; fields of configs inside as "text_config.hidden_size".
CHOICES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 80, "IMGIMGBA": 81}},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 1e4} for k in ("full_attention", "sliding_attention")
        }
    },
    "cohere_compass": {
        "text_config.rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 1e4} for k in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "emu3": {"vocabulary_map": {"<image>": 80, "<|visual token 000000|>": 81}},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "lilt": {"hidden_size": 48},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
    },
    "ernie4_5_vl_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}
    },
    "xmod": {"default_language": "en_XX"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "mistral4": {"qk_nope_head_dim": 8},
    "sam2": {"vision_config.backbone_config.hidden_size": 96},
    "sam2_video": {"vision_config.backbone_config.hidden_size": 96},
    "step3p7": {"text_config.sliding_window": 4},
    "swin2sr": {"embed_dim": 60},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "perceiver": {"qk_channels": 32, "v_channels": 32, "d_latents": 32},
    "hiera": {"embed_dim": 32},
}
TRIES = (
    Sizes(),
    Sizes(mrope=4),
    Sizes(kv_heads=4),
    Sizes(kv_heads=4, mrope=4),
    Sizes(given=True),
    Sizes(given=True, kv_heads=4),
    Sizes(layers=12),
    Sizes(layers=12, kv_heads=4, more=False),
    Sizes(more=False),
)


def config_for(unit: Unit, cls: Any, sizes: Sizes) -> Any:
    if unit.model_type in COMPOSITE:
        return _composite(unit)
    kind = config_class(unit)
    own = getattr(cls, "config_class", None) or kind
    config = small(kind if issubclass(kind, own) else own, sizes, **CHOICES.get(unit.model_type, {}))
    if "CAUSAL_LM" in unit.tasks and "is_decoder" in vars(config) and not config.is_encoder_decoder:
        config.is_decoder = True
    return config
