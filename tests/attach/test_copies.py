"""Copies of prefixes and of models that have one, and averages of either."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.attach import attached
from prefixattn.testing.timm import images

SAME = dict(rtol=0, atol=0)
FREE = PrefixConfig(length=4, share="none")
SHARES = {
    "none": FREE,
    "deep": PrefixConfig(length=4, hidden=8),
    "simple": PrefixConfig(length=4, share="simple"),
    "gate": PrefixConfig(length=4, share="none", gate=True),
    "plus": prefixattn.PrefixPlusConfig(init="normal"),
}


def of_timm() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    from prefixattn.testing.timm import tiny

    return tiny("vit"), lambda model: model(images())


def of_transformers() -> tuple[Any, Callable[[Any], torch.Tensor]]:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from prefixattn.testing.models import tiny, token_ids

    return tiny("gpt2"), lambda model: model(token_ids()).logits


LIBRARIES = {"timm": of_timm, "transformers": of_transformers}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return LIBRARIES[request.param]


class Torchs(AveragedModel):
    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, avg_fn=lambda average, new, _: average + 0.5 * (new - average))
        self.n_averaged += 1  # or the first update copies

    def update(self, module: nn.Module) -> None:
        self.update_parameters(module)


class Written(nn.Module):
    """As many write it themselves; `.data` leaves no trace in a tensor's version."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)

    def update(self, module: nn.Module) -> None:
        for average, new in zip(self.module.parameters(), module.parameters(), strict=True):
            average.data.mul_(0.5).add_(new.data, alpha=0.5)


def of_timms_utils(name: str) -> Callable[[nn.Module], Any]:
    def make(module: nn.Module) -> Any:
        from timm.utils import model_ema

        return getattr(model_ema, name)(module, decay=0.5)

    return make


AVERAGES = {"torch": Torchs, "written": Written, **{n: of_timms_utils(n) for n in ("ModelEmaV2", "ModelEmaV3")}}


@torch.no_grad()
def train(prefix: nn.Module) -> None:
    generator = torch.Generator("cpu").manual_seed(7)
    for parameter in prefix.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter))


CASES = [(average, "none") for average in AVERAGES] + [("torch", share) for share in SHARES if share != "none"]


