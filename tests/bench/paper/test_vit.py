"""The small ViT: batches that depend on epoch and step alone, a stopped training that goes on, the file of weights."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.paper import vit
from bench.paper.runs import Refusal
from bench.paper.visual import backbones, tiny_imagenet

CLASSES = ("n01443537", "n01629819", "n01641577")


def images(each: int = 4) -> tiny_imagenet.Images:
    pixels = np.random.default_rng(0).integers(0, 256, (3 * each, 64, 64, 3), dtype=np.uint8)
    return tiny_imagenet.Images(pixels, np.repeat(np.arange(3), each), CLASSES)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("embed_dim", 32), ("depth", 2), ("num_heads", 2)):
        monkeypatch.setitem(backbones.SMALL, name, value)


CONFIG = vit.Config(epochs=4, batch=4, decay=0.5, mixed_epochs=1, bf16=False)


def test_batches_are_a_function_of_epoch_and_step() -> None:
    augment = vit.Augment(images(), CONFIG)
    x, y = augment.batch(0, 1)
    augment.batch(3, 0)
    again, labels = vit.Augment(images(), CONFIG).batch(0, 1)
    assert torch.equal(x, again) and torch.equal(y, labels)
    assert x.shape == (4, 3, 64, 64) and float(x.min()) >= -1 and float(x.max()) <= 1
    torch.testing.assert_close(y.sum(1), torch.ones(4))
    assert not torch.equal(x, augment.batch(1, 1)[0])
    plain = vit.Augment(images(), CONFIG).batch(2, 0)[1]  # past mixed_epochs: a label each, smoothed
    assert {round(float(v), 4) for v in plain.flatten()} == {round(0.1 / 3, 4), round(0.9 + 0.1 / 3, 4)}


def test_an_epoch_shows_each_image_once() -> None:
    pixels = np.repeat(np.arange(12, dtype=np.uint8) * 20, 64 * 64 * 3).reshape(12, 64, 64, 3)
    numbered = tiny_imagenet.Images(pixels, np.arange(12), tuple(map(str, range(12))))
    augment = vit.Augment(numbered, vit.Config(epochs=4, batch=4, smoothing=0.0, mixed_epochs=0))
    seen = [int(label) for step in range(augment.steps()) for label in augment.batch(1, step)[1].argmax(1)]
    assert sorted(seen) == list(range(12))


def test_the_rate_does_not_depend_on_the_end_until_the_decay() -> None:
    short, long = vit.Config(epochs=20), vit.Config(epochs=40)
    assert [short.lr_at(e) for e in range(short.decay_start)] == [long.lr_at(e) for e in range(short.decay_start)]
    assert short.lr_at(20) == 0 and short.lr_at(0) < short.lr_at(4) < short.lr_at(6) == short.lr


def test_a_stopped_training_goes_on_to_the_same_weights(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": images(), "val": images(2)}
    device = torch.device("cpu")
    whole, _, _ = vit.train(CONFIG, "key", data, tmp_path / "a", device)
    count, batch = itertools.count(), vit.Augment.batch

    def stops(self: vit.Augment, epoch: int, step: int) -> Any:
        if next(count) == 4:  # in the second of four epochs
            raise KeyboardInterrupt
        return batch(self, epoch, step)

    monkeypatch.setattr(vit.Augment, "batch", stops)
    with pytest.raises(KeyboardInterrupt):
        vit.train(CONFIG, "key", data, tmp_path / "b", device)
    again, curve, _ = vit.train(CONFIG, "key", data, tmp_path / "b", device)
    assert next(count) == 5 + 9 and len(curve) == 4
    for (name, p), q in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
    with pytest.raises(Refusal, match="other lr"):
        vit.go_on(tmp_path / "b" / "checkpoint.pt", "key", vit.Config(**{**vars(CONFIG), "lr": 1.0}))
    with pytest.raises(Refusal, match="checkpoint of another run"):
        vit.go_on(tmp_path / "b" / "checkpoint.pt", "other", CONFIG)


def test_the_file_holds_the_model_and_fits_another_image_size(small: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = backbones.small_vit(3).eval()
    backbones.write_small(model, tmp_path / "model.safetensors", CLASSES)
    loaded = backbones.load_small(64, tmp_path / "model.safetensors").eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(x), model.half().float()(x), rtol=1e-5, atol=1e-5)
    assert backbones.load_small(32, tmp_path / "model.safetensors")(x[..., :32, :32]).shape == (2, 3)
    with pytest.raises(Refusal, match="expected a multiple of 8"):
        backbones.load_small(36, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(Refusal, match="not readable weights"):
        backbones.load_small(64, tmp_path / "model.safetensors")
    with pytest.raises(Refusal, match=r"vit\.py trains it"):
        backbones.load_small(64, tmp_path / "absent.safetensors")


def test_the_weights_in_the_repository_are_of_the_record() -> None:
    """Seven groups of classes are held out, and the file is small enough to be kept here."""
    record = json.loads((backbones.SMALL_FILE.parent / "training.json").read_text())
    assert record["model"] == backbones.SMALL and record["data"]["classes"] == 150
    assert record["data"]["held_out"] == sorted(record["data"]["held_out"]) == list(tiny_imagenet.HELD_OUT)
    assert len(tiny_imagenet.HELD_OUT) == 50 == len(set(tiny_imagenet.HELD_OUT)) and len(tiny_imagenet.GROUPS) == 7
    assert backbones.SMALL_FILE.stat().st_size < 10e6
    model = backbones.load_small()
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]
    assert record["accuracy"] > 0.2  # of 150 classes


def test_tiny_imagenet_is_refused_by_file(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("\n".join(f"{wnid}\twords" for wnid in (*tiny_imagenet.HELD_OUT, "n01443537")))
    assert len(tiny_imagenet.all_classes(tmp_path)) == 51
    with pytest.raises(Refusal, match=r"val\.zip: not a readable zip"):
        tiny_imagenet.read(tmp_path, "val", ["n01443537"])
    import zipfile

    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        archive.writestr("n01443537/val_3.webp", b"nothing")
    with pytest.raises(Refusal, match=r"val\.zip: n01443537/val_3\.webp: not a readable image"):
        tiny_imagenet.read(tmp_path, "val", ["n01443537"])
    Image.new("RGB", (64, 64)).save(tmp_path / "one.webp")
    with zipfile.ZipFile(tmp_path / "val.zip", "w") as archive:
        archive.write(tmp_path / "one.webp", "n01443537/val_3.webp")
    with pytest.raises(Refusal, match="1 images of n01443537 for val, expected 50"):
        tiny_imagenet.read(tmp_path, "val", ["n01443537"])
    (tmp_path / "words.txt").write_text("n01443537\tgoldfish\n")
    with pytest.raises(Refusal, match="lacks the class n02085620 and 49 more"):
        tiny_imagenet.all_classes(tmp_path)
