"""Folders that several save to and load from: at every moment one whole state, and nothing left over."""

import errno
import json
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixattn
from prefixattn import PrefixBank, PrefixConfig
from prefixattn.prefixes import saving

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from prefixattn.attach import attached
from prefixattn.testing.models import tiny_gpt2

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
KINDS: dict[str, tuple[PrefixConfig, str]] = {  # and how it is saved
    "prefix": (PrefixConfig(3, hidden=4), "save_pretrained"),
    "folded": (PrefixConfig(4, hidden=4), "folded"),
    "free": (PrefixConfig(2, share="none", gate=True), "save_pretrained"),
    "bank": (PrefixConfig(3, "none", count=5), "save_pretrained"),
    "adapter": (PrefixConfig(5, share="none"), "export_peft"),
    "longer": (PrefixConfig(6, share="none"), "export_peft"),
}
FILES = {"bank": {"bank.safetensors"}, "adapter": {"adapter_config.json", "adapter_model.safetensors"}}
FILES["longer"] = FILES["adapter"]


def saver(kind: str) -> tuple[Callable[[Path, float], None], Callable[[Any], float | None]]:
    """What saves a prefix full of one number, and what finds that number in a loaded one of this kind."""
    config, how = KINDS[kind]
    prefix = prefixattn.attach(tiny_gpt2(), config)

    def save(folder: Path, number: float) -> None:
        with torch.no_grad():
            for parameter in prefix.parameters():
                parameter.fill_(number)
        if how == "folded":
            prefix.save_pretrained(folder, folded=True)
        else:
            getattr(prefix, how)(folder)

    def number(loaded: Any) -> float | None:
        """None if it is of another kind; of a network every parameter is the number, of the others every value."""
        if isinstance(loaded, PrefixBank) != (kind == "bank") or loaded.config.length != config.length:
            return None
        found = set(torch.cat([p.detach().flatten() for p in loaded.parameters()]).unique().tolist())
        assert len(found) == 1, f"a mixture of {found}"
        return found.pop()

    return save, number


@pytest.fixture(scope="module")
def savers() -> dict[str, Any]:
    return {kind: saver(kind) for kind in KINDS}


def forever(save: Callable[[Path, float], None], folder: Path, step: float) -> None:
    torch.set_num_threads(1)  # the pool of the process that forked is not here
    number = 0.0
    while True:
        number += step
        save(folder, number)


def read(model: torch.nn.Module, folder: Path) -> Any:
    loaded = prefixattn.load(model, folder)
    loaded.detach()
    return loaded


def numbers(loaded: Any, savers: dict[str, Any], kinds: tuple[str, ...]) -> list[float]:
    return [n for kind in kinds if (n := savers[kind][1](loaded)) is not None]


