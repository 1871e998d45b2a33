"""Modules that make prefixes.

A *bank* is all prefixes of a model: `[N, 2, Hkv, P, D]`, with N the layers that have a prefix, and key before value.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefixattn.config import PrefixConfig
from prefixattn.reparam.functional import bank_and_z, bank_onto, reparameterize
from prefixattn.reparam.reference import ACTIVATIONS, Form, bank_view

Project = Callable[[int, Tensor], Tensor]  # layer, vectors [P, E] -> [2, Hkv, P, D]


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that a prefix must fit."""

    model_type: str
    layers: int  # with attention, of all kinds
    kv_heads: int  # Hkv
    head_dim: int  # D
    width: int  # E
    kinds: dict[str, int] = field(default_factory=dict)  # kind of attention -> its layers; of one kind {"self": layers}

    heads: int = 0  # H; 0: as many as Hkv

    def __post_init__(self) -> None:
        if not self.kinds:
            self.kinds["self"] = self.layers
        if not self.heads:
            object.__setattr__(self, "heads", self.kv_heads)


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


class _Known:
    """What was computed for one state of the parameters."""

    def __init__(self, parameters: tuple[Tensor, ...]) -> None:
        # an address alone may be that of another tensor later
        self.of = [(weakref.ref(t), t.data_ptr(), t._version) for t in parameters]
        self.banks: dict[torch.dtype, Tensor] = {}  # leaves, by type
        self.z: Tensor | None = None  # [G, P, M]
        self.name = object()  # for leaves, which must not hold what holds them

    def holds(self, parameters: tuple[Tensor, ...]) -> bool:
        return all(
            ref() is t and pointer == t.data_ptr() and version == t._version
            for (ref, pointer, version), t in zip(self.of, parameters, strict=True)
        )


