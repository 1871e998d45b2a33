"""Crops against torchvision's functions, and batches that no worker changes and a bad image ends in one line."""

import multiprocessing
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image

from bench.paper.runs import Refusal
from bench.paper.visual import transforms
from bench.paper.visual.data import Arrays, Files
from bench.paper.visual.testing_data import refused
from tests.support import ROOT

PAPER = ROOT / "bench" / "paper"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # from Python 3.12


def known_image(width: int = 300, height: int = 200) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def numbers(image: Image.Image) -> torch.Tensor:
    return F.normalize(F.to_tensor(image), MEAN, STD)


@pytest.mark.parametrize("size, shorter", [(224, 256), (64, 73), (196, 224)])
def test_crops_of_fgvc(size: int, shorter: int) -> None:
    image = known_image()
    resized = image.resize((int(300 * shorter / 200), shorter), Image.Resampling.BILINEAR)
    test = transforms.test_transform("fgvc", size, MEAN, STD)(image)
    assert torch.equal(test, numbers(F.center_crop(resized, [size, size])))
    assert (test.dtype, test.shape) == (torch.float32, (3, size, size))
    crop = transforms.train_transform("fgvc", size, MEAN, STD)
    height, width = shorter - size + 1, resized.width - size + 1
    mirrored, places = 0, set()
    for seed in range(40):
        torch.manual_seed(seed)
        found = crop(image)
        torch.manual_seed(seed)
        top, left = (int(torch.randint(0, many, size=(1,))) for many in (height, width))
        flip = bool(torch.rand(1) < 0.5)
        expected = F.crop(resized, top, left, size, size)
        assert torch.equal(found, numbers(F.hflip(expected) if flip else expected))
        mirrored += flip
        places.add((top, left))
    assert 10 <= mirrored <= 30
    assert len(places) > 35


@pytest.mark.parametrize("size", [224, 32])
def test_vtab_takes_all_of_the_image(size: int) -> None:
    image = known_image()
    expected = numbers(image.resize((size, size), Image.Resampling.BILINEAR))
    for made in (transforms.train_transform, transforms.test_transform):
        assert torch.equal(made("vtab", size, MEAN, STD)(image), expected)
        assert refused(lambda made=made: made("imagenet", size, MEAN, STD)).startswith("no style of crops 'imagenet'")


def part_of(rows: int) -> Arrays:
    pixels = np.random.default_rng(1).integers(0, 256, (rows, 40, 48, 3), dtype=np.uint8)
    return Arrays(pixels, np.arange(rows, dtype=np.int64))


def batches(part: Any, workers: int = 0, seed: int = 3, epoch: int = 5, shuffle: bool = True, batch: int = 4) -> list:
    crop = transforms.train_transform("fgvc", 32, MEAN, STD)
    return list(transforms.loader(part, crop, batch, workers, seed, epoch, shuffle))


def by_row(found: list) -> dict[int, torch.Tensor]:
    return {int(label): x for xs, labels in found for x, label in zip(xs, labels, strict=True)}


@forks
def test_workers_change_nothing() -> None:
    part = part_of(11)
    before = torch.get_rng_state()
    alone, two = batches(part), batches(part, workers=2)
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn from the caller's generator
    assert [len(labels) for _, labels in alone] == [4, 4, 3]  # the last is not dropped
    assert alone[0][0].shape == (4, 3, 32, 32)
    assert (alone[0][0].dtype, alone[0][1].dtype) == (torch.float32, torch.int64)
    for (x, y), (x_two, y_two) in zip(alone, two, strict=True):
        assert torch.equal(x, x_two) and torch.equal(y, y_two)


def test_order_and_crops_are_of_seed_epoch_and_row() -> None:
    part = part_of(11)
    torch.manual_seed(1)
    first = batches(part)
    torch.manual_seed(2)
    again = batches(part)
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    rows = torch.cat([labels for _, labels in first]).tolist()
    assert sorted(rows) == list(range(11)) and rows == transforms.order_of(11, 3, 5)
    for other in (batches(part, seed=4), batches(part, epoch=6)):
        assert torch.cat([labels for _, labels in other]).tolist() != rows
        same = [torch.equal(by_row(first)[row], by_row(other)[row]) for row in range(11)]
        assert sum(same) < 3  # of 9 * 9 or more places
    straight = batches(part, shuffle=False, batch=3)
    assert torch.cat([labels for _, labels in straight]).tolist() == list(range(11))
    assert all(torch.equal(by_row(first)[row], by_row(straight)[row]) for row in range(11))


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_one_line_whoever_meets_it(workers: int, tmp_path: Path) -> None:
    for at in range(6):
        Image.fromarray(part_of(6).pixels[at]).save(tmp_path / f"{at}.jpg")
    (tmp_path / "4.jpg").write_bytes((tmp_path / "4.jpg").read_bytes()[:-200])
    rows = [2, 3, 5, 7, 8, 9]
    part = Files(tmp_path, [f"{at}.jpg" for at in range(6)], np.zeros(6, dtype=np.int64), "a/list.txt", rows)
    found = transforms.loader(part, transforms.test_transform("fgvc", 32, MEAN, STD), 3, workers, 0, 0, False)
    assert len(next(found)[1]) == 3
    with pytest.raises(Refusal) as refusal:
        next(found)
    assert not multiprocessing.active_children()  # although the refusal still holds the loader's frame
    said = str(refusal.value)
    assert "\n" not in said
    assert said.startswith(f"a/list.txt, row 8: {tmp_path}/4.jpg: not a readable image (image file is truncated")
    direct = transforms.Pictures(part, transforms.test_transform("fgvc", 32, MEAN, STD))
    assert len(direct) == 6 and direct[0][0].shape == (3, 32, 32)
    assert refused(lambda: direct[4]) == said


def test_workers_are_forked_in_a_process_that_was_spawned(tmp_path: Path) -> None:
    """As a sweep's are: spawned workers would import torch for each epoch. What a spawn cannot pickle shows it."""
    (tmp_path / "script.py").write_text(
        "import multiprocessing, runpy\n"
        f"runpy.run_path({str(PAPER / 'as_file.py')!r})\n"
        "import numpy as np\n"
        "from bench.paper.visual import data, transforms\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    part = data.Arrays(np.zeros((4, 8, 8, 3), np.uint8), np.arange(4))\n"
        "    plain = transforms.test_transform('vtab', 8, (0.5,) * 3, (0.5,) * 3)\n"
        "    batches = transforms.loader(part, lambda image: plain(image), 2, 2, 0, 0, False)\n"
        "    print([y.tolist() for _, y in batches])\n"
    )
    command = (sys.executable, "-W", "ignore", str(tmp_path / "script.py"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[[0, 1], [2, 3]]\n", done.stderr
