"""Two processes, each with half of the batch, train as one does with the whole, whatever optimizer; or say why not."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers", reason="transformers is not installed")
from prefixattn.attach import attach
from prefixattn.optim import FactoredAdamW, FactoredSGD
from prefixattn.prefixes.config import PrefixConfig
from prefixattn.prefixes.plus import PrefixPlusConfig
from prefixattn.testing.models import tiny_gpt2, token_ids
from prefixattn.testing.optim import two_processes

STEPS = 3
PLUS = PrefixPlusConfig(init="normal")
OPTIMIZERS: dict[str, Any] = {
    # eps as large as a gradient that is nothing but rounding, which Adam would magnify
    "adamw": lambda groups: torch.optim.AdamW(plain(groups), lr=2e-2, eps=1e-4),
    "fused": lambda groups: torch.optim.AdamW(plain(groups), lr=2e-2, eps=1e-4, fused=True),
    "sgd": lambda groups: torch.optim.SGD(plain(groups), lr=0.5, momentum=0.5),
    "factored_adamw": lambda groups: FactoredAdamW(groups, lr=2e-2, eps=1e-4),
    "factored_sgd": lambda groups: FactoredSGD(groups, lr=0.5, momentum=0.5),
}


def plain(groups: list[Any]) -> list[Any]:
    return [
        p for g in groups for p in (g["params"].parameters() if isinstance(g["params"], nn.Module) else g["params"])
    ]


class Headed(nn.Module):
    """A model and a head that is trained."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(50, 3)

    def forward(self, ids: Tensor, **inputs: Any) -> Tensor:
        logits = self.head(self.model(input_ids=ids, **inputs).logits[:, -1])
        return nn.functional.cross_entropy(logits, ids[:, 0] % 3)


class Both(nn.Module):
    """A user's module of both, which DistributedDataParallel reduces as a whole."""

    def __init__(self, whole: nn.Module, prefix: nn.Module) -> None:
        super().__init__()
        self.whole, self.prefix = whole, prefix

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.whole(*args, **kwargs)
        return out


def train(
    rank: int | None,
    optimizer: str = "adamw",
    config: Any = None,
    clip: float | None = None,
    wrapper: str = "ddp",
    micro: int = 1,
    scaler: bool = False,
    sparse: bool = False,
    to_none: bool = True,
    **choices: Any,
) -> list[Tensor]:
    model = tiny_gpt2()
    config = config or PrefixConfig(length=4, hidden=8, **choices)
    torch.manual_seed(1)
    prefix: Any = attach(model, config)
    torch.manual_seed(1)
    bank = getattr(config, "count", None) is not None
    if bank:
        prefix.sparse = sparse
    whole: Any = Headed(model)
    head = list(whole.head.parameters())
    if wrapper == "none":  # what DistributedDataParallel would reduce
        whole.head.requires_grad_(False)
        head = []
    step = OPTIMIZERS[optimizer]([{"params": prefix}, {"params": head}] if head else [{"params": prefix}])
    accelerator: Any = None
    if rank is not None and wrapper in ("ddp", "prefix"):
        whole = DistributedDataParallel(whole)
        if wrapper == "prefix":
            DistributedDataParallel(prefix)  # of which no forward pass is run
    elif rank is not None and wrapper.startswith("both"):
        whole = DistributedDataParallel(Both(whole, prefix), gradient_as_bucket_view=wrapper == "both_views")
    elif rank is not None and wrapper == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        whole, step = accelerator.prepare(whole, step)
    scale = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaler)
    ids, which = token_ids(batch=4), torch.tensor([0, 2, 2, 1])
    mine = slice(None) if rank is None else slice(rank * 2, rank * 2 + 2)
    for i in range(STEPS):
        step.zero_grad(set_to_none=to_none)
        for part, rows in zip(ids[mine].chunk(micro), which[mine].chunk(micro), strict=True):
            loss = scale.scale(whole(part, **({"prefix_ids": rows} if bank else {})) / micro)
            if scaler and i == 1 and rank in (None, 1):
                loss = loss * float("inf")  # in one process: both skip
            (torch.Tensor.backward if accelerator is None else accelerator.backward)(loss)
        scale.unscale_(step)
        if clip is not None:
            norm_of = nn.utils.clip_grad_norm_ if accelerator is None else accelerator.clip_grad_norm_
            norm_of([*prefix.parameters(), *head], clip)
        scale.step(step)
        scale.update()
    return [p.detach() for p in [*prefix.parameters(), *head]]


