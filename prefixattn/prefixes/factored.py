"""`FactoredNetwork`: a network that ends in a large linear layer, of whose weight nobody makes the gradient."""

from functools import partial

import torch
from torch import Tensor, nn

from prefixattn.prefixes.ownership import CHANGED, Hidden, Known, OwnedByOptimizer
from prefixattn.reparam.call import Form
from prefixattn.reparam.reference import kv_view


class FactoredNetwork(OwnedByOptimizer):
    """The base of networks whose last layer makes all keys and values: `DeepShare`, or one of your own.

        y = hidden(*ahead) @ w2.mT + b2    # [G, P, O], O = form.layers * 2 * form.kv_heads * form.head_dim

    y is seen as kv `[G * layers, 2, kv_heads, P, head_dim]` as `reparameterize` sees it. A subclass defines

    - `parameters_in_order()`: the parameters ahead, w2 [O, M] or [G, O, M], and b2 [O], [G, O] or None;
    - `hidden(*ahead)`: [P, M] or [G, P, M], of these tensors and of nothing that changes, the same each time.

    An optimizer that needs no gradient of w2 can *own* the network (`prefixattn.FactoredAdamW` does). Then the
    kv that a forward pass gets is a leaf, computed once for a state of the parameters and used by all forward passes
    until one of them changes; what a backward pass adds to it goes to the optimizer, and is found in `.grad` of the
    parameters as that writes it there. torch.autograd.grad sees no path to them. Parameters keep their state between a
    forward pass and its backward pass; else the latter raises. Who writes to a parameter where torch does not see it
    has to call torch.autograd.graph.increment_version.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_dim: int, interleaved: bool = False, activation: str = "none"
    ) -> None:
        """Of the sizes of `reparameterize`; `activation` is the affair of `hidden`."""
        super().__init__()
        for name, value in (("layers", layers), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected an integer from 1")
        self.form = Form(layers, kv_heads, head_dim, interleaved, activation)

    def hidden(self, *ahead: Tensor) -> Tensor:
        """[P, M] or [G, P, M]"""
        raise NotImplementedError

    def factored_parameter(self) -> Tensor | None:
        w2: Tensor = self.parameters_in_order()[-2]
        return w2 if w2.dtype in (torch.float32, torch.float64) else None

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """Keys and values, in w2's type or in `dtype`."""
        if dtype is None:
            dtype = self.parameters_in_order()[-2].dtype
        plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if torch.is_grad_enabled() and not plain and self.factored:
            return self.leaf(dtype)
        return self._recorded(dtype)

    @property
    def factored(self) -> bool:
        """True if forward passes get a leaf: owned, and w2 is trained, nothing else put in a parameter's place."""
        return self.receiver is not None and self._trained()

    def _trained(self) -> bool:
        # parametrizations and torch.func.functional_call put other tensors there
        ordinary = all([t is None or isinstance(t, nn.Parameter) for t in self.parameters_in_order()])
        w2 = self.factored_parameter()
        return ordinary and w2 is not None and w2.requires_grad

    def leaf(self, dtype: torch.dtype) -> Tensor:
        """kv in `dtype` as a leaf that wants a gradient, the same one until a parameter changes."""
        known = self._known(self._there())
        if dtype not in known.leaves:
            return self._as_leaf(self._computed(dtype, known), known)
        return known.leaves[dtype]

    def _there(self) -> tuple[Tensor, ...]:
        return tuple([t for t in self.parameters_in_order() if t is not None])

    def _computed(self, dtype: torch.dtype, known: Known) -> Tensor:
        """kv without a graph; what else the optimizer will need is in `known.made` afterwards."""
        ahead, w2, b2 = self._split()
        with torch.inference_mode(False), torch.autocast(w2.device.type, enabled=False):
            if known.made is None:
                # of aliases: a graph that held the parameters would be held by their gradients
                aliases = [t.detach().requires_grad_() for t in ahead]
                with torch.enable_grad():
                    h = self._rows(aliases, w2).to(w2.dtype)
                known.made = Hidden(h.detach(), self.form, partial(_pulled, h, aliases))
            with torch.no_grad():
                return _kv(known.made.h, w2, b2, self.form, dtype)

    def _recorded(self, dtype: torch.dtype) -> Tensor:
        """kv with its graph."""
        ahead, w2, b2 = self._split()
        return _kv(self._rows(ahead, w2), w2, b2, self.form, dtype)

    def _split(self) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """The parameters ahead, w2 and b2; ValueError if they do not fit the form."""
        *ahead, w2, b2 = self.parameters_in_order()
        kind, form = type(self).__name__, self.form
        if missing := [i for i, t in enumerate(ahead) if t is None]:
            raise ValueError(f"parameter {missing[0]} of {kind} is None; only b2, the last, may be")
        outputs = form.layers * 2 * form.kv_heads * form.head_dim
        for name, t, axes, last in (("w2", w2, "O, M", -2), ("b2", b2, "O", -1)):
            if t is not None and (t.dim() not in (-last, 1 - last) or t.shape[last] != outputs):
                raise ValueError(
                    f"{name} of {kind} has shape {list(t.shape)}, expected [{axes}] or [G, {axes}] with O={outputs}: "
                    f"layers={form.layers} * 2 * kv_heads={form.kv_heads} * head_dim={form.head_dim}"
                )
        return ahead, w2, b2

    def _rows(self, ahead: list[Tensor], w2: Tensor) -> Tensor:
        """h [G, P, M]; ValueError if it is something else."""
        h = self.hidden(*ahead)
        found = list(h.shape) if isinstance(h, Tensor) else type(h).__name__
        G, M = (w2.shape[0] if w2.dim() == 3 else 1), w2.shape[-1]
        h = h[None] if isinstance(h, Tensor) and h.dim() == 2 else h
        if not isinstance(h, Tensor) or h.dim() != 3 or (h.shape[0], h.shape[2]) != (G, M):
            raise ValueError(f"hidden of {type(self).__name__} returned {found}, expected [G={G}, P, M={M}]")
        return h

    def _deliver(self, name: object, dkv: Tensor) -> None:
        known, receive = self._known(self._there()), self.receiver
        if name is not None and known.name is not name:
            raise RuntimeError(CHANGED.format(what="network"))
        if receive is None:  # the optimizer went away in between
            with torch.enable_grad():
                self._recorded(dkv.dtype).backward(dkv)
            return
        if known.made is None:
            self._computed(dkv.dtype, known)
        receive(self, dkv, known.made)


def _kv(h: Tensor, w2: Tensor, b2: Tensor | None, form: Form, dtype: torch.dtype) -> Tensor:  # h [G, P, M]
    with torch.autocast(h.device.type, enabled=False):
        y = h.to(w2.dtype) @ (w2 if w2.dim() == 3 else w2[None]).mT
        if b2 is not None:
            y = y + (b2 if b2.dim() == 2 else b2[None])[:, None]
    return kv_view(y, form).flatten(0, 1).to(dtype)


def _pulled(h: Tensor, aliases: list[Tensor], dh: Tensor, ahead: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(h, aliases, dh.to(h.dtype), retain_graph=True, allow_unused=True, materialize_grads=True)
