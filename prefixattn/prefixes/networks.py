"""Modules that make prefixes: *kv*, which geometry.py describes."""

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixattn.prefixes.config import PrefixConfig
from prefixattn.prefixes.factored import FactoredNetwork
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.ownership import CHANGED, Hidden, Known, MakesPrefix, OwnedByOptimizer, State, arrived
from prefixattn.reparam import reference
from prefixattn.reparam.call import Call, Form, Needs
from prefixattn.reparam.functional import kv_and_z, kv_onto, reparameterize
from prefixattn.reparam.reference import ACTIVATIONS, hidden_bwd, kv_view

Project = Callable[[int, Tensor], Tensor]  # layer, vectors [P, E] -> its kv, without N


class _Rows(nn.Module):
    """`nn.Embedding`'s table for several networks."""

    def __init__(self, networks: int, length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(networks, length, width))


class _Linears(nn.Module):
    """As many `nn.Linear`s as there are networks, in one tensor."""

    def __init__(self, networks: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5  # nn.Linear's
        self.weight = nn.Parameter(torch.empty(networks, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(networks, outputs).uniform_(-bound, bound))

    def forward(self, rows: Tensor) -> Tensor:  # [G, P, I] -> [G, P, J]
        return torch.baddbmm(self.bias[:, None], rows, self.weight.mT)


class DeepShare(FactoredNetwork):
    """Embedding -> Linear -> activation -> Linear: key and value of a row come from one embedding.

    One network makes all layers, as for language models, or each of several makes its own `layers`, those of network g
    after those of network g - 1: three for an encoder-decoder, one for each layer in published code for vision, where
    key and value are also `interleaved`. Their parameters are `embedding.weight [G, P, E]`, `down.weight [G, M, E]`,
    `down.bias [G, M]`, `up.weight [G, O, M]` and `up.bias [G, O]`, without the first axis if there is one network.

    With `fused`, which can be changed at any time, the op `reparameterize` runs it, without calling the layers, and so
    without their hooks.

    An optimizer that needs no gradient of `up.weight` can own the network, see `FactoredNetwork`.
    """

    def __init__(
        self,
        layers: int,
        length: int,
        hidden: int,
        geometry: Geometry,
        *,
        networks: int = 1,
        interleaved: bool = False,
        activation: str = "tanh",
        fused: bool = True,
    ) -> None:
        heads, width = geometry.of_network
        super().__init__(layers, heads, width, interleaved, activation)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, expected {', '.join(map(repr, ACTIVATIONS))}")
        if not isinstance(networks, int) or networks < 1:
            raise ValueError(f"networks is {networks!r}, expected an integer from 1")
        self.networks = networks
        self.fused = fused
        self.two_widths = geometry.two_widths
        outputs = layers * 2 * heads * width
        self.embedding: Any
        self.down: Any
        self.up: Any
        if networks == 1:
            self.embedding = nn.Embedding(length, geometry.width)
            self.down = nn.Linear(geometry.width, hidden)
            self.up = nn.Linear(hidden, outputs)
        else:
            self.embedding = _Rows(networks, length, geometry.width)
            self.down = _Linears(networks, geometry.width, hidden)
            self.up = _Linears(networks, hidden, outputs)
        self._stand_in: Tensor | None = None

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """Keys and values, in the parameters' type or in `dtype`. One pass over P rows, whatever the batch."""
        kv = self._halves(self.embedding.weight.dtype if dtype is None else dtype)
        return kv.flatten(1, 2)[:, None] if self.two_widths else kv

    def _halves(self, dtype: torch.dtype) -> Tensor:
        """kv in the network's own form, [N, 2, Hkv, P, D] or [N, 2, Hkv / 2, P, D + Dv]."""
        if not self.fused:
            return self._by_layers(dtype)
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            if torch.compiler.is_compiling():
                if self._stand_in is not None and self._trained():
                    return kv_onto(self._stand_in, Call(*self.operands(), self.form, dtype))
            elif self.factored:
                return self.leaf(dtype)
        return self._recorded(dtype)

    def _by_layers(self, dtype: torch.dtype) -> Tensor:
        activation = ACTIVATIONS[self.form.activation][0]
        y = self.up(activation(self.down(self.embedding.weight)))  # [G, P, O] or [P, O]
        return kv_view(y if y.dim() == 3 else y[None], self.form).flatten(0, 1).to(dtype)

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [G, P, E], w1 [G, M, E], b1 [G, M], w2 [G, O, M], b2 [G, O]: the parameters or, of one network, views."""
        parameters = self.parameters_in_order()
        x, w1, b1, w2, b2 = (t.unsqueeze(0) for t in parameters) if self.networks == 1 else parameters
        return x, w1, b1, w2, b2

    def parameters_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five parameters as they are, those of one network without the axis G."""
        return self.embedding.weight, self.down.weight, self.down.bias, self.up.weight, self.up.bias

    # owned by an optimizer

    def take_over(self, receive: Callable[..., None]) -> None:
        """As of any network; and a compiled forward pass computes kv in its graph, each time.

        Its gradient comes by way of a leaf without memory that stands in for the parameters; it does not notice a
        parameter changed before its backward.
        """
        super().take_over(receive)
        self._make_stand_in()

    def release(self) -> None:
        """Undoes `take_over`."""
        self._stand_in = None
        super().release()

    def _make_stand_in(self) -> None:
        N, P = self.networks * self.form.layers, self.embedding.weight.shape[-2]
        shape = (N, 2, self.form.kv_heads, P, self.form.head_dim)
        self._stand_in = self.embedding.weight.new_zeros(()).expand(shape).requires_grad_()
        self._stand_in.register_post_accumulate_grad_hook(partial(arrived, weakref.ref(self), None))

    @property
    def factored(self) -> bool:
        return self.fused and super().factored

    def _computed(self, dtype: torch.dtype, known: Known) -> Tensor:
        kv, z = kv_and_z(Call(*self.operands(), self.form, dtype))
        if known.made is None:
            known.made = hidden_of(z, self.form)
        return kv

    def _recorded(self, dtype: torch.dtype) -> Tensor:
        return reparameterize(*self.operands(), **self.form._asdict(), dtype=dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "DeepShare":
        super()._apply(fn, recurse)
        if self._stand_in is not None:
            self._make_stand_in()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_stand_in": None}


def hidden_of(z: Tensor, form: Form) -> Hidden:  # z [G, P, M]
    """What the op saved, as the optimizer takes it."""
    return Hidden(reference.hidden(z, form), form, partial(_pulled, z, form))


def _pulled(z: Tensor, form: Form, dh: Tensor, ahead: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, w1 = (t if t.dim() == 3 else t[None] for t in ahead[:2])
    return hidden_bwd(dh, x, w1, z, form, Needs(x=True, w1=True, b1=True))


class Projected(NamedTuple):
    """What frozen projections made of vectors, with the graph between them."""

    vectors: Tensor  # [N, P, E], an alias of the parameter: the parameter's gradient holds this, and must not hold it
    kv: Tensor
    of: State

    def pull(self, dkv: Tensor) -> Tensor:
        """The gradient of the vectors; RuntimeError if they or the projections are no longer what they were."""
        if not self.of.lasts():
            raise RuntimeError(
                "the vectors of a prefix, or the model's weights that project them, were changed, moved or sharded "
                "between a backward pass and the first use of its gradient; call zero_grad() after such a change"
            )
        with torch.autocast(dkv.device.type, enabled=False):
            [grad] = torch.autograd.grad(self.kv, self.vectors, dkv.to(self.kv.dtype), retain_graph=True)
        return grad


class SimpleShare(OwnedByOptimizer):
    """One vector per row and layer; the layer's own norm and frozen projections make key and value of it.

    An optimizer can take it over as it can `DeepShare`: then the projections run once, forward and backward, for a
    state of the parameters, however many micro-batches there are. A compiled forward pass projects in its graph, each
    time.
    """

    reads_the_model = True

    def __init__(self, layers: tuple[int, ...], length: int, geometry: Geometry) -> None:
        super().__init__()
        self.layers = layers
        self.vectors = nn.Parameter(torch.randn(len(layers), length, geometry.width))

    def forward(self, project: Project, weights: Iterable[Tensor] = (), dtype: torch.dtype | None = None) -> Tensor:
        """kv, in the type that `project` makes or in `dtype`. `weights`: all that `project` computes with."""
        weights = tuple(weights)
        if self._factored(weights):
            return self._leaf(project, weights, dtype)
        kv = self._projected(project, self.vectors)
        return kv if dtype is None else kv.to(dtype)

    def _projected(self, project: Project, vectors: Tensor) -> Tensor:
        return torch.stack([project(layer, vector) for layer, vector in zip(self.layers, vectors, strict=True)])

    def _factored(self, weights: tuple[Tensor, ...]) -> bool:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or self.receiver is None:
            return False
        ordinary = isinstance(self.vectors, nn.Parameter) and not torch._C._are_functorch_transforms_active()
        # nobody would tell of a change, and a trained weight needs the graph
        frozen = not any(t.requires_grad or t.is_inference() for t in weights)
        return bool(weights) and ordinary and frozen and self.vectors.requires_grad

    def _leaf(self, project: Project, weights: tuple[Tensor, ...], dtype: torch.dtype | None) -> Tensor:
        known = self._known((self.vectors, *weights))
        if known.made is None:
            vectors = self.vectors.detach().requires_grad_()
            known.made = Projected(vectors, self._projected(project, vectors), known.of)
        kv: Tensor = known.made.kv
        if dtype is None:
            dtype = kv.dtype
        return known.leaves[dtype] if dtype in known.leaves else self._as_leaf(kv.detach().to(dtype), known)

    def _deliver(self, name: object, dkv: Tensor) -> None:
        known, receive = self._last, self.receiver
        if known is None or known.name is not name or not known.of.lasts():
            raise RuntimeError(CHANGED.format(what="projections"))
        if receive is None:  # the optimizer went away in between
            self.vectors.backward(known.made.pull(dkv))
            return
        receive(self, dkv, known.made)

    def factored_parameter(self) -> Tensor:
        return self.vectors

    def parameters_in_order(self) -> tuple[Tensor, ...]:
        return (self.vectors,)


class FreePrefix(MakesPrefix):
    """Keys and values as parameters: share="none", and what is left of any prefix after `fold`."""

    def __init__(self, kv: Tensor, trainable: bool = True) -> None:
        super().__init__()
        self.bank = nn.Parameter(kv, requires_grad=trainable)  # by its name in checkpoints

    def forward(self) -> Tensor:
        return self.bank


class PrefixRows(MakesPrefix):
    """Keys and values of many prefixes, each of them one contiguous row of `weight`, [T, numbers of its kv].

    `lengths` int64 [T] says how many of the P of each are used; what lies past them is zero.
    """

    lengths: Tensor

    def __init__(self, rows: Tensor, lengths: Tensor, trainable: bool = True) -> None:  # [T, *kv]
        super().__init__()
        self.shape = tuple(rows.shape[1:])
        self.weight = nn.Parameter(rows.flatten(1), requires_grad=trainable)
        self.register_buffer("lengths", lengths)

    def forward(self) -> Tensor:  # [T, *kv], a view
        return self.weight.view(-1, *self.shape)

    def lookup(self, ids: Tensor, sparse: bool = False) -> Tensor:  # [U] -> [U, *kv]
        return F.embedding(ids, self.weight, sparse=sparse).view(-1, *self.shape)


class DeepShares(nn.Module):
    """A network for each kind of attention, where their stacks differ in depth."""

    def __init__(self, networks: list[DeepShare]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.cat([network(dtype) for network in self.networks])


def make_encoder(config: PrefixConfig, geometry: Geometry) -> nn.Module:
    """The module that makes the kv of a resolved config."""
    counts = list(config.counts(geometry.kinds).values())
    slots, P = config.slots(geometry.kinds), config.longest
    if config.share == "simple":
        return SimpleShare(slots, P, geometry)
    if config.share == "none":
        shape = geometry.kv_shape(len(slots), P)
        if config.count is None:
            return FreePrefix(torch.randn(shape))
        return PrefixRows(torch.randn(config.count, *shape), torch.full((config.count,), P))
    hidden, activation = config.hidden or 512, config.activation
    if config.network == "per_layer":
        networks = len(slots)
        return DeepShare(1, P, hidden, geometry, networks=networks, interleaved=True, activation=activation)
    if len(set(counts)) == 1:
        return DeepShare(counts[0], P, hidden, geometry, networks=len(counts), activation=activation)
    return DeepShares([DeepShare(count, P, hidden, geometry, activation=activation) for count in counts])
