"""A small random model of a class with inputs that it runs on, or the reason why there is none."""

import inspect
from typing import Any

import torch
from torch import nn

from . import inputs as examples
from .catalogue import Unit, config_class, model_class, tensors
from .small import Special, small

MOST_PARAMETERS = 30_000_000


class NotBuilt(Exception):
    """There is no small model of the class to attach to."""


def build(unit: Unit) -> tuple[Any, examples.Inputs]:
    """The first of several small configs whose model runs; in evaluation mode."""
    reasons: list[str] = []
    try:
        cls = model_class(unit)
    except Exception as error:
        raise NotBuilt(f"class: {first_line(error)}") from None
    for make in CONFIGS:
        try:
            model = made(cls, make(unit))
        except NotBuilt:
            raise
        except Exception as error:
            reasons.append(f"model: {first_line(error)}")
            continue
        found = runs(model, reasons)
        if found is not None:
            return model, found
    raise NotBuilt(reasons[0] if reasons else "no inputs: " + ", ".join(required(model)))


def required(model: Any) -> list[str]:
    return [n for n, p in examples.names_of(model).items() if p.default is p.empty]


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else ''}"


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
    for inputs in examples.candidates(model):
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
    """Weights as large as in a trained model, and none that switches a layer off; usual starts hardly move an output."""
    generator = torch.Generator().manual_seed(0)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim >= 2:
            if id(p) in embeddings:
                p.copy_(0.7 * noise)
            elif float(p.std()) > 0 or float(p.abs().max()) == 0:  # not what holds one number
                p.copy_(noise * 1.4 / p[0].numel() ** 0.5)
        elif name.endswith("bias"):
            p.copy_(0.1 * noise)
        elif p.numel() and float(p.abs().mean()) < 1e-2:  # LayerScale, gates
            p.copy_(0.5 + 0.1 * noise)


def _composite(unit: Unit) -> Any:
    """Models that are made of two others."""
    import transformers as T

    special = Special()
    text = small(T.BertConfig, special=special, is_decoder=True, add_cross_attention=True)
    encoders = {
        "encoder-decoder": lambda: small(T.BertConfig),
        "vision-encoder-decoder": lambda: small(T.ViTConfig),
        "speech-encoder-decoder": lambda: small(T.Wav2Vec2Config),
    }
    both = {
        "vision-text-dual-encoder": lambda c: c.from_vision_text_configs(small(T.ViTConfig), small(T.BertConfig)),
    }
    cls = config_class(unit)
    if unit.model_type in both:
        return both[unit.model_type](cls)
    config = cls.from_encoder_decoder_configs(encoders[unit.model_type](), text)
    config.pad_token_id, config.decoder_start_token_id = 0, 3
    return config


COMPOSITE = ("encoder-decoder", "vision-encoder-decoder", "speech-encoder-decoder", "vision-text-dual-encoder")
# More by model type, where the names alone do not tell; nested fields by "text_config.hidden_size".
CHOICES: dict[str, dict[str, Any]] = {}


def _config(more: bool) -> Any:
    def make(unit: Unit) -> Any:
        if unit.model_type in COMPOSITE:
            return _composite(unit)
        config = small(config_class(unit), more=more, **CHOICES.get(unit.model_type, {}))
        for task in unit.tasks:
            if task == "CAUSAL_LM" and "is_decoder" in vars(config) and not config.is_encoder_decoder:
                config.is_decoder = True
        return config

    return make


CONFIGS = (_config(True), _config(False))
assert inspect  # noqa: S101
