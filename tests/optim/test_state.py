"""The optimizers' state: saved, loaded, copied, refused, and kept in fewer bits."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from prefixattn.attach import attach
from prefixattn.optim import FactoredAdamW, FactoredGradient, FactoredSGD
from prefixattn.optim.adamw import moment
from prefixattn.prefixes.config import PrefixConfig
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.networks import DeepShare
from prefixattn.reparam.fused_step import fused_adamw
from prefixattn.reparam.moments8 import BLOCK, Moment8
from prefixattn.testing.models import tiny_gpt2, token_ids
from prefixattn.testing.optim import loss, network, parameters, targets, train, twin

KINDS: dict[str, Any] = {
    "adamw": lambda params: FactoredAdamW(params, lr=1e-2, weight_decay=0.1),
    "bf16": lambda params: FactoredAdamW(params, lr=1e-2, moments="bfloat16"),
    "8bit": lambda params: FactoredAdamW(params, lr=1e-2, moments="8bit"),
    "mixed": lambda params: FactoredAdamW(params, lr=1e-2, moments=("8bit", "bfloat16")),
    "sgd": lambda params: FactoredSGD(params, lr=1e-3, momentum=0.9, nesterov=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_state_goes_on_to_the_bit(kind: str) -> None:
    net, wanted = network(), targets(network())
    ours = KINDS[kind](net)
    train(net, ours, wanted, 5)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": ours.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network(seed=9)
    theirs = KINDS[kind](other)
    train(other, theirs, wanted, 2)
    other.load_state_dict(saved["net"])
    theirs.load_state_dict(saved["optimizer"])
    loaded = copy.deepcopy(saved["optimizer"]["state"])
    for one, optimizer in ((net, ours), (other, theirs)):
        train(one, optimizer, wanted, 5)
    for key, state in saved["optimizer"]["state"].items():
        assert all(torch.equal(value, loaded[key][name]) for name, value in state.items()), (
            "training wrote to the file's"
        )
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    first, second = (o.state[n.up.weight] for o, n in ((ours, net), (theirs, other)))
    assert first.keys() == second.keys()
    assert all(first[key].dtype == second[key].dtype and torch.equal(first[key], second[key]) for key in first)
    assert first is not second and all(first[k].data_ptr() != second[k].data_ptr() for k in first)


def test_torchs_state_and_ours_are_one() -> None:
    net, wanted = network(), targets(network())
    other = twin(net)
    ours, theirs = FactoredAdamW(net, lr=1e-2), torch.optim.AdamW(other.parameters(), lr=1e-2)
    train(net, ours, wanted, 5)
    train(other, theirs, wanted, 5)
    exchanged = copy.deepcopy(ours.state_dict()), copy.deepcopy(theirs.state_dict())
    theirs.load_state_dict(exchanged[0])
    ours.load_state_dict(exchanged[1])
    train(net, ours, wanted, 5)
    train(other, theirs, wanted, 5)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_state_of_another_format_is_converted() -> None:
    net, wanted = network(), targets(network())
    ours = FactoredAdamW(net, lr=1e-2)
    train(net, ours, wanted, 3)
    full = ours.state[net.up.weight]["exp_avg"].clone()
    ours.param_groups[0]["moments"] = "8bit"
    train(net, ours, wanted, 1)
    assert ours.state[net.up.weight]["exp_avg"].dtype == torch.uint8
    assert "exp_avg_scale" in ours.state[net.up.weight]
    assert ours.state[net.down.weight]["exp_avg"].dtype == torch.float32  # the large matrix alone
    ours.param_groups[0]["moments"] = "float32"
    train(net, ours, wanted, 1)
    back = ours.state[net.up.weight]
    assert back["exp_avg"].dtype == torch.float32 and "exp_avg_scale" not in back
    assert torch.nn.functional.cosine_similarity(back["exp_avg"].flatten(), full.flatten(), 0) > 0.5


WRONG: dict[str, tuple[Any, str]] = {
    "shape": (lambda s: s["state"][3].update(exp_avg=torch.zeros(2, 3)), r"exp_avg of up\.weight has shape \[2, 3\]"),
    "second": (lambda s: s["state"][0].update(exp_avg_sq=None), r"exp_avg_sq of embedding\.weight has shape NoneType"),
    "scale": (lambda s: s["state"][3].update(exp_avg_scale=torch.zeros(2)), r"exp_avg_scale of up\.weight has shape"),
    "lacks": (lambda s: s["state"][3].pop("step"), r"the state of up\.weight lacks step"),
    "integers": (lambda s: s["state"][1].update(exp_avg=s["state"][1]["exp_avg"].long()), "is torch.int64"),
    "foreign": (lambda s: s["state"][2].update(momentum_buffer=torch.zeros(12)), "has momentum_buffer, expected only"),
    "groups": (lambda s: s["param_groups"][0]["params"].pop(), r"groups of \[4\] parameters, expected \[5\]"),
    "amsgrad": (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad=True"),
    "maximum": (lambda s: s["state"][3].update(max_exp_avg_sq=torch.zeros(96, 12)), "is of amsgrad"),
    "betas": (lambda s: s["param_groups"][0].update(betas=(0.9, 1.5)), "betas is"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_state_that_does_not_fit_changes_nothing(what: str) -> None:
    net, wanted = network(), targets(network())
    ours = FactoredAdamW(net, lr=1e-2, moments="8bit")
    train(net, ours, wanted, 2)
    before = copy.deepcopy(ours.state_dict())
    wrong = copy.deepcopy(before)
    wrong["param_groups"][0]["lr"] = 5.0
    spoil, words = WRONG[what]
    spoil(wrong)
    with pytest.raises((ValueError, NotImplementedError), match=words):
        ours.load_state_dict(wrong)
    after = ours.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(after["state"][key][name], value) for name, value in state.items())


def test_a_momentum_of_another_shape() -> None:
    ours, other = (FactoredSGD(network(hidden=hidden), momentum=0.9) for hidden in (12, 13))
    (net, wanted) = network(), targets(network())
    ours = FactoredSGD(net, momentum=0.9)
    train(net, ours, wanted, 1)
    with pytest.raises(ValueError, match=r"momentum_buffer of down\.weight has shape \[12, 16\], expected \[13, 16\]"):
        other.load_state_dict(ours.state_dict())
    assert not other.state
    with pytest.raises(ValueError, match=r"the state of embedding\.weight has momentum_buffer, expected only"):
        FactoredAdamW(net).load_state_dict(ours.state_dict())


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "amsgrad": (lambda n: FactoredAdamW(n, amsgrad=True), NotImplementedError, "amsgrad=True: .*AdamW"),
    "maximize": (lambda n: FactoredAdamW(n, maximize=True), NotImplementedError, "maximize=True: negate"),
    "capturable": (lambda n: FactoredAdamW(n, capturable=True), NotImplementedError, "capturable=True"),
    "differentiable": (lambda n: FactoredAdamW(n, differentiable=True), NotImplementedError, "differentiable=True"),
    "fused": (lambda n: FactoredAdamW(n, fused=True), NotImplementedError, "fused=True"),
    "group": (lambda n: FactoredAdamW([{"params": n, "amsgrad": True}]), NotImplementedError, "amsgrad=True"),
    "sgd_maximize": (lambda n: FactoredSGD(n, maximize=True), NotImplementedError, "maximize=True"),
    "nesterov": (lambda n: FactoredSGD(n, nesterov=True), ValueError, "nesterov needs a momentum above 0"),
    "lr": (lambda n: FactoredAdamW(n, lr=-1.0), ValueError, r"lr is -1\.0"),
    "lr_nan": (lambda n: FactoredAdamW(n, lr=float("nan")), ValueError, "lr is nan"),
    "eps": (lambda n: FactoredAdamW(n, eps=-1e-8), ValueError, "eps is"),
    "betas": (lambda n: FactoredAdamW(n, betas=(0.9, 1.0)), ValueError, "betas is"),
    "moments": (lambda n: FactoredAdamW(n, moments="4bit"), ValueError, "moments is '4bit', expected 'float32'"),
    "max_norm": (lambda n: FactoredAdamW(n, max_norm=0.0), ValueError, r"max_norm is 0\.0"),
    "process_group": (lambda n: FactoredAdamW(n, process_group="all"), ValueError, "process_group is 'all'"),
    "empty": (lambda n: FactoredAdamW([]), ValueError, "params is empty"),
    "no_module": (lambda n: FactoredAdamW(["up"]), TypeError, "params holds a str"),
    "tensor": (lambda n: FactoredAdamW(n.up.weight), TypeError, "params is a tensor"),
    "set": (lambda n: FactoredAdamW([{"params": set(n.parameters())}]), TypeError, "params is a set"),
    "frozen": (lambda n: FactoredAdamW(n.requires_grad_(False)), ValueError, "no parameter that requires a gradient"),
    "twice": (lambda n: FactoredAdamW([{"params": n}, {"params": n.up}]), ValueError, "more than one parameter group"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_words(what: str) -> None:
    make, error, words = REFUSED[what]
    net = network()
    with pytest.raises(error, match=words):
        make(net)
    assert not net.factored


def test_a_backend_is_asked_for_by_name() -> None:
    net, wanted = network(dtype=torch.float64), targets(network())
    before = parameters(net)
    with pytest.raises(ValueError, match='backend is "abacus"; expected "auto", '):
        FactoredAdamW(net, backend="abacus")
    with pytest.raises(NotImplementedError, match=r"no backend for w \[1, 96, 12\] torch\.float64 on cpu:\n  cpu: "):
        train(net, FactoredAdamW(net, backend="cpu"), wanted, 1)
    assert all(torch.equal(before[name], p) for name, p in net.named_parameters())


def test_bare_parameters_are_no_prefix() -> None:
    net = network()
    with pytest.warns(UserWarning, match="give the prefix itself"):
        optimizer = FactoredAdamW(net.parameters())
    assert not net.factored
    train(net, optimizer, targets(net), 1)


def test_a_model_in_16_bits_trains_as_torch_does() -> None:
    """A prefix cast to bfloat16 is not owned: its rule is torch's, and so are its gradients."""
    net = network(dtype=torch.bfloat16)
    other, wanted = twin(net, torch.bfloat16), targets(net)
    train(net, FactoredAdamW(net, lr=1e-2), wanted, 3)
    train(other, torch.optim.AdamW(other.parameters(), lr=1e-2), wanted, 3)
    assert not net.factored
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05)


