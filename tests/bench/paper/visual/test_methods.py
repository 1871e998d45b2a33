"""The vision methods: what each trains, Deep-share against the published computation, features that are kept."""

import copy
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.paper.runs import Refusal
from bench.paper.visual import backbones
from bench.paper.visual.backbones import load, small_vit
from bench.paper.visual.features import Features
from bench.paper.visual.methods import BY_LAYERS, HEAD_BIAS, METHODS, Choices, Tuned, tune

CLOSE = dict(rtol=2e-5, atol=2e-5)
WIDTH, DEPTH, CLASSES, P = 256, 6, 5, 4
HEAD = WIDTH * CLASSES + CLASSES
BLOCK = 12 * WIDTH**2 + 13 * WIDTH  # numbers of a block: attention, MLP, two norms


def backbone() -> Any:
    torch.manual_seed(7)
    model = small_vit(3)
    with torch.no_grad():
        for p in model.parameters():  # else what is added would hardly move the logits
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


def pictures(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator("cpu").manual_seed(1))


def tuned(name: str, **choices: Any) -> Tuned:
    return tune(name, backbone(), CLASSES, 42, Choices(**{"length": P, "hidden": 16} | choices))


TRAINED = {  # numbers beside the head, DEEP and SHALLOW
    "deep": lambda L: L * (P * WIDTH + WIDTH * 16 + 16 + 16 * 2 * WIDTH + 2 * WIDTH),
    "original": lambda L: L * (P * WIDTH + WIDTH * 16 + 16 + 16 * 2 * WIDTH + 2 * WIDTH),
    "simple": lambda L: L * P * WIDTH,
    "none": lambda L: L * 2 * P * WIDTH,
    "plus": lambda L: L * 4 * 64 * 64,
    "vpt": lambda L: L * P * WIDTH,
    "lora": lambda L: L * 8 * (WIDTH + 3 * WIDTH),
    "adapter": lambda L: L * (2 * WIDTH * 32 + 32 + WIDTH),
    "bias": lambda L: L * 11 * WIDTH + 2 * WIDTH,  # the blocks', the last norm's, the patches'
    "partial": lambda L: BLOCK + 2 * WIDTH,
    "linear": lambda L: 0,
    "finetune": lambda L: DEPTH * BLOCK + 64 * 3 * WIDTH + WIDTH + 66 * WIDTH + 2 * WIDTH,
}
CASES = [(name, layers) for name in METHODS for layers in ("all", "first") if layers == "all" or name in BY_LAYERS]


@pytest.mark.parametrize("name, layers", CASES)
def test_trains_what_it_says_and_nothing_else(name: str, layers: str) -> None:
    method = tuned(name, layers=layers)
    numbers = method.numbers()
    assert numbers["head"] == HEAD
    assert numbers["trained"] == TRAINED[name](DEPTH if layers == "all" else 1)
    before = copy.deepcopy({n: p.detach() for n, p in method.model.named_parameters()})
    state = {n: t.clone() for n, t in method.state().items()}
    optimizer = method.optimizer(0.1, 1e-3)
    method.train(True)
    labels = torch.tensor([0, 1, 2])
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(method(pictures()), labels)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(set(losses)) == 3
    for n, p in method.model.named_parameters():
        if n not in state:
            assert torch.equal(p, before[n]), f"{n} is not trained, but moved"
    moved = {n for n, t in method.state().items() if not torch.equal(t, state[n])}
    assert moved == set(state), set(state) - moved
    method.load_state(state)
    assert all(torch.equal(t, state[n]) for n, t in method.state().items())


def test_the_head_starts_as_published() -> None:
    head = tuned("linear").head
    assert torch.equal(head.bias, torch.full((CLASSES,), HEAD_BIAS))
    assert math.isclose(HEAD_BIAS, -4.595, abs_tol=1e-3)
    assert math.isclose(float(head.weight.detach().std()), math.sqrt(2 / CLASSES), rel_tol=0.1)  # fan out
    for name in METHODS:
        method = tuned(name)
        groups = method.optimizer(0.1, 0.25).param_groups
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        assert decays[id(method.head.bias)] == 0.0 and decays[id(method.head.weight)] == 0.25
        free = {n for n, p in method.parameters() if decays.get(id(p)) == 0.0}  # AdamW decays no bias
        assert free == ({n for n, _ in method.parameters() if n.endswith("bias")} if method.adamw else {"head.bias"})


def test_only_finetuning_leaves_evaluation_mode() -> None:
    for name in METHODS:
        method = tuned(name)
        method.train(True)
        assert method.model.training == (name == "finetune")
        if "prefix" in method.added:
            assert method.added["prefix"].training


