"""The compiled kernels (csrc/). A dict holds the members of a struct of csrc/api by name: all of them, and no other."""

from typing import TypedDict

# enums and limits of csrc/api/limits.h; types by torch's names
DTYPES: dict[str, int]
MASK_KINDS: dict[str, int]
PHIS: dict[str, int]
MOMENT_FORMATS: dict[str, int]
MAX_HEAD_DIM: int
HEAD_DIM_STEP: int
MOMENT_BLOCK: int

_Strided = tuple[int, int, int, int]  # address and three strides, in elements; the fourth is 1
_Address = int

class Attn(TypedDict):
    dtype: int
    B: int
    H: int
    Hkv: int
    L: int
    S: int
    T: int
    P: int
    D: int
    q: _Strided
    k: _Strided
    v: _Strided
    prefix_k: _Strided
    prefix_v: _Strided
    memory: _Strided | None
    memories: int
    phi: int
    prefix_ids: _Address | None
    prefix_lengths: _Address | None
    mask_kind: int
    mask: _Strided | None
    mask_stride3: int
    scale: float
    softcap: float
    causal: bool
    dropout_p: float
    prefix_dropout_p: float
    seed: _Address | None

class OnCpu(TypedDict):
    window_left: int
    window_right: int
    prefix_in_window: bool
    cu_seqlens_q: _Address | None
    cu_seqlens_k: _Address | None
    total_q: int
    splits_float32: bool

class AttnOnCpu(Attn, OnCpu): ...

class AttnFwd(Attn):
    out: _Strided
    attended: _Strided | None
    lse: _Address
    mass: _Address | None

class AttnBwd(Attn):
    dout: _Strided
    out: _Strided | None
    lse: _Address
    dlse: _Address | None
    dq: _Strided | None
    dk: _Strided | None
    dv: _Strided | None
    dprefix_k: _Strided | None
    dprefix_v: _Strided | None
    dmemory: _Strided | None

class AttnFwdOnCpu(AttnFwd, OnCpu): ...
class AttnBwdOnCpu(AttnBwd, OnCpu): ...

def prefix_attn_fwd(fields: AttnFwdOnCpu, threads: int) -> None: ...
def prefix_attn_bwd(fields: AttnBwdOnCpu, threads: int) -> None: ...

class ReparamSizes(TypedDict):
    G: int
    P: int
    O: int
    M: int

class KvForm(TypedDict):
    layers: int
    kv_heads: int
    head_dim: int
    interleaved: bool

class KeptMoment(TypedDict):
    data: _Address
    scale: _Address | None
    format: int

class ReparamFwd(ReparamSizes):
    h: _Address
    w: _Address
    b: _Address | None
    form: KvForm
    dtype: int
    workspace: _Address
    kv: _Address

class FusedStep(ReparamSizes):
    h: _Address | None
    dy: _Address
    form: KvForm | None  # of the kv whose gradient dy is
    dtype: int
    w: _Address
    dh: _Address | None
    workspace: _Address
    grad_scale: float

class ReparamBwd(FusedStep):
    dw: _Address | None
    db: _Address | None

class AdamW(FusedStep):
    exp_avg: KeptMoment | None
    exp_avg_sq: KeptMoment | None
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    step_size: float
    inverse_sqrt_correction2: float
    decay: float
    salt: int

class Sgd(FusedStep):
    momentum_buffer: KeptMoment | None
    lr: float
    momentum: float
    one_minus_dampening: float
    weight_decay: float
    nesterov: bool
    first: bool

def reparam_fwd_workspace(sizes: ReparamSizes) -> int: ...
def reparam_step_workspace(sizes: ReparamSizes) -> int: ...
def reparam_fwd(fields: ReparamFwd, threads: int) -> None: ...
def reparam_bwd(fields: ReparamBwd, threads: int) -> None: ...
def reparam_dh(fields: FusedStep, threads: int) -> None: ...
def reparam_adamw(fields: AdamW, threads: int) -> None: ...
def reparam_sgd(fields: Sgd, threads: int) -> None: ...
def isas() -> list[str]: ...
def isa_objections() -> dict[str, str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def limit_scratch(bytes: int) -> None: ...
def openmp_runtime() -> str: ...
