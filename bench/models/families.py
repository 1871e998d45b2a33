"""The models whose whole training steps are timed: random weights, one batch, the loss, and where the layers attend.

GPT-2 medium on E2E, BART-large on XSUM and ViT-B/16 at 224 pixels, at the batches of the papers; `tiny` is the same
classes at sizes for trying the code. Nothing is downloaded. What is not the published set-up: lengths are quantiles
(of a normal with E2E's mean and 99th percentile; for XSUM's sources of a lognormal with an assumed median of 420, cut
at `source`, which the longest has); ids and images are noise; the ViT's head is frozen like the rest.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prefixattn

IGNORED = -100  # label of a position without loss
SEED = 101


def normal(count: int) -> Tensor:
    """The standard normal's quantiles at equal steps, [count]: a small batch has the distribution's mean and spread."""
    return torch.special.ndtri((torch.arange(count) + 0.5) / count)


def lengths(mean: float, deviation: float, least: int, most: int, count: int) -> Tensor:
    """`count` lengths, int64, always the same."""
    return (mean + deviation * normal(count)).round().clamp(least, most).long()


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labelled tokens of the cross entropy. logits [B, S, vocabulary]; labels [B, S], not shifted.

    Moving labels leaves the logits, the largest tensor, uncopied.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


class Family(ABC):
    """A model and its task. The attributes are what the published code trains it with."""

    name: ClassVar[str]
    library = "transformers"
    task: str | None = None  # PEFT's word for it
    training = False  # the mode of the frozen model in a training step
    positions: str | None = None  # the model's own
    prefix_dropout = 0.0
    hidden: int
    batch: int

    @abstractmethod
    def build(self) -> nn.Module: ...

    @abstractmethod
    def inputs(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def loss(self, model: Any, batch: dict[str, Tensor], labelled: bool) -> Callable[[], Tensor]:
        """The loss of a step; `labelled`: logits at labelled positions only."""

    @abstractmethod
    def embeddings(self, model: Any) -> list[nn.Module]:
        """The modules whose outputs are the model's input embeddings."""

    @abstractmethod
    def attentions(self, model: Any) -> list[nn.Module]:
        """The attention modules in the order in which a forward calls them."""

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """layers, heads, width."""

    def optimizer(self, trained: nn.Module) -> torch.optim.Optimizer:
        """AdamW; for a prefix of ours the one that does without the network's large gradient."""
        ours = isinstance(trained, prefixattn.Prefix)
        optimizer: Any = prefixattn.FactoredAdamW if ours else torch.optim.AdamW
        return optimizer(trained if ours else trained.parameters(), lr=5e-5, weight_decay=0.0)

    def frozen(self, device: str, dtype: torch.dtype) -> nn.Module:
        """A model of the same weights each time."""
        model = copy.deepcopy(_template(self)).to(device=device, dtype=dtype)
        return model.requires_grad_(False).train(self.training)

    def on(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return {n: t.to(device, dtype if t.is_floating_point() else t.dtype) for n, t in self.inputs().items()}


@lru_cache(maxsize=1)  # cases of one model follow each other
def _template(family: Family) -> nn.Module:
    torch.manual_seed(SEED)
    return family.build()


class GPT2(Family):
    name, task, positions = "gpt2-medium", "CAUSAL_LM", "shifted"

    def __init__(self, tiny: bool) -> None:
        self.tiny, self.hidden, self.batch = tiny, 16 if tiny else 512, 3 if tiny else 10

    @property
    def sizes(self) -> dict[str, int]:
        return {"layers": 2, "heads": 2, "width": 32} if self.tiny else {"layers": 24, "heads": 16, "width": 1024}

    def build(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        layers, heads, width = self.sizes.values()
        vocabulary = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0} if self.tiny else {}
        model: nn.Module = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width, **vocabulary))
        return model

    def inputs(self) -> dict[str, Tensor]:
        """ids, labels [B, S], padded on the right to the batch's longest; labels are the text's, not the record's."""
        texts = lengths(9, 3, 4, 16, self.batch) if self.tiny else lengths(56.3, 12.8, 20, 118, self.batch)
        at = torch.arange(int(texts.max()))
        ids = torch.randint(1, 50 if self.tiny else 50257, (self.batch, len(at)), generator=_generator())
        record = (texts * 29.5 / 56.3).long()[:, None]  # shares of E2E's means
        return {"ids": ids, "labels": ids.masked_fill((at < record) | (at >= texts[:, None]), IGNORED)}

    def loss(self, model: Any, batch: dict[str, Tensor], labelled: bool) -> Callable[[], Tensor]:
        ids, labels = batch["ids"], batch["labels"]
        rows = len(ids)  # the sum over tokens is divided by, as published

        def everywhere() -> Tensor:
            return token_losses(model(input_ids=ids, use_cache=False).logits, labels) / rows

        def where_a_label_is() -> Tensor:
            return prefixattn.labelled_loss(model, labels, num_items_in_batch=rows, input_ids=ids, use_cache=False)

        return where_a_label_is if labelled else everywhere

    def embeddings(self, model: Any) -> list[nn.Module]:
        return [model.transformer.wte]

    def attentions(self, model: Any) -> list[nn.Module]:
        return [block.attn for block in model.transformer.h]


