"""What a backend answers to a case, and how that compares with plain PyTorch's errors in the same type."""

from typing import NamedTuple

import torch
from torch import Tensor

from prefixattn import prefix_attention_qkvpacked
from prefixattn.testing.attention import Inputs, allowed_error, exact, results, rms, same_dtype, suited
from prefixattn.testing.varlen import Packed
from tests.fuzz.cases import Case
from tests.fuzz.truth import truth


class Finding(NamedTuple):
    """A tensor of an answer: its rms error and what the bar allows."""

    name: str
    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        """Above 1 it is outside."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed else float("inf")


class Judge:
    """The truth about a case and plain PyTorch's answers, made once and used for each backend."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.right = truth(case)
        dlse = self.right["lse"].new_zeros(self.right["lse"].shape) if case.dlse is None else case.dlse
        wide = torch.promote_types(case.dtype, torch.float32)
        kind = Inputs if case.sequences is None else Packed
        self.inputs = kind(case.tensors, case.options, case.dout, dlse.to(wide))
        self.seed = None
        if case.seed is not None:
            torch.manual_seed(case.seed)
            self.seed = torch.randint(2**62, (1,))
        concatenated = self.inputs.concatenated(seed=self.seed, fused=case.seed is None)
        self.one = {name: t[None] for name, t in results(self.inputs, *concatenated).items()}
        self.several: dict[str, Tensor] | None = None

    def answer(self, backend: str) -> dict[str, Tensor] | str:
        """The backend's, or why it refuses."""
        inputs, words = suited(backend, self.inputs)
        if words:
            return words
        asked = {"return_lse": True, "return_prefix_mass": True}
        if self.case.seed is not None:
            torch.manual_seed(self.case.seed)
        if self.case.packed:
            qkv = torch.stack([inputs.tensors[n].transpose(1, 2) for n in "qkv"], 2)
            rest = {n: t for n, t in inputs.tensors.items() if n not in ("q", "k", "v")}
            out, lse, mass = prefix_attention_qkvpacked(qkv, **rest, **inputs.options, **asked, backend=backend)
            out = out.transpose(1, 2)
        else:
            out, lse, mass = inputs.call(backend, **asked)
        return results(inputs, out, lse, mass)

    def findings(self, answer: dict[str, Tensor]) -> list[Finding]:
        found = []
        for name, t in answer.items():
            finding = self._compared(name, t, self.one)
            if not finding.ratio <= 1:  # one answer of plain PyTorch can be lucky: ask for all that the bar knows
                if self.several is None:
                    self.several = same_dtype(self.inputs, self.seed)
                finding = self._compared(name, t, self.several)
            found.append(finding)
        return found

    def disagreement(self) -> list[Finding]:
        """The truth against that of the package's tests: both are float64, so one is wrong where they differ."""
        other = exact(self.inputs, self.seed)
        found = []
        for name, right in self.right.items():
            if not right.numel():
                continue
            held = right.isfinite()
            theirs, right = (torch.where(held, t, 0.0) for t in (other[name].double(), right))
            # mass is a float32; and scores of 1e4 cost digits of their weights
            allowed = (1e-7 if name == "mass" else 1e-10) * max(1.0, float(right.abs().max()))
            found.append(Finding(name, rms(theirs - right), allowed))
        return found

    def _compared(self, name: str, t: Tensor, plain: dict[str, Tensor]) -> Finding:
        right = self.right[name]
        wrong = Finding(name, float("inf"), 0.0)
        if t.shape != right.shape or not torch.equal(t[right.isinf()].double(), right[right.isinf()]):
            return wrong
        # -inf where nothing is seen, and numbers that the type cannot hold, are no errors
        dtype = t.dtype
        held = right.abs() < torch.finfo(dtype).max / 2
        if not held.any():
            return Finding(name, 0.0, 0.0)
        t, same, right = (torch.where(held, x.double(), 0.0) for x in (t, plain[name], right))
        same = same[same.isfinite().flatten(1).all(1)]
        error = rms(t - right)
        if not len(same):  # plain PyTorch overflows on the way: what is finite is as good
            return Finding(name, 0.0, 0.0) if t.isfinite().all() else wrong
        return Finding(name, error if error == error else float("inf"), allowed_error(same, right, dtype))