class DeepShare(nn.Module):
    """Embedding -> Linear -> activation -> Linear: key and value of a row come from one embedding.

    One network makes all layers, as for language models, or each of several makes its own `layers`, those of network g
    after those of network g - 1: three for an encoder-decoder, one for each layer in published code for vision, where
    key and value are also `interleaved`. Their parameters are `embedding.weight [G, P, E]`, `down.weight [G, M, E]`,
    `down.bias [G, M]`, `up.weight [G, O, M]` and `up.bias [G, O]`, without the first axis if there is one network.

    With `fused`, which can be changed at any time, the op `reparameterize` runs it, without calling the layers, and so
    without their hooks.

    An optimizer that needs no gradient of `up.weight` can *take over* the network (`prefixattn.FactoredAdamW` does).
    Then the bank that a forward pass gets is a leaf, computed once for a state of the parameters and used by all
    forward passes until one of them changes; what a backward pass adds to it goes to the optimizer, and is found in
    `.grad` of the parameters as that writes it there. torch.autograd.grad sees no path to them.
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
        super().__init__()
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, expected {', '.join(map(repr, ACTIVATIONS))}")
        if not isinstance(networks, int) or networks < 1:
            raise ValueError(f"networks is {networks!r}, expected an integer from 1")
        self.form = Form(layers, geometry.kv_heads, geometry.head_dim, interleaved, activation)
        self.networks = networks
        self.fused = fused
        outputs = layers * 2 * geometry.kv_heads * geometry.head_dim
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
        self._receive: Callable[[], Any] | None = None  # a weak reference
        self._finalizer: Any = None
        self._last: _Known | None = None
        self._stand_in: Tensor | None = None

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """The bank, in the parameters' type or in `dtype`. One pass over P rows, whatever the batch."""
        if dtype is None:
            dtype = self.embedding.weight.dtype
        if not self.fused:
            return self._by_layers(dtype)
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            if torch.compiler.is_compiling():
                if self._stand_in is not None and self._trained():
                    return bank_onto(self._stand_in, *self.operands(), self.form, dtype)
            elif self.factored:
                return self.leaf(dtype)
        return reparameterize(*self.operands(), **self.form._asdict(), dtype=dtype)

    def _by_layers(self, dtype: torch.dtype) -> Tensor:
        activation = ACTIVATIONS[self.form.activation][0]
        y = self.up(activation(self.down(self.embedding.weight)))  # [G, P, O] or [P, O]
        return bank_view(y if y.dim() == 3 else y[None], self.form).flatten(0, 1).to(dtype)

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [G, P, E], w1 [G, M, E], b1 [G, M], w2 [G, O, M], b2 [G, O]: the parameters or, of one network, views."""
        parameters = self.parameters_in_order()
        x, w1, b1, w2, b2 = (t.unsqueeze(0) for t in parameters) if self.networks == 1 else parameters
        return x, w1, b1, w2, b2

    def parameters_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five parameters as they are, those of one network without the axis G."""
        return self.embedding.weight, self.down.weight, self.down.bias, self.up.weight, self.up.bias

    # taken over by an optimizer

    def take_over(self, receive: Callable[["DeepShare", Tensor, Tensor], None]) -> None:
        """From now on `receive(network, dbank, z)` gets the gradient of the bank, once after each backward pass.

        `receive` is a method of the optimizer, of which a weak reference is kept: when the optimizer is gone, the
        network records its forward passes as before. dbank [N, 2, Hkv, P, D] has a float type, may be kept, and may
        hold what is not finite; z [G, P, M] is what the op saved, `reference.hidden(z, network.form)` is h. z is the
        same tensor for all backward passes of one state of the parameters. Parameters keep their state between a
        forward pass and its backward pass; else the latter raises.

        Who writes to a parameter where torch does not see it has to call torch.autograd.graph.increment_version.

        A compiled forward pass computes the bank in its graph, each time, and its gradient comes by way of a leaf
        without memory that stands in for the parameters; it does not notice a parameter changed before its backward.
        """
        self.release()
        self._receive = weakref.WeakMethod(receive)
        # compiled code looks at the stand-in alone
        optimizer = receive.__self__  # type: ignore[attr-defined]
        self._finalizer = weakref.finalize(optimizer, _release, weakref.ref(self))
        self._make_stand_in()

    def release(self) -> None:
        """Undoes `take_over`."""
        self._receive = self._stand_in = None
        if self._last is not None:
            self._last.banks.clear()
        if self._finalizer is not None:
            self._finalizer.detach()
            self._finalizer = None

    def _make_stand_in(self) -> None:
        N, P = self.networks * self.form.layers, self.embedding.weight.shape[-2]
        shape = (N, 2, self.form.kv_heads, P, self.form.head_dim)
        self._stand_in = self.embedding.weight.new_zeros(()).expand(shape).requires_grad_()
        self._stand_in.register_post_accumulate_grad_hook(partial(_deliver, weakref.ref(self), None))

    @property
    def factored(self) -> bool:
        """True if forward passes get a leaf: taken over, and `up.weight` is trained, nothing else put in its place."""
        return self._receive is not None and self._receive() is not None and self.fused and self._trained()

    def _trained(self) -> bool:
        # parametrizations and torch.func.functional_call put other tensors there
        ordinary = all([isinstance(t, nn.Parameter) for t in self.parameters_in_order()])
        return ordinary and self.up.weight.requires_grad and self.up.weight.dtype in (torch.float32, torch.float64)

    def leaf(self, dtype: torch.dtype) -> Tensor:
        """The bank in `dtype` as a leaf that wants a gradient, the same one until a parameter changes."""
        known = self._known()
        if dtype not in known.banks:
            bank, z = bank_and_z(*self.operands(), self.form, dtype)
            known.z = z if known.z is None else known.z
            # the hook must not keep the network alive: Python's collector does not see that circle
            hook = partial(_deliver, weakref.ref(self), known.name)
            bank.requires_grad_().register_post_accumulate_grad_hook(hook)
            known.banks[dtype] = bank
        return known.banks[dtype]

    def forget(self) -> None:
        """Frees the leaf, for parameters are about to change; a backward pass through it raises from now on."""
        self._last = None

    def _known(self) -> "_Known":
        parameters = self.parameters_in_order()
        if self._last is None or not self._last.holds(parameters):
            self._last = _Known(parameters)
        return self._last

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "DeepShare":
        super()._apply(fn, recurse)
        self._last = None
        if self._stand_in is not None:
            self._make_stand_in()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # a copy belongs to no optimizer
        return {**self.__dict__, "_receive": None, "_finalizer": None, "_last": None, "_stand_in": None}


