"""A network of the user's own, factored because it is a `FactoredNetwork`."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prefixattn import FactoredAdamW, FactoredNetwork, FactoredSGD
from prefixattn.optim import DeferredGradient, FactoredGradient
from prefixattn.prefixes.ownership import Factorable, Hidden
from prefixattn.reparam.call import Form
from prefixattn.reparam.reference import kv_view
from prefixattn.testing.optim import Largest

P, E, M, LAYERS, HEADS, D = 5, 12, 10, 3, 2, 8
OUTPUTS = LAYERS * 2 * HEADS * D
FORM = Form(LAYERS, HEADS, D, interleaved=False, activation="none")


class Deeper(FactoredNetwork):
    """Two hidden layers and a norm, where DeepShare has one hidden layer."""

    def __init__(self, networks: int = 1, bias: bool = True) -> None:
        super().__init__(LAYERS, HEADS, D)
        ahead = () if networks == 1 else (networks,)
        self.rows = nn.Parameter(torch.randn(*ahead, P, E))
        self.norm = nn.LayerNorm(E)
        self.first = nn.Parameter(torch.randn(*ahead, M, E) * E**-0.5)
        self.second = nn.Parameter(torch.randn(*ahead, M, M) * M**-0.5)
        self.up = nn.Parameter(torch.randn(*ahead, OUTPUTS, M) * M**-0.5)
        self.bias = nn.Parameter(torch.zeros(*ahead, OUTPUTS)) if bias else None

    def parameters_in_order(self) -> tuple[Tensor | None, ...]:
        return self.rows, self.norm.weight, self.norm.bias, self.first, self.second, self.up, self.bias

    def hidden(self, rows: Tensor, weight: Tensor, bias: Tensor, first: Tensor, second: Tensor) -> Tensor:
        x = F.layer_norm(rows, (E,), weight, bias)
        return torch.tanh(F.gelu(x @ first.mT) @ second.mT)


KINDS = {"one": {}, "three": {"networks": 3}, "no_bias": {"bias": False}}


def made(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Deeper, Deeper, Tensor]:
    """A network, its twin, and kv to come near."""
    torch.manual_seed(0)
    net = Deeper(**KINDS[kind]).to(dtype)
    return net, copy.deepcopy(net), torch.randn_like(net().detach())


def loss(net: Deeper, wanted: Tensor) -> Tensor:
    return (net() - wanted).square().sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_it_trains_as_torchs_optimizer_trains_it(kind: str, rule: str) -> None:
    net, twin, wanted = made(kind)
    if rule == "adamw":
        ours, theirs = FactoredAdamW(net, lr=1e-2), torch.optim.AdamW(twin.parameters(), lr=1e-2)
    else:
        ours, theirs = (
            o(p, lr=1e-4, momentum=0.9) for o, p in ((FactoredSGD, net), (torch.optim.SGD, twin.parameters()))
        )
    for step in range(5):
        for module, optimizer in ((net, ours), (twin, theirs)):
            optimizer.zero_grad()
            for part in range(1 + step % 2):  # every other step of two micro-batches
                loss(module, wanted * (part + 1)).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 5.0)
            optimizer.step()
        for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_ordinary_ones_that_nobody_made_yet(kind: str) -> None:
    net, twin, wanted = made(kind)
    FactoredAdamW(net).zero_grad()
    owner = FactoredAdamW(net)
    loss(net, wanted).backward()
    loss(twin, wanted).backward()
    assert owner.networks and type(net.up.grad) is FactoredGradient
    assert all(type(p.grad) is DeferredGradient for p in net.parameters() if p is not net.up)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad.to_dense(), q.grad, rtol=1e-9, atol=1e-12)


def test_no_gradient_of_the_large_matrix_is_made() -> None:
    net, _, _ = made("one", torch.float32)
    net.up = nn.Parameter(torch.randn(OUTPUTS, M).repeat(40, 1))  # larger than all else by far
    net.bias = None
    net.form = net.form._replace(layers=LAYERS * 40)
    optimizer = FactoredAdamW(net)
    for _ in range(2):  # the first makes the moments
        optimizer.zero_grad()
        net().square().sum().backward()
        with Largest() as largest:
            optimizer.step()
    assert largest.numbers < net.up.numel(), largest.by


@pytest.mark.parametrize("changed", ["norm.weight", "second", "up"])
def test_a_parameter_changed_before_the_step_is_refused(changed: str) -> None:
    net, _, wanted = made("one")
    optimizer = FactoredAdamW(net)
    loss(net, wanted).backward()
    with torch.no_grad():
        net.get_parameter(changed).add_(1)
    with pytest.raises(RuntimeError, match="of a prefix network was changed between the backward pass and the first"):
        net.rows.grad.to_dense()
    optimizer.zero_grad()
    loss(net, wanted).backward()
    optimizer.step()


def test_kv_is_computed_once_for_a_state_of_the_parameters() -> None:
    net, _, wanted = made("one")
    optimizer = FactoredAdamW(net)
    assert net() is net() and net().is_leaf
    before = net()
    loss(net, wanted).backward()
    optimizer.step()
    assert net() is not before and not torch.equal(net(), before)
    with torch.no_grad():
        assert not net().requires_grad


def test_compiled_or_without_an_owner_its_gradients_are_ordinary() -> None:
    net, twin, wanted = made("one")
    optimizer = FactoredAdamW(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    (compiled() - wanted).square().sum().backward()
    loss(twin, wanted).backward()
    assert type(net.up.grad) is Tensor
    torch.testing.assert_close(net.up.grad, twin.up.grad)
    optimizer.step()
    del optimizer
    net.zero_grad()
    loss(net, wanted).backward()
    assert type(net.up.grad) is Tensor
    torch.compiler.reset()


class Wrong(Deeper):
    """A network with one thing wrong."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def parameters_in_order(self) -> tuple[Tensor | None, ...]:
        *ahead, w2, b2 = super().parameters_in_order()
        if self.what == "ahead":
            ahead[1] = None
        short = {"w2": (nn.Parameter(w2[1:]), b2), "b2": (w2, nn.Parameter(b2[1:])), "axes": (nn.Parameter(w2[0]), b2)}
        return *ahead, *short.get(self.what, (w2, b2))

    def hidden(self, *ahead: Tensor) -> Tensor:
        h = super().hidden(*ahead)
        return {"width": h[:, 1:], "networks": h.expand(2, -1, -1), "kind": None}.get(self.what, h)


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize(
    "what, words",
    [
        ("ahead", r"parameter 1 of Wrong is None; only b2, the last, may be"),
        (
            "w2",
            r"w2 of Wrong has shape \[95, 10\], expected \[O, M\] or \[G, O, M\] with O=96: layers=3 ",
        ),
        ("b2", r"b2 of Wrong has shape \[95\], expected \[O\] or \[G, O\] with O=96"),
        ("axes", r"w2 of Wrong has shape \[10\], expected \[O, M\]"),
        ("width", r"hidden of Wrong returned \[5, 9\], expected \[G=1, P, M=10\]"),
        ("networks", r"hidden of Wrong returned \[2, 5, 10\], expected \[G=1, P, M=10\]"),
        ("kind", r"hidden of Wrong returned NoneType, expected \[G=1, P, M=10\]"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_in_words(what: str, words: str, owned: bool) -> None:
    net = Wrong(what)
    if owned:
        net.take_over(Receiver().receive)
    with pytest.raises(ValueError, match=words):
        net()


@pytest.mark.parametrize("name", ["layers", "kv_heads", "head_dim"])
def test_sizes_are_integers_from_one(name: str) -> None:
    sizes = {"layers": 1, "kv_heads": 1, "head_dim": 8}
    for value in (0, 1.0, True, None):
        with pytest.raises(ValueError, match=rf"{name} is {value}, expected an integer from 1"):
            FactoredNetwork(**{**sizes, name: value})


class Receiver:
    def receive(self, *_: object) -> None:
        raise AssertionError("nothing arrives")


class Foreign(nn.Module):
    """No class of ours: only the protocol. Its h is one parameter."""

    reads_the_model = False

    def __init__(self) -> None:
        super().__init__()
        self.h, self.up = nn.Parameter(torch.randn(P, M)), nn.Parameter(torch.randn(OUTPUTS, M))
        self.receive: Any = None
        self.leaf: Tensor | None = None

    def factored_parameter(self) -> Tensor:
        return self.up

    def parameters_in_order(self) -> tuple[Tensor | None, ...]:
        return self.h, self.up, None

    def take_over(self, receive: Any) -> None:
        self.receive = receive

    def forget(self) -> None:
        self.leaf = None

    def forward(self) -> Tensor:
        kv = kv_view((self.h @ self.up.mT)[None], FORM).flatten(0, 1)
        if self.receive is None:
            return kv
        if self.leaf is None:
            made = Hidden(self.h.detach()[None], FORM, lambda dh, ahead: (dh[0],))
            self.leaf = kv.detach().requires_grad_()
            self.leaf.register_post_accumulate_grad_hook(lambda leaf: self.arrived(leaf, made))
        return self.leaf

    def arrived(self, leaf: Tensor, made: Hidden) -> None:
        dkv, leaf.grad = leaf.grad, None
        self.receive(self, dkv, made)


def test_a_module_that_implements_the_protocol_is_factored() -> None:
    torch.manual_seed(0)
    net = Foreign().double()
    twin = copy.deepcopy(net)
    assert isinstance(net, Factorable)
    ours, theirs = FactoredAdamW(net, lr=1e-2), torch.optim.AdamW(twin.parameters(), lr=1e-2)
    wanted = torch.randn_like(twin().detach())
    for _ in range(3):
        for module, optimizer in ((net, ours), (twin, theirs)):
            optimizer.zero_grad()
            (module() - wanted).square().sum().backward()
            if module is net:
                assert type(net.up.grad) is FactoredGradient and type(net.h.grad) is DeferredGradient
            optimizer.step()
        torch.testing.assert_close(net.up, twin.up, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(net.h, twin.h, rtol=1e-9, atol=1e-12)