def timm_model(rank: int | None, optimizer: str = "adamw", clip: float = 0.01) -> list[Tensor]:
    from prefixattn.testing.timm import images, tiny

    model = tiny("vit")
    torch.manual_seed(1)
    prefix = attach(model, PrefixConfig(length=4, share="none"))
    step = OPTIMIZERS[optimizer]([{"params": prefix}])
    pictures, labels = images(4), torch.tensor([0, 2, 1, 1])
    mine = slice(None) if rank is None else slice(rank * 2, rank * 2 + 2)
    for _ in range(STEPS):
        model.zero_grad()
        nn.functional.cross_entropy(model(pictures[mine]), labels[mine]).backward()
        nn.utils.clip_grad_norm_(prefix.parameters(), clip)
        step.step()
    return [p.detach() for p in prefix.parameters()]


SHARES: dict[str, dict[str, Any]] = {
    "deep": {"share": "deep"},
    "simple": {"share": "simple"},
    "none": {"share": "none"},
    "gate": {"share": "deep", "gate": True},
    "gate-none": {"share": "none", "gate": True},
    "plus": {"config": PLUS},
    "bank": {"share": "none", "count": 3},
}
EQUAL: dict[str, tuple[Any, dict[str, Any]]] = {
    f"{share}-{optimizer}-{'clipped' if clip else 'free'}": (
        train,
        {"optimizer": optimizer, "clip": clip, "wrapper": wrapper, **choices},
    )
    for share, choices in SHARES.items()
    for optimizer in ("adamw", "factored_sgd")
    # a norm that each process would have otherwise
    for clip, wrapper in ((0.01, "ddp"), (None, "none"))
}
EQUAL |= {
    "fused": (train, {"optimizer": "fused", "clip": 0.01}),
    "factored_adamw": (train, {"optimizer": "factored_adamw", "clip": 0.01, "gate": True}),
    "sgd-micro-batches": (train, {"optimizer": "sgd", "micro": 2, "gate": True, "clip": 0.01}),
    "factored-micro-batches": (train, {"optimizer": "factored_sgd", "micro": 2, "gate": True, "clip": 0.01}),
    "zeroed-in-place": (train, {"optimizer": "sgd", "to_none": False, "share": "none", "clip": 0.01}),
    "scaler": (train, {"optimizer": "sgd", "scaler": True, "share": "none", "clip": 0.01}),
    "scaler-factored": (train, {"optimizer": "factored_sgd", "scaler": True, "gate": True, "clip": 0.01}),
    "ddp-of-the-prefix": (train, {"wrapper": "prefix", "share": "none"}),
    "ddp-of-both": (train, {"wrapper": "both", "clip": 0.01, "gate": True}),
    "ddp-of-both-views": (train, {"wrapper": "both_views", "clip": 0.01, "share": "none"}),
    "accelerate": (train, {"wrapper": "accelerate", "clip": 0.01, "share": "none"}),
    "sparse-bank": (train, {"optimizer": "sgd", "share": "none", "count": 3, "sparse": True}),
    "timm": (timm_model, {}),
    "timm-factored": (timm_model, {"optimizer": "factored_sgd"}),
}


def small(rank: int, seed: int = 1, length: int = 3) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    model = tiny_gpt2()
    torch.manual_seed(seed)
    prefix = attach(model, PrefixConfig(length=length, share="none"))
    ids = token_ids(batch=4)[rank * 2 : rank * 2 + 2]
    return model, prefix, lambda: model(ids, labels=ids).loss