def _release(reference: "weakref.ref[DeepShare]") -> None:
    network = reference()
    if network is not None:
        network.release()


def _deliver(reference: "weakref.ref[DeepShare]", name: object, leaf: Tensor) -> None:
    """What follows a backward pass that reached the leaf: its gradient moves on."""
    network, dbank = reference(), leaf.grad
    leaf.grad = None
    if network is None or dbank is None:
        return
    known, dbank = network._known(), dbank.detach()
    if name is not None and known.name is not name:
        raise RuntimeError(
            "a parameter of the network behind the prefix was changed between a forward pass and its backward pass; "
            "call backward before optimizer.step()"
        )
    receive = None if network._receive is None else network._receive()
    if receive is None:  # the optimizer went away in between
        with torch.enable_grad():
            reparameterize(*network.operands(), **network.form._asdict(), dtype=dbank.dtype).backward(dbank)
        return
    if known.z is None:
        known.z = bank_and_z(*network.operands(), network.form, dbank.dtype)[1]
    receive(network, dbank, known.z)


class SimpleShare(nn.Module):
    """One vector per row and layer; the layer's own norm and frozen projections make key and value of it."""

    def __init__(self, layers: tuple[int, ...], length: int, geometry: Geometry) -> None:
        super().__init__()
        self.layers = layers
        self.vectors = nn.Parameter(torch.randn(len(layers), length, geometry.width))

    def forward(self, project: Project) -> Tensor:
        return torch.stack([project(layer, vector) for layer, vector in zip(self.layers, self.vectors, strict=True)])


class FreePrefix(nn.Module):
    """Keys and values as parameters: share="none", and what is left of any prefix after `fold`."""

    def __init__(self, bank: Tensor, trainable: bool = True) -> None:
        super().__init__()
        self.bank = nn.Parameter(bank, requires_grad=trainable)  # [N, 2, Hkv, P, D]

    def forward(self) -> Tensor:
        return self.bank


class PrefixRows(nn.Module):
    """Keys and values of many prefixes, each of them one contiguous row of `weight` [T, N * 2 * Hkv * P * D].

    `lengths` int64 [T] says how many of the P of each are used; what lies past them is zero.
    """

    lengths: Tensor

    def __init__(self, rows: Tensor, lengths: Tensor, trainable: bool = True) -> None:  # [T, N, 2, Hkv, P, D]
        super().__init__()
        self.shape = tuple(rows.shape[1:])
        self.weight = nn.Parameter(rows.flatten(1), requires_grad=trainable)
        self.register_buffer("lengths", lengths)

    def forward(self) -> Tensor:  # [T, N, 2, Hkv, P, D], a view
        return self.weight.view(-1, *self.shape)

    def lookup(self, ids: Tensor, sparse: bool = False) -> Tensor:  # [U] -> [U, N, 2, Hkv, P, D]
        return F.embedding(ids, self.weight, sparse=sparse).view(-1, *self.shape)


class DeepShares(nn.Module):
    """A network for each kind of attention, where their stacks differ in depth."""

    def __init__(self, networks: list[DeepShare]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.cat([network(dtype) for network in self.networks])


def make_encoder(config: PrefixConfig, geometry: Geometry) -> nn.Module:
    """The module that makes the bank of a resolved config."""
    counts = list(config.counts(geometry.kinds).values())
    slots, P = config.slots(geometry.kinds), config.longest
    if config.share == "simple":
        return SimpleShare(slots, P, geometry)
    if config.share == "none":
        shape = (len(slots), 2, geometry.kv_heads, P, geometry.head_dim)
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
