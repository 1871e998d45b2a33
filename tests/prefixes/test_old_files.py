"""What an earlier version of the library wrote is read by this one, to the bit."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from prefixattn import FactoredAdamW, PrefixPlus, load
from prefixattn.testing.models import tiny
from tests.support import ROOT

OLD = ROOT / "tests" / "records" / "checkpoints"  # of commit 4a35c4e, by make_checkpoints.py beside it
FOLDERS = ["deep", "deep-folded", "none", "none-folded", "bank"]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_prefix(name: str) -> None:
    expected = torch.load(OLD / "expected.pt", weights_only=True)[name.removesuffix("-folded")]
    assert expected.any()
    assert torch.equal(load(tiny("gpt2"), OLD / name)().detach(), expected)


def test_prefix_tuning_plus() -> None:
    from safetensors.torch import load_file

    plus = load(tiny("gpt2"), OLD / "plus")
    assert isinstance(plus, PrefixPlus)
    [file] = (OLD / "plus").glob("*.safetensors")
    found = {name: t.detach() for name, t in plus.encoder.named_parameters()}
    saved = load_file(file)
    assert saved and saved.keys() == found.keys()
    for name, t in saved.items():
        assert torch.equal(found[name], t), name


def test_the_state_of_an_optimizer() -> None:
    state = torch.load(OLD / "factored_adamw.pt", weights_only=True)
    prefix = load(tiny("gpt2"), OLD / "deep")
    optimizer = FactoredAdamW([prefix], lr=0.5)
    optimizer.load_state_dict(state)
    again = optimizer.state_dict()
    assert again["param_groups"] == state["param_groups"] and again["param_groups"][0]["lr"] == 1e-2
    assert again["state"].keys() == state["state"].keys() and state["state"]
    for index, values in state["state"].items():
        assert values.keys() == again["state"][index].keys()
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(again["state"][index][name]), torch.as_tensor(value)), (index, name)
