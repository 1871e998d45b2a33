"""Example inputs of a small model, and labels for its loss."""

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .small import EOS, PATCH, WIDTH

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
    if "spatial_shapes" in names:
        wholes.append(list(dict.fromkeys([*first, "pixel_values", "pixel_attention_mask", "spatial_shapes"])))
    if "attention_mask" in names:
        wholes += [[*first, "attention_mask"], [*first, "input_ids", "attention_mask"]]
    if {"pixel_values", "input_ids"} <= set(names):
        wholes.append(list(dict.fromkeys([*first, "input_ids", "pixel_values", "attention_mask"])))
        wholes.append(list(dict.fromkeys([*first, "input_ids", "pixel_values", "bbox"])))
        wholes.append(
            list(dict.fromkeys([*first, "input_ids", "pixel_values", "qformer_input_ids", "decoder_input_ids"]))
        )
    if {"input_features", "input_ids"} <= set(names):
        wholes.append(list(dict.fromkeys([*first, "input_ids", "input_features", "attention_mask"])))
    targets = ["decoder_input_ids"] if model.config.is_encoder_decoder and "decoder_input_ids" in names else []
    for whole in wholes:
        for with_targets in [targets, []] if targets and not _pooled(model) else [[], targets] if targets else [[]]:
            chosen = [n for n in dict.fromkeys([*whole, *with_targets]) if n in names]
            options = [_options(n, model) for n in chosen]
            if all(options):
                for values in itertools.islice(itertools.product(*options), 24):
                    yield {
                        n: (v.clone() if isinstance(v, torch.Tensor) else v)
                        for n, v in zip(chosen, values, strict=True)
                    }


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
    sizes = [
        getattr(c, n)
        for c in (vision, config)
        for n in ("image_size", "img_size", "crop_size", "input_size")
        if getattr(c, n, None)
    ]
    for size in dict.fromkeys([*(_pair(s) for s in sizes if s), (32, 32), (64, 64), (224, 224)]):
        yield channels, *size


def _options(name: str, model: Any) -> list[Any]:
    """What a parameter of the name may be; empty if nobody knows."""
    config = model.config
    if name in ("input_ids", "qformer_input_ids"):
        ids = tokens()
        if (model.config.is_encoder_decoder and _pooled(model)) or "clip" in config.model_type:
            eos = getattr(config, "eos_token_id", EOS)
            ids[:, 4] = eos if isinstance(eos, int) else EOS  # pooled there
        if "MultipleChoice" in type(model).__name__:
            return [torch.stack([ids, tokens(seed=4)], 1)]
        books = getattr(config, "num_codebooks", None)
        several = (
            [tokens(TOKENS * books).view(BATCH, TOKENS, books), tokens(batch=BATCH * books)]
            if isinstance(books, int)
            else []
        )
        return [ids, *several]
    if name == "decoder_input_ids":
        return [tokens(TARGETS, seed=2), tokens(TOKENS, seed=2)]
    if name in ("attention_mask", "input_mask"):
        return [torch.ones(BATCH, TOKENS, dtype=torch.long)]
    if name == "bbox":
        box = torch.tensor([1, 1, 8, 9])
        return [box.expand(BATCH, TOKENS, 4), box.expand(BATCH, TOKENS, 4) / 64, torch.ones(BATCH, TOKENS, 8)]
    if name in ("pixel_values", "pixel_values_videos", "inputs"):
        if name == "inputs" and getattr(config, "vocab_size", None) and "Image" not in type(model).__name__:
            return [tokens()]
        frames = getattr(_part(config, "vision_config"), "num_frames", getattr(config, "frames_per_clip", None))
        shapes = list(_images(config))
        if "spatial_shapes" in names_of(model):  # of patches
            return [drawn(BATCH, 16, shapes[0][0] * _pair(_part(config, "vision_config").patch_size)[0] ** 2)]
        if frames or name.endswith("videos"):
            return [drawn(BATCH, frames or 4, *s) for s in shapes] + [drawn(BATCH, *s) for s in shapes[:2]]
        return [drawn(BATCH, *s) for s in shapes]
    if name in ("hidden_states", "grid_thw", "image_grid_thw"):
        patch, channels = (
            _pair(getattr(config, "patch_size", 8))[0],
            getattr(config, "in_channels", getattr(config, "num_channels", 3)),
        )
        if name == "hidden_states":
            return [
                drawn(16, channels * t * patch * patch)
                for t in dict.fromkeys([getattr(config, "temporal_patch_size", 1), 1])
            ]
        return [torch.tensor([[1, 4, 4]])]
    if name in ("input_features", "audio_mel"):
        audio = _part(config, "audio_config", "encoder_config", "encoder")
        mels = next(
            (
                v
                for c in (audio, config)
                for n in (
                    "num_mel_bins",
                    "feature_size",
                    "input_feat_per_channel",
                    "feature_projection_input_dim",
                    "input_feat_size",
                    "input_dim",
                )
                if isinstance(v := getattr(c, n, None), int)
            ),
            80,
        )
        most = next(
            (v for c in (audio, config) if isinstance(v := getattr(c, "max_source_positions", None), int)), None
        )
        lengths = [*([2 * most] if most else []), 64, 128]
        flat = [drawn(BATCH, mels, n) for n in lengths] + [drawn(BATCH, n, mels) for n in lengths]
        return [*flat, drawn(BATCH, 1, 128, mels)]
    if name == "input_values":
        return [
            drawn(BATCH, 3200),
            drawn(BATCH, 1, 3200),
            drawn(BATCH, 1, 64, 64),
            drawn(BATCH, 64, 32),
            drawn(BATCH, 16000),
        ]
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
    if name == "pixel_attention_mask" and "spatial_shapes" in names_of(model):
        return [torch.ones(BATCH, 16, dtype=torch.long)]
    if name == "spatial_shapes":
        return [torch.tensor([[4, 4]]).expand(BATCH, 2)]
    if name == "bool_masked_pos":
        return [(torch.arange(n) % 2 == 0).expand(BATCH, n) for n in (16, 32)]
    if name == "flattened_patches":
        return [
            torch.cat(
                [
                    torch.ones(BATCH, 9, 2),
                    drawn(BATCH, 9, getattr(_part(config, "vision_config"), "patch_embed_hidden_size", 768)),
                ],
                -1,
            )
        ]
    if name == "query_embeds":
        return [drawn(BATCH, 4, config.hidden_size)]
    if name == "inputs_embeds":
        return [drawn(BATCH, TOKENS, config.get_text_config().hidden_size)]
    return []


