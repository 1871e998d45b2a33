"""A prefix may be an activation: gradients flow on through it into what made it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixattn import prefix_attention

T, B, H, Hkv, P, L, D, E = 2, 5, 4, 2, 9, 6, 16, 12
IDS = torch.tensor([0, 1, 1, 0, 0])  # the prompt of each completion
LENGTHS = torch.tensor([9, 4])  # of the prompts


def heads(x: Tensor, weight: Tensor, count: int) -> Tensor:  # [B, L, E] -> a view [B, count, L, D], strided
    return (x @ weight).view(*x.shape[:2], count, D).transpose(1, 2)


def made(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Prompts [T, P, E], completions [B, L, E], the weights of q, k and v; and what weighs the output."""
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = (T, P, E), (B, L, E), (E, H * D), (E, Hkv * D), (E, Hkv * D), (B, H, L, D)
    *inputs, weigh = (torch.randn(s, generator=generator, device="cpu").to(torch.get_default_device()) for s in shapes)
    return [t.to(dtype).requires_grad_() for t in inputs], weigh.to(dtype)


def shared(inputs: list[Tensor], weigh: Tensor, backend: str) -> list[Tensor]:
    prompts, own, wq, wk, wv = inputs
    q, k, v = heads(own, wq, H), heads(own, wk, Hkv), heads(own, wv, Hkv)
    bank = heads(prompts, wk, Hkv), heads(prompts, wv, Hkv)
    ids, lengths = IDS.to(q.device), LENGTHS.to(q.device)
    options = {"is_causal": True, "enable_gqa": True, "prefix_ids": ids, "prefix_lengths": lengths}
    out = prefix_attention(q, k, v, *bank, **options, backend=backend)
    return [out, *torch.autograd.grad((out * weigh).sum(), inputs)]


def repeated(inputs: list[Tensor], weigh: Tensor) -> list[Tensor]:
    """Each completion behind its own copy of its prompt, by itself."""
    prompts, own, wq, wk, wv = inputs
    outs = []
    for b, t in enumerate(IDS.tolist()):
        x = torch.cat([prompts[t, : int(LENGTHS[t])], own[b]])[None]
        q, k, v = heads(x, wq, H), heads(x, wk, Hkv), heads(x, wv, Hkv)
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[:, :, -L:])
    out = torch.cat(outs)
    return [out, *torch.autograd.grad((out * weigh).sum(), inputs)]


def test_a_prompt_behind_several_completions_gets_the_repeated_batchs_gradients(backend: str) -> None:
    exact, plain = repeated(*made(torch.float64)), repeated(*made(torch.float32))
    ours = shared(*made(torch.float32), backend)
    for name, mine, same, truth in zip("out prompts own wq wk wv".split(), ours, plain, exact, strict=True):
        error, bar = ((t.double() - truth).norm() for t in (mine, same))
        assert error <= 2 * bar, f"{name}: {error:.1e}, plain PyTorch's is {bar:.1e}"


def test_padding_behind_a_short_prompt_gets_no_gradient(backend: str) -> None:
    inputs, weigh = made(torch.float32)
    grad = shared(inputs, weigh, backend)[1]  # [T, P, E]
    for t, length in enumerate(LENGTHS.tolist()):
        assert (grad[t, :length].abs().amax(1) > 0).all() and not grad[t, length:].any()
