"""Saving and loading prefixes."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import prefixattn
from prefixattn import FactoredAdamW, PrefixConfig
from prefixattn.prefixes import saving

pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
from prefixattn.attach import attached  # noqa: E402
from prefixattn.testing.models import model_inputs, tiny, tiny_gpt2  # noqa: E402

P = 5
SHARES = ["deep", "simple", "none"]
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def config(share: str = "deep", **choices: object) -> PrefixConfig:
    return PrefixConfig(**{"length": P, "hidden": 16, "share": share, **choices})


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("share", SHARES)
def test_a_saved_prefix_comes_back_and_trains_on(tmp_path, share):
    model = tiny_gpt2()
    prefix = prefixattn.attach(model, config(share))
    optimizer = torch.optim.SGD(prefix.parameters(), lr=0.1)
    step(model, optimizer)
    prefix.save_pretrained(tmp_path)
    other = tiny_gpt2()
    loaded = prefixattn.load(other, tmp_path)
    assert loaded.config == prefix.config
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    step(model, optimizer)
    step(other, torch.optim.SGD(loaded.parameters(), lr=0.1))
    for name, value in prefix.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("share", SHARES)
def test_a_folded_prefix_comes_back_as_keys_and_values(tmp_path, share):
    model = tiny_gpt2()
    prefix = prefixattn.attach(model, config(share, layers=[1]))
    wanted = model(IDS).logits
    prefix.save_pretrained(tmp_path / "a", folded=True)
    prefix.fold()
    prefix.save_pretrained(tmp_path / "b")
    for folder in ("a", "b"):
        other = tiny_gpt2()
        loaded = prefixattn.load(other, tmp_path / folder)
        assert loaded.folded and torch.equal(other(IDS).logits, wanted)
        assert sum(p.numel() for p in loaded.parameters()) == 2 * P * 32


# family, choices of the model, of the prefix
KINDS = {
    "gpt2": ("gpt2", {}, dict(length=5, hidden=8, activation="relu", dropout=0.1)),
    "llama_ragged": ("llama", {}, dict(length=[3, 6], share="none", gate=True, positions="unshifted")),
    "llama_simple": ("llama", {}, dict(length=4, share="simple", gate=True, layers=[1])),
    "llama_text": ("llama", {}, dict(share="none", init="three words here")),
    "bart_depths": ("bart", {}, dict(length=5, hidden=8, gate=True, activation="gelu")),
    "bart_networks": ("bart", {"encoder_layers": 2}, dict(length=[1, 2, 3, 4, 5, 6], hidden=8)),
    "bart_decoder": ("bart", {}, dict(length=4, hidden=8, attentions=["decoder"], positions="shifted")),
    "t5": ("t5", {}, dict(length=3, hidden=8, attentions=["encoder", "cross"], activation="none", init="zero")),
    "vit": ("vit", {}, dict(length=4, gate=True, init="uniform")),
    "vit_one": ("vit", {}, dict(length=4, hidden=8, network="one", layers="first")),
}


def started(kind):
    """A model, its inputs, a prefix that has taken two steps, and its optimizer; and what makes another such model."""
    family, sizes, choices = KINDS[kind]
    model, inputs = tiny(family, **sizes), model_inputs(family)
    prefix = prefixattn.attach(model, PrefixConfig(**choices), lambda text, **_: {"input_ids": [7, 2, 9]}).eval()
    optimizer = FactoredAdamW(prefix, lr=1e-2)
    go_on(model, inputs, optimizer)
    return model, inputs, prefix, optimizer, lambda: tiny(family, **sizes)


def go_on(model, inputs, optimizer):
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs).logits.square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prefix_comes_back_to_the_bit_and_goes_on_with_its_optimizer(tmp_path, kind):
    model, inputs, prefix, optimizer, fresh = started(kind)
    with torch.no_grad():
        wanted = model(**inputs).logits
    for folded in (True, False):
        prefix.save_pretrained(tmp_path / str(folded), folded=folded)
        other = fresh()
        loaded = prefixattn.load(other, tmp_path / str(folded)).eval()
        assert loaded.lengths == prefix.lengths and all(p.requires_grad != folded for p in loaded.parameters())
        with torch.no_grad():
            assert torch.equal(other(**inputs).logits, wanted)
        assert loaded.folded if folded else loaded.config == prefix.config
    resumed = FactoredAdamW(loaded, lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    before = {name: value.clone() for name, value in prefix.state_dict().items()}
    go_on(model, inputs, optimizer)
    go_on(other, inputs, resumed)
    assert loaded.state_dict().keys() == before.keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in prefix.state_dict().items())
    assert any(not torch.equal(value, before[name]) for name, value in prefix.state_dict().items())


def test_a_prefix_in_float64_keeps_its_type_and_its_gate(tmp_path):
    model = tiny("llama").double()
    prefix = prefixattn.attach(model, PrefixConfig(share="none", init=[3, 4], gate=True))
    prefix.save_pretrained(tmp_path)
    other = tiny("llama").double()
    loaded = prefixattn.load(other, tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert torch.equal(loaded(), prefix())


def test_a_prefix_that_is_not_finite_is_not_saved_over_one_that_is(tmp_path):
    prefix = prefixattn.attach(tiny_gpt2(), config())
    prefix.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        prefix.encoder.up.bias[0] = float("nan")
    for save in (prefix.save_pretrained, prefix.export_peft):
        with pytest.raises(ValueError, match=r"infinite or not a number, in .*: not saved"):
            save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_loading_draws_no_random_numbers(tmp_path):
    prefixattn.attach(tiny_gpt2(), config()).save_pretrained(tmp_path)
    model = tiny_gpt2()
    state = torch.get_rng_state()
    prefixattn.load(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_saving_again_replaces_the_checkpoint_and_leaves_no_other_file(tmp_path):
    model = tiny_gpt2()
    prefix = prefixattn.attach(model, config())
    prefix.save_pretrained(tmp_path)
    with torch.no_grad():
        prefix.encoder.up.bias.add_(1.0)
    (tmp_path / "prefix-mine.safetensors").touch()
    prefix.save_pretrained(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    other = tiny_gpt2()
    prefixattn.load(other, tmp_path)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_a_save_that_dies_leaves_the_checkpoint_before_it(tmp_path, monkeypatch):
    model = tiny_gpt2()
    prefix = prefixattn.attach(model, config())
    prefix.save_pretrained(tmp_path)
    wanted = model(IDS).logits
    with torch.no_grad():
        prefix.encoder.up.bias.add_(1.0)
    replace, calls = saving.os.replace, []

    def dies_at_the_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(saving.os, "replace", dies_at_the_second)
    with pytest.raises(OSError, match="no space left"):
        prefix.save_pretrained(tmp_path)
    other = tiny_gpt2()
    prefixattn.load(other, tmp_path)
    assert torch.equal(other(IDS).logits, wanted)
    assert not list(tmp_path.glob("*.tmp"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "prefix.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights(folder: Path) -> Path:
    return next(folder.glob("prefix-*.safetensors"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor] | bytes) -> None:
    """Another content under a matching digest."""
    import hashlib

    data = tensors if isinstance(tensors, bytes) else safetensors_torch.save(tensors)
    weights(folder).write_bytes(data)
    edit(folder, sha256=hashlib.sha256(data).hexdigest())


def drop(folder: Path, name: str) -> None:
    rewrite(folder, {key: t for key, t in safetensors_torch.load_file(weights(folder)).items() if key != name})


def drop_field(folder: Path, name: str) -> None:
    path = folder / "prefix.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))


class Bomb:
    """Goes off where it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def convert(folder: Path, change: Callable[[torch.Tensor], torch.Tensor], only: str = "") -> None:
    """The tensors whose name starts with `only` changed, under a matching digest."""
    tensors = safetensors_torch.load_file(weights(folder))
    rewrite(folder, {name: change(t) if name.startswith(only) else t for name, t in tensors.items()})


