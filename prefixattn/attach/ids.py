"""Which of several prefixes each sample names."""

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


def checked(ids: Tensor | None, batch: int, T: int, several: str, one: str) -> Tensor:
    """`ids`, if they are int64 [B] from 0 to T - 1; else ValueError, to which the T are `several` and each is `one`.

    On a GPU values out of range raise later, as looking at them would stop it.
    """
    wanted = f"expected torch.int64 of shape [B={batch}], {one} for each sample"
    if ids is None:
        raise ValueError(f"prefix_ids is missing for {several}; {wanted}")
    if not isinstance(ids, Tensor):
        raise ValueError(f"prefix_ids is a {type(ids).__name__}; {wanted}")
    if ids.dtype != torch.int64 or ids.shape != (batch,):
        raise ValueError(f"prefix_ids is {ids.dtype} of shape {list(ids.shape)}; {wanted}")
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and detect_fake_mode(ids) is None:
        bad = ((ids < 0) | (ids >= T)).nonzero()
        if bad.numel():
            i = int(bad[0])
            raise ValueError(f"prefix_ids[{i}] is {int(ids[i])}, expected 0 to {T - 1} (T={T})")
    else:
        torch._assert_async(((ids >= 0) & (ids < T)).all(), f"prefix_ids has a value outside 0 to {T - 1} (T={T})")
    return ids
