"""Banks on disk: saved, loaded, and used where they lie in the file."""

import json
import math
import struct
from pathlib import Path

import pytest
import torch

import prefixattn
from prefixattn import PrefixBank, PrefixConfig
from prefixattn.prefixes import saving

pytest.importorskip("transformers", reason="transformers is not installed")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

from prefixattn.attach import attached  # noqa: E402
from prefixattn.testing.models import tiny_gpt2, token_ids  # noqa: E402

IDS = torch.tensor([2, 0, 2])


def saved(folder, count=4):
    torch.manual_seed(1)
    model = tiny_gpt2()
    bank = prefixattn.attach(model, PrefixConfig(5, "none", count=count))
    bank.set(2, bank.get(2)[..., :3, :])
    bank.save_pretrained(folder)
    with torch.no_grad():
        return bank, model(token_ids(), prefix_ids=IDS).logits


@pytest.mark.parametrize("how", ["load", "open", "open_file"])
def test_a_saved_bank_comes_back(tmp_path, how):
    bank, wanted = saved(tmp_path)
    model = tiny_gpt2()
    if how == "load":
        again = prefixattn.load(model, tmp_path)
    else:
        again = PrefixBank.open(model, tmp_path if how == "open" else tmp_path / "bank.safetensors")
    assert again.config == bank.config and again.encoder.lengths.tolist() == [5, 5, 3, 5]
    assert again.encoder.weight.requires_grad == (how == "load")
    assert torch.equal(again(), bank())
    with torch.no_grad():
        assert torch.equal(model(token_ids(), prefix_ids=IDS).logits, wanted)
        again.set(0, again.get(1))
        assert not torch.equal(model(token_ids(), prefix_ids=IDS).logits, wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]
    assert torch.equal(prefixattn.load(tiny_gpt2(), tmp_path)(), bank())  # the file is as it was


def test_folders_and_other_prefixes_make_one_bank(tmp_path):
    model = tiny_gpt2()
    prefixes = [prefixattn.attach(model, PrefixConfig(n, share, hidden=8)) for n, share in ((3, "deep"), (5, "none"))]
    prefixes.append(prefixattn.attach(model, PrefixConfig(2, "deep", hidden=8, gate=True)))
    with torch.no_grad():
        prefixes[2].gate[0] = 2.0
    for i, prefix in enumerate(prefixes):
        prefix.save_pretrained(tmp_path / str(i))
    prefixes[1].export_peft(tmp_path / "peft")
    other = tiny_gpt2()
    bank = PrefixBank.of(other, [tmp_path / "0", tmp_path / "peft", str(tmp_path / "2")])
    assert attached(other) is bank
    for i, prefix in enumerate(prefixes):
        assert torch.equal(bank.get(i), prefix().detach())
    bank.set(0, tmp_path / "2")
    assert torch.equal(bank.get(0), bank.get(2))


