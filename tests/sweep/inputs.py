"""Example inputs of a small model, and labels for its loss."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch

from .small import BOS, EOS, PAD, VOCABULARY

TOKENS, TARGETS, BATCH = 9, 6, 2
Inputs = dict[str, Any]


def drawn(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(length: int = TOKENS, seed: int = 1, batch: int = BATCH) -> torch.Tensor:
    return torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(seed))


def names_of(model: Any) -> dict[str, inspect.Parameter]:
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    return {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def candidates(model: Any) -> Iterator[Inputs]:
    """Inputs to be tried one after another, from the fewest on."""
    names = names_of(model)
    needed = [n for n, p in names.items() if p.default is p.empty]
    main = model.main_input_name if isinstance(model.main_input_name, str) else "pixel_values"
    first = [n for n in dict.fromkeys([main, *needed]) if n in names or n == main]
    wholes = [first]
    for extra in ("input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids", "bbox"):
        if extra in names and extra not in first:
            wholes.append([*first, extra])
    if {"pixel_values", "input_ids"} <= set(names):
        wholes.append(list(dict.fromkeys([*first, "input_ids", "pixel_values", "attention_mask"])))
        wholes.append(list(dict.fromkeys([*first, "input_ids", "pixel_values", "bbox"])))
        wholes.append(list(dict.fromkeys([*first, "input_ids", "pixel_values", "qformer_input_ids", "decoder_input_ids"])))
    if {"input_features", "input_ids"} <= set(names):
        wholes.append(list(dict.fromkeys([*first, "input_ids", "input_features", "attention_mask"])))
    targets = ["decoder_input_ids"] if model.config.is_encoder_decoder and "decoder_input_ids" in names else []
    for whole in wholes:
        for with_targets in ([targets, []] if targets and not _pooled(model) else [[], targets] if targets else [[]]):
            chosen = [n for n in dict.fromkeys([*whole, *with_targets]) if n in names]
            options = [_options(n, model) for n in chosen]
            if all(options):
                for values in itertools.islice(itertools.product(*options), 24):
                    yield {n: (v.clone() if isinstance(v, torch.Tensor) else v) for n, v in zip(chosen, values, strict=True)}


def _pooled(model: Any) -> bool:
    return any(word in type(model).__name__ for word in ("SequenceClassification", "QuestionAnswering"))


def _part(config: Any, *names: str) -> Any:
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        return value["height"], value["width"]
    return (value, value) if isinstance(value, int) else (value[-2], value[-1])


def _images(config: Any) -> Iterator[tuple[int, int, int]]:
    vision = _part(config, "vision_config", "encoder", "backbone_config", "image_encoder_config")
    vision = _part(vision, "backbone_config")
    channels = getattr(vision, "num_channels", getattr(vision, "in_channels", getattr(vision, "in_chans", 3)))
    channels = channels if isinstance(channels, int) else 3
    sizes = [getattr(c, n) for c in (vision, config) for n in ("image_size", "img_size", "crop_size", "input_size") if getattr(c, n, None)]
    for size in dict.fromkeys([*(_pair(s) for s in sizes if s), (32, 32), (64, 64), (224, 224)]):
        yield channels, *size


def _options(name: str, model: Any) -> list[Any]:
    """What a parameter of the name may be; empty if nobody knows."""
    config = model.config
    if name in ("input_ids", "qformer_input_ids"):
        ids = tokens()
        if model.config.is_encoder_decoder and _pooled(model) or "clip" in config.model_type:
            ids[:, 4] = EOS  # pooled there
        if "MultipleChoice" in type(model).__name__:
            return [ids[:, None].repeat(1, 2, 1)]
        codebooks = getattr(config, "num_codebooks", None)
        return [ids, *([tokens(TOKENS * codebooks).view(BATCH, TOKENS, codebooks)] if isinstance(codebooks, int) else [])]
    if name == "decoder_input_ids":
        return [tokens(TARGETS, seed=2), tokens(TOKENS, seed=2)]
    if name in ("attention_mask", "input_mask"):
        return [torch.ones(BATCH, TOKENS, dtype=torch.long)]
    if name == "bbox":
        box = torch.tensor([1, 1, 8, 8])
        return [box.expand(BATCH, TOKENS, 4), box.expand(BATCH, TOKENS, 4) / 64, torch.ones(BATCH, TOKENS, 8)]
    if name in ("pixel_values", "pixel_values_videos", "inputs"):
        frames = getattr(_part(config, "vision_config"), "num_frames", getattr(config, "frames_per_clip", None))
        shapes = list(_images(config))
        if frames or name.endswith("videos"):
            return [drawn(BATCH, frames or 4, *s) for s in shapes] + [drawn(BATCH, *s) for s in shapes[:2]]
        return [drawn(BATCH, *s) for s in shapes]
    if name in ("hidden_states", "grid_thw", "image_grid_thw"):
        patch, channels = _pair(getattr(config, "patch_size", 8))[0], getattr(config, "in_channels", getattr(config, "num_channels", 3))
        if name == "hidden_states":
            return [drawn(16, channels * t * patch * patch) for t in dict.fromkeys([getattr(config, "temporal_patch_size", 1), 1])]
        return [torch.tensor([[1, 4, 4]])]
    if name in ("input_features", "audio_mel"):
        audio = _part(config, "audio_config", "encoder_config", "encoder")
        mels = next((v for c in (audio, config) for n in ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "input_feat_size", "input_dim") if isinstance(v := getattr(c, n, None), int)), 80)
        most = next((v for c in (audio, config) if isinstance(v := getattr(c, "max_source_positions", None), int)), None)
        lengths = [*([2 * most] if most else []), 64, 128]
        return [drawn(BATCH, mels, n) for n in lengths] + [drawn(BATCH, n, mels) for n in lengths]
    if name == "input_values":
        return [drawn(BATCH, 3200), drawn(BATCH, 1, 3200), drawn(BATCH, 1, 64, 64), drawn(BATCH, 64, 32), drawn(BATCH, 16000)]
    if name in ("input_features_mask", "audio_mel_mask"):
        return [torch.ones(BATCH, 64, dtype=torch.long)]
    if name == "past_values":
        length = getattr(config, "context_length", None) or 32
        channels = getattr(config, "num_input_channels", getattr(config, "input_size", 1))
        lags = max(getattr(config, "lags_sequence", None) or [0])
        return [drawn(BATCH, length, channels), drawn(BATCH, length), drawn(BATCH, length + lags)]
    if name in ("past_time_features", "past_observed_mask"):
        length = (getattr(config, "context_length", None) or 32) + max(getattr(config, "lags_sequence", None) or [0])
        features = getattr(config, "num_time_features", 0)
        return [torch.ones(BATCH, length, features) if name == "past_time_features" else torch.ones(BATCH, length)]
    if name == "bool_masked_pos":
        return [(torch.arange(n) % 2 == 0).expand(BATCH, n) for n in (16, 32)]
    if name == "flattened_patches":
        return [torch.cat([torch.ones(BATCH, 9, 2), drawn(BATCH, 9, getattr(_part(config, "vision_config"), "patch_embed_hidden_size", 768))], -1)]
    if name == "query_embeds":
        return [drawn(BATCH, 4, config.hidden_size)]
    if name == "inputs_embeds":
        return [drawn(BATCH, TOKENS, config.get_text_config().hidden_size)]
    return []


def labels(model: Any, inputs: Inputs) -> Iterator[Inputs]:
    """What may be added to the inputs to get a loss."""
    names, cls = names_of(model), type(model).__name__
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if "start_positions" in names:
        place = torch.tensor([2, 3])
        yield {"start_positions": place, "end_positions": place + 1}
    if "labels" in names:
        whole = torch.tensor([0, 1])
        if not any(word in cls for word in ("SequenceClassification", "ImageClassification", "MultipleChoice")) and ids is not None:
            yield {"labels": ids % 2 if "TokenClassification" in cls else ids.clone()}
        yield {"labels": whole}
        if ids is not None:
            yield {"labels": ids.clone()}
    if "return_loss" in names:
        yield {"return_loss": True}


__all__ = ["BOS", "PAD", "VOCABULARY", "Inputs", "candidates", "labels", "tokens"]