def with_image(model: Any) -> Iterator[Inputs]:
    """One sample of text around an image, for a language model that sees; to be tried one after another.

    How many tokens an image takes is what the model says when it gets another number.
    """
    names, config = names_of(model), model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if (
        not {"pixel_values", "input_ids"} <= set(names)
        or not isinstance(token, int)
        or model.main_input_name != "input_ids"
    ):
        return
    vision = _part(config, "vision_config")
    start, end = getattr(config, "vision_start_token_id", None), getattr(config, "vision_end_token_id", None)
    around = [[t] if isinstance(t, int) else [] for t in (start, end)]

    def text(count: int) -> Inputs:
        ids = torch.tensor([[5, 6, *around[0], *[token] * count, *around[1], 7, 8, 9]])
        kinds = {"mm_token_type_ids": (ids == token).int()} if "mm_token_type_ids" in names else {}
        return {"input_ids": ids, **kinds}

    if "image_grid_thw" in names:
        patch, times = _pair(getattr(vision, "patch_size", PATCH))[0], getattr(vision, "temporal_patch_size", 1)
        merge = getattr(vision, "spatial_merge_size", 2)
        channels = getattr(vision, "in_channels", getattr(vision, "in_chans", getattr(vision, "num_channels", 3)))
        pixels = drawn(16, channels * times * patch * patch)
        yield {**text(16 // merge**2), "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
        return
    for shape in itertools.islice(_images(config), 1):
        for pixels in (drawn(1, *shape), drawn(1, 1, *shape)):
            sizes = {"image_sizes": torch.tensor([shape[1:]])} if "image_sizes" in names else {}
            for count in _counts(model, text, {"pixel_values": pixels, **sizes}):
                yield {**text(count), "pixel_values": pixels, **sizes}


def _counts(model: Any, text: Callable[[int], Inputs], image: Inputs) -> list[int]:
    """The numbers in the model's complaint about one token for an image, and one if it does not complain."""
    try:
        with torch.no_grad():
            model(**text(1), **image)
    except Exception as error:
        found = [int(n) for n in re.findall(r"\d+", str(error))]
        return sorted(
            {n for n in found if 1 < n <= 64} | {n // WIDTH for n in found if n % WIDTH == 0 and n < 64 * WIDTH}
        )
    return [1]


def labels(model: Any, inputs: Inputs) -> Iterator[Inputs]:
    """What may be added to the inputs to get a loss."""
    names, cls = names_of(model), type(model).__name__
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    if "start_positions" in names:
        place = torch.tensor([2, 3])
        yield {"start_positions": place, "end_positions": place + 1}
    if "labels" in names:
        whole = torch.tensor([0, 1])
        if (
            not any(word in cls for word in ("SequenceClassification", "ImageClassification", "MultipleChoice"))
            and ids is not None
        ):
            yield {"labels": ids % 2 if "TokenClassification" in cls else ids.clone()}
        yield {"labels": whole}
        if ids is not None:
            yield {"labels": ids.clone()}
    if "return_loss" in names:
        yield {"return_loss": True}