@pytest.mark.parametrize("layers", ["all", "first"])
def test_deep_share_is_the_published_computation(layers: str) -> None:
    ours, theirs = tuned("deep", layers=layers), tuned("original", layers=layers)
    generator = torch.Generator("cpu").manual_seed(3)
    encoder: Any = ours.added["prefix"].encoder
    networks: Any = theirs.added["networks"].layers
    with torch.no_grad():
        for p in ours.added["prefix"].parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 2 / math.sqrt(p.shape[-1]))
        rows = encoder.embedding.weight.view(len(networks), P, WIDTH)
        for layer, network in enumerate(networks):
            network.rows.copy_(rows[layer])
            for part, linear in ((encoder.down, network.net[0]), (encoder.up, network.net[2])):
                # one layer's network has no axis for layers
                linear.weight.copy_(part.weight.view(len(networks), *linear.weight.shape)[layer])
                linear.bias.copy_(part.bias.view(len(networks), -1)[layer])
    x = pictures()
    plain = tuned("linear")(x)
    made, expected = ours(x), theirs(x)
    assert not torch.allclose(plain, made, rtol=1e-2, atol=1e-2)  # the prefix matters
    torch.testing.assert_close(made, expected, **CLOSE)
    made.square().sum().backward()
    expected.square().sum().backward()
    gradients = encoder.up.weight.grad
    for layer, network in enumerate(networks):
        other = network.net[2].weight.grad
        torch.testing.assert_close(gradients.view(len(networks), *other.shape)[layer], other, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("layers", ["all", "first"])
def test_vpt_is_prompts_in_the_sequence(layers: str) -> None:
    method = tuned("vpt", layers=layers)
    model, rows = method.model, method.added["prompts"].rows
    x = pictures()
    tokens = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for i, block in enumerate(backbone_blocks(model)):
        if i < len(rows):
            own = tokens[:, 1:] if i == 0 else tokens[:, 1 + P :]
            tokens = torch.cat([tokens[:, :1], rows[i].expand(len(x), -1, -1), own], 1)
        tokens = plain_block(block, tokens)
    torch.testing.assert_close(method(x), model.head(model.norm(tokens)[:, 0]), **CLOSE)


def backbone_blocks(model: Any) -> list[nn.Module]:
    return list(model.blocks)


def plain_block(block: Any, x: Tensor) -> Tensor:
    """A block without its hooks."""
    x = x + block.attn(block.norm1(x))
    return x + block.mlp(block.norm2(x))


def test_adapters_start_as_the_plain_model() -> None:
    torch.testing.assert_close(tuned("adapter")(pictures()), tuned("linear")(pictures()), rtol=0, atol=0)


@pytest.mark.parametrize("name, last", [("linear", 1), ("partial", 1), ("partial", 3)])
def test_cached_features_are_exact(name: str, last: int) -> None:
    method = tuned(name, last=last)
    assert Features.possible(method)
    features = Features(method)
    x = pictures()
    with torch.no_grad():
        cached = features.before(x)
    assert torch.equal(features.after(cached), method(x))


def test_features_are_not_cached_where_a_gradient_goes_below() -> None:
    possible = {name for name in METHODS if Features.possible(tuned(name))}
    assert possible == {"linear", "partial"}


def test_dropout_is_drawn_for_each_sample() -> None:
    for name in ("deep", "none", "vpt", "original"):
        method = tuned(name, dropout=0.5)
        x = pictures(1).expand(4, -1, -1, -1)
        method.train(True)
        torch.manual_seed(0)
        rows = method(x)
        assert not torch.allclose(rows[0], rows[1], atol=1e-4), name
        method.train(False)
        rows = method(x)
        torch.testing.assert_close(rows[0], rows[1], **CLOSE)


@pytest.mark.parametrize(
    "name, choices, words",
    [
        ("shallow", {}, "no method 'shallow'"),
        ("adapter", {"layers": "first"}, "says nothing of it"),
        ("partial", {"last": 7}, "expected 1 to 6"),
    ],
)
def test_refuses(name: str, choices: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        tuned(name, **choices)


@pytest.mark.parametrize("name", ["vpt", "original", "partial", "adapter", "lora"])
@pytest.mark.parametrize("model", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_models_that_a_method_would_not_train_are_refused(name: str, model: str) -> None:
    with torch.device("meta"):
        made = timm.create_model(model)
    with pytest.raises(Refusal, match=rf"{name}: knows timm's VisionTransformer of plain blocks"):
        tune(name, made, CLASSES, 42, Choices())


def test_original_refuses_norms_of_keys() -> None:
    from timm.models import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2, qk_norm=True)
    with pytest.raises(Refusal, match="has norms of its own"):
        tune("original", model, CLASSES, 42, Choices())


def test_weights_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PEFT's and timm's users have them; another image size interpolates the positions."""
    torch.manual_seed(3)
    saved = timm.create_model("vit_tiny_patch16_224.augreg_in21k").eval()
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setenv("PREFIXATTN_WEIGHTS", str(tmp_path / "weights.pth"))
    model, _, _ = load("vit_tiny_patch16_224.augreg_in21k", 224)
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model.eval()(x), saved(x), rtol=1e-5, atol=1e-5)
    smaller, _, _ = load("vit_tiny_patch16_224.augreg_in21k", 64)
    assert torch.equal(smaller.blocks[3].mlp.fc1.weight, saved.blocks[3].mlp.fc1.weight)
    assert smaller.pos_embed.shape[1] == 17
    with pytest.raises(Refusal, match="its weights cannot be had"):
        load("vit_small_patch16_224.augreg_in21k", 224)  # of another width
    monkeypatch.setenv("PREFIXATTN_WEIGHTS", str(tmp_path / "absent.pth"))
    with pytest.raises(Refusal, match="no such file"):
        load("vit_tiny_patch16_224.augreg_in21k", 224)


def test_weights_are_told_by_what_is_in_the_file_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files under one name of a model, or a file that is written anew, are not taken for each other."""
    for at, content in enumerate((b"one", b"other")):
        (tmp_path / f"{at}.pth").write_bytes(content)
    found = []
    for at in (0, 1, 0):
        monkeypatch.setenv("PREFIXATTN_WEIGHTS", str(tmp_path / f"{at}.pth"))
        found.append(backbones.fingerprint("vit_tiny_patch16_224"))
    (tmp_path / "0.pth").write_bytes(b"third")
    os.utime(tmp_path / "0.pth", ns=(1, 1))
    found.append(backbones.fingerprint("vit_tiny_patch16_224"))
    assert found[0] == found[2] and len(set(found)) == 3
    monkeypatch.delenv("PREFIXATTN_WEIGHTS")
    assert backbones.fingerprint("vit_tiny_patch16_224") == "vit_tiny_patch16_224"


def as_published(model: Any) -> dict[str, Any]:
    """A timm ViT under the names and in the shapes of the original's .npz files."""
    heads, width = model.blocks[0].attn.num_heads, model.embed_dim
    found = {
        "cls": model.cls_token, "Transformer/posembed_input/pos_embedding": model.pos_embed,
        "embedding/kernel": model.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": model.patch_embed.proj.bias, "head/kernel": model.head.weight.T, "head/bias": model.head.bias,
        "Transformer/encoder_norm/scale": model.norm.weight, "Transformer/encoder_norm/bias": model.norm.bias,
    }  # fmt: skip
    for i, block in enumerate(model.blocks):
        at = f"Transformer/encoderblock_{i}"
        attention = f"{at}/MultiHeadDotProductAttention_1"
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            found[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            found[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        found[f"{attention}/out/kernel"] = block.attn.proj.weight.T.reshape(heads, -1, width)
        found[f"{attention}/out/bias"] = block.attn.proj.bias
        for name, norm in (("LayerNorm_0", block.norm1), ("LayerNorm_2", block.norm2)):
            found[f"{at}/{name}/scale"], found[f"{at}/{name}/bias"] = norm.weight, norm.bias
        for name, linear in (("Dense_0", block.mlp.fc1), ("Dense_1", block.mlp.fc2)):
            found[f"{at}/MlpBlock_3/{name}/kernel"] = linear.weight.T
            found[f"{at}/MlpBlock_3/{name}/bias"] = linear.bias
    return {name: tensor.detach().numpy() for name, tensor in found.items()}


def test_weights_from_the_papers_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    saved = timm.create_model("vit_tiny_patch16_224.augreg_in21k").eval()
    np.savez(tmp_path / "imagenet21k_ViT-Ti_16.npz", **as_published(saved))
    monkeypatch.setenv("PREFIXATTN_WEIGHTS", str(tmp_path / "imagenet21k_ViT-Ti_16.npz"))
    model, _, _ = load("vit_tiny_patch16_224.augreg_in21k", 224)
    x = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model.eval()(x), saved(x), rtol=1e-5, atol=1e-5)


def test_a_model_for_images_of_any_size() -> None:
    model, _, _ = load("random:resnet18", 64)
    assert tune("linear", model, CLASSES, 42, Choices())(pictures()).shape == (3, CLASSES)
    with pytest.raises(Refusal, match="attention"):
        tune("deep", model, CLASSES, 42, Choices())


def test_a_backbone_that_timm_does_not_have_is_refused() -> None:
    with pytest.raises(Refusal, match="timm has no such model"):
        load("vit_nano_patch16_224", 224)


def test_any_of_timms_models_by_name() -> None:
    model, mean, std = load("random:vit_tiny_patch16_224.augreg_in21k", 64)
    assert model(pictures(1)).shape[0] == 1
    assert (mean, std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