DAMAGE = {
    "json_truncated": (lambda f: truncate(f / "prefix.json"), r"prefix\.json is not JSON"),
    "json_binary": (lambda f: (f / "prefix.json").write_bytes(b"\xff\xfe\x00"), r"prefix\.json is not JSON"),
    "json_list": (lambda f: (f / "prefix.json").write_text("[1]"), r"prefix\.json holds a list, expected an object"),
    "format": (lambda f: edit(f, format="other"), r"has format 'other', expected 'prefixattn'"),
    "version": (lambda f: edit(f, version=9), r"has version 9; this prefixattn reads version 2"),
    "config": (lambda f: edit(f, config={"length": 5}), r"prefix\.json: the prefix config .* lacks"),
    "config_value": (
        lambda f: edit(f, config={**config().to_dict(), "share": "half"}),
        r"prefix\.json: share is 'half'",
    ),
    "config_length": (
        lambda f: edit(f, config={**config().to_dict(), "length": 10**30}),
        r"prefix\.json: length is 10{30}, expected an integer from 1 to",
    ),
    "config_layers": (
        lambda f: edit(f, config={**config().to_dict(), "layers": [7]}),
        r"prefix\.json: layers names layer 7, but the model has 2 layers",
    ),
    "digest_none": (lambda f: edit(f, sha256=None), r"prefix\.json has sha256 None, expected a str"),
    "folded_word": (lambda f: edit(f, folded="no"), r"prefix\.json has folded 'no', expected a bool"),
    "weights_unnamed": (lambda f: edit(f, weights=""), r"prefix\.json names the weights '', expected"),
    "weights_outside": (lambda f: edit(f, weights="../other"), r"names the weights '\.\./other'"),
    "weights_absolute": (lambda f: edit(f, weights="/prefix-0123456789ab.safetensors"), r"names the weights '/prefix"),
    "weights_below": (lambda f: edit(f, weights="a/prefix-0123456789ab.safetensors"), r"names the weights 'a/prefix"),
    "weights_pickled": (lambda f: rewrite(f, pickle.dumps(Bomb())), r"is not a whole safetensors file"),
    "weights_missing": (lambda f: weights(f).unlink(), r"\.safetensors is missing"),
    "weights_truncated": (lambda f: truncate(weights(f)), r"\.safetensors is damaged or was not written in full"),
    "weights_flipped_bit": (lambda f: flip(weights(f)), r"\.safetensors is damaged or was not written in full"),
    "weights_foreign": (lambda f: rewrite(f, b"not tensors"), r"is not a whole safetensors file"),
    "tensors_foreign": (lambda f: rewrite(f, {"a": torch.zeros(2)}), r"holds tensors \{'a': \[2\]\}, expected"),
    "tensors_int8": (lambda f: convert(f, torch.Tensor.char), r"of torch\.int8, expected one floating-point type"),
    "tensors_complex": (lambda f: convert(f, torch.Tensor.cfloat), r"of torch\.complex64, expected one floating-point"),
    "tensors_mixed": (
        lambda f: convert(f, torch.Tensor.half, "up."),
        r"of torch\.float16, torch\.float32, expected one floating-point type for all",
    ),
    "tensors_nan": (
        lambda f: convert(f, lambda t: t.log(), "up.bias"),
        r"holds values that are infinite or not a number, in up\.bias",
    ),
    "tensors_fewer": (lambda f: drop(f, "up.bias"), r"holds tensors .*, expected .*'up\.bias': \[128\]"),
    "tensors_more": (
        lambda f: rewrite(f, safetensors_torch.load_file(weights(f)) | {"gate": torch.ones(2)}),
        r"holds tensors .*'gate': \[2\].*, expected",
    ),
    "tensors_other_shape": (
        lambda f: convert(f, lambda t: t[:-1], "embedding"),
        r"'embedding\.weight': \[4, 32\].*, expected .*'embedding\.weight': \[5, 32\]",
    ),
    "tensors_infinite": (
        lambda f: convert(f, lambda t: t / 0, "down.bias"),
        r"infinite or not a number, in down\.bias",
    ),
    "json_deep": (lambda f: (f / "prefix.json").write_text("[" * 10**5), r"prefix\.json is not JSON"),
    "field_missing": (lambda f: drop_field(f, "folded"), r"lacks the fields \['folded'\]"),
    "field_unknown": (lambda f: edit(f, extra=1), r"has unknown fields \['extra'\]"),
    "version_older": (lambda f: edit(f, version=1), r"has version 1; this prefixattn reads version 2"),
    "model_list": (lambda f: edit(f, model=[]), r"has model \[\], expected a dict"),
    "model_fewer": (lambda f: edit(f, model={"layers": 2}), r"describes the model as .*, expected the fields"),
    "left_open": (
        lambda f: edit(f, config={**config().to_dict(), "network": "one", "init": "normal"}),
        r"prefix\.json leaves positions of the prefix to the model",
    ),
    "empty_folder": (lambda f: (f / "prefix.json").unlink(), r"holds neither prefix\.json nor adapter_config\.json"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    prefixattn.attach(tiny_gpt2(), config()).save_pretrained(folder)
    return folder


WRONG = {
    "length": [None, "5", 5.0, True, [], [[5]], [5, None], {}],
    "share": [None, 1, ["deep"]],
    "layers": [None, 1, "0", [0.0], ["0"], [1, 0], {}],
    "attentions": [None, "self", [], [1], ["cross"], {}],
    "network": [None, 1, "two"],
    "hidden": [None, "16", 16.0, True, [16], 0],
    "activation": [None, 0, "sine"],
    "dropout": [None, "0", False, float("nan"), 1, [0.0]],
    "gate": [None, 0, "false", []],
    "positions": [None, 5, "moved"],
    "init": [None, "", [], [0.5], {}, True],
}


@pytest.mark.parametrize("field", WRONG)
def test_a_wrong_value_in_a_field_of_the_config_is_refused(tmp_path, whole, field):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    good = json.loads((whole / "prefix.json").read_text())["config"]
    model = tiny_gpt2()
    kept = prefixattn.attach(model, config("none"))
    for value in WRONG[field]:
        edit(tmp_path, config={**good, field: value})
        with pytest.raises(ValueError, match=rf"prefix\.json.*\b{field}\b") as caught:
            prefixattn.load(model, tmp_path)
        assert "\n" not in str(caught.value)
        assert attached(model) is kept
    edit(tmp_path, config=good)
    assert attached(model) is kept and prefixattn.load(model, tmp_path).is_active


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_one_clear_error_and_no_change(tmp_path, whole, case):
    damage, words = DAMAGE[case]
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    model = tiny_gpt2()
    before = model(IDS).logits
    with pytest.raises(ValueError, match=words) as caught:
        prefixattn.load(model, tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert attached(model) is None and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(IDS).logits, before)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    prefixattn.attach(tiny_gpt2(), config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"prefix for another model: layers=2, here 3; head_dim=16, here 8; width=32"):
        prefixattn.load(tiny_gpt2(n_layer=3, n_embd=16), tmp_path)
