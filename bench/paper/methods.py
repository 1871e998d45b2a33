"""The ways to put a prefix into a GPT-2 that the table-to-text runs compare, behind one interface."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from original import OriginalPrefix
from runs import Refusal

WORD = "summarize"  # the published No-share runs' word; its token count becomes P
# method: PrefixConfig.share
SHARES = {"deep": "deep", "deep-all": "deep", "simple": "simple", "none": "none", "none-word": "none"}

IGNORED = -100  # label of a position without loss


class Method(Protocol):
    prefix: nn.Module  # what is trained
    length: int  # P, which may be that of a word; the positions it takes
    kept: int  # numbers to keep once trained

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor: ...  # [B, S] both; the sum over the labelled tokens

    def generate(self, input_ids: Tensor, num_beams: int, **options: Any) -> Tensor: ...  # [B, S] -> [B, new]


def targets_of(labels: Tensor) -> Tensor:
    """The token to predict at each position, [B * S]; moving labels leaves the logits, the largest tensor, uncopied."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over the labelled tokens of the cross entropy. logits [n, vocabulary], targets [n]."""
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


class FrozenMethod:
    """The model without a prefix: nothing to train. `labelled`: logits only where a label is, and not everywhere."""

    def __init__(self, model: PreTrainedModel, labelled: bool) -> None:
        self.model, self.prefix, self.labelled = model, nn.Module(), labelled
        self.length = self.kept = 0

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        if not self.labelled:
            return token_losses(self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1), targets_of(labels))
        targets = targets_of(labels)
        kept = (targets != IGNORED).nonzero()[:, 0]
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, S, n_embd]
        return token_losses(self.model.lm_head(hidden.flatten(0, 1)[kept]), targets[kept])

    def generate(self, input_ids: Tensor, num_beams: int, **options: Any) -> Tensor:
        mask = torch.ones_like(input_ids)
        out = self.model.generate(input_ids, attention_mask=mask, num_beams=num_beams, **options)
        return out[:, input_ids.shape[1] :]


class AttachedMethod(FrozenMethod):
    """A prefix of this library."""

    def __init__(self, model: PreTrainedModel, labelled: bool, **config: Any) -> None:
        import prefixattn

        super().__init__(model, labelled)
        self.prefix = prefixattn.attach(model, prefixattn.PrefixConfig(**config))
        self.length, self.kept = self.prefix.config.length, self.prefix.num_parameters(kept=True)


class OriginalMethod:
    """The published way (original.py): logits at every position, as there."""

    def __init__(self, model: PreTrainedModel, length: int, hidden: int) -> None:
        self.model = model
        self.model.set_attn_implementation("eager")
        self.prefix = OriginalPrefix(model, length, hidden)
        self.length, self.kept = length, self.prefix.kept

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        past = self.prefix.cache(len(ids), self.model.config)
        out = self.model(input_ids=ids, past_key_values=past, use_cache=True)
        return token_losses(out.logits.flatten(0, 1), targets_of(labels))

    def generate(self, input_ids: Tensor, num_beams: int, **options: Any) -> Tensor:
        # P placeholder ids tell transformers 5 that the cache already holds P positions; they are never embedded
        ids = torch.cat([input_ids.new_zeros(len(input_ids), self.prefix.length), input_ids], 1)
        past = self.prefix.cache(len(input_ids) * num_beams, self.model.config)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=past, num_beams=num_beams, **options
        )
        return out[:, ids.shape[1] :]


def make_method(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    hidden: int,
    seed: int,
    labelled: bool = True,
) -> Method:
    """The method on a frozen model, its numbers drawn from the seed: `deep` and `original` start from the same ones.

    `labelled`: logits at labelled positions only; `deep-all` and `original` have them everywhere all the same.
    """
    model.requires_grad_(False).eval()
    torch.manual_seed(seed)
    if name == "frozen":
        return FrozenMethod(model, labelled)
    if name == "original":
        return OriginalMethod(model, length, hidden)
    if name == "none-word":
        word = tokenizer(f" {WORD}", add_special_tokens=False)["input_ids"]
        return AttachedMethod(model, labelled, share="none", length=len(word), init=tuple(word))
    labelled = labelled and name != "deep-all"
    return AttachedMethod(model, labelled, share=SHARES[name], length=length, hidden=hidden)


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GPT-2 in float32, frozen, in eval(), and its tokenizer; `name` is a folder or a name on the hub."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, found = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # each library under from_pretrained has errors of its own for a damaged file
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"--model {name}: not a GPT-2 with a tokenizer that can be loaded ({first[:160]})") from None
    if model.config.model_type != "gpt2":
        raise Refusal(f"--model {name}: its config says {model.config.model_type!r}, expected 'gpt2'")
    if missing := sorted(found["missing_keys"]):  # transformers would draw them at random
        raise Refusal(f"--model {name}: its weights lack {len(missing)} tensors of a GPT-2, {missing[0]} among them")
    if tokenizer.eos_token_id is None:
        raise Refusal(f"--model {name}: its tokenizer has no eos token, which separates record and text")
    if len(tokenizer) > model.config.vocab_size:
        raise Refusal(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size} embeddings"
        )
    return model.float().requires_grad_(False).eval(), tokenizer
