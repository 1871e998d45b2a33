"""That the sweep's proofs of generation tell a fault from rounding, and leave what they compare."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import prefixattn  # noqa: E402
from prefixattn import PrefixConfig  # noqa: E402

from . import proofs  # noqa: E402
from .inputs import tokens  # noqa: E402
from .small import Sizes, small  # noqa: E402


class Erring(transformers.LlamaForCausalLM):
    """One whose steps are off whole passes by about `by`."""

    by = 0.0

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
        out = super().forward(input_ids, **kwargs)
        if input_ids.shape[1] == 1:
            out.logits = out.logits * (1 + self.by)
        return out


@pytest.mark.parametrize("by", [0.0, 3e-4])
def test_a_fault_is_one_in_float64_too(by: float) -> None:
    torch.manual_seed(0)
    model, inputs = Erring(small(transformers.LlamaConfig, Sizes())).eval(), {"input_ids": tokens()}
    prefixattn.attach(model, PrefixConfig(length=3, share="none"))
    model.by = by
    exact = proofs.exact_steps(model, inputs)
    assert exact is not None
    assert (exact > proofs.EXACT) is (by > 0)
    assert exact < 2 * by + proofs.EXACT
    assert next(model.parameters()).dtype == torch.float32


def test_generation_leaves_the_inputs_that_proofs_compare() -> None:
    class Writing(Erring):
        def generate(self, input_ids: torch.Tensor, **kwargs: object) -> object:
            input_ids[:, 0] = 7
            return super().generate(input_ids, **kwargs)

    model, inputs = Writing(small(transformers.LlamaConfig, Sizes())).eval(), {"input_ids": tokens()}
    proofs.generated(model, inputs)
    assert torch.equal(inputs["input_ids"], tokens())
