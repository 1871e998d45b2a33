"""The compiled kernels (csrc/bindings.cpp). Addresses, sizes and strides; prefixattn/cpu.py says what goes where."""

# enums and limits of csrc/api/limits.h; types by torch's names
DTYPES: dict[str, int]
MASK_KINDS: dict[str, int]
PHIS: dict[str, int]
MOMENT_FORMATS: dict[str, int]
MAX_HEAD_DIM: int
HEAD_DIM_STEP: int
MOMENT_BLOCK: int

_Strided = tuple[int, int, int, int]  # address and three strides, in elements; the fourth is 1

def prefix_attn_fwd(common: tuple[object, ...], out: _Strided, attended: _Strided, lse: int, mass: int) -> None: ...
def prefix_attn_bwd(
    common: tuple[object, ...],
    dout: _Strided,
    out: _Strided,
    lse: int,
    dlse: int,
    gradients: tuple[_Strided, ...],
) -> None: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def limit_scratch(bytes: int) -> None: ...
def openmp_runtime() -> str: ...

_Sizes = tuple[int, int, int, int, int]  # G, P, O, M, threads
# addresses: h, dy, w, dh, workspace; where dy is the gradient of a bank, that bank's form and its type
_Sweep = tuple[int, int, int, int, int] | tuple[int, int, int, int, int, int, int, int, bool, int]
_Kept = tuple[int, int, int]  # struct KeptMoment: addresses of numbers and scale, format
_BankForm = tuple[int, int, int, bool]  # layers, kv_heads, head_dim, interleaved

def reparam_fwd_workspace(sizes: _Sizes) -> int: ...
def reparam_sweep_workspace(sizes: _Sizes) -> int: ...
def reparam_fwd(sizes: _Sizes, form: _BankForm, dtype: int, tensors: tuple[int, int, int, int, int]) -> None: ...
def reparam_bwd(sizes: _Sizes, tensors: _Sweep, form: _BankForm, dtype: int, dw: int, db: int) -> None: ...
def reparam_dh(sizes: _Sizes, tensors: _Sweep) -> None: ...
def reparam_adamw(
    sizes: _Sizes,
    tensors: _Sweep,
    grad_scale: float,
    exp_avg: _Kept,
    exp_avg_sq: _Kept,
    numbers: tuple[float, float, float, float, float, float, float],
    salt: int,
) -> None: ...
def reparam_sgd(
    sizes: _Sizes,
    tensors: _Sweep,
    grad_scale: float,
    momentum_buffer: _Kept,
    numbers: tuple[float, float, float, float, bool, bool],
) -> None: ...