def header(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write(path, head, data):
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit(path, **changes):
    """Other values in the description, "config.length" being one of the config's."""
    head, data = header(path)
    meta = head["__metadata__"]
    for name, value in changes.items():
        part, _, field = name.partition("__")
        meta[part] = json.dumps({**json.loads(meta[part]), field: value}) if field else value
    write(path, {**head, "__metadata__": meta}, data)


def retype(path, rows=lambda t: t, lengths=lambda t: t, **more):
    tensors = safetensors_torch.load_file(path)
    meta = header(path)[0]["__metadata__"]
    changed = {"rows": rows(tensors["rows"]), "lengths": lengths(tensors["lengths"]), **more}
    safetensors_torch.save_file(changed, path, meta)


DAMAGE = {
    "foreign": (lambda p: p.write_bytes(b"not tensors at all"), "is not a whole safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "is not a whole safetensors file"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-64]), "is not a whole safetensors file"),
    "missing": (Path.unlink, "is missing; expected a bank that save_pretrained wrote"),
    "format": (lambda p: edit(p, format="pt"), "has format 'pt', expected 'prefixattn-bank'"),
    "version": (lambda p: edit(p, version="7"), "has version '7'; this prefixattn reads version 1"),
    "config_text": (lambda p: edit(p, config="{"), "has no readable config in its header"),
    "config_field": (lambda p: edit(p, config__share="half"), "share is 'half'"),
    "config_layers": (lambda p: edit(p, config__layers=[9]), "layers names layer 9, but the model has 2 layers"),
    "count_none": (lambda p: edit(p, config__count=None), "has count None, expected the number of its prefixes"),
    "count": (
        lambda p: edit(p, config__count=7),
        r"holds rows .*\[4, 2, 2, 2, 5, 16\], expected .*\[7, 2, 2, 2, 5, 16\]",
    ),
    "model": (lambda p: edit(p, model__layers=3), "is of a prefix for another model: layers=3, here 2"),
    "tensors": (lambda p: retype(p, more=torch.zeros(2)), r"holds tensors \['lengths', 'more', 'rows'\], expected"),
    "integers": (lambda p: retype(p, rows=torch.Tensor.char), "holds rows torch.int8"),
    "shape": (lambda p: retype(p, rows=lambda t: t[..., :8].contiguous()), r"\[4, 2, 2, 2, 5, 8\], expected"),
    "lengths_type": (lambda p: retype(p, lengths=torch.Tensor.int), "holds lengths torch.int32"),
    "lengths_past": (lambda p: retype(p, lengths=lambda t: t + 1), "has length 6 for row 0, expected 1 to 5"),
    "lengths_zero": (lambda p: retype(p, lengths=lambda t: t - 3), "has length 0 for row 2, expected 1 to 5"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_bank_is_one_clear_error_and_no_change(tmp_path, case):
    damage, words = DAMAGE[case]
    saved(tmp_path)
    path = tmp_path / "bank.safetensors"
    damage(path)
    model = tiny_gpt2()
    ways = [lambda: PrefixBank.open(model, path)]
    if case != "missing":
        ways.append(lambda: prefixattn.load(model, tmp_path))
    for way in ways:
        with pytest.raises(ValueError, match=words) as caught:
            way()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert attached(model) is None and all(p.requires_grad for p in model.parameters())


def test_a_row_that_is_not_finite_is_refused_when_it_is_used(tmp_path):
    saved(tmp_path)
    path = tmp_path / "bank.safetensors"
    retype(path, rows=lambda t: t.index_fill(0, torch.tensor(3), float("nan")))
    model = tiny_gpt2()
    with pytest.raises(ValueError, match="holds values that are infinite or not a number"):
        prefixattn.load(model, tmp_path)
    PrefixBank.open(model, path)
    with torch.no_grad():
        model(token_ids(), prefix_ids=IDS)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"bank\.safetensors holds values .* not a number, in row 3"):
                model(token_ids(), prefix_ids=IDS + 1)


def test_a_save_that_dies_leaves_the_bank_before_it(tmp_path, monkeypatch):
    bank, _ = saved(tmp_path)
    wanted = bank().detach().clone()
    with torch.no_grad():
        bank().add_(1.0)

    def dies(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(saving.os, "replace", dies)
    with pytest.raises(OSError, match="no space left"):
        bank.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["bank.safetensors"]
    assert torch.equal(prefixattn.load(tiny_gpt2(), tmp_path)(), wanted)


def test_an_open_bank_can_be_saved_over_itself(tmp_path):
    saved(tmp_path)
    bank = PrefixBank.open(tiny_gpt2(), tmp_path)
    bank.set(1, bank.get(0))
    bank.save_pretrained(tmp_path)
    assert torch.equal(prefixattn.load(tiny_gpt2(), tmp_path)(), bank())


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_large_bank_is_opened_and_used_without_being_read(tmp_path, dtype):
    """8 GiB that take no place on disk; float32 is read in place, bfloat16 brought over."""
    bank, _ = saved(tmp_path, count=3)
    path = tmp_path / "bank.safetensors"
    head, _ = header(path)
    row = list(bank().shape[1:])
    width = {"F32": 4, "BF16": 2}[dtype]
    count = 2**33 // (width * math.prod(row))
    end = 8 * count + count * width * math.prod(row)
    config = {**json.loads(head["__metadata__"]["config"]), "count": count}
    lengths = {"dtype": "I64", "shape": [count], "data_offsets": [0, 8 * count]}
    rows = {"dtype": dtype, "shape": [count, *row], "data_offsets": [8 * count, end]}
    meta = {**head["__metadata__"], "config": json.dumps(config)}
    write(path, {"__metadata__": meta, "lengths": lengths, "rows": rows}, torch.full((count,), 5).numpy().tobytes())
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size - 8 * count + end)
    assert path.stat().st_size > 2**33
    model = tiny_gpt2()
    zero = prefixattn.attach(model, PrefixConfig(5, "none", init="zero"))
    with torch.no_grad():
        wanted = model(token_ids()).logits
        before = resident()
        PrefixBank.open(model, path)
        ids = torch.tensor([count - 1, 0, count // 2])
        out = model(token_ids(), prefix_ids=ids).logits
        model.generate(token_ids(), prefix_ids=ids, max_new_tokens=2, attention_mask=torch.ones(3, 9).long())
    assert resident() - before < 2**28
    torch.testing.assert_close(out, wanted)
    assert not zero.is_active
