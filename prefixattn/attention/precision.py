"""torch's own switch for products of float32, as the kernels of a CPU read it.

It is read once a call and goes along to its backward pass, which computes the scores again that lse was made of: by
another arithmetic large scores would differ by more than 1, and the weights by as many times.
"""

import torch


def splits_float32() -> bool:
    """Whether products of float32 may be three of bfloat16, where there are tiles.

    The switch is that of torch's own products on a CPU: "tf32" and "bf16" are what
    ``torch.set_float32_matmul_precision("high")`` and ``("medium")`` make of it. torch's CUDA switch does not touch it.
    """
    precision: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return precision in ("tf32", "bf16")


# As torch.compiler.assume_constant_result has it, which would import Dynamo here: Dynamo cannot trace the switch. It
# compiles anew when torch.set_float32_matmul_precision has been called.
splits_float32._dynamo_marked_constant = True  # type: ignore[attr-defined]
