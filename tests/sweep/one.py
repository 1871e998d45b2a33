"""One model of the sweep: built, attached to, and each proof tried."""

import time
from collections.abc import Callable
from typing import Any

import torch

import prefixattn
from prefixattn import PrefixConfig

from . import proofs
from .building import NotBuilt, build, first_line, forward
from .catalogue import Unit, tensors
from .plain import Plain, implementations
from .proofs import Wrong

LENGTH = 3
PROOFS = (
    "reaches",
    "direct",
    "training",
    "each_layer",
    "dependence",
    "padding_right",
    "padding_left",
    "mask_width",
    "generation",
    "image",
    "parts",
    "deep",
    "disabled",
    "detached",  # the last, as it takes the prefix away
)
Note = Callable[[str], None]


def sweep(unit: Unit, note: Note = lambda phase: None) -> dict[str, Any]:
    """`outcome`: "not built", "refused", "proved" or "failed"; `reason`; `checks`, what is to be said of proofs."""
    start = time.perf_counter()
    note("building")
    try:
        model, inputs = build(unit)
    except NotBuilt as error:
        return {"outcome": "not built", "reason": str(error)}
    note("plain")
    try:
        plain = Plain(model, inputs)
    except Exception as error:
        return {"outcome": "not built", "reason": f"the plain model, after other calls: {first_line(error)}"}
    result = Trial(plain).run(note)
    return {**result, "seconds": round(time.perf_counter() - start, 2)}


