"""Which prefix a layer of timm's models meets: ways through a model, checkpoints, threads, types, compilers."""

import copy
import threading

import pytest
import timm
import torch
from torch.utils import checkpoint as torch_checkpoint

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.testing.timm import concatenating, images, tiny

COMPILES = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # Dynamo asks it of what an object holds
)
CLOSE = dict(rtol=2e-5, atol=2e-5)
SAME = dict(rtol=0, atol=0)
FREE = PrefixConfig(length=4, share="none")
DEEP = PrefixConfig(length=4, hidden=8)


def gradients(prefix):
    found = {name: p.grad.clone() for name, p in prefix.named_parameters()}
    prefix.zero_grad()
    return found


WAYS = {
    "forward_features": lambda model, x: model.forward_head(model.forward_features(x)),
    "intermediates": lambda model, x: model.forward_head(model.forward_intermediates(x)[0]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["vit", "eva02", "naflex"])
def test_every_way_through_the_model_has_the_prefix(family, way):
    model, calls = tiny(family), []
    prefix = prefixattn.attach(model, DEEP)
    expected = model(images())
    expected.square().mean().backward()
    wanted = gradients(prefix)
    handle = prefix.encoder.register_forward_hook(lambda *_: calls.append(1))
    out = WAYS[way](model, images())
    assert len(calls) == 1  # the network runs once for a pass
    handle.remove()
    torch.testing.assert_close(out, expected, **SAME)
    out.square().mean().backward()
    torch.testing.assert_close(gradients(prefix), wanted, **SAME)


def test_a_block_alone_and_a_pass_that_stops_early():
    model = tiny("vit")
    prefix = prefixattn.attach(model, FREE)
    with torch.no_grad():
        whole = model.get_intermediate_layers(images(), n=3)
        early = model.forward_intermediates(images(), indices=[0], stop_early=True, intermediates_only=True)
        assert len(early) == 1 and len(whole) == 3
        prefix.encoder.bank.add_(1.0)  # what the unfinished pass had is not used again
        x = torch.randn(2, 10, 32)
        out = model.blocks[1](x)
        torch.testing.assert_close(model.blocks[1](x), out, **SAME)
        last = model.blocks[2](x)
        model.forward_intermediates(images(), indices=[0], stop_early=True)
        with prefix.disabled():
            plain = [block(x) for block in model.blocks[1:]]
            assert all(not torch.allclose(a, b) for a, b in zip((out, last), plain, strict=True))
        model.forward_intermediates(images(), indices=[0], stop_early=True)
        torch.testing.assert_close([block(x) for block in (model.blocks[2], model.blocks[1])], [last, out], **SAME)
        model.forward_intermediates(images(), indices=[0], stop_early=True)
    model.blocks[1](x).sum().backward()  # and gradients flow
    assert prefix.encoder.bank.grad[1].abs().sum() > 0 and prefix.encoder.bank.grad[0].abs().sum() == 0


@pytest.mark.parametrize("share", ["deep", "simple", "none"])
@pytest.mark.parametrize("family", ["vit", "eva02", "naflex", "parallel"])
def test_checkpoints_change_no_gradient(family, share):
    model = tiny(family)
    prefix = prefixattn.attach(model, PrefixConfig(length=4, share=share, dropout=0.1))
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        model(images()).square().mean().backward()
        found.append(gradients(prefix))
    torch.testing.assert_close(found[1], found[0], **SAME)


def test_a_checkpointed_block_meets_the_prefix_of_its_own_pass():
    model = tiny("vit")
    first, second = prefixattn.attach(model, FREE), prefixattn.attach(model, FREE)
    third = prefixattn.attach(model, DEEP)

    def run(in_between):
        outs = []
        for prefix in (first, second, third):
            prefix.activate()
            outs.append(model(images()).square().mean())
        with first.disabled():
            outs.append(model(images()).square().mean())  # no gradient comes of it
        in_between()
        sum(outs).backward()
        return [gradients(prefix) for prefix in (first, second, third)]

    wanted = run(lambda: None)
    model.set_grad_checkpointing(True)
    for in_between in (lambda: None, first.activate, second.activate):
        torch.testing.assert_close(run(in_between), wanted, **SAME)
    with torch.autograd.graph.save_on_cpu():  # unpacked tensors are others than those that were saved
        torch.testing.assert_close(run(first.activate), wanted, **SAME)
    model.set_grad_checkpointing(False)
    second.activate()
    model(images()).square().mean().backward()
    torch.testing.assert_close(gradients(second), wanted[1], **SAME)
    torch_checkpoint.checkpoint(model, images(), use_reentrant=False).square().mean().backward()
    torch.testing.assert_close(gradients(second), wanted[1], **SAME)
    model.set_grad_checkpointing(True)
    torch_checkpoint.checkpoint(model, images(), use_reentrant=False).square().mean().backward()
    torch.testing.assert_close(gradients(second), wanted[1], **SAME)


def test_a_backward_inside_disabled_keeps_the_prefix_of_its_forward():
    model = tiny("vit")
    prefix = prefixattn.attach(model, DEEP)
    model.set_grad_checkpointing(True)
    model(images()).square().mean().backward()
    wanted = gradients(prefix)
    loss = model(images()).square().mean()
    with prefix.disabled():
        loss.backward()
    torch.testing.assert_close(gradients(prefix), wanted, **SAME)


def test_reentrant_checkpoints_are_refused():
    model = tiny("vit")
    prefixattn.attach(model, FREE)
    model.set_grad_checkpointing(True)
    timm.layers.set_reentrant_ckpt(True)
    try:
        with pytest.raises(NotImplementedError, match="set_reentrant_ckpt"):
            model(images())
    finally:
        timm.layers.set_reentrant_ckpt(False)
    model(images()).sum().backward()


def test_passes_of_several_threads_do_not_mix():
    model, other = tiny("vit"), tiny("vit")
    prefix, neighbour = prefixattn.attach(model, DEEP), prefixattn.attach(other, DEEP)
    model(images()).square().mean().backward()
    wanted, of_other = gradients(prefix), other(images())
    assert not torch.allclose(of_other, model(images()), atol=1e-3)
    halfway, may_go_on, runs, found = threading.Event(), threading.Event(), [], {}

    def wait(*_):
        if threading.current_thread() is slow:
            halfway.set()
            assert may_go_on.wait(60)

    def work():
        found["slow"] = model(images())
        found["slow"].square().mean().backward()

    slow = threading.Thread(target=work)
    model.blocks[0].register_forward_hook(wait)
    prefix.encoder.register_forward_hook(lambda *_: runs.append(threading.current_thread()))
    slow.start()
    assert halfway.wait(60)
    with torch.no_grad():  # whole passes between the first and the second block of the other thread
        between = model(images())
        torch.testing.assert_close(other(images()), of_other, **SAME)
    may_go_on.set()
    slow.join()
    torch.testing.assert_close(found["slow"], between, **SAME)
    torch.testing.assert_close(gradients(prefix), wanted, **SAME)
    assert runs.count(slow) == 1  # its later blocks had what its pass began with
    assert neighbour.is_active


def test_an_error_in_a_pass_leaves_nothing_behind():
    model = tiny("vit")
    prefix = prefixattn.attach(model, FREE)
    handle = model.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        model(images())
    handle.remove()
    assert prefix._adapter.passes.running is None
    model(images()).sum().backward()


@pytest.mark.parametrize("family", ["vit", "eva02"])
def test_bfloat16_and_autocast(family):
    model = tiny(family)
    prefix = prefixattn.attach(model, FREE)
    exact = model(images())
    exact.square().mean().backward()
    wanted = gradients(prefix)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(images())
    assert cast.dtype == torch.bfloat16
    cast.float().square().mean().backward()
    of_autocast = gradients(prefix)
    model.to(torch.bfloat16)
    whole = model(images().bfloat16())
    assert whole.dtype == torch.bfloat16 and prefix.encoder.bank.dtype == torch.float32
    whole.float().square().mean().backward()
    for out, found in ((cast, of_autocast), (whole, gradients(prefix))):
        assert (out.float() - exact).norm() < 0.1 * exact.norm()
        assert (found["encoder.bank"] - wanted["encoder.bank"]).norm() < 0.2 * wanted["encoder.bank"].norm()


def test_float64_runs_on_the_reference():
    model = tiny("eva02").double()
    twin = copy.deepcopy(model)
    prefix = prefixattn.attach(model, FREE)
    prefix.double()
    with torch.no_grad(), concatenating(prefix):
        expected = twin(images().double())
    torch.testing.assert_close(model(images().double()).detach(), expected, rtol=1e-10, atol=1e-10)


@COMPILES
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("family", ["vit", "eva02"])
def test_compile_forward_and_backward_in_one_graph(family, checkpoints):
    model = tiny(family)
    prefix = prefixattn.attach(model, DEEP)
    expected = model(images())
    expected.square().mean().backward()
    wanted = gradients(prefix)
    model.set_grad_checkpointing(checkpoints)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        out = compiled(images())
        out.square().mean().backward()
        torch.testing.assert_close(out, expected, **CLOSE)
        torch.testing.assert_close(gradients(prefix), wanted, **CLOSE)
    with prefix.disabled(), torch.no_grad():
        plain = model(images())
        torch.testing.assert_close(compiled(images()), plain, **CLOSE)
    assert not torch.allclose(compiled(images()), plain, atol=1e-3)
    assert prefix._adapter.traced is None


@COMPILES
def test_compile_of_a_part():
    model = tiny("vit")
    prefix = prefixattn.attach(model, DEEP)
    expected = model.forward_features(images())
    expected.square().mean().backward()
    wanted = gradients(prefix)
    out = torch.compile(model.forward_features, fullgraph=True, backend="aot_eager")(images())
    out.square().mean().backward()
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(gradients(prefix), wanted, **CLOSE)
    assert prefix._adapter.traced is None


@pytest.mark.parametrize("family", ["vit", "eva02"])
def test_export(family):
    model = tiny(family)
    prefixattn.attach(model, FREE)
    with torch.no_grad():
        expected = model(images())
        program = torch.export.export(model, (images(),), strict=False)  # strict: modules alone
        torch.testing.assert_close(program.module()(images()), expected, **CLOSE)
