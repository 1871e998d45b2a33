"""The op alone: it equals attention over concatenated keys, and sums the prefix's gradient over the batch."""

import torch
import torch.nn.functional as F

from prefixattn import prefix_attention

B, H, L, P, D = 4, 6, 50, 10, 64


def concatenated(q, k, v, prefix_k, prefix_v):
    keys = torch.cat([prefix_k.expand(B, -1, -1, -1), k], dim=2)
    values = torch.cat([prefix_v.expand(B, -1, -1, -1), v], dim=2)
    return F.scaled_dot_product_attention(q, keys, values)


def main():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, H, L, D).unbind()
    prefix_k, prefix_v = (torch.nn.Parameter(torch.randn(H, P, D)) for _ in range(2))

    out = prefix_attention(q, k, v, prefix_k, prefix_v)
    expected = concatenated(q, k, v, prefix_k, prefix_v)
    print("largest difference of the output:", float((out - expected).abs().max()))

    (ours,) = torch.autograd.grad(out.square().sum(), prefix_k)
    (theirs,) = torch.autograd.grad(expected.square().sum(), prefix_k)
    print("largest difference of the gradient:", float((ours - theirs).abs().max()))
    torch.testing.assert_close(ours, theirs)

    _, mass = prefix_attention(q, k, v, prefix_k, prefix_v, return_prefix_mass=True)
    print("share of attention that the prefix gets:", round(float(mass.mean()), 3))


if __name__ == "__main__":
    main()
