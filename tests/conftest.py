import os
from collections.abc import Iterator

import pytest
import torch

# PREFIXATTN_TEST_DEVICE=cuda runs the op's tests on a GPU with compiled kernels; else they are interpreted
if os.environ.get("PREFIXATTN_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before anything of ours is imported
else:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or cuBLAS warns that it may not repeat to the bit

from prefixattn import backends
from prefixattn.reparam import functional as reparam
from prefixattn.testing import interpreter

DEVICE = os.environ.get("PREFIXATTN_TEST_DEVICE", "cpu")
# PREFIXATTN_TEST_ISA=amx_plain runs the CPU kernels of that instruction set in all tests that name no other
if ISA := os.environ.get("PREFIXATTN_TEST_ISA"):
    from prefixattn import _C

    _C.set_isa(ISA)
interpreter.prepare()
torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """torch.empty returns NaN, so an output that a kernel leaves unwritten cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


# tests/native/cuda has the sizes of "cuda"
@pytest.fixture(params=[name for name in backends.NAMES if name != "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """The name of each backend; skips in the words of the one that does not work here."""
    name: str = request.param
    if name == "cpu" and DEVICE != "cpu":
        pytest.skip(f"cpu: the tests run on {DEVICE}")
    if reasons := backends.here()[name]:
        pytest.skip(f"{name}: " + "; ".join(reasons))
    return name


@pytest.fixture(params=[row.name for row in backends.REPARAM if row.named])
def reparam_backend(request: pytest.FixtureRequest) -> str:
    """The same for the reparameterization."""
    name: str = request.param
    if name == "cpu" and DEVICE != "cpu":
        pytest.skip(f"cpu: the tests run on {DEVICE}")
    if reasons := reparam.here()[name]:
        pytest.skip(f"{name}: " + "; ".join(reasons))
    return name
