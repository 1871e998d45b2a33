"""Images to batches: the crops of the two suites, and a loader whose result does not depend on its workers."""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from bench.paper.runs import Refusal
from bench.paper.visual.data import Part

Transform = Callable[[Image.Image], torch.Tensor]
STYLES = ("fgvc", "vtab")


def train_transform(style: str, size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """An RGB image to float32 [3, size, size], `mean` and `std` those of pixels in [0, 1].

    "fgvc": a random crop, mirrored half of the time, of the image with its shorter side resized to 256 (at 224; in
    proportion at another size). "vtab": all of the image, resized to a square, and nothing drawn.
    """
    if _known(style) == "vtab":
        return test_transform(style, size, mean, std)
    crop = [transforms.RandomCrop(size), transforms.RandomHorizontalFlip(0.5)]
    return transforms.Compose([_shorter(size), *crop, *_numbers(mean, std)])


def test_transform(style: str, size: int, mean: Sequence[float], std: Sequence[float]) -> Transform:
    """As `train_transform` with nothing drawn: "fgvc" takes the crop in the centre."""
    if _known(style) == "vtab":
        resize = transforms.Resize((size, size), InterpolationMode.BILINEAR)
        return transforms.Compose([resize, *_numbers(mean, std)])
    return transforms.Compose([_shorter(size), transforms.CenterCrop(size), *_numbers(mean, std)])


test_transform.__test__ = False  # pytest takes it for a test where it is imported


def _known(style: str) -> str:
    if style not in STYLES:
        raise Refusal(f"no style of crops {style!r}; there are {', '.join(STYLES)}")
    return style


def _shorter(size: int) -> Callable[[Image.Image], Image.Image]:
    return transforms.Resize(round(size * 256 / 224), InterpolationMode.BILINEAR)


def _numbers(mean: Sequence[float], std: Sequence[float]) -> list[Callable]:
    return [transforms.ToTensor(), transforms.Normalize(mean, std)]


class Pictures(Dataset):
    """(x float32 [3, size, size], label) of each row of `part`.

    What `transform` draws from torch is a function of (seed, epoch, row); torch's generator is left as it was.
    """

    def __init__(self, part: Part, transform: Transform, seed: int = 0, epoch: int = 0) -> None:
        self.part, self.transform, self.seed, self.epoch = part, transform, seed, epoch

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        """Refusal, in one line, for an image that cannot be read."""
        image = self.part.image(row)
        generator = torch.default_generator
        before = generator.get_state()
        try:
            generator.manual_seed(_mixed(self.seed, self.epoch, row))
            with torch.device("cpu"):  # where the default is a GPU, its generator would draw
                return self.transform(image), int(self.part.labels[row])
        finally:
            generator.set_state(before)


class _Answers(Dataset):
    """Pictures by (epoch, row); refusals are results: torch would print a worker's traceback into an exception."""

    def __init__(self, part: Part, transform: Transform, seed: int) -> None:
        self.part, self.transform, self.seed = part, transform, seed

    def __getitem__(self, place: tuple[int, int]) -> tuple[torch.Tensor, int] | str:
        epoch, row = place
        try:
            return Pictures(self.part, self.transform, self.seed, epoch)[row]
        except Refusal as refusal:
            return str(refusal)


class _Batches(Sampler[list[tuple[int, int]]]):
    """Lists of (epoch, row), epoch after epoch."""

    def __init__(self, rows: int, batch: int, seed: int, epochs: Sequence[int], shuffle: bool) -> None:
        self.rows, self.batch, self.seed, self.epochs, self.shuffle = rows, batch, seed, epochs, shuffle

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in self.epochs:
            order = order_of(self.rows, self.seed, epoch) if self.shuffle else list(range(self.rows))
            for at in range(0, self.rows, self.batch):
                yield [(epoch, row) for row in order[at : at + self.batch]]


def _batched(answers: list[tuple[torch.Tensor, int] | str]) -> tuple[torch.Tensor, torch.Tensor] | str:
    if refusal := next((answer for answer in answers if isinstance(answer, str)), None):
        return refusal
    labels = torch.from_numpy(np.array([label for _, label in answers], dtype=np.int64))
    return torch.stack([x for x, _ in answers]), labels


def loader(
    part: Part, transform: Transform, batch: int, workers: int, seed: int, epochs: int | Sequence[int], shuffle: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (x float32 [B, 3, size, size], y int64 [B]) of the CPU, of an epoch the last as small as what is left.

    With `shuffle` the order is drawn from (seed, epoch). `workers` processes (0: none; at most one a core) read ahead,
    from one epoch into the next, and change nothing in the batches.

    Raises:
        Refusal: an image cannot be read; one line with file and row, whichever process met it.
    """
    wanted = [epochs] if isinstance(epochs, int) else epochs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with torch.device("cpu"):
        batches = iter(
            DataLoader(
                _Answers(part, transform, seed), batch_sampler=_Batches(len(part), batch, seed, wanted, shuffle),
                num_workers=(number := min(workers, cores)), collate_fn=_batched,
                # in a process that was spawned the default is to spawn too, and to import torch anew for each epoch
                multiprocessing_context="fork" if number else None,
                generator=torch.Generator(),  # or it would draw from the caller's
            )
        )  # fmt: skip
    try:
        for answer in batches:
            if isinstance(answer, str):
                raise Refusal(answer)
            yield answer
    finally:
        del batches  # ends the workers; the frame that a refusal keeps would end them late, and 5 s each


def order_of(rows: int, seed: int, epoch: int) -> list[int]:
    """The rows of an epoch in the order in which `loader` gives them."""
    return np.random.default_rng((seed, epoch)).permutation(rows).tolist()


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