@pytest.mark.parametrize("average, share", CASES)
def test_an_average_of_a_prefix_attends_in_its_model(library, average, share):
    model, run = library()
    prefix = prefixattn.attach(model, SHARES[share])
    first = {name: t.clone() for name, t in prefix.state_dict().items()}
    ema = AVERAGES[average](prefix)
    assert attached(model) is prefix and not ema.module.is_active
    train(prefix)
    ema.update(prefix)
    with torch.no_grad():
        trained = run(model)
        ema.module.activate()
        averaged = run(model)
        assert attached(model) is ema.module and not prefix.is_active
        prefix.activate()
        torch.testing.assert_close(run(model), trained, **SAME)
        prefix.load_state_dict({name: (first[name] + t) / 2 for name, t in prefix.state_dict().items()})
        torch.testing.assert_close(averaged, run(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(averaged, trained, atol=1e-3)
    prefix.detach()
    assert attached(model) is None and not model._forward_pre_hooks
    with pytest.raises(ValueError, match="a copy of one that is detached"):
        ema.module.activate()


def test_a_guest_leaves_without_the_others(library):
    model, run = library()
    prefix = prefixattn.attach(model, FREE)
    guest = copy.deepcopy(prefix)
    train(guest)
    with torch.no_grad():
        own = run(model)
        guest.activate()
        copied = copy.deepcopy(model)  # whose active prefix is a copy of the guest
        torch.testing.assert_close(run(copied), run(model), **SAME)
        assert attached(copied) is not guest and attached(copied)._adapter.model is copied
        guest.detach()
        torch.testing.assert_close(run(model), own, **SAME)
        guest = copy.deepcopy(prefix)
        guest.activate()
        prefix.detach()  # the last of those that are here: nothing is left
    assert attached(model) is None and not model._forward_pre_hooks
    guest.detach()


@pytest.mark.parametrize("average, share", [case for case in CASES if case[0] != "written" and case[1] != "gate"])
def test_an_average_of_the_model_that_left_the_prefix_behind_is_refused(library, average, share):
    model, run = library()
    prefix = prefixattn.attach(model, SHARES[share])
    ema = AVERAGES[average](model)
    run(ema.module)  # nothing was trained yet
    train(prefix)
    ema.update(model)
    with pytest.raises(ValueError, match=r"averaged or loaded, and its Prefix.*activate\(\) on the averaged copy"):
        run(ema.module)
    attached(ema.module).load_state_dict(prefix.state_dict())
    torch.testing.assert_close(run(ema.module), run(model), **SAME)
    train(prefix)
    ema.update(model)
    run(ema.module)  # it has a life of its own


def test_a_copy_may_stay_as_it_is(library):
    model, run = library()
    prefix = prefixattn.attach(model, FREE)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = run(copied)
        train(prefix)
        with pytest.warns(UserWarning, match="Prefix of this copy of a model still is what it was then"):
            torch.testing.assert_close(run(copied), before, **SAME)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(run(copied), before, **SAME)  # once is enough
            other = copy.deepcopy(model)
            train(prefix)
            attached(other).activate()  # says that it is meant
            Torchs.update_parameters(Torchs(other), model)
            run(other)
            third, _ = copy.deepcopy(model), train(attached(copied))
            del model, prefix
            run(third)


def test_an_average_by_hand_warns(library):
    model, run = library()
    prefix = prefixattn.attach(model, FREE)
    ema = Written(model)
    train(prefix)
    ema.update(model)
    with pytest.warns(UserWarning, match=r"what averages a model's parameters does not see the prefix's"):
        run(ema.module)
    pair = Written(prefix)
    train(prefix)
    pair.update(prefix)
    attached(ema.module).load_state_dict(pair.module.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(ema.module)


@pytest.mark.parametrize("order", [("model", "prefix"), ("prefix", "model")])
def test_one_module_with_both_is_copied_and_averaged_as_a_whole(library, order):
    model, run = library()
    prefix = prefixattn.attach(model, SHARES["deep"])
    parts = {"model": model, "prefix": prefix}
    both = nn.ModuleDict({name: parts[name] for name in order})
    ema = Torchs(both)
    theirs = ema.module["prefix"]
    assert attached(ema.module["model"]) is theirs is not prefix
    assert theirs._adapter.model is ema.module["model"] and prefix._adapter.model is model
    with torch.no_grad():
        train(prefix)
        for _ in range(60):
            ema.update(both)
        torch.testing.assert_close(run(ema.module["model"]), run(model), rtol=1e-5, atol=1e-5)
        theirs.detach()
        assert not ema.module["model"]._forward_pre_hooks and attached(model) is prefix


def test_a_copy_made_inside_disabled_has_its_prefix():
    try:
        model, run = of_timm()
    except ImportError as error:
        pytest.skip(f"timm is not installed: {error}")
    prefix = prefixattn.attach(model, FREE)
    with torch.no_grad():
        with prefix.disabled():
            copied = copy.deepcopy(model)
        torch.testing.assert_close(run(copied), run(model), **SAME)


def test_an_optimizer_that_took_over_trains_its_prefix_and_no_copy():
    try:
        model, run = of_timm()
    except ImportError as error:
        pytest.skip(f"timm is not installed: {error}")
    prefix = prefixattn.attach(model, SHARES["deep"])
    optimizer = prefixattn.FactoredSGD(prefix, lr=0.1)
    ema = Torchs(prefix)
    first = copy.deepcopy(ema.module.state_dict())
    run(model).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(ema.module.state_dict(), first, **SAME)
    ema.update(prefix)
    wanted = {name: (first[name] + t) / 2 for name, t in prefix.state_dict().items()}
    torch.testing.assert_close(ema.module.state_dict(), wanted)
    optimizer.zero_grad()
    run(model).square().mean().backward()  # the prefix is trained on
    optimizer.step()
    assert pickle.loads(pickle.dumps(ema.module)).config == prefix.config