class Bart(Family):
    name, task = "bart-large", "SEQ_2_SEQ_LM"
    training = True  # the published loop leaves BART in training mode: its dropout is on

    def __init__(self, tiny: bool, source: int) -> None:
        self.tiny, self.source, self.target = tiny, source // 32 if tiny else source, 7 if tiny else 60
        self.hidden, self.batch = (16, 2) if tiny else (512, 16)

    @property
    def sizes(self) -> dict[str, int]:
        return {"layers": 2, "heads": 2, "width": 32} if self.tiny else {"layers": 12, "heads": 16, "width": 1024}

    def build(self) -> nn.Module:
        from transformers import BartConfig, BartForConditionalGeneration

        layers, heads, width = self.sizes.values()
        small = {"vocab_size": 50, "max_position_embeddings": 256} if self.tiny else {}
        config = BartConfig(
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=heads,
            decoder_attention_heads=heads,
            d_model=width,
            encoder_ffn_dim=4 * width,
            decoder_ffn_dim=4 * width,
            **small,
        )
        model: nn.Module = BartForConditionalGeneration(config)
        return model

    def inputs(self) -> dict[str, Tensor]:
        """Sources [B, source] with their padding mask, targets [B, target]; padding on the right."""
        vocabulary = 50 if self.tiny else 50265
        spread = 420 * (0.55 * normal(self.batch)).exp() / (32 if self.tiny else 1)
        sources = spread.round().long().clamp(4, self.source)
        targets = lengths(*((5, 1, 2) if self.tiny else (27, 8, 8)), self.target, self.batch)
        sources[-1], targets[-1] = self.source, self.target
        at = torch.arange(self.target)
        decoder = torch.randint(4, vocabulary, (self.batch, self.target), generator=_generator())
        return {
            "ids": torch.randint(4, vocabulary, (self.batch, self.source), generator=_generator()),
            "mask": (torch.arange(self.source) < sources[:, None]).long(),
            "decoder": decoder,
            "labels": decoder.roll(-1, 1).masked_fill(at >= targets[:, None], IGNORED),
        }

    def loss(self, model: Any, batch: dict[str, Tensor], labelled: bool) -> Callable[[], Tensor]:
        given = {"input_ids": batch["ids"], "attention_mask": batch["mask"], "decoder_input_ids": batch["decoder"]}
        labels = batch["labels"].flatten()

        def loss() -> Tensor:
            logits = model(**given, use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=IGNORED)

        return loss

    def embeddings(self, model: Any) -> list[nn.Module]:
        return list(dict.fromkeys([model.model.encoder.embed_tokens, model.model.decoder.embed_tokens]))

    def attentions(self, model: Any) -> list[nn.Module]:
        decoder = [m for layer in model.model.decoder.layers for m in (layer.self_attn, layer.encoder_attn)]
        return [layer.self_attn for layer in model.model.encoder.layers] + decoder


class ViT(Family):
    """ViT-B/16 of transformers; `TimmViT` is timm's."""

    name, prefix_dropout = "vit-b16", 0.1
    CLASSES = 200

    def __init__(self, tiny: bool) -> None:
        self.tiny, self.hidden, self.batch = tiny, 16 if tiny else 48, 2 if tiny else 64
        self.pixels, self.patch = (32, 8) if tiny else (224, 16)

    @property
    def sizes(self) -> dict[str, int]:
        return {"layers": 2, "heads": 2, "width": 32} if self.tiny else {"layers": 12, "heads": 12, "width": 768}

    def build(self) -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        layers, heads, width = self.sizes.values()
        config = ViTConfig(
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_size=width,
            intermediate_size=4 * width,
            image_size=self.pixels,
            patch_size=self.patch,
            num_labels=self.CLASSES,
        )
        return _with_a_head(ViTForImageClassification(config), "classifier")

    def inputs(self) -> dict[str, Tensor]:
        images = torch.randn(self.batch, 3, self.pixels, self.pixels, generator=_generator())
        return {"images": images, "labels": torch.randint(self.CLASSES, (self.batch,), generator=_generator())}

    def loss(self, model: Any, batch: dict[str, Tensor], labelled: bool) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            logits = model(batch["images"])
            return F.cross_entropy(getattr(logits, "logits", logits).float(), batch["labels"])

        return loss

    def embeddings(self, model: Any) -> list[nn.Module]:
        return [model.vit.embeddings]

    def attentions(self, model: Any) -> list[nn.Module]:
        return [layer.attention for layer in model.vit.layers]

    def optimizer(self, trained: nn.Module) -> torch.optim.Optimizer:
        ours = isinstance(trained, prefixattn.Prefix)
        optimizer: Any = prefixattn.FactoredSGD if ours else torch.optim.SGD
        return optimizer(trained if ours else trained.parameters(), lr=0.01, momentum=0.9)


class TimmViT(ViT):
    library = "timm"

    def build(self) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        layers, heads, width = self.sizes.values()
        model = VisionTransformer(
            img_size=self.pixels,
            patch_size=self.patch,
            embed_dim=width,
            depth=layers,
            num_heads=heads,
            num_classes=self.CLASSES,
        )
        return _with_a_head(model, "head")

    def embeddings(self, model: Any) -> list[nn.Module]:
        return [model.patch_embed]

    def attentions(self, model: Any) -> list[nn.Module]:
        return [block.attn for block in model.blocks]


def _with_a_head(model: nn.Module, name: str) -> nn.Module:
    """A fresh head may be zero, and then no gradient reaches the model."""
    nn.init.normal_(getattr(model, name).weight, std=0.02)
    return model


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)
