"""Saving and loading prefixes, and PEFT's adapters."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import prefixattn
from prefixattn import PrefixConfig

pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
from prefixattn.attach import attached  # noqa: E402
from prefixattn.attach.testing import tiny_gpt2  # noqa: E402

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
    from prefixattn import checkpoint

    replace, calls = checkpoint.os.replace, []

    def dies_at_the_second(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left on device")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", dies_at_the_second)
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
    "empty_folder": (lambda f: (f / "prefix.json").unlink(), r"holds neither prefix\.json nor adapter_config\.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_one_clear_error_and_no_change(tmp_path, case):
    damage, words = DAMAGE[case]
    prefixattn.attach(tiny_gpt2(), config()).save_pretrained(tmp_path)
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


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_peft_adapter_written_here_is_read_bit_for_bit_by_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: its adapters are not read with it")
    model = tiny_gpt2()
    prefix = prefixattn.attach(model, config())
    prefix.export_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_gpt2(), tmp_path)
    rows = theirs.prompt_encoder["default"].embedding.weight  # [P, layers * 2 * Hkv * D]
    bank = prefix().detach()  # [layers, 2, Hkv, P, D]
    for layer in range(2):
        for kv in range(2):
            mine = bank[layer, kv].transpose(0, 1).reshape(P, 32)
            assert torch.equal(rows[:, (2 * layer + kv) * 32 :][:, :32], mine)
    torch.testing.assert_close(theirs(input_ids=IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_peft_adapter_is_read_bit_for_bit_and_trains_on(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: its adapters are not written with it")
    torch.manual_seed(5)
    settings = dict(num_virtual_tokens=P, prefix_projection=True, encoder_hidden_size=16)
    theirs = peft.get_peft_model(tiny_gpt2(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", **settings)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny_gpt2()
    prefix = prefixattn.load(model, tmp_path / "theirs")
    assert prefix.config.length == P and prefix.num_parameters() == 2 * 2 * P * 32
    torch.testing.assert_close(model(IDS).logits, theirs(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    prefix.export_peft(tmp_path / "ours")
    saved = [safetensors_torch.load_file(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "ours")]
    assert torch.equal(saved[0]["prompt_embeddings"], saved[1]["prompt_embeddings"])
    step(model, torch.optim.SGD(prefix.parameters(), lr=0.1))
    assert not torch.equal(prefix().permute(3, 0, 1, 2, 4).reshape(P, -1), saved[0]["prompt_embeddings"])


def test_what_peft_cannot_hold_is_refused(tmp_path):
    prefix = prefixattn.attach(tiny_gpt2(), config(layers="first"))
    with pytest.raises(ValueError, match="layers is 'first'; a PEFT adapter has a prefix in every layer"):
        prefix.export_peft(tmp_path)
    prefix = prefixattn.attach(tiny_gpt2(), config(positions="unshifted"))
    with pytest.raises(ValueError, match="positions is 'unshifted'; PEFT always shifts positions"):
        prefix.export_peft(tmp_path)
    assert not list(tmp_path.iterdir())


PEFT_DAMAGE = {
    "another_method": (dict(peft_type="LORA"), "has peft_type 'LORA', expected 'PREFIX_TUNING'"),
    "another_depth": (dict(num_layers=12), "prefix for another model: num_layers=12, here 2"),
    "another_length": (dict(num_virtual_tokens=7), r"expected \{'prompt_embeddings': \[7, 128\]\}"),
    "no_length": (dict(num_virtual_tokens=None), "num_virtual_tokens None, expected an integer from 1 to"),
}
PEFT_TENSORS = {
    "int32": (torch.Tensor.int, r"of torch\.int32, expected one floating-point type"),
    "nan": (lambda t: t.log(), "holds values that are infinite or not a number, in prompt_embeddings"),
}


@pytest.mark.parametrize("case", PEFT_DAMAGE)
def test_a_peft_adapter_that_does_not_fit_is_refused(tmp_path, case):
    changes, words = PEFT_DAMAGE[case]
    prefixattn.attach(tiny_gpt2(), config()).export_peft(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    model = tiny_gpt2()
    with pytest.raises(ValueError, match=words):
        prefixattn.load(model, tmp_path)
    assert attached(model) is None


@pytest.mark.parametrize("case", PEFT_TENSORS)
def test_peft_tensors_that_cannot_be_a_prefix_are_refused(tmp_path, case):
    change, words = PEFT_TENSORS[case]
    prefixattn.attach(tiny_gpt2(), config()).export_peft(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    safetensors_torch.save_file({name: change(t) for name, t in safetensors_torch.load_file(path).items()}, path)
    with pytest.raises(ValueError, match=words) as caught:
        prefixattn.load(tiny_gpt2(), tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_peft_adapter_is_refused(tmp_path):
    prefixattn.attach(tiny_gpt2(), config()).export_peft(tmp_path)
    truncate(tmp_path / "adapter_model.safetensors")
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        prefixattn.load(model, tmp_path)
    assert attached(model) is None
