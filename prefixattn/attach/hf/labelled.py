"""`labelled_loss`: a language model's loss without logits where no label is."""

import inspect
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label of a position that has none


def labelled_loss(
    model: nn.Module,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | float | None = None,
    **inputs: Any,
) -> Tensor:
    """``model(labels=labels, **inputs).loss``, with logits at labelled positions only.

    The final hidden states that have a label are picked before the model's head, so logits ``[n, vocabulary]`` of n
    labels are made instead of ``[B, S, vocabulary]``: where a prompt has no labels or samples are padded, they and
    their gradient are most of a step's memory. Works with or without a prefix, and with whatever the model does behind
    its head (scales, caps, biases). A compiled model is compiled once more for it; within a function that is compiled
    it breaks the graph.

    Args:
        model: A language model of transformers: causal, masked or encoder-decoder; within DistributedDataParallel too.
        labels: int64 ``[B, S]``, as the model takes them (a causal model's are not shifted); -100: no label.
        num_items_in_batch: The sum over labels is divided by this; default: the number of labels, which makes the mean.
        **inputs: The model's other inputs. ``decoder_input_ids`` are made of the labels where they are missing.

    Returns:
        A scalar, float32 or, of a float64 model, float64.

    Raises:
        ValueError: `labels` are no integers ``[B, S]``.
        NotImplementedError: `model` is no language model, does not call its head, or adds a loss of its own.
    """
    plain = _unwrapped(model)
    shifted = is_shifted(plain)
    if shifted is None:
        raise NotImplementedError(
            f"model is {type(plain).__name__}; labelled_loss takes causal, masked and encoder-decoder language models "
            "of transformers"
        )
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels is a {type(labels).__name__}, expected a tensor int64 [B, S]")
    if labels.dim() != 2 or labels.dtype != torch.int64:
        raise ValueError(f"labels is {labels.dtype} {list(labels.shape)}; expected int64 [B, S]")
    if plain.config.is_encoder_decoder and not {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        inputs["decoder_input_ids"] = _decoder_input_ids(plain, labels)
    if "use_cache" in inspect.signature(plain.forward).parameters:
        inputs.setdefault("use_cache", False)  # nothing reads it, and with one transformers packs no sequences
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shifted else labels
    rows, columns = (targets != IGNORED).nonzero(as_tuple=True)

    here = threading.get_ident()

    def pick(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not torch.compiler.is_compiling() and threading.get_ident() != here:
            return None  # another thread's pass, which wants all logits
        hidden = args[0]  # [B, S, width]
        if hidden.shape[:2] != targets.shape:
            raise ValueError(f"labels is {list(labels.shape)}; the model's states are {list(hidden.shape[:2])}")
        return hidden[rows.to(hidden.device), columns.to(hidden.device)][None], *args[1:]

    hook = plain.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        made = model(**inputs, return_dict=True)
    finally:
        hook.remove()
    if getattr(made, "aux_loss", None) is not None:
        raise NotImplementedError(f"{type(plain).__name__} adds a loss of its routers; set output_router_logits=False")
    if made.logits.shape[:2] != (1, len(rows)):
        raise NotImplementedError(
            f"{type(plain).__name__} makes logits {list(made.logits.shape)} of {len(rows)} labelled positions: its "
            "head was not called with them"
        )
    logits = made.logits[0]  # [n, vocabulary]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    found = targets[rows, columns].to(logits.device)
    if num_items_in_batch is None:
        return F.cross_entropy(logits, found)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits.device)
    return F.cross_entropy(logits, found, reduction="sum") / num_items_in_batch


def is_shifted(model: Any) -> bool | None:
    """Whether position s predicts label s + 1 (causal) or label s; None: no language model of transformers."""
    config = getattr(model, "config", None)
    find_head = getattr(model, "get_output_embeddings", None)
    if config is None or find_head is None or find_head() is None:
        return None
    if getattr(config, "is_encoder_decoder", False):
        return False
    if "MaskedLM" in type(model).__name__:
        return False
    return True if model.can_generate() else None


def _unwrapped(model: nn.Module) -> Any:
    for name in ("_orig_mod", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module) and not hasattr(model, "config"):
            return _unwrapped(inner)
    return model


def _decoder_input_ids(model: Any, labels: Tensor) -> Tensor:
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if make is None:
        raise NotImplementedError(f"{type(model).__name__} cannot make decoder_input_ids of labels; pass them")
    ids: Tensor = make(labels=labels)
    return ids