def refused(rank: int, what: str) -> str:
    model, prefix, loss = small(rank, length=3 + rank if what == "sizes" else 3)
    optimizer = torch.optim.SGD(prefix.parameters(), lr=0.1)
    try:
        if what == "head":
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # untied
            optimizer = torch.optim.SGD([*prefix.parameters(), model.lm_head.weight], lr=0.1)
        if what in ("zeros", "later"):
            loss().backward()
        if what == "later":  # the first step went well
            optimizer.step()
            loss().backward()
        if what == "zeros":
            optimizer.zero_grad(set_to_none=False)
        if what == "unused":
            loss()
        if rank == 0 or what not in ("lacks", "unused", "zeros", "later"):  # of the last two one takes two passes
            loss().backward()
        optimizer.step()
        loss().backward()
    except RuntimeError as error:
        return str(error)
    return "trained"


REFUSED = {
    "unused": r"with gradients \[\[1\], \[0\]\], after \[0, 0\] steps and \[1, 0\] backward",
    "lacks": r"different prefix parameters: process by process each begins a forward pass / asks",
    "zeros": r"after \[0, 0\] steps and \[2, 1\] backward passes since",
    "later": r"after \[1, 2\] steps and \[2, 1\] backward passes since",
    "sizes": r"prefixes of different sizes",
    "head": r"different gradients of lm_head.weight, of norm .* wrap the model in .*DistributedDataParallel",
}


def other_start(rank: int) -> tuple[list[Tensor], list[str]]:
    _, prefix, loss = small(rank, seed=rank)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loss().backward()
    return [prefix.encoder.bank.detach(), prefix.encoder.bank.grad], [str(w.message) for w in said]


def alone(rank: int) -> tuple[Tensor, Tensor]:
    """Each process for itself, and no collective call, which would wait for ever in the second."""
    _, prefix, loss = small(rank, seed=rank)
    prefix.process_group = False
    before = prefix.encoder.bank.detach().clone()
    if rank == 0:
        loss().backward()
        torch.optim.SGD(prefix.parameters(), lr=0.1).step()
    return before, prefix.encoder.bank.detach()


SCENARIOS: dict[str, tuple[Any, dict[str, Any]]] = {
    **EQUAL,
    **{what: (refused, {"what": what}) for what in REFUSED},
    "start": (other_start, {}),
    "alone": (alone, {}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_processes(Path(__file__), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", EQUAL)
def test_two_processes_are_equal_to_one(results: list[dict[str, Any]], name: str) -> None:
    run, options = SCENARIOS[name]
    first, second = (result[name][0] for result in results)
    for a, b, c in zip(first, second, run(None, **options), strict=True):
        assert torch.equal(a, b), "the processes drifted apart"
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", REFUSED)
def test_what_differs_between_processes_is_refused_in_words(results: list[dict[str, Any]], what: str) -> None:
    match = partial(pytest.raises, RuntimeError, match=REFUSED[what])
    for result in results:
        with match():
            raise RuntimeError(result[what][0])


def test_all_start_with_the_numbers_of_the_first(results: list[dict[str, Any]]) -> None:
    _, prefix, _ = small(0, seed=0)
    (first, said), (second, _) = (result["start"][0] for result in results)
    assert torch.equal(first[0], prefix.encoder.bank) and torch.equal(second[0], prefix.encoder.bank)
    assert torch.equal(first[1], second[1])
    assert any("the prefixes of the processes differ before the first step" in text for text in said)


def test_a_process_may_train_a_prefix_of_its_own(results: list[dict[str, Any]]) -> None:
    (first, second), (sent, _) = zip(*(result["alone"] for result in results), strict=True)
    assert not sent
    assert not torch.equal(first[0], first[1]) and torch.equal(second[0], second[1])
    assert not torch.equal(first[0], second[0])
