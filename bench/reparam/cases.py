"""The reparameterization networks of the papers, and what takes a training step with them: ours and its baselines."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from prefixattn.optim import FactoredAdamW
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.networks import DeepShare

ROWS = 8  # samples of a batch, each of which published code sends through the network


@dataclass(frozen=True)
class Network:
    networks: int  # G
    layers: int  # of each network
    kv_heads: int
    head_dim: int
    width: int  # E
    hidden: int  # M
    length: int  # P
    interleaved: bool = False

    @property
    def outputs(self) -> int:
        return self.layers * 2 * self.kv_heads * self.head_dim

    @property
    def matrix_bytes(self) -> int:
        """W: the large matrices, float32."""
        return 4 * self.networks * self.outputs * self.hidden

    @property
    def kv_bytes(self) -> int:
        return 4 * self.networks * self.length * self.outputs

    @property
    def parameter_bytes(self) -> int:
        small = self.length * self.width + self.hidden * (self.width + 1) + self.outputs
        return self.matrix_bytes + 4 * self.networks * small

    @property
    def floor_bytes(self) -> int:
        """Exact AdamW: forward reads W; the update reads p, m and v and writes them. kv, and its gradient."""
        return 7 * self.matrix_bytes + 2 * self.kv_bytes


CASES = {
    "gpt2-medium P10": Network(1, 24, 16, 64, 1024, 512, 10),
    "gpt2-medium P200": Network(1, 24, 16, 64, 1024, 512, 200),
    "vit-b16 P10": Network(12, 1, 12, 64, 768, 48, 10, interleaved=True),
    "vit-b16 P200": Network(12, 1, 12, 64, 768, 48, 200, interleaved=True),
    "bart-large P200": Network(3, 12, 16, 64, 1024, 800, 200),
    "llama-7b P30": Network(1, 32, 32, 128, 4096, 512, 30),
}
TINY = {
    "tiny": Network(1, 3, 2, 8, 24, 16, 5),
    "tiny interleaved": Network(4, 1, 2, 8, 24, 5, 3, interleaved=True),
}
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def make(size: Network, fused: bool, device: str) -> DeepShare:
    torch.manual_seed(0)
    geometry = Geometry("benchmark", size.networks * size.layers, size.kv_heads, size.head_dim, size.width)
    form = {"networks": size.networks, "interleaved": size.interleaved, "fused": fused}
    return DeepShare(size.layers, size.length, size.hidden, geometry, **form).to(device)


Make = Callable[[DeepShare], torch.optim.Optimizer]


class Step:
    """A network, its optimizer and one training step from a given gradient of kv."""

    def __init__(
        self, size: Network, device: str, fused: bool, optimizer: Callable[..., torch.optim.Optimizer]
    ) -> None:
        self.network = make(size, fused, device)
        self.optimizer = optimizer(self.network)
        generator = torch.Generator(device).manual_seed(1)
        shape = (size.networks * size.layers, 2, size.kv_heads, size.length, size.head_dim)
        self.dkv = torch.randn(shape, generator=generator, device=device)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.network().backward(self.dkv)
        self.optimizer.step()


class OnRows(Step):
    """As the published code does it: each sample's rows go through the network, and each has a gradient."""

    def __init__(self, size: Network, device: str, optimizer: Make) -> None:
        super().__init__(size, device, False, optimizer)
        self.shares = (self.dkv / ROWS).expand(ROWS, *self.dkv.shape).contiguous()

    def kv(self) -> Tensor:  # [ROWS, N, 2, Hkv, P, D]
        network, form = self.network, self.network.form
        P = network.embedding.weight.shape[-2]
        x, w1, b1, w2, b2 = network.operands()
        rows = x[:, None].expand(-1, ROWS, -1, -1).flatten(1, 2)  # [G, ROWS * P, E]
        h = torch.tanh(torch.baddbmm(b1[:, None], rows, w1.mT))
        y = torch.baddbmm(b2[:, None], h, w2.mT).unflatten(1, (ROWS, P))  # [G, ROWS, P, O]
        heads = (form.kv_heads, form.head_dim)
        if form.interleaved:
            return y.unflatten(3, (form.layers, *heads, 2)).permute(1, 0, 3, 6, 4, 2, 5).flatten(1, 2)
        return y.unflatten(3, (form.layers, 2, *heads)).permute(1, 0, 3, 4, 5, 2, 6).flatten(1, 2)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.kv().backward(self.shares)
        self.optimizer.step()


def adamw(network: DeepShare, **how: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), **OPTIONS, **how)


def factored(network: DeepShare) -> torch.optim.Optimizer:
    return FactoredAdamW(network, **OPTIONS)


BASELINES: dict[str, Callable[[Network, str], Step]] = {
    "ours": lambda size, device: Step(size, device, True, factored),
    # the gradient of the large matrix is built, by our own op
    "ours, any optimizer": lambda size, device: Step(size, device, True, partial(adamw, fused=True)),
    "eager": lambda size, device: Step(size, device, False, partial(adamw, fused=True)),
    "eager, foreach": lambda size, device: Step(size, device, False, partial(adamw, foreach=True)),
    "original": lambda size, device: OnRows(size, device, partial(adamw, fused=True)),
}
