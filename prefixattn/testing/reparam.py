"""What tests and benchmarks of the reparameterization share: named inputs, the exact answer, plain PyTorch's answer."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixattn import backends
from prefixattn.reparam.call import Call, Form, Given, Needs
from prefixattn.testing.plain import ORDERS, Roundings


class NetShape(NamedTuple):
    G: int  # networks
    P: int
    E: int
    M: int
    n: int  # layers of a network
    Hkv: int
    D: int

    @property
    def O(self) -> int:  # noqa: E743
        return self.n * 2 * self.Hkv * self.D


SHAPES = {
    "tiny": NetShape(1, 1, 8, 8, 1, 1, 8),
    "one_row": NetShape(1, 1, 32, 48, 3, 2, 16),
    "five_rows": NetShape(1, 5, 24, 40, 2, 3, 16),
    "ten_rows": NetShape(1, 10, 64, 96, 3, 2, 32),  # the usual language prefix
    "tile_past": NetShape(1, 17, 33, 65, 2, 3, 20),  # one past a tile, nothing divides anything
    "long": NetShape(1, 200, 48, 32, 2, 2, 16),
    "long_odd": NetShape(1, 131, 40, 72, 1, 5, 8),
    "three_networks": NetShape(3, 10, 64, 80, 4, 2, 16),  # an encoder-decoder: self, cross, encoder
    "per_layer": NetShape(4, 5, 72, 48, 1, 3, 32),  # vision: a small network for each layer
    "per_layer_one_row": NetShape(4, 1, 40, 24, 1, 2, 12),
    "narrow": NetShape(2, 3, 5, 3, 1, 1, 7),  # smaller than a vector
    "wide_hidden": NetShape(1, 10, 16, 520, 1, 2, 16),
}

# how a call departs from the plain one; the words make_inputs understands
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "interleaved": {"interleaved": True},
    "relu": {"activation": "relu"},
    "gelu": {"activation": "gelu", "interleaved": True},
    "none": {"activation": "none"},
    "no_b1": {"biases": (False, True)},
    "no_b2": {"biases": (True, False), "interleaved": True},
    "no_biases": {"biases": (False, False)},
    "saturated": {"gain": 6.0},  # tanh close to one, where its slope is close to nothing
    "strided": {"strided": True},  # parameters that are views: a last axis with a stride, a transposed matrix
}

PARAMETERS = Needs._fields
NEEDS = Needs(x=True, w1=True, b1=True, w2=True, b2=True)


@dataclass
class NetInputs:
    """A call of reparameterize: `tensors` are leaves that want gradients, an absent bias is not among them."""

    tensors: dict[str, Tensor]  # x [G, P, E], w1 [G, M, E], b1 [G, M], w2 [G, O, M], b2 [G, O]
    form: Form
    dtype: torch.dtype  # of kv
    dkv: Tensor  # [N, 2, Hkv, P, D], in the type of kv

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """x, w1, b1, w2, b2 as the backends take them."""
        return tuple(self.tensors.get(name) for name in PARAMETERS)

    def call(self, backend: str = "auto", **options: Any) -> Tensor:
        from prefixattn.reparam.functional import reparameterize  # here: a backend's own tests need only the inputs

        form = {**self.form._asdict(), "dtype": self.dtype, "backend": backend}
        return reparameterize(*self.parameters, **{**form, **options})  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> "NetInputs":
        """The same values with parameters, kv and its gradient in another type, as fresh leaves."""
        tensors = {n: t.detach().to(dtype).requires_grad_(t.requires_grad) for n, t in self.tensors.items()}
        return replace(self, tensors=tensors, dtype=dtype, dkv=self.dkv.to(dtype))


def make_inputs(
    shape: NetShape | str,
    dtype: torch.dtype = torch.float32,
    *,
    parameters: torch.dtype | None = None,  # float32, or float64 where kv is
    seed: int = 0,
    grad: bool = True,
    device: str | None = None,  # torch's default
    interleaved: bool = False,
    activation: str = "tanh",
    biases: tuple[bool, bool] = (True, True),
    gain: float = 1.0,
    strided: bool = False,
) -> NetInputs:
    """Random parameters of the sizes that PyTorch draws: z, h and y are of the order of one."""
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    G, P, E, M, n, Hkv, D = shape
    if parameters is None:
        parameters = torch.float64 if dtype == torch.float64 else torch.float32
    device = device or torch.get_default_device().type
    generator = torch.Generator("cpu").manual_seed(seed)  # the same numbers on every device

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu") * scale
        return made.to(parameters)

    tensors = {
        "x": normal(G, P, E),
        "w1": normal(G, M, E, scale=gain * E**-0.5),
        "b1": normal(G, M, scale=0.5),
        "w2": normal(G, shape.O, M, scale=M**-0.5),
        "b2": normal(G, shape.O, scale=0.5),
    }
    for name, there in zip(("b1", "b2"), biases, strict=True):
        if not there:
            del tensors[name]
    if strided:
        tensors = {name: _strided(t, transposed=name == "w2") for name, t in tensors.items()}
    tensors = {name: t.detach().to(device).requires_grad_(grad) for name, t in tensors.items()}
    dkv = normal(G * n, 2, Hkv, P, D).to(dtype).to(device)
    return NetInputs(tensors, Form(n, Hkv, D, interleaved, activation), dtype, dkv)


def _strided(t: Tensor, transposed: bool) -> Tensor:
    """The same values with another stride than one in the last axis, beside numbers that must not be read."""
    if transposed:
        return t.mT.contiguous().mT
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def detached(inputs: NetInputs) -> Call:
    """The record that backends take."""
    return Call._make((*inputs.parameters, inputs.form, inputs.dtype)).each(Tensor.detach)


def objections(backend: str, inputs: NetInputs) -> str:
    """Why a backend refuses these inputs, in its own words; empty if it does not."""
    [row] = [row for row in backends.REPARAM if row.name == backend]
    return "; ".join(backends.objections(row, detached(inputs), NEEDS))


def results(inputs: NetInputs, kv: Tensor) -> dict[str, Tensor]:
    """kv and every gradient, by name."""
    found = {"kv": kv.detach()}
    wanted = {name: t for name, t in inputs.tensors.items() if t.requires_grad}
    if wanted:
        grads = torch.autograd.grad(kv, list(wanted.values()), inputs.dkv.to(kv.dtype), materialize_grads=True)
        found |= {"d" + name: grad for name, grad in zip(wanted, grads, strict=True)}
    return found


def ours(inputs: NetInputs, backend: str = "auto", **options: Any) -> dict[str, Tensor]:
    return results(inputs, inputs.call(backend, **options))


def from_module(inputs: NetInputs, module: Any) -> dict[str, Tensor]:
    """kv and every gradient from `fwd` and `bwd` of a backend's module, called without the op around them."""
    call = detached(inputs)
    kv, z = module.fwd(call)
    needs = Needs(**{name: name in inputs.tensors for name in PARAMETERS})
    grads = module.bwd(call._replace(b1=None, b2=None), Given(inputs.dkv, z), needs)
    return {"kv": kv} | {"d" + name: grad for name, grad in grads._asdict().items() if name in inputs.tensors}


