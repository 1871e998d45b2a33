"""Files that somebody else wrote: every mutation of real ones is one short ValueError, or loads, and costs little."""

import copy
import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixattn
from prefixattn import PrefixBank, PrefixConfig, PrefixPlusConfig

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from prefixattn.attach import attached
from prefixattn.prefixes import checkpoint, files
from prefixattn.testing.models import tiny_gpt2

SAVED = {
    "deep": PrefixConfig(3, hidden=4),
    "ragged": PrefixConfig([2, 3], share="none", gate=True, init=[3, 5, 7]),
    "folded": PrefixConfig(3, hidden=4, gate=True, layers=[1]),
    "plus": PrefixPlusConfig(phi="mlp", hidden=3),
    "bank": PrefixConfig(3, "none", count=4),
    "peft": PrefixConfig(3, share="none"),
}


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "x", "\n",
    "../up", "x" * 50_000, "\ud800", "F8_E4M3", "F4", "C64", "I8", "I64", "F64", [], [[]], [None], [0], [-1], [2**63],
    ["self"], [3, 3], [0, 2**40, 2**40], [[3]], {}, {"": None}, {"x" * 50_000: 1}, {"a": {"b": []}}, list(range(5_000)),
    deep(400), deep(930),
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(values: Any, rng: random.Random) -> Any:
    """Another value, a field less, or a field more, somewhere in it."""
    values = copy.deepcopy(values)
    path = rng.choice(list(places(values)))
    if not path:
        return rng.choice(NASTY)
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    how = rng.randrange(8)
    if how == 0:
        del parent[path[-1]]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice(["x", "", "x" * 50_000, "__metadata__", "rows", "gate", "count", "weight"])] = rng.choice(
            NASTY
        )
    elif how == 2:
        parent[path[-1]] = copy.deepcopy(parent[rng.choice(list(parent))] if isinstance(parent, dict) else parent)
    else:
        parent[path[-1]] = rng.choice(NASTY)
    return values


def damaged(data: bytes, rng: random.Random) -> bytes:
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return rng.choice([
        lambda: data[:at], lambda: data[at:], lambda: data[:at] + data[to:], lambda: data[:to] + data[at:],
        lambda: data[:at] + rng.randbytes(9) + data[at:], lambda: data[:at] + rng.randbytes(1) + data[at + 1 :],
        lambda: data[:at] + bytes(to - at) + data[to:], lambda: data + bytes(8), lambda: b"", lambda: b"[" * 100_000,
    ])()  # fmt: skip


def split(data: bytes) -> tuple[Any, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def mutate(folder: Path, rng: random.Random) -> str:
    """Changes one file of `folder`, and what must fit it; says what it did."""
    path = rng.choice(sorted(folder.iterdir()))
    data, how = path.read_bytes(), rng.choice(["bytes", "values", "values", "values"])
    if how == "bytes":
        path.write_bytes(damaged(data, rng))
    elif path.suffix == ".json":
        path.write_text(json.dumps(changed(json.loads(data), rng)))
    else:
        header, body = split(data)
        texts = sorted(name for name in ("config", "model", "adapter_config") if name in header.get("__metadata__", {}))
        if texts and rng.random() < 0.7:
            name, meta = rng.choice(texts), header["__metadata__"]
            meta[name] = json.dumps(changed(json.loads(meta[name]), rng))
        else:
            header = changed(header, rng)
        path.write_bytes(joined(header, body))
    if checkpoint.WEIGHTS.fullmatch(path.name) and rng.random() < 0.9:
        named = folder / checkpoint.JSON
        named.write_text(json.dumps({**json.loads(named.read_text()), "sha256": digest(path)}))
    if path.name == "adapter_model.safetensors" and rng.random() < 0.3:
        (folder / "adapter_config.json").unlink()
    return f"{path.name}, {how}"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name, config in SAVED.items():
        prefix = prefixattn.attach(tiny_gpt2(), config)
        if name == "peft":
            prefix.export_peft(folder / name)
        else:
            prefix.save_pretrained(folder / name, **({"folded": True} if name == "folded" else {}))
    return folder


def look(model: torch.nn.Module, folder: Path, kept: Any) -> str | None:
    """Loads; the words of a refusal, which must be one short line that names the file and changes nothing."""
    ways = [lambda: prefixattn.load(model, folder)]
    if (folder / "bank.safetensors").exists():
        ways.append(lambda: PrefixBank.open(model, folder))
    words = None
    for way in ways:
        try:
            way().detach()
            kept.activate()
        except ValueError as error:
            words = str(error)
            assert len(words) < 2_000 and "\n" not in words, words[:3_000]
            assert str(folder) in words
        assert attached(model) is kept
    return words


@pytest.mark.parametrize("name", SAVED)
def test_every_mutation_of_a_file_loads_or_is_refused_in_a_short_line(name: str, saved: Path, tmp_path: Path) -> None:
    run(name, saved, tmp_path, range(60))


def run(name: str, saved: Path, tmp_path: Path, seeds: range) -> None:
    model = tiny_gpt2()
    kept = prefixattn.attach(model, PrefixConfig(2, share="none"))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    refusals = 0
    for seed in seeds:
        folder = tmp_path / "mutant"
        shutil.copytree(saved / name, folder)
        what = mutate(folder, random.Random(f"{name} {seed}"))
        try:
            refusals += look(model, folder, kept) is not None
        except Exception as error:
            raise AssertionError(f"{name}, seed {seed}: {what}: {type(error).__name__}: {str(error)[:300]}") from error
        shutil.rmtree(folder)
    assert refusals > len(seeds) / 2
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_file_in_the_working_folder_is_named_too(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved / "deep", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "prefix.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "config": {**values["config"], "share": "."}}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^prefix\.json: share is '\.', expected one of"):
        prefixattn.load(tiny_gpt2(), ".")


@pytest.mark.parametrize("name", ["prefix.json", "prefix-*.safetensors", "bank.safetensors", "adapter_*.safetensors"])
def test_a_file_of_another_size_is_refused_before_it_is_read(name: str, saved: Path, tmp_path: Path) -> None:
    """Each is a tebibyte that takes no place on the disk."""
    kind = {"b": "bank", "a": "peft"}.get(name[0], "deep")
    shutil.copytree(saved / kind, tmp_path, dirs_exist_ok=True)
    [path] = tmp_path.glob(name)
    whole = path.read_bytes()
    for start in (whole, b"", (2**30).to_bytes(8, "little"), b"[" * 100):
        path.write_bytes(start)
        os.truncate(path, 2**40)
        with pytest.raises(ValueError, match=f"^{path} "):
            prefixattn.load(tiny_gpt2(), tmp_path)


def test_as_many_token_ids_as_a_prefix_may_have_rows_are_saved() -> None:
    ids = [999_999] * 2**20
    assert len(files.json_bytes({"config": PrefixConfig(share="none", init=ids).to_dict()})) < files.MOST