PAIRS = [("prefix", "free"), ("prefix", "bank"), ("folded", "prefix"), ("adapter", "longer")]


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_a_reader_beside_two_savers_always_meets_one_whole_state(
    kinds: tuple[str, str], savers: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_gpt2()
    savers[kinds[0]][0](tmp_path, 1.0)
    work = [FORK.Process(target=forever, args=(savers[kind][0], tmp_path, 1.0), daemon=True) for kind in kinds]
    for process in work:
        process.start()
    seen = set()
    for _ in range(40):
        seen.add(tuple(numbers(read(model, tmp_path), savers, kinds)))
    for process in work:
        assert process.is_alive()  # no saver failed
        process.kill()
        process.join()
    assert len(seen) > 5 and all(len(found) == 1 for found in seen if kinds != ("folded", "prefix"))
    savers[kinds[1]][0](tmp_path, 7.0)
    assert 7.0 in numbers(read(model, tmp_path), savers, kinds[1:]) or kinds[1] == "folded"


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
def test_a_saver_that_is_killed_leaves_a_whole_state_and_the_next_one_cleans_up(
    kinds: tuple[str, str], savers: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_gpt2()
    savers[kinds[0]][0](tmp_path, 1.0)

    def both() -> None:
        torch.set_num_threads(1)
        while True:
            for kind in reversed(kinds):
                savers[kind][0](tmp_path, 2.0)

    for i in range(12):
        process = FORK.Process(target=both, daemon=True)
        process.start()
        time.sleep(0.003 * i)
        process.kill()
        process.join()
        assert numbers(read(model, tmp_path), savers, kinds)
    savers[kinds[1]][0](tmp_path, 3.0)
    left = {path.name for path in tmp_path.iterdir()}
    if kinds[1] in FILES:
        assert left == FILES[kinds[1]]
    else:
        assert len(left) == 2 and left > {"prefix.json"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_killed_saver_left_is_in_nobodys_way(kind: str, savers: dict[str, Any], tmp_path: Path) -> None:
    work = tmp_path / saving.WORK
    work.mkdir()
    for name in ("lock", "prefix.json", "bank.safetensors", "adapter_config.json", "adapter_model.safetensors", "more"):
        (work / name).write_text("half")
    with pytest.raises(ValueError, match="holds neither"):
        prefixattn.load(tiny_gpt2(), tmp_path)
    savers[kind][0](tmp_path, 1.0)
    assert not work.exists()
    assert kind == "folded" or numbers(read(tiny_gpt2(), tmp_path), savers, (kind,)) == [1.0]


def test_savers_in_threads_wait_for_each_other(savers: dict[str, Any], tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(kind: str) -> None:
        try:
            for i in range(15):
                savers[kind][0](tmp_path, float(i))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in ("prefix", "free", "bank")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert numbers(read(tiny_gpt2(), tmp_path), savers, ("prefix", "free", "bank")) == [14.0]


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_what_was_saved_last_is_what_is_loaded(first: str, second: str, savers: dict[str, Any], tmp_path: Path) -> None:
    """An adapter for PEFT stands beside what save_pretrained wrote, and takes nothing from it."""
    savers[first][0](tmp_path, 1.0)
    savers[second][0](tmp_path, 2.0)
    wanted = first if second in ("adapter", "longer") and first not in ("adapter", "longer") else second
    loaded = read(tiny_gpt2(), tmp_path)
    assert loaded.config.length == KINDS[wanted][0].length and isinstance(loaded, PrefixBank) == (wanted == "bank")
    if wanted != "folded":
        assert numbers(loaded, savers, (wanted,)) == [1.0 if wanted != second else 2.0]
    if second not in ("bank", "adapter", "longer"):
        assert len(list(tmp_path.glob("prefix-*"))) == 1 and not (tmp_path / "bank.safetensors").exists()
    if second == "bank":
        assert not list(tmp_path.glob("prefix*"))


def test_files_of_others_stay(savers: dict[str, Any], tmp_path: Path) -> None:
    mine = ["prefix-mine.safetensors", "model.safetensors", "notes.tmp", "prefix.json.1.tmp.txt"]
    for name in mine:
        (tmp_path / name).write_text(name)
    for kind in KINDS:
        savers[kind][0](tmp_path, 1.0)
    assert [(tmp_path / name).read_text() for name in mine] == mine


# PEFT reads two files


def test_to_peft_a_half_written_adapter_is_none(savers: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """And to us it is the old one or the new one."""
    save, number = savers["longer"]
    replace, states = saving.os.replace, []

    def watched(source: Path, target: Path) -> None:
        states.append((config(), number(read(tiny_gpt2(), tmp_path))))
        replace(source, target)
        states.append((config(), number(read(tiny_gpt2(), tmp_path))))

    def config() -> int | None:
        path = tmp_path / "adapter_config.json"
        return json.loads(path.read_text())["num_virtual_tokens"] if path.exists() else None

    savers["adapter"][0](tmp_path, 1.0)
    monkeypatch.setattr(saving.os, "replace", watched)
    save(tmp_path, 2.0)
    assert states == [(None, None), (None, 2.0), (None, 2.0), (6, 2.0)]
    states.clear()
    save(tmp_path, 3.0)  # the same description: it stays where it is
    assert states == [(6, 2.0), (6, 3.0)]


# folders that cannot be written to


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_is_a_file_is_refused_in_words(kind: str, savers: dict[str, Any], tmp_path: Path) -> None:
    (path := tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=rf"{path}: not saved, .*it is a file, expected a folder"):
        savers[kind][0](path, 1.0)
    with pytest.raises(OSError, match=r"not saved, .*Not a directory"):
        savers[kind][0](path / "below", 1.0)
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match=f"{path} is a file, expected a folder with a saved prefix"):
        prefixattn.load(tiny_gpt2(), path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call, number", [("fsync", errno.ENOSPC), ("mkdir", errno.EROFS), ("replace", errno.EACCES)])
def test_a_full_or_read_only_disk_loses_nothing(
    kind: str, call: str, number: int, savers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, found = savers[kind]
    save(tmp_path, 1.0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "somewhere")

    with monkeypatch.context() as patch:
        patch.setattr(saving.os, call, fails)
        with pytest.raises(OSError, match=f"{tmp_path}: not saved, and what was there is as it was") as caught:
            save(tmp_path, 2.0)
    assert caught.value.errno == number and os.strerror(number) in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert kind == "folded" or found(read(tiny_gpt2(), tmp_path)) == 1.0


def test_a_file_that_the_disk_does_not_take_is_an_os_error_in_words(tmp_path: Path) -> None:
    large = [
        prefixattn.attach(tiny_gpt2(), PrefixConfig(hidden=64)).save_pretrained,
        prefixattn.attach(tiny_gpt2(), PrefixConfig(share="none", count=40)).save_pretrained,
        prefixattn.attach(tiny_gpt2(), PrefixConfig(99, share="none")).export_peft,
    ]
    folder = tmp_path / "folder"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        for save in large:
            try:
                save(folder)
            except OSError as error:
                (tmp_path / "words").open("a").write(f"{error}\n")

    process = FORK.Process(target=work)
    process.start()
    process.join()
    words = f"[Errno {errno.EFBIG}] {folder}: not saved, and what was there is as it was ({os.strerror(errno.EFBIG)})"
    assert (tmp_path / "words").read_text().splitlines() == [words] * 3
    assert list(folder.iterdir()) == []


def test_a_bank_that_is_not_finite_is_not_saved_over_one_that_is(savers: dict[str, Any], tmp_path: Path) -> None:
    savers["bank"][0](tmp_path, 1.0)
    with pytest.raises(ValueError, match="infinite or not a number, in rows: not saved"):
        savers["bank"][0](tmp_path, float("nan"))
    assert numbers(read(tiny_gpt2(), tmp_path), savers, ("bank",)) == [1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_others_may_read_what_is_saved_as_the_umask_says(kind: str, savers: dict[str, Any], tmp_path: Path) -> None:
    savers[kind][0](tmp_path, 1.0)
    (plain := tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {plain.stat().st_mode}


def test_a_save_inside_a_save_of_the_same_thread_is_refused_and_not_waited_for(
    savers: dict[str, Any], tmp_path: Path
) -> None:
    """As a handler of SIGTERM may try."""
    errors: list[str] = []

    def handler(*_: object) -> None:
        try:
            savers["free"][0](tmp_path, 2.0)
        except RuntimeError as error:
            errors.append(str(error))

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with saving.saver(tmp_path):
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert len(errors) == 1 and "is being saved to by this very thread" in errors[0]
    handler()
    assert len(errors) == 1 and numbers(read(tiny_gpt2(), tmp_path), savers, ("free",)) == [2.0]


def test_where_there_are_no_locks_a_save_warns_and_goes_on(
    savers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(saving.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="has no locks .*let one process at a time save to it"):
        savers["free"][0](tmp_path, 1.0)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_state_that_stays_broken_is_refused_beside_a_saver_too(savers: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prefix.json").write_text("{")
    model = tiny_gpt2()
    with saving.saver(tmp_path), pytest.raises(ValueError, match="is not JSON"):
        prefixattn.load(model, tmp_path)
    assert attached(model) is None
