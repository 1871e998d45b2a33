"""Which layers of a Hugging Face model attend, and with what sizes: found by running tokens, an image or a sound."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixattn.attach.adapter import evaluating
from prefixattn.attach.hf import interface

SOURCE, TARGET = 5, 3  # tokens of a trial, by which attention over another sequence shows
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # half types round as much as a wrong mask moves
HALF = 0.3
PLAIN = int, float, bool, str, tuple, type(None), Tensor  # of attributes
NO_ATTENTION = "pool", "linear", "lightning", "output"  # in names of what has no softmax over keys of its own


class Site(NamedTuple):
    path: str  # of the attention module, from the base model on
    kind: str  # "self", or "encoder", "decoder", "cross"
    heads: int  # H
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool
    window: int | None = None  # keys that a causal layer sees, the query's own among them
    source: int = 0  # the slot of the layer whose own keys these are: its own, or an earlier one's (Gemma 3n)


class Trial(NamedTuple):
    """Inputs, what the plain model makes of them, and what of that is not padding."""

    inputs: dict[str, Any]
    out: Tensor  # [B, L, ...]
    kept: Tensor | None  # [B, L], bool
    tolerance: float


def refuse(model: nn.Module, base: Any) -> None:
    """NotImplementedError if a model cannot be tried as it is."""
    name = type(base).__name__
    if execution_device(base).type == "meta":
        raise NotImplementedError(
            f"the weights of {name} are on the meta device, where attach can try nothing; attach after they are "
            "loaded, or before they are offloaded"
        )
    for module in model.modules():
        if getattr(module.__dict__.get("config"), "output_attentions", False) is True:
            raise NotImplementedError(
                f"config.output_attentions is True in {type(module).__name__}, but attention with a prefix never "
                "makes its weights; set it to False"
            )


def outermost(model: Any, base: Any) -> Any:
    """The model through which users go, if it runs on what attach tries a model with; else its base."""
    try:
        run(model, example(model))
    except Exception:  # a head that wants other inputs
        return base
    return model


def example(model: Any, ids: list[int] | None = None) -> dict[str, Any]:
    """The inputs of a forward pass of `model` on the tokens `ids`, or on some, or on one black image or silence."""
    config, name, device = model.config, model.main_input_name, execution_device(model)
    if name == "input_features":
        return _silence(model) | _targets(model)
    if name == "pixel_values":
        config = getattr(config, "vision_config", config)
        size = getattr(config, "image_size", None)
        if size is None:
            raise NotImplementedError(
                f"{type(model).__name__} takes images, but its config has no image_size, so attach cannot try it"
            )
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        return {name: torch.zeros(1, channels, height, width, device=device, dtype=model.dtype)}
    if name != "input_ids":
        raise NotImplementedError(
            f"{type(model).__name__} takes {name}; attach tries a model with tokens (input_ids), images "
            "(pixel_values) or what Whisper hears (input_features)"
        )
    tokens = torch.tensor([_ordinary(model) if ids is None else ids], device=device)
    return {name: tokens} | _targets(model, ids)


def _targets(model: Any, ids: list[int] | None = None) -> dict[str, Any]:
    """What a decoder takes beside the input of an encoder, and that nothing is cached."""
    inputs: dict[str, Any] = {}
    if model.config.is_encoder_decoder:
        tokens = _ordinary(model)[:TARGET] if ids is None else ids
        inputs["decoder_input_ids"] = torch.tensor([tokens], device=execution_device(model))
    if "use_cache" in interface.arguments(model):
        inputs["use_cache"] = False
    return inputs


def _silence(model: Any) -> dict[str, Any]:
    """The only length of sound that Whisper's encoder takes."""
    bins, positions = (getattr(model.config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if bins is None or positions is None:
        raise NotImplementedError(
            f"{type(model).__name__} takes input_features, but its config has not both num_mel_bins and "
            "max_source_positions, as Whisper's has, so attach cannot try it"
        )
    return {"input_features": torch.zeros(1, bins, 2 * positions, device=execution_device(model), dtype=model.dtype)}


def execution_device(model: nn.Module) -> torch.device:
    """Where the model computes: of weights that accelerate keeps elsewhere, where it brings them."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if (device := getattr(hook, "execution_device", None)) is not None:
            return torch.device(device if isinstance(device, str | torch.device) else f"cuda:{device}")
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("meta"))


def _ordinary(model: Any) -> list[int]:
    """Tokens that mean nothing to the model, as padding or a place for an image does."""
    config = model.config.get_text_config()
    tokens = getattr(config, "vocab_size", None) or getattr(config, "vocabulary_size", None) or 30
    values = [v for c in (model.config, config) for k, v in vars(c).items() if "token" in k]
    special = {i for v in values for i in (v if isinstance(v, list | tuple) else [v]) if isinstance(i, int)}
    free = [i for i in range(min(tokens, 1000)) if i not in special] or list(range(tokens))
    return [free[(i + 1) * len(free) // (SOURCE + 1) % len(free)] for i in range(SOURCE)]


def computing_dtype(model: Any, device: torch.device) -> torch.dtype:
    # torch's question has no answer for meta, and raises
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    dtype: torch.dtype = model.dtype
    return dtype


def run(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[interface.Watched]]:
    """A forward pass in evaluation mode: the first of its outputs, and the calls of attention."""
    with evaluating(model), unchanged(model), torch.no_grad(), interface.watched() as calls:
        out = model(**inputs)
    hidden = getattr(out, "last_hidden_state", None)
    return _tensor(out if hidden is None else hidden), calls


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What a pass overwrites on the model's modules, as Swin its windows for a small image, is put back.

    What it adds stays: transformers notes so that it has hooked a model. All stays if weights were written to, of
    which attributes may tell.
    """
    libraries = {_library(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    # torch's own, and those of libraries for quantised weights, keep their books there
    own = [module for module in model.modules() if _library(module) in libraries]
    places: list[dict[str, Any]] = [place for module in own for place in (module.__dict__, module._buffers)]
    kept = [(place, {n: v for n, v in place.items() if isinstance(v, PLAIN)}) for place in places]
    weights = [t for t in (*model.parameters(), *model.buffers()) if not t.is_inference()]
    versions = [t._version for t in weights]
    try:
        yield
    finally:
        if versions == [t._version for t in weights]:
            for place, before in kept:
                for name, value in before.items():
                    if (now := place.get(name, ...)) is not value and isinstance(now, PLAIN):
                        place[name] = value


def _library(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]


def _tensor(out: Any) -> Tensor:
    """The first tensor of an output."""
    while not isinstance(out, Tensor):
        out = out[0]
    return out


def trials(base: Any) -> list[Trial]:
    """Runs the plain model: a sample, and, where a mask of padding is taken, a batch that is padded on both sides."""
    inputs = example(base)
    try:
        out = run(base, inputs)[0]
    except Exception as error:  # whatever a model does that wants other inputs
        raise NotImplementedError(
            f"attach tries {type(base).__name__} with {' and '.join(n for n in inputs if n != 'use_cache')} alone, and "
            f"without a prefix it fails: {brief(error)}"
        ) from error
    # the kernels of quantised weights round otherwise from call to call
    quantised = any(not t.is_floating_point() for t in base.parameters())
    allowed = HALF if quantised else tolerance(out)
    made = [Trial(inputs, out, None, allowed)]
    if "attention_mask" not in interface.arguments(base) or base.main_input_name != "input_ids":
        return made
    tokens = inputs["input_ids"].expand(2, SOURCE)
    mask = tokens.new_ones(2, SOURCE)
    mask[0, :2], mask[1, -2:] = 0, 0
    inputs = {**inputs, "input_ids": tokens.contiguous(), "attention_mask": mask}
    kept: Tensor | None = mask.bool()
    if base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["decoder_input_ids"].expand(2, TARGET).contiguous()
        kept = None
    try:
        out = run(base, inputs)[0]
    except Exception:  # it takes no such mask, and will say so
        return made
    fits = kept is None or out.shape[:2] == kept.shape
    return [*made, Trial(inputs, out, kept, allowed)] if fits else made


def tolerance(out: Tensor) -> float:
    """How far two ways to the same `out` may be apart. Under autocast its type is not what it was computed in."""
    autocasts = out.device.type != "meta" and torch.is_autocast_enabled(out.device.type) and out.dtype != torch.float64
    return TOLERANCE.get(torch.get_autocast_dtype(out.device.type) if autocasts else out.dtype, HALF)


def differs(trial: Trial, out: Tensor) -> float | None:
    """How far `out` is from the plain model's, if that is more than rounding: the median over the tokens."""
    if out.device.type == "meta":
        return None
    if out.shape != trial.out.shape:
        return float("inf")
    mine, plain = (t.double().reshape(*t.shape[:2], -1) for t in (out, trial.out))  # [B, L, width]
    apart = (mine - plain).norm(dim=-1) / plain.norm(dim=-1).clamp_min(1e-30)
    apart = apart[plain.isfinite().all(-1) if trial.kept is None else plain.isfinite().all(-1) & trial.kept]
    middle = float(apart.nan_to_num(float("inf")).median()) if apart.numel() else 0.0
    return middle if middle > trial.tolerance else None


def brief(error: BaseException) -> str:
    text = next(iter(str(error).splitlines()), "") or f"a {type(error).__name__} without words"
    return text if len(text) <= 200 else f"{text[:200]}..."


def check(base: Any, plain: list[Trial]) -> list[interface.Watched]:
    """The calls of attention in a model whose layers attend by way of the interface, with no prefix.

    NotImplementedError if it does not run so, or does not make what the plain model makes.
    """
    found: list[interface.Watched] = []
    for trial in plain:
        with interface.watched() as calls:
            try:
                out = run(base, trial.inputs)[0]
            except NotImplementedError:
                raise
            except Exception as error:  # whatever a model does that has never met another attention
                if not calls:
                    raise unknown(base) from error
                raise NotImplementedError(
                    f"{type(base).__name__} does not run with the attention that reads a prefix: {brief(error)}"
                ) from error
        found = found or calls
        if calls and (apart := differs(trial, out)) is not None:
            raise NotImplementedError(
                f"{type(base).__name__} computes something else with the attention that reads a prefix, even without "
                f"one: its output differs by {apart:.1e} of its size"
            )
    return found


def field(base: Any, config: Any, site: Site, name: str) -> Any:
    """A field of `config`, or where that has none, of the config nearest around a layer."""
    parts = site.path.split(".")
    around = (base.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1))
    for known in (config, *(module.__dict__.get("config") for module in around)):
        if (value := getattr(known, name, None)) is not None:
            return value
    raise NotImplementedError(
        f"attach reads {name} in a config, but neither that of {type(base).__name__} nor one around its layers has it"
    )


def own_attentions(base: nn.Module, inputs: dict[str, Any]) -> list[str]:
    """Paths of the attention layers that run without calling the interface."""
    calling, silent = set[str](), set[str]()
    with ExitStack() as hooks, interface.watched() as calls:
        before: list[int] = []
        for path, module in base.named_modules():
            name = type(module).__name__.lower()
            if not path or "attention" not in name or any(word in name for word in NO_ATTENTION):
                continue

            def enter(module: nn.Module, args: Any) -> None:
                before.append(len(calls))

            def leave(module: nn.Module, args: Any, out: Any, path: str = path) -> None:
                (calling if len(calls) > before.pop() else silent).add(path)

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        with evaluating(base), unchanged(base), torch.no_grad():
            base(**inputs)
    return sorted(path for path in silent - calling if not any(path.startswith(f"{other}.") for other in calling))


def unknown(base: Any) -> NotImplementedError:
    return NotImplementedError(
        f"attach does not know {type(base).__name__}: it has an attention of its own, and none of its layers calls "
        "transformers' attention interface"
    )


def sites(base: Any, calls: list[interface.Watched]) -> list[Site]:
    """The layers of `calls`, those of each kind together."""
    if not calls:
        raise unknown(base)
    paths = {module: path for path, module in base.named_modules()}
    if lost := [paths[call.module] for call in calls if not call.carried]:
        raise NotImplementedError(
            f"attach cannot reach the layers of {type(base).__name__}: {lost[0]} does not get, or does not pass on, "
            "the keyword arguments of the model's forward pass"
        )
    found: dict[str, list[Site]] = {}
    for call in calls:
        kind = _kind(call, base)
        left = call.window[0]
        window = left + 1 if call.causal and left >= 0 else None
        sizes = call.heads, call.key.shape[1], call.key.shape[3], call.value.shape[3]
        site = Site(paths[call.module], kind, *sizes, call.causal, window)
        if all(site.path != known.path for known in found.setdefault(kind, [])):
            found[kind].append(site)
    flat = [site for kind in ("self", "encoder", "decoder", "cross") for site in found.get(kind, [])]
    first: dict[int, int] = {}
    keys = {paths[call.module]: call.key.data_ptr() for call in reversed(calls)}
    for slot, site in enumerate(flat):
        flat[slot] = site._replace(source=first.setdefault(keys[site.path] or -slot - 1, slot))  # 0: on meta
    if len(heads := sorted({site.heads for site in flat})) > 1:
        raise NotImplementedError(
            f"the layers of {type(base).__name__} have {' or '.join(map(str, heads))} query heads; expected one number "
            "for all"
        )
    return flat


def _kind(call: interface.Watched, base: Any) -> str:
    if not base.config.is_encoder_decoder:
        return "self"
    if call.queries != call.key.shape[2]:
        return "cross"
    return "decoder" if call.causal or call.queries == TARGET else "encoder"
