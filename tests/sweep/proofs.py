"""What is proved of a model with a prefix, against what the plain model did before."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prefixattn.attach import attached

from . import inputs as examples
from .building import forward
from .catalogue import tensors
from .small import PAD

CLOSE = 1e-4  # of the largest number: what may differ where two ways compute the same
EXACT = 1e-9  # the same in float64
FAR = 1e-3  # of the largest number: what depends
WORDS = (NotImplementedError, ValueError)
INNER = ("AttributeError:", "KeyError:", "TypeError:", "RuntimeError:", "IndexError:", "AssertionError:")

PLAIN_FAILS = "without a prefix it fails: "  # what follows is quoted: the plain model's own error


class Wrong(Exception):
    """A proof that fails."""


def in_words(error: BaseException) -> bool:
    """Whether an error is a refusal and no accident."""
    words = str(error).split(PLAIN_FAILS)[0]
    known = type(error) in WORDS or (type(error) is RuntimeError and "with a prefix" in words)
    return known and not any(word in words for word in INNER)


def of_ours(error: BaseException) -> bool:
    """Whether an error was raised by this library; transformers raises NotImplementedError for reasons of its own."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals.get("__name__", "").startswith("prefixattn.")


def main_output(out: Any) -> Tensor | None:
    """The output that belongs to the tokens."""
    for name in ("logits", "last_hidden_state", "start_logits", "prediction_logits"):
        value = getattr(out, name, None)
        if isinstance(value, Tensor):
            return value
    return next(tensors(out), None)


def off(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of the largest number; infinite if one has NaN where the other has none."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a[finite], b[finite]
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) if a.numel() else 0.0


def equal(a: Any, b: Any) -> bool:
    one, two = list(tensors(a)), list(tensors(b))
    return len(one) == len(two) and all(
        torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(one, two, strict=True)
    )


def finite(out: Any) -> bool:
    """No NaN and no infinity, but those that hide a token's logit."""
    return all(not t.isnan().any() and not t.isposinf().any() for t in tensors(out) if not t.is_complex())


def tried(run: Callable[[], Any]) -> Any:
    """The result, or None if the plain model does not do that."""
    try:
        return run()
    except Exception:
        return None


# What the plain model does, and what it does with a prefix: the same functions run for both.


def dependence(model: Any, inputs: examples.Inputs, name: str, place: int) -> list[bool | None] | None:
    """For each position of the output, whether it depends on the input at `place`; None where that is not clear.

    Of an image the place is a corner. What depends on the encoder's tokens is looked at where the encoder ends.
    """
    other = {**inputs, name: inputs[name].clone()}
    if inputs[name].is_floating_point():
        other[name][..., place] += 3.0
    else:
        other[name][:, place] = (other[name][:, place] + 17) % 50 + 5
    one, two = (positions_of(forward(model, i), inputs, name) for i in (inputs, other))
    if one is None or two is None or one.ndim < 3 or one.shape != two.shape:
        return None
    if not inputs[name].is_floating_point() and one.shape[1] != inputs[name].shape[1]:
        return None
    moved = (one - two).abs().flatten(2).amax((0, 2)) / one.abs().max()
    return [True if d > FAR else False if d < 1e-6 else None for d in moved.nan_to_num(1.0).tolist()]


def positions_of(out: Any, inputs: examples.Inputs, name: str) -> Tensor | None:
    if name == "input_ids" and "decoder_input_ids" in inputs:
        found = getattr(out, "encoder_last_hidden_state", None)
        return found if isinstance(found, Tensor) else None
    if name == "pixel_values":
        found = getattr(out, "last_hidden_state", None)
        return found if isinstance(found, Tensor) else None
    return main_output(out)


SIDES = ("right", "left")


def padded_inputs(model: Any, inputs: examples.Inputs, side: str) -> tuple[examples.Inputs, examples.Inputs, slice]:
    """A batch whose first sample is padded, that sample alone, and where its tokens are in the batch."""
    ids, short = inputs["input_ids"], 6
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    pad = PAD if not isinstance(pad, int) or pad < 0 else pad
    real = ids[:1, :short]
    filler = torch.full((1, ids.shape[1] - short, *ids.shape[2:]), pad)
    row = torch.cat([real, filler] if side == "right" else [filler, real], 1)
    mask = torch.ones(ids.shape[:2], dtype=torch.long)
    place = slice(0, short) if side == "right" else slice(ids.shape[1] - short, None)
    mask[0] = 0
    mask[0, place] = 1
    rest = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask", "bbox")}
    whole = {**rest, "input_ids": torch.cat([row, ids[1:]]), "attention_mask": mask}
    alone = {n: v[:1] if isinstance(v, Tensor) and v.shape[:1] == ids.shape[:1] else v for n, v in rest.items()}
    if "bbox" in inputs:
        whole["bbox"], alone["bbox"] = inputs["bbox"], inputs["bbox"][:1, :short]
    return whole, {**alone, "input_ids": real}, place


def padding_error(model: Any, inputs: examples.Inputs, side: str) -> float:
    whole, alone, place = padded_inputs(model, inputs, side)
    one, two = main_output(forward(model, whole)), main_output(forward(model, alone))
    if one.shape[1:] != two.shape[1:]:
        one = one[:, place]
    return off(one[:1], two)


