"""The shapes that targets for the Triton kernels were set with, and those targets."""

from typing import NamedTuple


class TargetShape(NamedTuple):
    """A row of the targets that were set, with these floors and estimates of peers, before any kernel; microseconds.

    Its target of forward + backward is a ratio to the best peer, whose time it estimates for the forward alone: here
    the peer's forward + backward is that time, scaled by the peers' two floors (`peer_floor`).
    """

    name: str
    B: int
    H: int
    Hkv: int
    N: int  # = L = S
    P: int
    D: int
    causal: bool
    packed: bool  # views of one [B, N, 3, H, D] projection; otherwise of [B, N, H, D]
    floor: tuple[float, float]  # forward, forward + backward
    target: float  # forward
    peer: float  # forward of the fastest peer, estimated
    peer_floor: tuple[float, float]  # forward, forward + backward
    ratio: float  # the peer's forward + backward over ours

    @property
    def targets(self) -> tuple[float, float]:
        return self.target, self.peer * self.peer_floor[1] / self.peer_floor[0] / self.ratio

    @property
    def useful(self) -> int:
        """Flops of the forward: two products over the pairs of a query and a key that it sees."""
        own = self.N * (self.N + 1) // 2 if self.causal else self.N * self.N
        return 4 * self.B * self.H * self.D * (self.N * self.P + own)

    def floor_bytes(self, grads: bool) -> int:
        """Each input read once, each output written once, in each pass; bf16, lse in float32."""
        queries, rows = 2 * self.B * self.H * self.N * self.D, 4 * self.B * self.H * self.N
        keys = 2 * 2 * self.Hkv * (self.B * self.N + self.P) * self.D  # and values
        fwd = 2 * queries + keys + rows  # q, out
        return fwd + (4 * queries + 2 * keys + rows if grads else 0)  # q, out, dout, dq; keys and their gradients


SHAPES = (
    TargetShape("ViT-B 224 B64 P10", 64, 12, 12, 197, 10, 64, False, True, (18.2, 56), 30, 62, (37, 115), 1.9),
    TargetShape("ViT-B 224 B128 P50", 128, 12, 12, 197, 50, 64, False, True, (36.3, 127), 62, 128, (82, 249), 1.8),
    TargetShape("ViT-B 384 B64 P50", 64, 12, 12, 577, 50, 64, False, True, (90, 315), 190, 300, (145, 377), 1.3),
    TargetShape(
        "ViT-L/14 N1025 B64 P50", 64, 16, 16, 1025, 50, 64, False, True, (366, 1280), 800, 1050, (494, 1411), 1.15
    ),
    TargetShape("GPT-2s B16 N256 P20", 16, 12, 12, 256, 20, 64, True, True, (5.9, 18.6), 11, 22, (12, 38), 1.8),
    TargetShape("GPT-2m B8 N1024 P200", 8, 16, 16, 1024, 200, 64, True, True, (30, 106), 68, 104, (47, 125), 1.3),
    TargetShape("GPT-2xl B8 N1024 P10", 8, 25, 25, 1024, 10, 64, True, True, (35, 121), 88, 125, (59, 164), 1.25),
    TargetShape("LLaMA-7B B16 N512 P100", 16, 32, 32, 512, 100, 128, True, False, (63, 215), 130, 215, (137, 422), 1.4),
    TargetShape("LLaMA-7B B4 N2048 P30", 4, 32, 32, 2048, 30, 128, True, False, (179, 627), 305, 361, (242, 690), 1.05),
    TargetShape("LLaMA-3-8B B4 N2048 P30", 4, 32, 8, 2048, 30, 128, True, False, (179, 627), 300, 300, (195, 643), 1.0),
)
