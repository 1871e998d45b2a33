"""The compiled CUDA kernels (csrc/cuda), and their twin on the host machine. Fields are those of prefixattn._C."""

from collections.abc import Callable
from typing import TypedDict

from prefixattn._C import AttnBwd, AttnFwd

# enums of csrc/api/limits.h; types by torch's names
DTYPES: dict[str, int]
MASK_KINDS: dict[str, int]
PHIS: dict[str, int]
HOST_MACHINE: bool  # whether kernels run on the CPU

_Address = int
_Allocate = Callable[[int], _Address]  # takes a number of bytes, and keeps them for as long as it wants them kept

def prefix_attn_fwd(fields: AttnFwd, allocate: _Allocate, device: int, stream: _Address) -> None: ...
def prefix_attn_bwd(fields: AttnBwd, allocate: _Allocate, device: int, stream: _Address) -> None: ...

class Launch(TypedDict):
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int

class Plan(TypedDict):
    launches: list[Launch]
    workspace: int

def fwd_plan(fields: AttnFwd, shared_bytes: int, processors: int) -> Plan: ...
def bwd_plan(fields: AttnBwd, shared_bytes: int, processors: int) -> Plan: ...