def test_copies_and_pickles() -> None:
    net, wanted = network(), targets(network())
    ours = FactoredAdamW(net, lr=1e-2, max_norm=3.0, moments="8bit")
    train(net, ours, wanted, 2)
    for made in (copy.deepcopy((net, ours)), pickle.loads(pickle.dumps((net, ours)))):
        other, theirs = made
        assert not other.factored and net.factored and theirs.max_norm == 3.0
        theirs.take_over(other)
        assert other.factored
        expected = copy.deepcopy(net), copy.deepcopy(ours)
        train(other, theirs, wanted, 3)
        assert isinstance(other.up.weight.grad, FactoredGradient)
        expected[1].param_groups[0]["params"] = list(expected[0].parameters())
    train(net, ours, wanted, 3)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_copy_without_take_over_takes_ordinary_steps() -> None:
    net, wanted = network(), targets(network())
    ours = FactoredAdamW(net, lr=1e-2, moments="bfloat16")
    train(net, ours, wanted, 2)
    other, theirs = copy.deepcopy((net, ours))
    train(other, theirs, wanted, 3)
    assert type(other.up.weight.grad) is Tensor
    train(net, ours, wanted, 3)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_an_attached_model_is_copied() -> None:
    model = tiny_gpt2()
    prefix = attach(model, PrefixConfig(length=4, share="deep", hidden=8))
    ours = FactoredAdamW(prefix)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    ours.step()
    made = copy.deepcopy(model)
    made(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("cleared", [True, False])
def test_nothing_is_kept_alive(cleared: bool) -> None:
    """A parameter's grad refers to parameters, which must not make a circle that nobody collects."""
    net, wanted = network(), targets(network())
    ours = FactoredAdamW(net)
    train(net, ours, wanted, 2)
    loss(net, wanted).backward()
    if cleared:
        ours.zero_grad()
    dead = weakref.ref(net), weakref.ref(net.up.weight), weakref.ref(ours)
    del net, ours
    gc.collect()
    assert all(ref() is None for ref in dead)


# 8 bits


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", [7, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
def test_codes(signed: bool, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 40, width, generator=generator) * torch.logspace(-9, 2, 40)[:, None]
    values[0, 3] = 0
    values[0, 4, 1:] = 0
    values[0, 5, 1:] *= 1e-12
    values = values if signed else values.square()
    shape = 1, 40, -(-width // BLOCK)
    moment = Moment8(torch.empty(values.shape, dtype=torch.uint8), torch.empty(shape), signed)
    moment.encode(0, slice(0, 13), values[0, :13], step=3)
    moment.encode(0, slice(13, 40), values[0, 13:], step=3)
    found = moment.decode(0, slice(0, 40))
    assert torch.equal(found[3], torch.zeros(width))
    assert torch.equal(found == 0, values[0] == 0) or signed, "a positive exp_avg_sq became zero"
    assert torch.equal(found.sign() * values[0].sign() < 0, torch.zeros_like(found, dtype=torch.bool))
    root, exact = (found, values[0]) if signed else (found.sqrt(), values[0].sqrt())
    scale = moment.scale[0].repeat_interleave(BLOCK, -1)[:, :width]
    most = 127 if signed else 255
    share = torch.where(scale > 0, exact.abs() / scale, 0)
    allowed = scale * ((share.sqrt() + 1 / most).square() - share) * 1.0001 + 1e-38  # the distance to the next code
    assert ((root - exact).abs() <= allowed).all()
    largest = exact.abs() == scale
    torch.testing.assert_close(found[largest], values[0][largest], rtol=3e-7, atol=0)


def test_codes_are_right_on_average() -> None:
    """Over many steps the coin is fair: the mean of what is kept is the value."""
    for signed in (True, False):
        values = torch.tensor([1.0, 0.41, 0.1234, 0.0567, 0.01]).repeat(20)
        moment = Moment8(torch.empty(1, 1, 100, dtype=torch.uint8), torch.empty(1, 1, 1), signed)
        total = torch.zeros(5)
        for step in range(400):
            moment.encode(0, slice(0, 1), values[None], step)
            total += moment.decode(0, slice(0, 1)).view(20, 5).mean(0)
        torch.testing.assert_close(total / 400, values[:5], rtol=2e-3, atol=0)


def test_a_slow_average_moves() -> None:
    """exp_avg_sq goes a thousandth of its way in a step, much less than two codes are apart, and arrives."""
    w, v = torch.zeros(1, 8, 64), torch.full((1, 8, 64), 4.0)
    v[..., 0] = 100.0  # the block's largest, which stays
    eight = [Moment8(torch.zeros(1, 8, 64, dtype=torch.uint8), torch.zeros(1, 8, 1), s) for s in (True, False)]
    eight[1].encode(0, slice(0, 8), v[0], 0)
    h, dy = torch.ones(1, 1, 64), torch.ones(1, 1, 8)
    h[..., 0] = 10.0
    options: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    for step in range(1, 1001):
        fused_adamw(w, *eight, h, dy, **options, step=step, grad_scale=1.0, want_dh=False)
    expected = 1 + 3 * 0.999**1000
    found = eight[1].decode(0, slice(0, 8))
    assert found[:, 1:].mean() == pytest.approx(expected, rel=0.02)
    torch.testing.assert_close(found[:, 0], torch.full((8,), 100.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("moments", "allowed"), [(("bfloat16", "float32"), 0.02), ("8bit", 0.06)])
def test_fewer_bits_train_alike(moments: Any, allowed: float) -> None:
    """A regression with noise whose gradients shrink tenfold on the way, so that exp_avg_sq has to come down.

    Measured over 3000 steps, against float32: ("bfloat16", "float32") ends 0.4 % of the way off, "8bit" 2 %, "bfloat16"
    11 %, with an exp_avg_sq ten times too large.
    """
    wanted = targets(_regression(), 64)
    wanted = wanted[:1] + 2 * wanted  # something to learn, and noise
    ends, squares = {}, {}
    for name in ("float32", moments):
        net = _regression()
        start = net.up.weight.detach().clone()
        optimizer = FactoredAdamW(net, lr=3e-3, weight_decay=0.0, moments=name)
        for i in range(600):
            optimizer.zero_grad()
            (loss(net, wanted[i % 64][None]) * (10 if i < 100 else 1)).backward()
            optimizer.step()
        ends[name] = net.up.weight.detach() - start
        kept = moment("exp_avg_sq", optimizer.state[net.up.weight])
        squares[name] = (kept.decode(0, slice(None)) if isinstance(kept, Moment8) else kept).mean()
    assert (ends[moments] - ends["float32"]).norm() < allowed * ends["float32"].norm()
    torch.testing.assert_close(squares[moments], squares["float32"], rtol=0.01, atol=0)


def _regression() -> DeepShare:
    torch.manual_seed(3)
    return DeepShare(4, 5, 64, Geometry("test", 4, 2, 16, 32))
