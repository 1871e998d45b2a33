"""Verdicts on kernels: each kind is compared with the reference at its first use, before anybody relies on it.

A compiler that is new to a GPU can be wrong in silence. What fails is lost for the rest of the process, with a warning.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# by rms, of the reference's rms: far above rounding, far below any mistake
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_TF32_TOLERANCE = 4e-3

Case = tuple[Any, ...]  # kind of kernel, device, type, and what else tells kernels apart
Pairs = Iterable[tuple[str, Tensor, Tensor]]  # of a result: its name, the kernels', the reference's


class Trials:
    """`run(*case)` makes the results to compare, `lost(*case)` says what the process does without."""

    def __init__(
        self,
        run: Callable[..., Pairs],
        lost: Callable[..., str],
        agree: Callable[[Tensor, Tensor, torch.dtype], bool] | None = None,
    ) -> None:
        self.run, self.lost = run, lost
        self.agree = agree or close
        self.verdicts: dict[Case, str] = {}  # what was wrong, or ""

    def verdict(self, case: Case) -> str:
        """What is wrong with the kernels in this case, found out at the first question; "" if nothing is."""
        if case not in self.verdicts:
            self.decide(case, self.tried(case))
        return self.verdicts[case]

    def trusted(self, case: Case) -> bool:
        if case not in self.verdicts and case[1].type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True  # nothing can be compared while a graph is recorded; the question stays open
        return not self.verdict(case)

    def decide(self, case: Case, words: str) -> None:
        self.verdicts[case] = words
        if words:
            warnings.warn(
                f"prefixattn: {self.lost(*case)}: {words}. This process uses the much slower reference for them "
                'instead; please report it. backend="triton" runs them all the same.',
                RuntimeWarning,
                stacklevel=2,
            )

    def tried(self, case: Case) -> str:
        dtype = case[2]
        try:
            with torch.no_grad():
                wrong = [label for label, found, right in self.run(*case) if not self.agree(found, right, dtype)]
        except Exception as error:  # whatever a compiler or a driver raises
            return f"{type(error).__name__}: {error}"
        return f"{', '.join(dict.fromkeys(wrong))} differ from the reference" if wrong else ""


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """By rms, of the reference's rms; in float32 as torch's own switch for TF32 stands."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    tolerance = _TF32_TOLERANCE if tf32 else _TOLERANCE[dtype]
    error = (actual.double() - expected.double()).square().mean()
    return bool(error <= tolerance**2 * expected.double().square().mean())  # False for a nan


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
