"""One model of the sweep: built, attached to, and each proof tried."""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch

import prefixattn
from prefixattn import PrefixConfig

from . import proofs
from .building import NotBuilt, build, first_line, forward
from .catalogue import Unit, tensors
from .proofs import Wrong

LENGTH = 3
Note = Callable[[str], None]


def sweep(unit: Unit, note: Note = lambda phase: None) -> dict[str, Any]:
    """`outcome`: "not built", "refused", "proved" or "failed"; `reason`, and `checks` with a word for each proof."""
    start = time.perf_counter()
    note("building")
    try:
        model, inputs = build(unit)
    except NotBuilt as error:
        return {"outcome": "not built", "reason": str(error)}
    note("plain")
    result = Trial(model, inputs).run(note)
    result["seconds"] = round(time.perf_counter() - start, 2)
    return result


class Trial:
    """What is known of the plain model, and what the model with a prefix is held to."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.checks: dict[str, str] = {}
        self.state = copy.deepcopy(model.state_dict())
        self.implementations = implementations(model)
        self.plain = forward(model, inputs)
        # Which product a linear layer takes depends on whether its weight wants a gradient, so the plain model's last
        # bits do: attach freezes, and what is compared to the bit while attached is the frozen plain model.
        model.requires_grad_(False)
        self.frozen = forward(model, inputs)
        places = [(n, p) for n in ("decoder_input_ids", "input_ids", "pixel_values") if n in inputs for p in (-1, 0)]
        self.dependence = {k: proofs.tried(lambda k=k: proofs.dependence(model, inputs, *k)) for k in places}
        ids = (
            "input_ids" in inputs
            and inputs["input_ids"].ndim == 2
            and "attention_mask" in proofs.examples.names_of(model)
        )
        self.padding = {
            s: proofs.tried(lambda s=s: proofs.padding_error(model, inputs, s)) for s in (proofs.SIDES if ids else ())
        }
        self.widths = {n: not isinstance(self.width(n), Exception) for n in ((-2, 3) if ids else ())}
        self.labels = proofs.choose_labels(model, inputs)
        self.generated = self.steps = self.left = None
        if can_generate(model):
            self.generated = proofs.tried(lambda: proofs.generated(model, inputs))
            if self.generated is not None:
                self.steps = proofs.tried(lambda: proofs.steps_off(model, inputs, self.generated))
                if ids and not model.config.is_encoder_decoder:
                    self.left = proofs.tried(lambda: self.left_padded())
        self.pictured = proofs.choose_image(model)
        self.seen = None
        if self.pictured is not None:
            proofs.forget(model)
            self.seen = forward(model, self.pictured)
        self.image_step = (
            proofs.tried(lambda: proofs.image_step(model, self.pictured))
            if can_generate(model) and self.pictured
            else None
        )
        proofs.forget(model)
        self.inner = {
            n: (p, proofs.tried(lambda p=p: proofs.part_inputs(model, inputs, p)))
            for n, p in proofs.parts_of(model).items()
        }
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())

    def run(self, note: Note) -> dict[str, Any]:
        note("attaching")
        try:
            self.prefix = prefixattn.attach(self.model, PrefixConfig(length=LENGTH, share="none"))
        except Exception as error:
            return self.refused(error)
        note("attached")
        adapter = self.prefix._adapter
        for name in (
            "reaches",
            "forward",
            "training",
            "each layer",
            "causality",
            "padding right",
            "padding left",
            "mask width",
            "generation",
            "image",
            "parts",
            "deep",
            "disabled",
            "detached",
        ):
            note(name)
            try:
                self.checks[name] = getattr(self, name.replace(" ", "_"))() or "ok"
            except Wrong as error:
                self.checks[name] = f"FAILED: {error}"
            except Exception as error:
                self.checks[name] = f"FAILED: {'refused late: ' if proofs.in_words(error) else ''}{first_line(error)}"
        failed = [f"{n}: {w.removeprefix('FAILED: ')}" for n, w in self.checks.items() if w.startswith("FAILED")]
        return {
            "outcome": "failed" if failed else "proved",
            "reason": "; ".join(failed),
            "kinds": adapter.geometry.kinds,
            "positions": self.prefix.config.positions,
            "checks": {n: w for n, w in self.checks.items() if w != "ok"},
        }

    def refused(self, error: Exception) -> dict[str, Any]:
        reason = first_line(error)
        if not (proofs.in_words(error) and proofs.names_itself(error)):
            return {"outcome": "failed", "reason": f"attach: {reason}"}
        if (
            not proofs.equal(forward(self.model, self.inputs), self.plain)
            or implementations(self.model) != self.implementations
        ):
            return {"outcome": "failed", "reason": f"attach refused and left the model changed: {reason}"}
        return {"outcome": "refused", "reason": reason}

    # one method for each proof: returns a word, or raises

    def reaches(self) -> str | None:
        self.fill(1)
        one = forward(self.model, self.inputs)
        again = forward(self.model, self.inputs)
        if not proofs.equal(one, again):
            raise Wrong("two runs with the same prefix differ")
        self.fill(2)
        other = forward(self.model, self.inputs)
        if proofs.equal(one, other):
            raise Wrong("another prefix gives the same output")
        if proofs.equal(one, self.plain):
            raise Wrong("the output is the plain model's")
        if not all(
            t.isfinite().all() or p.isinf().any()
            for t, p in zip(tensors(other), tensors(self.plain), strict=True)
            if not t.is_complex()
        ):
            raise Wrong("the output is not finite")
        if [t.shape for t in tensors(one)] != [t.shape for t in tensors(self.plain)]:
            raise Wrong("the output has another shape than the plain model's")
        return None

    def forward(self) -> str | None:
        self.fill(2)
        try:
            other = forward(self.model, self.inputs, call=self.model.forward)
        except Exception as error:
            if proofs.in_words(error):
                return f"refused: {first_line(error)}"
            raise
        self.fill(1)
        expected, out = forward(self.model, self.inputs), forward(self.model, self.inputs, call=self.model.forward)
        if proofs.equal(out, other):
            raise Wrong("model.forward(...) leaves out the prefix")
        if not proofs.equal(out, expected):
            raise Wrong("model.forward(...) gives another output than model(...)")
        return None

    def training(self) -> str | None:
        if self.labels is False:
            return "-"
        self.fill(1)
        with proofs.training(self.model):
            self.prefix.zero_grad()
            loss = proofs.loss_of(self.model, self.inputs, self.labels)
            if not loss.requires_grad:
                raise Wrong("the loss needs no gradient")
            loss.backward()
        grad = self.bank.grad
        if grad is None:
            raise Wrong("the prefix got no gradient")
        if not grad.isfinite().all():
            raise Wrong("the gradient is not finite")
        without = (
            [i for i, g in enumerate(grad) if not g.abs().amax((1, 2, 3)).gt(0).all()]
            if grad.ndim == 5
            else []
            if grad.abs().sum()
            else [0]
        )
        if without:
            raise Wrong(f"layers {without} of {len(grad)} got no gradient")
        if any(p.grad is not None for p in self.model.parameters()):
            raise Wrong("the frozen model got gradients")
        return "ok, own loss" if self.labels is not None else "ok, sum of outputs"

    def each_layer(self) -> str | None:
        self.fill(1)
        before, bank = forward(self.model, self.inputs), self.bank.detach().clone()
        dead = []
        for slot in range(len(bank)):
            self.bank.data.copy_(bank)
            self.bank.data[slot] = self.bank.data[slot].flip(-1) + 0.5
            if proofs.equal(before, forward(self.model, self.inputs)):
                dead.append(slot)
        if dead:
            raise Wrong(f"the prefix of layers {dead} of {len(bank)} moves nothing")
        return None

    def causality(self) -> str | None:
        self.fill(1)
        known = {k: v for k, v in self.dependence.items() if v is not None}
        for (name, place), plain in known.items():
            ours = proofs.dependence(self.model, self.inputs, name, place)
            if ours is None:
                raise Wrong("the output has other positions")
            differs = [i for i, (a, b) in enumerate(zip(plain, ours, strict=True)) if None not in (a, b) and a != b]
            if differs:
                what = (
                    "depends where the plain model's does not"
                    if ours[differs[0]]
                    else "does not depend where the plain model's does"
                )
                raise Wrong(f"output {differs} {what}, on {name}[{place}]")
        return None if known else "-"

    def padding_right(self) -> str | None:
        return self.padded("right")

    def padding_left(self) -> str | None:
        return self.padded("left")

    def padded(self, side: str) -> str:
        self.fill(1)
        plain = self.padding.get(side)
        if plain is None or plain > proofs.CLOSE:
            return "-" if plain is None else "- (the plain model's padding counts)"
        try:
            ours = proofs.padding_error(self.model, self.inputs, side)
        except Exception as error:
            if proofs.in_words(error):
                return f"refused: {first_line(error)}"
            raise
        if ours > proofs.CLOSE:
            raise Wrong(f"padded differs from unpadded by {ours:.0e}, plain {plain:.0e}")
        return "ok"

    def width(self, more: int) -> Any:
        """The output with a mask of `more` columns than tokens, or the error."""
        ids = self.inputs["input_ids"]
        mask = torch.ones(ids.shape[0], ids.shape[1] + more, dtype=torch.long)
        try:
            return forward(self.model, {**self.inputs, "attention_mask": mask})
        except Exception as error:
            return error

    def mask_width(self) -> str | None:
        self.fill(1)
        for more, accepts in self.widths.items():
            out = self.width(more)
            if not accepts and not isinstance(out, Exception):
                raise Wrong(f"a mask {'too short' if more < 0 else 'too wide'} is taken, which the plain model refuses")
        return None if self.widths else "-"

    def generation(self) -> str | None:
        if self.generated is None:
            return "-"
        self.fill(2)
        other = proofs.generated(self.model, self.inputs)
        self.fill(1)
        one = proofs.generated(self.model, self.inputs)
        if all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True)):
            raise Wrong("another prefix generates from the same logits")
        if self.steps is None:
            return "ok, not compared with a forward pass"
        for step, (plain, ours) in enumerate(
            zip(self.steps, proofs.steps_off(self.model, self.inputs, one), strict=True)
        ):
            if plain < proofs.CLOSE < ours:
                raise Wrong(f"step {step} is off a forward pass by {ours:.0e}, plain {plain:.0e}")
        if self.left is not None and self.left < proofs.CLOSE < (ours := self.left_padded()):
            raise Wrong(f"a left-padded sample generates logits off by {ours:.0e}, plain {self.left:.0e}")
        return "ok"

    def left_padded(self) -> float:
        whole, alone, _ = proofs.padded_inputs(self.model, self.inputs, "left")
        one, two = (proofs.generated(self.model, i).logits for i in (whole, alone))
        return max(proofs.off(a[:1], b) for a, b in zip(one, two, strict=True))

    def image(self) -> str | None:
        """The same with an image in the text: positions that are computed from it are those of generation."""
        if self.pictured is None:
            return "-"
        outs = []
        for seed in (2, 1):
            self.fill(seed)
            proofs.forget(self.model)
            outs.append(forward(self.model, self.pictured))
        if proofs.equal(*outs):
            raise Wrong("another prefix gives the same output")
        if self.image_step is not None and self.image_step < proofs.CLOSE < (
            ours := proofs.image_step(self.model, self.pictured)
        ):
            raise Wrong(
                f"the first step of generation is off the forward pass by {ours:.0e}, plain {self.image_step:.0e}"
            )
        proofs.forget(self.model)
        with self.prefix.disabled():
            if not proofs.equal(forward(self.model, self.pictured), self.seen):
                raise Wrong("disabled: the output is not the plain model's to the bit")
        proofs.forget(self.model)
        return None

    def parts(self) -> str | None:
        """The base model, the encoder and the decoder, called by themselves with what the model gives them."""
        words = []
        for name, (part, given) in self.inner.items():
            if given is None or not any(hasattr(m, "prefix_slot") for m in part.modules()):
                continue
            args, kwargs = given
            outs = []
            try:
                for seed in (1, 2):
                    self.fill(seed)
                    torch.manual_seed(0)
                    with torch.no_grad():
                        outs.append(part(*args, **kwargs))
            except Exception as error:
                if not proofs.in_words(error):
                    raise Wrong(f"{name} called by itself: {first_line(error)}") from None
                words.append(f"{name} refused: {first_line(error)}")
                continue
            if proofs.equal(*outs):
                raise Wrong(f"{name} called by itself leaves out the prefix")
        return "; ".join(words)

    def deep(self) -> str | None:
        """A second prefix, of a network, beside the first; which is the active one again afterwards."""
        self.fill(1)
        before = forward(self.model, self.inputs)
        deep = prefixattn.attach(self.model, PrefixConfig(length=LENGTH, share="deep", hidden=8))
        try:
            self.trained(deep, before)
        finally:
            deep.detach()
        if not proofs.equal(forward(self.model, self.inputs), before):
            raise Wrong("without the second prefix the output is not the first's")
        return None

    def trained(self, deep: Any, before: Any) -> None:
        if proofs.equal(forward(self.model, self.inputs), before):
            raise Wrong("the second prefix gives the first's output")
        if self.labels is False:
            return
        with proofs.training(self.model):
            proofs.loss_of(self.model, self.inputs, self.labels).backward()
        if not all(
            p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in deep.parameters()
        ):
            raise Wrong("a parameter of the network got no gradient")

    def disabled(self) -> str | None:
        with self.prefix.disabled():
            out = forward(self.model, self.inputs)
            text = None if self.generated is None else proofs.generated(self.model, self.inputs)
        if not proofs.equal(out, self.frozen):
            raise Wrong("the output is not the plain model's to the bit")
        if text is not None and not all(
            torch.equal(a, b) for a, b in zip(text.logits, self.generated.logits, strict=True)
        ):
            raise Wrong("generation is not the plain model's to the bit")
        return None

    def detached(self) -> str | None:
        self.prefix.detach()
        if not proofs.equal(forward(self.model, self.inputs), self.plain):
            raise Wrong("the output is not the plain model's to the bit")
        if implementations(self.model) != self.implementations:
            raise Wrong("the attention implementation is another than before")
        after = self.model.state_dict()
        if list(after) != list(self.state) or not all(
            torch.equal(after[n], v) for n, v in self.state.items() if isinstance(v, torch.Tensor)
        ):
            raise Wrong("the model's weights are others than before")
        if not all(p.requires_grad for p in self.model.parameters() if p.is_floating_point()):
            return "ok, but not all parameters are trainable"
        return None

    @property
    def bank(self) -> Any:
        return self.prefix.encoder.bank

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.bank.copy_(torch.randn(self.bank.shape, generator=generator))


def can_generate(model: Any) -> bool:
    return bool(proofs.tried(lambda: model.can_generate()))


def implementations(model: Any) -> list[str | None]:
    return [getattr(m.config, "_attn_implementation", None) for m in model.modules() if "config" in m.__dict__]