class Trial:
    """The model with a prefix. A method for each proof: it returns what is to be said beside "ok", or raises."""

    def __init__(self, plain: Plain) -> None:
        self.model, self.inputs, self.plain = plain.model, plain.inputs, plain
        self.prefix: Any = None

    def run(self, note: Note) -> dict[str, Any]:
        note("attaching")
        try:
            self.prefix = prefixattn.attach(self.model, PrefixConfig(length=LENGTH, share="none"))
        except Exception as error:
            return self.refused(error)
        checks = {}
        for name in PROOFS:
            note(name)
            self.fill(1)
            try:
                word = getattr(self, name)()
            except Wrong as error:
                word = f"FAILED: {error}"
            except Exception as error:
                late = "refused late: " if proofs.in_words(error) else ""
                word = f"FAILED: {late}{first_line(error)}"
            if word:
                checks[name] = word
        failed = [f"{n}: {w.removeprefix('FAILED: ')}" for n, w in checks.items() if w.startswith("FAILED")]
        return {
            "outcome": "failed" if failed else "proved",
            "reason": "; ".join(failed),
            "kinds": self.prefix.geometry.kinds,
            "positions": self.prefix.config.positions,
            "checks": checks,
        }

    def refused(self, error: Exception) -> dict[str, Any]:
        reason = first_line(error)
        if not (proofs.in_words(error) and proofs.of_ours(error)):
            return {"outcome": "failed", "reason": f"attach: {reason}"}
        try:
            same = proofs.equal(forward(self.model, self.inputs), self.plain.out)
        except Exception:
            same = False
        if not same or implementations(self.model) != self.plain.implementations:
            return {"outcome": "failed", "reason": f"attach refused and left the model changed: {reason}"}
        return {"outcome": "refused", "reason": reason}

    def reaches(self) -> str | None:
        one, again = (forward(self.model, self.inputs) for _ in range(2))
        self.fill(2)
        other = forward(self.model, self.inputs)
        if not proofs.equal(one, again):
            raise Wrong("two runs with the same prefix differ")
        if proofs.equal(one, other):
            raise Wrong("another prefix gives the same output")
        if proofs.equal(one, self.plain.out):
            raise Wrong("the output is the plain model's")
        if [t.shape for t in tensors(one)] != [t.shape for t in tensors(self.plain.out)]:
            raise Wrong("the output has another shape than the plain model's")
        if not proofs.finite(one):
            raise Wrong("the output is not finite")
        return None

    def direct(self) -> str | None:
        """model.forward(...), past the hooks."""
        expected = forward(self.model, self.inputs)
        try:
            out = forward(self.model, self.inputs, call=self.model.forward)
        except Exception as error:
            if proofs.in_words(error):
                return "refused"
            raise
        self.fill(2)
        if proofs.equal(out, forward(self.model, self.inputs, call=self.model.forward)):
            raise Wrong("model.forward(...) leaves out the prefix")
        if not proofs.equal(out, expected):
            raise Wrong("model.forward(...) gives another output than model(...)")
        return None

    def training(self) -> str | None:
        if self.plain.labels is False:
            return "-"
        self.prefix.zero_grad()
        with proofs.training(self.model):
            loss = proofs.loss_of(self.model, self.inputs, self.plain.labels)
            if not loss.requires_grad:
                raise Wrong("the loss needs no gradient")
            loss.backward()
        grad = self.kv.grad
        if grad is None:
            raise Wrong("the prefix got no gradient")
        if not grad.isfinite().all():
            raise Wrong("the gradient is not finite")
        # [N, 2, Hkv, P, D]: keys and values of each layer
        without = [i for i, g in enumerate(grad) if not g.abs().amax((1, 2, 3)).gt(0).all()]
        if without:
            raise Wrong(f"layers {without} of {len(grad)} got no gradient")
        if any(p.grad is not None for p in self.model.parameters()):
            raise Wrong("the frozen model got gradients")
        return "sum of outputs" if self.plain.labels is None else None

    def each_layer(self) -> str | None:
        before, kv = forward(self.model, self.inputs), self.kv.detach().clone()
        dead = []
        for slot in range(len(kv)):
            self.kv.data.copy_(kv)
            self.kv.data[slot] = kv[slot].flip(-1) + 0.5
            if proofs.equal(before, forward(self.model, self.inputs)):
                dead.append(slot)
        if dead:
            raise Wrong(f"the prefix of layers {dead} of {len(kv)} moves nothing")
        return None

    def dependence(self) -> str | None:
        known = {k: v for k, v in self.plain.dependence.items() if v is not None}
        for (name, place), plain in known.items():
            ours = proofs.dependence(self.model, self.inputs, name, place)
            if ours is None:
                raise Wrong("the output has other positions")
            differs = [i for i, (a, b) in enumerate(zip(plain, ours, strict=True)) if None not in (a, b) and a != b]
            if differs:
                does, plain_does = ("depends", "does not") if ours[differs[0]] else ("does not depend", "does")
                raise Wrong(f"output {differs} {does} on {name}[{place}], where the plain model's {plain_does}")
        return None if known else "-"

    def padding_right(self) -> str | None:
        return self.padded("right")

    def padding_left(self) -> str | None:
        return self.padded("left")

    def padded(self, side: str) -> str | None:
        plain = self.plain.padding.get(side)
        if plain is None or plain > proofs.CLOSE:
            return "-" if plain is None else "counts in the plain model"
        try:
            ours = proofs.padding_error(self.model, self.inputs, side)
        except Exception as error:
            if proofs.in_words(error):
                return f"refused: {first_line(error)}"
            raise
        if ours > proofs.CLOSE:
            raise Wrong(f"padded differs from unpadded by {ours:.0e}, plain {plain:.0e}")
        return None

    def mask_width(self) -> str | None:
        for more, accepts in self.plain.widths.items():
            try:
                proofs.masked(self.model, self.inputs, more)
            except Exception:
                continue
            if not accepts:
                raise Wrong(f"a mask too {'short' if more < 0 else 'wide'} is taken, which the plain model refuses")
        return None if self.plain.widths else "-"

    def generation(self) -> str | None:
        if self.plain.generated is None:
            return "-"
        one = proofs.generated(self.model, self.inputs)
        self.fill(2)
        other = proofs.generated(self.model, self.inputs)
        if all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True)):
            raise Wrong("another prefix generates from the same logits")
        self.fill(1)
        word = None if self.plain.steps is not None else "steps not compared with a forward pass"
        if self.plain.steps is not None:
            steps = proofs.steps_off(self.model, self.inputs, one)
            both = list(enumerate(zip(self.plain.steps, steps, strict=True)))
            far = [(step, plain, ours) for step, (plain, ours) in both if plain < proofs.CLOSE < ours]
            if far:
                exact = proofs.exact_steps(self.model, self.inputs)
                if exact is None or exact > proofs.EXACT:
                    step, plain, ours = far[0]
                    also = "" if exact is None else f", and {exact:.0e} in float64"
                    raise Wrong(f"step {step} is off a forward pass by {ours:.0e}, plain {plain:.0e}{also}")
                word = "steps compared in float64"
        left = self.plain.left
        if left is not None and left < proofs.CLOSE < (ours := proofs.left_padded(self.model, self.inputs)):
            raise Wrong(f"a left-padded sample generates logits off by {ours:.0e}, plain {left:.0e}")
        return word

    def image(self) -> str | None:
        """The same with an image in the text: positions that are computed from it are those of generation."""
        pictured, plain = self.plain.pictured, self.plain.image_step
        if pictured is None:
            return "-"
        outs = []
        for seed in (2, 1):
            self.fill(seed)
            proofs.forget(self.model)
            try:
                outs.append(forward(self.model, pictured))
            except Exception as error:
                if proofs.in_words(error):
                    return f"refused: {first_line(error)}"
                raise
        if proofs.equal(*outs):
            raise Wrong("another prefix gives the same output")
        if plain is not None and plain < proofs.CLOSE < (ours := proofs.image_step(self.model, pictured)):
            raise Wrong(f"the first step of generation is off the forward pass by {ours:.0e}, plain {plain:.0e}")
        proofs.forget(self.model)
        with self.prefix.disabled():
            if not proofs.equal(forward(self.model, pictured), self.plain.seen):
                raise Wrong("disabled: the output is not the plain model's to the bit")
        proofs.forget(self.model)
        return None

    def parts(self) -> str | None:
        """The base model, the encoder and the decoder, called by themselves with what the model gives them."""
        words = []
        for name, (part, given) in self.plain.parts.items():
            if given is None or not any(hasattr(m, "prefix_slot") for m in part.modules()):
                continue
            outs = []
            try:
                for seed in (1, 2):
                    self.fill(seed)
                    outs.append(forward(part, given[1], call=lambda *a, p=part, g=given, **k: p(*g[0], *a, **k)))
            except Exception as error:
                if not proofs.in_words(error):
                    raise Wrong(f"{name} called by itself: {first_line(error)}") from None
                words.append(f"{name} refused")
                continue
            if proofs.equal(*outs):
                raise Wrong(f"{name} called by itself leaves out the prefix")
        return ", ".join(words) or None

    def deep(self) -> str | None:
        """A second prefix, made by a network, is the active one and learns; without it the first one is there again."""
        before = forward(self.model, self.inputs)
        deep = prefixattn.attach(self.model, PrefixConfig(length=LENGTH, share="deep", hidden=8))
        try:
            if proofs.equal(forward(self.model, self.inputs), before):
                raise Wrong("the second prefix gives the first's output")
            if self.plain.labels is not False:
                with proofs.training(self.model):
                    proofs.loss_of(self.model, self.inputs, self.plain.labels).backward()
                if not all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in deep.parameters()):
                    raise Wrong("a parameter of the network got no gradient")
        finally:
            deep.detach()
        if not proofs.equal(forward(self.model, self.inputs), before):
            raise Wrong("without the second prefix the output is not the first's")
        return None

    def disabled(self) -> str | None:
        plain = self.plain.generated
        with self.prefix.disabled():
            out = forward(self.model, self.inputs)
            text = None if plain is None else proofs.generated(self.model, self.inputs)
        if not proofs.equal(out, self.plain.frozen):
            raise Wrong("the output is not the plain model's to the bit")
        if text is not None and not proofs.equal(text.logits, plain.logits):
            raise Wrong("generation is not the plain model's to the bit")
        return None

    def detached(self) -> str | None:
        self.prefix.detach()
        if not proofs.equal(forward(self.model, self.inputs), self.plain.out):
            raise Wrong("the output is not the plain model's to the bit")
        if implementations(self.model) != self.plain.implementations:
            raise Wrong("the attention implementation is another than before")
        state = self.model.state_dict()
        if not all(torch.equal(state[n], v) for n, v in self.plain.state.items()):
            raise Wrong("the model's weights are others than before")
        if not all(p.requires_grad for p in self.model.parameters() if p.is_floating_point()):
            raise Wrong("a parameter that was trainable is frozen")
        return None

    @property
    def kv(self) -> Any:
        return self.prefix.encoder.bank

    def fill(self, seed: int) -> None:
        """Other keys and values for each seed."""
        with torch.no_grad():
            self.kv.copy_(torch.randn(self.kv.shape, generator=torch.Generator().manual_seed(seed)))
