"""One timm model in two threads: what one does, in the middle of a forward pass of the other."""

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.attach import attached
from prefixattn.testing.timm import images, tiny

SAME = dict(rtol=0, atol=0)
FREE = PrefixConfig(length=4, share="none")


class Halfway:
    """Runs a model in a thread that waits between its first block and its second."""

    def __init__(self, model: torch.nn.Module, run: Callable[[], torch.Tensor]) -> None:
        self.there, self.go_on, self.out = threading.Event(), threading.Event(), []
        self.handle = model.blocks[0].mlp.register_forward_hook(self.wait)  # no hook of the model's own blocks
        self.thread = threading.Thread(target=lambda: self.out.append(run()))

    def wait(self, *_: object) -> None:
        if threading.current_thread() is self.thread:
            self.there.set()
            assert self.go_on.wait(120)

    def __deepcopy__(self, memo: object) -> "Halfway":
        return self

    def __enter__(self) -> "Halfway":
        self.thread.start()
        assert self.there.wait(120)
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.thread.join()
        self.handle.remove()


def disabling(model, prefix, folder):
    with prefix.disabled():
        return model(images(2))


def weighing(model, prefix, folder):
    prefix.mass(images(2))


def loading(model, prefix, folder):
    prefixattn.load(model, folder).detach()


def attaching(model, prefix, folder):
    other = prefixattn.attach(model, PrefixConfig(length=7, hidden=8))
    model(images(2))
    prefix.activate()
    other.detach()


def failing(model, prefix, folder):
    model.blocks[2].forward = lambda x, **_: x
    try:
        with pytest.raises(NotImplementedError, match="2 of 3 layers"):
            prefixattn.attach(model, FREE)
    finally:
        del model.blocks[2].forward


def copying(model, prefix, folder):
    copy.deepcopy(model)(images(2))


def tracing(model, prefix, folder):
    with pytest.raises(NotImplementedError, match=r"torch\.fx"):
        torch.fx.symbolic_trace(model)


BESIDE = [disabling, weighing, loading, attaching, failing, copying, tracing]


@pytest.mark.parametrize("beside", BESIDE, ids=lambda f: f.__name__)
def test_a_pass_ends_as_it_began(beside, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = tiny("vit")
    prefix = prefixattn.attach(model, FREE)
    prefix.save_pretrained(tmp_path)
    wanted = model(images())
    wanted.square().mean().backward()
    gradient, prefix.encoder.bank.grad = prefix.encoder.bank.grad, None
    with Halfway(model, lambda: model(images())) as slow:
        beside(model, prefix, tmp_path)
    torch.testing.assert_close(slow.out[0], wanted, **SAME)
    slow.out[0].square().mean().backward()
    torch.testing.assert_close(prefix.encoder.bank.grad, gradient, **SAME)
    torch.testing.assert_close(model(images()), wanted, **SAME)


def test_two_threads_get_the_mass_of_their_own_images():
    model = tiny("vit")
    prefix = prefixattn.attach(model, FREE)
    wanted, other = prefix.mass(images()), prefix.mass(images(2, seed=5))
    with Halfway(model, lambda: prefix.mass(images())) as slow:
        torch.testing.assert_close(prefix.mass(images(2, seed=5)), other, **SAME)
    torch.testing.assert_close(slow.out[0], wanted, **SAME)


def test_a_pass_inside_disabled_stays_plain():
    model = tiny("vit").requires_grad_(False)
    plain = model(images())
    prefix = prefixattn.attach(model, FREE)
    wanted = model(images()).detach()

    def run():
        with prefix.disabled():
            return model(images())

    with Halfway(model, run) as slow:
        torch.testing.assert_close(model(images()).detach(), wanted, **SAME)
    torch.testing.assert_close(slow.out[0], plain, **SAME)
    torch.testing.assert_close(model(images()).detach(), wanted, **SAME)


@pytest.mark.parametrize("way", ["model", "forward_features", "blocks"])
def test_the_first_attach_and_the_last_detach_wait_for_no_pass(way):
    """Part of the other thread's pass would have the prefix and part of it none."""
    runs = {"model": lambda: model(images()), "forward_features": lambda: model.forward_features(images())}
    runs["blocks"] = lambda: model.blocks(rows)
    model, rows = tiny("vit").requires_grad_(False), torch.randn(2, 10, 32)
    model.head.requires_grad_(True)
    run = runs[way]
    plain, kinds = run(), [type(module) for module in model.modules()]
    with Halfway(model, run) as slow:
        with pytest.raises(ValueError, match="attach: another thread is in the middle of a forward pass"):
            prefixattn.attach(model, FREE)
        assert attached(model) is None and [type(module) for module in model.modules()] == kinds
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    torch.testing.assert_close(slow.out[0], plain, **SAME)
    prefix = prefixattn.attach(model, FREE)
    wanted = run().detach()
    with Halfway(model, run) as slow:
        with pytest.raises(ValueError, match="detach: another thread is in the middle of a forward pass"):
            prefix.detach()
        assert prefix.is_active
    torch.testing.assert_close(slow.out[0].detach(), wanted, **SAME)
    with Halfway(other := tiny("vit"), lambda: other(images())):  # of another model
        prefix.detach()
    torch.testing.assert_close(run(), plain, **SAME)


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_threads_that_take_turns_at_any_moment():
    model = tiny("vit").requires_grad_(False)
    plain = model(images())
    prefix = prefixattn.attach(model, FREE)
    prefix.encoder.requires_grad_(False)
    other = prefixattn.attach(model, PrefixConfig(length=2, share="none", init="zero"))
    other.encoder.requires_grad_(False)
    of_other = model(images())
    prefix.activate()
    of_prefix, mass, wrong = model(images()), prefix.mass(images(2)), []

    def serve():
        out = model(images())
        if not any(torch.equal(out, known) for known in (of_prefix, of_other)):
            wrong.append(out)

    def change():
        other.activate()
        prefix.activate()
        if not torch.equal(prefix.mass(images(2)), mass):
            wrong.append("mass")
        with prefix.disabled():
            if not torch.equal(model(images()), plain):
                wrong.append("disabled")

    def loop(work):
        try:
            for _ in range(15):
                work()
        except Exception as error:
            wrong.append(error)

    with switching_often():
        threads = [threading.Thread(target=loop, args=(work,)) for work in (serve, change, serve)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
