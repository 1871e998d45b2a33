"""What the forward computes, in the operations that sentryward knows. It compares in real arithmetic."""

import torch
from torch import Tensor

FACTOR = 0.1803368777036667  # scale * log2(e), as the float32 that the kernel is launched with


def reference(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    """One head: the softmax over prefix and own keys. In real numbers no maximum need be taken off first."""
    on_prefix = torch.exp2(q.float() @ prefix_k.float().transpose(0, 1) * FACTOR)
    own = torch.exp2(q.float() @ k.float().transpose(0, 1) * FACTOR)
    total = on_prefix.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
    return ((on_prefix @ prefix_v.float() + own @ v.float()) / total).to(torch.bfloat16)
