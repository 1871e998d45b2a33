"""Two processes on gloo: results equal to one process with the whole batch, and little on the wire."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefixattn.attach import attach
from prefixattn.optim import FactoredAdamW, FactoredSGD
from prefixattn.prefixes.config import PrefixConfig
from prefixattn.prefixes.plus import PrefixPlusConfig
from prefixattn.testing.models import tiny_gpt2, token_ids
from prefixattn.testing.optim import loss, network, targets, two_processes

STEPS = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found: by scenario the result and the bytes of each collective call."""
    return two_processes(Path(__file__), tmp_path_factory.mktemp("processes"))


def train_network(rank: int | None, kind: str = "adamw", clip: str = "", micro: int = 1) -> list[Tensor]:
    """Trains on the whole batch, or a process on its half."""
    net, wanted = network("three"), targets(network("three"), 8)
    max_norm = 3.0 if clip == "max_norm" else None
    optimizer: Any
    if kind == "sgd":
        optimizer = FactoredSGD(net, lr=1e-2, momentum=0.9, max_norm=max_norm)
    else:
        optimizer = FactoredAdamW(net, lr=1e-2, max_norm=max_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=clip == "scaler")
    mine = wanted if rank is None else wanted[rank::2]
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in mine.chunk(micro):
            factor = float("inf") if clip == "scaler" and step == 1 and rank in (None, 1) else 1.0
            scaler.scale(loss(net, part) / micro * factor).backward()
        if clip in ("torch", "scaler"):
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 3.0)
        scaler.step(optimizer)
        scaler.update()
    return [p.detach() for p in net.parameters()]


PLUS = PrefixPlusConfig(init="normal")


def train_model(
    rank: int | None, wrapper: str, share: str = "deep", micro: int = 1, config: Any = None, **choices: Any
) -> list[Tensor]:
    """A frozen GPT-2 with a prefix, and a head that a wrapper around the model reduces."""
    model = tiny_gpt2()
    prefix: Any = attach(model, config or PrefixConfig(length=4, share=share, hidden=8, **choices))
    torch.manual_seed(1)
    whole: Any = Headed(model)
    accelerator: Any = None
    if rank is not None and wrapper == "ddp":
        whole = nn.parallel.DistributedDataParallel(whole)
    elif rank is not None and wrapper == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        whole = fully_shard(whole, mesh=init_device_mesh("cpu", (2,)))
    elif rank is not None and wrapper == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        whole = accelerator.prepare(whole)
    head = [p for p in whole.parameters() if p.requires_grad]
    groups = [{"params": prefix}, {"params": head, "lr": 1e-2}]
    # eps as large as a gradient that is nothing but rounding, which Adam would magnify
    optimizer: Any = FactoredAdamW(groups, lr=2e-2, eps=1e-4, max_norm=2.0)
    if accelerator is not None:
        assert accelerator.num_processes == 2
        optimizer = accelerator.prepare(optimizer)
    ids = token_ids(batch=4)
    mine = ids if rank is None else ids[rank * 2 : rank * 2 + 2]
    for _ in range(STEPS):
        optimizer.zero_grad()
        for part in mine.chunk(micro):
            (torch.Tensor.backward if accelerator is None else accelerator.backward)(whole(part) / micro)
        optimizer.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in [*prefix.parameters(), *head]]


class Headed(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.head = model, nn.Linear(50, 3)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.head(self.model(input_ids=ids).logits[:, -1])
        return nn.functional.cross_entropy(logits, ids[:, 0] % 3)


def one_lacks(rank: int) -> str:
    net = network()
    optimizer = FactoredAdamW(net)
    if rank == 0:
        loss(net, targets(net)).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "stepped"


def one_alone(rank: int) -> Tensor:
    net = network()
    optimizer = FactoredAdamW(net, process_group=False)
    if rank == 0:
        loss(net, targets(net)).backward()
        optimizer.step()
    return net.up.weight.detach()


SCENARIOS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (train_network, {}),
    "sgd": (train_network, {"kind": "sgd"}),
    "max_norm": (train_network, {"clip": "max_norm"}),
    "clip_grad_norm_": (train_network, {"clip": "torch"}),
    "scaler": (train_network, {"clip": "scaler"}),  # infinite in one process: both skip
    "micro-batches": (train_network, {"micro": 2}),
    "ddp": (train_model, {"wrapper": "ddp"}),
    "fsdp2": (train_model, {"wrapper": "fsdp2"}),
    "accelerate": (train_model, {"wrapper": "accelerate"}),
    "none": (train_model, {"wrapper": "ddp", "share": "none"}),
    "simple": (train_model, {"wrapper": "ddp", "share": "simple", "micro": 2}),
    "simple-fsdp2": (train_model, {"wrapper": "fsdp2", "share": "simple"}),
    "gate": (train_model, {"wrapper": "ddp", "gate": True}),
    "plus": (train_model, {"wrapper": "ddp", "config": PLUS}),
    "bank": (train_model, {"wrapper": "ddp", "share": "none", "count": 1}),
    "lacks": (one_lacks, {}),
    "alone": (one_alone, {}),
}
EQUAL = [name for name, (run, _) in SCENARIOS.items() if run in (train_network, train_model)]


@pytest.mark.parametrize("name", EQUAL)
def test_equal_to_one_process(results: list[dict[str, Any]], name: str) -> None:
    run, options = SCENARIOS[name]
    first, second = (result[name][0] for result in results)
    for a, b, c in zip(first, second, run(None, **options), strict=True):
        assert torch.equal(a, b), "the processes drifted apart"
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in EQUAL if SCENARIOS[name][0] is train_network])
def test_bytes_on_the_wire(results: list[dict[str, Any]], name: str) -> None:
    net = network("three")
    rows = 3 * 4 * net.up.weight.shape[1] * 4  # G * P * O numbers of float32
    agreed = 2 * 8
    for result in results:
        assert result[name][1] == [agreed, rows] * STEPS
    assert rows < 0.5 * sum(p.numel() * 4 for p in net.parameters())


def test_bytes_of_a_simple_share_on_the_wire(results: list[dict[str, Any]]) -> None:
    """Its vectors' gradient, once for a step."""
    for result in results:
        vectors = result["simple"][0][0]
        step = [16, vectors.nbytes]
        # one at the start, and one that all are at their first step
        assert result["simple"][1] == [16, *step, 16] + step * (STEPS - 1)


def test_gradients_that_one_process_lacks(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert "the processes have gradients of different prefix parameters" in result["lacks"][0]


def test_one_of_several_processes_alone(results: list[dict[str, Any]]) -> None:
    (first, sent), (second, _) = (result["alone"] for result in results)
    assert not sent
    assert not torch.equal(first, second)