def masked(model: Any, inputs: examples.Inputs, more: int) -> Any:
    """The output with a mask of `more` columns than tokens."""
    rows, columns = inputs["input_ids"].shape
    return forward(model, {**inputs, "attention_mask": torch.ones(rows, columns + more, dtype=torch.long)})


def left_padded(model: Any, inputs: examples.Inputs) -> float:
    """How far the logits that a left-padded sample generates are from those of the sample alone."""
    whole, alone, _ = padded_inputs(model, inputs, "left")
    one, two = (generated(model, i).logits for i in (whole, alone))
    return max(off(a[:1], b) for a, b in zip(one, two, strict=True))


def generated(model: Any, inputs: examples.Inputs, new: int = 3, **more: Any) -> Any:
    torch.manual_seed(0)
    # clones, as BLIP writes into its own
    given = {n: v.clone() if isinstance(v, Tensor) else v for n, v in inputs.items() if n != "decoder_input_ids"}
    with torch.no_grad():
        out = model.generate(
            **given,
            **more,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    if not len(out.logits) or len(out.logits[0]) != next(iter(given.values())).shape[0]:
        raise ValueError("no logits for each sample")
    return out


def steps_off(model: Any, inputs: examples.Inputs, out: Any) -> list[float]:
    """How far the logits of each step are from those of one forward pass over all tokens."""
    targets, many = out.sequences, len(out.logits)
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    whole = forward(model, {**{n: v for n, v in inputs.items() if n != "attention_mask"}, name: targets}).logits
    if whole.shape[1] != targets.shape[1]:
        raise ValueError("logits of other positions")
    return [off(out.logits[i], whole[:, i - many - 1]) for i in range(many)]


class Double(TorchFunctionMode):
    """float64 where a model says float32, as many do in norms and rotations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*args, **{n: torch.float64 if a is torch.float32 else a for n, a in (kwargs or {}).items()})


def exact_steps(model: Any, inputs: examples.Inputs) -> float | None:
    """The most of `steps_off` in float64, None if the model does not run so.

    Some models make thousands of times more of float32's rounding, which differs between a step and a whole pass.
    """

    def run() -> float:
        twin = copy.deepcopy(model).double()
        prefix = attached(twin)
        if prefix is not None:
            prefix.double()
        with contextlib.suppress(Exception):
            twin.set_experts_implementation("eager")  # the grouped products take no float64
        given = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
        with Double():
            return max(steps_off(twin, given, generated(twin, given)))

    return tried(run)


def forget(model: Any) -> None:
    """What a model keeps of an image from one call to the next."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


def choose_image(model: Any) -> examples.Inputs | None:
    """The first inputs with an image on which the plain model runs, and for which the image counts."""
    for inputs in examples.with_image(model):
        with contextlib.suppress(Exception):
            forget(model)
            one = main_output(forward(model, inputs))
            forget(model)
            other = main_output(forward(model, {**inputs, "pixel_values": inputs["pixel_values"] * 0.5 + 1}))
            if one is not None and one.isfinite().all() and not torch.equal(one, other):
                return inputs
    return None


def image_step(model: Any, inputs: examples.Inputs) -> float:
    """How far the first logits that are generated after an image are from the forward pass's."""
    forget(model)
    last = forward(model, inputs).logits[:, -1]
    forget(model)
    return off(generated(model, inputs, new=1).logits[0], last)


def loss_of(model: Any, inputs: examples.Inputs, more: examples.Inputs | None) -> Tensor:
    """The model's own loss, or a sum of its outputs where it has none."""
    torch.manual_seed(0)
    out = model(**inputs, **(more or {}))
    if more is not None:
        loss = out.loss
        return loss.sum()
    weighted = [
        (t.real * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).nan_to_num(0.0, 0.0, 0.0).sum()
        for t in tensors(out)
        if t.requires_grad or not torch.is_grad_enabled()
    ]
    return torch.stack(weighted).sum()


def choose_labels(model: Any, inputs: examples.Inputs) -> examples.Inputs | bool | None:
    """The first labels with which the plain model has a finite loss in training.

    None if the outputs have to do for a loss; False if the model does not train on these inputs at all.
    """
    for more in (*examples.labels(model, inputs), None):
        with contextlib.suppress(Exception), training(model), torch.no_grad():
            if loss_of(model, inputs, more).isfinite():
                return more
    return False


@contextlib.contextmanager
def training(model: Any) -> Iterator[None]:
    """In training mode; what that changes of the model, such as a batch norm's statistics, is put back."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    try:
        yield
    finally:
        model.eval()
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def parts_of(model: Any) -> dict[str, Any]:
    """Models inside the model that people call by themselves."""
    found = {"base": getattr(model, model.base_model_prefix or "-", None)}
    for name in ("get_encoder", "get_decoder"):
        with contextlib.suppress(Exception):
            found[name] = getattr(model, name)()
    found = {n: m for n, m in found.items() if isinstance(m, torch.nn.Module) and m is not model}
    return {n: m for i, (n, m) in enumerate(found.items()) if all(m is not k for k in list(found.values())[:i])}


def part_inputs(model: Any, inputs: examples.Inputs, part: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What a part gets from the plain model's forward; None if it is not called."""
    seen: list[Any] = []
    hook = part.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    try:
        forward(model, {**inputs, **({"use_cache": False} if "use_cache" in examples.names_of(model) else {})})
    finally:
        hook.remove()
    return seen[0] if len(seen) == 1 else None
