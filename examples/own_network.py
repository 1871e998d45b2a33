"""A network of your own behind a prefix: deeper than DeepShare, trained without its large gradient."""

import torch
from torch import Tensor, nn

import prefixattn

layers, heads, head_dim, length, width, hidden = 4, 8, 32, 10, 64, 48


class Deeper(prefixattn.FactoredNetwork):
    def __init__(self) -> None:
        super().__init__(layers, heads, head_dim)
        self.rows = nn.Parameter(torch.randn(length, width))
        self.first = nn.Parameter(torch.randn(hidden, width) * width**-0.5)
        self.second = nn.Parameter(torch.randn(hidden, hidden) * hidden**-0.5)
        self.up = nn.Linear(hidden, layers * 2 * heads * head_dim)  # by far the largest

    def parameters_in_order(self) -> tuple[Tensor, ...]:
        return self.rows, self.first, self.second, self.up.weight, self.up.bias

    def hidden(self, rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return torch.tanh(nn.functional.gelu(rows @ first.mT) @ second.mT)


torch.manual_seed(0)
network = Deeper()
optimizer = prefixattn.FactoredAdamW(network, lr=1e-2)
q, k, v = torch.randn(3, 2, heads, 20, head_dim).unbind()
wanted = torch.randn(2, heads, 20, head_dim)
for step in range(5):
    optimizer.zero_grad()
    kv = network()  # [layers, 2, heads, length, head_dim]
    out = prefixattn.prefix_attention(q, k, v, *kv[0].unbind())
    loss = (out - wanted).square().mean()
    loss.backward()  # network.up.weight.grad stays two thin factors
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")
