"""What crosses the border of a kernel together: named tuples, which a kernel reads by name.

To Triton a number in one is an argument like any other: it has its divisibility, 1 is a constant, and None is one too.
"""

from typing import NamedTuple

from torch import Tensor

from prefixattn.kernels.phi_tiles import NO_MEMORY
from prefixattn.kernels.tiles import NO_MASK


class Strides(NamedTuple):
    """Of a tensor whose last axis lies in one piece, in elements."""

    sample: int  # of prefixes: from one of them to the next; of packed sequences: from a row to the next
    head: int
    row: int


def strides(t: Tensor, packed: bool = False) -> Strides:
    """What nobody wants may have fewer axes."""
    if t.dim() != 4:
        return Strides(0, 0, 0)
    sample, head, row, _ = t.stride()
    return Strides(row if packed else sample, head, row)


class MaskStrides(NamedTuple):
    """0 where the mask is the same all along an axis."""

    sample: int
    head: int
    row: int
    column: int


class Layout(NamedTuple):
    """The strides of what a kernel reads and writes; None for what it does not know."""

    q: Strides | None = None
    k: Strides | None = None
    v: Strides | None = None
    prefix_k: Strides | None = None
    prefix_v: Strides | None = None
    mask: MaskStrides | None = None
    out: Strides | None = None
    dout: Strides | None = None
    dq: Strides | None = None
    dk: Strides | None = None
    dv: Strides | None = None


class Drops(NamedTuple):
    """Threshold and gain of attention dropout, then of prefix dropout, or None for a kernel that has no code for it."""

    threshold: int
    keep_scale: float
    prefix_threshold: int | None = None
    prefix_gain: float | None = None


class Window(NamedTuple):
    """Query l, which lies at first + l, sees own keys from its position - left to + right; None: all there are.

    Without a `first` there is no window. None in its place would do, but Triton 3.4 cannot ask a tuple that holds None
    whether it is None itself.
    """

    left: int | None = None
    right: int | None = None
    first: int | None = None  # of packed sequences 0: each has its own, which a kernel takes from its lengths


class Packed(NamedTuple):
    """Where sequences lie that are packed one behind the other; the sizes beside it are the longest one's."""

    queries: Tensor  # int64 [B + 1]: the rows between two are a sequence's
    keys: Tensor  # likewise
    total: int  # queries of all


class Rows(NamedTuple):
    """The queries of packed sequences as one axis, with the sequences in some order."""

    bounds: Tensor  # int64 [B + 1], as Packed.queries, in that order
    owners: Tensor  # int64 [total]: the place in that order of each query's sequence


class Features(NamedTuple):
    """What is compiled in; the defaults are for a kernel that has no code for it."""

    D: int
    BLOCK_D: int  # a power of two, at least D
    EXP: int  # how weights are computed: RAW, NATURAL or EXACT
    PRECISION: str  # of products of float32; Triton 3.4 takes text as no argument of a function in a kernel
    DROPOUT: bool
    MASK: int = NO_MASK.value
    KEY_MASK: bool = False  # the mask is the same for every query
    CAUSAL: bool = False
    HAS_IDS: bool = False  # `prefix_ids` [B] names the prefix of each sample
    PER_SAMPLE: bool = False  # each sample has its own
    HAS_LENGTHS: bool = False
    PREFIX_DROPOUT: bool = False
    PREFIX_IN_WINDOW: bool = False  # a window's left bound hides rows of the prefix too
    PHI: int = NO_MEMORY.value  # or what is done to the queries that meet the memory
    MEMORY_PER_PREFIX: bool = False  # each prefix has a memory of its own