def exact(inputs: NetInputs) -> dict[str, Tensor]:
    """The answer in float64, by plain layers and autograd."""
    doubled = inputs.to(torch.float64)
    return results(doubled, plain_network(doubled))


def same_dtype(inputs: NetInputs) -> dict[str, Tensor]:
    """Plain PyTorch's answers in the inputs' types: the layers in the parameters' type, their output cast.

    One along a new axis for each order of the sums, and two of float64 with the least roundings of the accumulator.
    """
    found = [results(inputs, plain_network(inputs, order=i)) for i in range(ORDERS)]
    doubled = inputs.to(torch.float64)
    accumulator = torch.promote_types(inputs.tensors["x"].dtype, torch.float32)
    for i in range(2):
        found.append(results(doubled, plain_network(doubled, roundings=Roundings(accumulator, i))))
    return {name: torch.stack([answer[name].double() for answer in found]) for name in found[0]}


def plain_network(inputs: NetInputs, order: int = 0, roundings: Roundings | None = None) -> Tensor:
    """kv by a Linear, an activation and a Linear for each network, taken apart as the published codes do it.

    Sums begin `order` ORDERS-ths of the way in; `roundings` happen to each stage, on the way there and back.
    """
    tensors, form = inputs.tensors, inputs.form
    act: Any = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu, "none": torch.nn.Identity()}[form.activation]
    n, Hkv, D = form.layers, form.kv_heads, form.head_dim
    rounded = roundings or torch.clone
    by = {name: size * order // ORDERS for name, size in zip("PEMO", _sums(inputs), strict=True)}
    layers = []
    for g, x in enumerate(tensors["x"]):
        # the same sums in another order: rows, features and outputs are moved around, and the outputs moved back
        x = x.roll((by["P"], by["E"]), (0, 1))
        w1, w2 = (tensors[name][g].roll((by[o], by[i]), (0, 1)) for name, o, i in (("w1", "M", "E"), ("w2", "O", "M")))
        b1, b2 = (tensors[n][g].roll(by[o], 0) if n in tensors else None for n, o in (("b1", "M"), ("b2", "O")))
        y = F.linear(rounded(act(rounded(F.linear(x, w1, b1)))), w2, b2)  # [P, O]
        y = y.roll((-by["P"], -by["O"]), (0, 1))
        for part in y.split(2 * Hkv * D, 1):  # a layer each
            if form.interleaved:
                key, value = part[:, 0::2], part[:, 1::2]  # [P, Hkv * D]
            else:
                key, value = part.split(Hkv * D, 1)
            pair = [torch.stack(t.split(D, 1)) for t in (key, value)]  # [Hkv, P, D]
            layers.append(torch.stack(pair))
    assert len(layers) == n * len(tensors["x"])
    return torch.stack(layers).to(inputs.dtype)


def _sums(inputs: NetInputs) -> tuple[int, int, int, int]:
    """P, E, M, O."""
    return *inputs.tensors["x"].shape[1:], *inputs.tensors["w2"].mT.shape[1:]
