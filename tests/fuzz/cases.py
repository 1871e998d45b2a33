"""A random call for each number: shapes, types, strides, masks, prefixes, sizes of scores, packed sequences."""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
MOST = 1_500_000  # multiply-adds of the scores of a call
LARGE_BATCH = 64
MOST_SEQUENCES = 150  # which truth and plain PyTorch take one after the other


@dataclass
class Case:
    number: int
    sizes: dict[str, int]  # B, H, Hkv, L, S, P, D, Dv; of packed sequences their number and the longest
    dtype: torch.dtype
    tensors: dict[str, Tensor]  # leaves, those that want a gradient say so
    options: dict[str, Any]
    dout: Tensor  # [B, H, L, Dv], or [total_q, H, Dv]
    dlse: Tensor | None  # [B, H, L], or [H, total_q]
    packed: bool = False  # by prefix_attention_qkvpacked
    seed: int | None = None  # for torch.manual_seed, where there is dropout
    words: list[str] = field(default_factory=list)  # how the call departs from the plain one
    sequences: tuple[list[int], list[int]] | None = None  # queries and keys of each, by prefix_attention_varlen

    @property
    def large_batch(self) -> bool:
        return self.sizes["B"] >= LARGE_BATCH

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}{n}" for letter, n in self.sizes.items())
        return f"case {self.number}: {str(self.dtype).removeprefix('torch.')} {sizes} {' '.join(self.words)}"


def make(number: int) -> Case:
    """The case of this number, the same on every machine."""
    return _Maker(number).case()


class _Maker:
    def __init__(self, number: int) -> None:
        self.number = number
        self.draw = random.Random(f"prefixattn {number}")
        self.numbers = torch.Generator("cpu").manual_seed(number)
        self.words: list[str] = []

    def chance(self, p: float, word: str = "") -> bool:
        happens = self.draw.random() < p
        if happens and word:
            self.words.append(word)
        return happens

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.numbers, dtype=torch.float64, device="cpu")

    def sizes(self) -> dict[str, int]:
        draw = self.draw
        D = draw.choice(
            (1, 2, 3, 5, 7, 8, 8, 12, 16, 16, 20, 24, 32, 32, 40, 64, 64, 64, 72, 80, 96, 100, 128, 128, 256)
        )
        Hkv, group = draw.choice((1, 1, 2, 2, 3, 4)), draw.choice((1, 1, 1, 2, 3, 4, 8))
        L = (
            0
            if self.chance(0.02)
            else draw.choice((1, 1, 2, 3, draw.randint(4, 40), draw.randint(4, 40), draw.randint(41, 260)))
        )
        S = draw.choice((L, L, L, 0, 1, draw.randint(1, 40), draw.randint(1, 300)))
        P = draw.choice((0, 1, draw.randint(2, 20), draw.randint(2, 20), draw.randint(2, 20), draw.randint(21, 300)))
        B = 0 if self.chance(0.02) else draw.choice((1, 1, 2, 2, 3, 4, 7))
        if self.chance(0.06):
            B = int(2 ** draw.uniform(6, 13))
            L, S, P, D = min(L, 9), min(S, 9), min(P, 12), min(D, 16)
            Hkv, group = min(Hkv, 2), min(group, 2)
        while B * Hkv * group * max(L, 1) * (P + S) * D > MOST:
            if B > 8:
                B //= 2
            elif P + S > 64:
                P, S = P // 2, (L if S == L else S) // 2
            elif L > 1:
                L //= 2
            else:
                B, group = (B + 1) // 2, (group + 1) // 2
        if self.chance(0.005):
            Hkv = 0
        return {"B": B, "H": Hkv * group, "Hkv": Hkv, "L": L, "S": S, "P": P, "D": D, "Dv": D}

    def case(self) -> Case:
        draw = self.draw
        dtype = TYPES[draw.choice(("float32",) * 10 + ("bfloat16",) * 5 + ("float16",) * 4 + ("float64",))]
        sizes = self.sizes()
        # streams of their own, here and below: the other cases stay what they were
        sequences = self.sequences(sizes)
        B, H, Hkv, L, S, _, D, _ = sizes.values()
        packable = L == S and H == Hkv and sequences is None
        is_packed = packable and self.chance(0.2, "packed")
        own = random.Random(f"values {self.number}")
        if not is_packed and own.random() < 0.12:
            sizes["Dv"] = own.choice((1, 3, 8, 16, 24, 32, 64, 100, 128))
            self.words.append("two-widths")
        Dv = sizes["Dv"]
        # what the scores are worth: ordinary, or up to 1e4
        size = 1.0
        if self.chance(0.2):
            size = 10 ** draw.uniform(0.5, 4)
            self.words.append(f"scores~{size:.0e}")
        queries, keys, values, lse = (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv), (B, H, L)
        options: dict[str, Any] = {}
        if sequences is not None:
            total_q, total_k = map(sum, sequences)
            queries, keys, values, lse = (total_q, H, D), (total_k, Hkv, D), (total_k, Hkv, Dv), (H, total_q)
            options = self.offsets(sequences)
        tensors = {
            "q": self.normal(*queries) * size**0.5,
            "k": self.normal(*keys) * size**0.5,
            "v": self.normal(*values),
        }
        if self.chance(0.1, "offset-values"):
            tensors["v"] += 3.0
        options["is_causal"] = self.chance(0.4, "causal")
        if not is_packed:
            options["enable_gqa"] = True
        tensors |= self.prefixes(sizes, options, size)
        if self.chance(0.15, "memory"):
            rows = tensors["prefix_k"].shape[:-3] if self.chance(0.5) else ()
            tensors["memory"] = self.normal(*rows, H, D, Dv) * D**-0.5 * draw.choice((0.1, 1, 1, 10))
            options["phi"] = draw.choice(("elu", "gelu", "relu", "none"))
        tensors = {name: self.placed(name, t.to(dtype)) for name, t in tensors.items()}
        if self.chance(0.5) and sequences is None:
            self.mask(sizes, dtype, tensors, options)
        if self.chance(0.15, "softcap"):
            options["softcap"] = draw.choice((0.7, 5.0, 30.0, 50.0))
        if self.chance(0.25, "scale"):
            options["scale"] = draw.choice((1.0, 0.5, 0.01, -0.2, 0.0, D**-0.5 * 1.7))
        if "memory" not in tensors and random.Random(f"sinks {self.number}").random() < 0.1:
            self.words.append("sinks")
            tensors["sinks"] = (2 * self.normal(H)).to(dtype)
        own = random.Random(f"window {self.number}")
        if own.random() < 0.15:
            options["window_size"] = own.choice((-1, 0, 1, 7, own.randint(0, 300))), own.choice((-1, -1, 0, 1, 20))
            options["prefix_in_window"] = own.random() < 0.5
            self.words.append(f"window{options['window_size']}" + "-with-prefix" * options["prefix_in_window"])
        seed = None
        if self.chance(0.08, "dropout"):
            options["dropout_p"], seed = draw.choice((0.1, 0.5)), self.number
        if self.chance(0.08, "prefix-dropout"):
            options["prefix_dropout_p"], seed = draw.choice((0.1, 0.5)), self.number
        return Case(
            self.number,
            sizes,
            dtype,
            self.wanted(tensors),
            options,
            self.gradient((*queries[:-1], Dv)).to(dtype),
            self.normal(*lse).to(torch.promote_types(dtype, torch.float32)) if self.chance(0.4, "dlse") else None,
            is_packed,
            seed,
            self.words,
            sequences,
        )

    def sequences(self, sizes: dict[str, int]) -> tuple[list[int], list[int]] | None:
        """Sometimes queries and keys of each sample that is one of packed sequences; the sizes are then the longest."""
        own = random.Random(f"sequences {self.number}")
        if own.random() >= 0.12:
            return None
        B = min(sizes["B"], MOST_SEQUENCES)
        L, S = (n if n > 3 else own.randint(0, 24) for n in (sizes["L"], sizes["S"]))  # one token makes no difference
        kind = own.choice(("training", "training", "cached", "decoding", "ragged"))
        if kind == "decoding":
            queries, keys = [own.randint(0, 1) for _ in range(B)], [own.randint(1, max(S, 1)) for _ in range(B)]
        else:
            queries = [own.randint(0 if kind == "ragged" else min(L, 1), L) for _ in range(B)]
            keys = {
                "training": queries,
                "cached": [n + own.randint(0, S) for n in queries],
                "ragged": [own.randint(0, S) for _ in range(B)],
            }[kind]
        sizes.update(B=B, L=max(queries, default=0), S=max(keys, default=0))
        self.words.append(f"sequences-{kind}")
        return queries, keys

    def offsets(self, sequences: tuple[list[int], list[int]]) -> dict[str, Any]:
        own = random.Random(f"offsets {self.number}")
        made: dict[str, Any] = {}
        for x, lengths in zip("qk", sequences, strict=True):
            ends = torch.tensor([0, *lengths], dtype=torch.int64, device="cpu").cumsum(0)
            ends = ends.to(own.choice((torch.int32, torch.int64)))
            if own.random() < 0.2:  # each twice in memory: who reads both finds other sequences, and no wild address
                ends = torch.stack([ends, ends], 1)[:, 0]
                self.words.append(f"cu_seqlens_{x}-sliced")
            made[f"cu_seqlens_{x}"] = ends
            made[f"max_seqlen_{x}"] = max(lengths, default=0) + own.choice((0, 0, 0, 1, 70))
        return made

    def prefixes(self, sizes: dict[str, int], options: dict[str, Any], size: float) -> dict[str, Tensor]:
        B, _, Hkv, _, _, P, D, Dv = sizes.values()
        kind = self.draw.choice(("shared", "shared", "per_sample", "bank"))
        T = {"shared": 1, "per_sample": B, "bank": self.draw.randint(1, 5)}[kind]
        rows = () if kind == "shared" else (T,)
        if kind != "shared":
            self.words.append(kind)
        if kind == "bank":
            options["prefix_ids"] = torch.randint(T, (B,), generator=self.numbers, device="cpu")
        if self.chance(0.25, "lengths"):
            by_row = kind == "bank" and self.chance(0.5, "of-rows")
            lengths = torch.randint(P + 1, (T if by_row else B,), generator=self.numbers, device="cpu")
            options["prefix_lengths"] = lengths
        made = ("prefix_k", D, size**0.5), ("prefix_v", Dv, 1.0)
        return {name: self.normal(*rows, Hkv, P, width) * s for name, width, s in made}

    def mask(
        self, sizes: dict[str, int], dtype: torch.dtype, tensors: dict[str, Tensor], options: dict[str, Any]
    ) -> None:
        """Any axis may be 1, and the first ones missing."""
        full = [sizes[letter] for letter in "BHLS"]
        size = [n if self.chance(0.6) else 1 for n in full][self.draw.choice((0, 0, 0, 1, 2, 3)) :]
        kind = self.draw.choice(("bool", "bool", "float", "float", "float32"))
        self.words.append(f"{kind}-mask{size}".replace(" ", ""))
        if kind == "bool":
            made = torch.rand(size, generator=self.numbers, device="cpu") < self.draw.choice((0.1, 0.7, 0.95))
            options["attn_mask"] = self.strided(made)
            return
        made = self.normal(*size) * self.draw.choice((1.0, 1.0, 10.0, 100.0))
        if self.chance(0.4, "hides"):
            least = -torch.inf if self.chance(0.5) else float(torch.finfo(torch.float32).min)
            hidden = torch.rand(size, generator=self.numbers, device="cpu") < 0.3
            made = made.masked_fill(hidden, least)
        made = made.to(torch.float32 if kind == "float32" else dtype)
        tensors["attn_mask"] = self.strided(made)

    def placed(self, name: str, t: Tensor) -> Tensor:
        """The tensor in some order of memory; an expanded one has the values of its first head or sample."""
        how = self.draw.random()
        if how < 0.55:
            return t
        if how < 0.7:
            self.words.append(f"{name}-transposed")
            return t.transpose(-3, -2).contiguous().transpose(-3, -2)
        if how < 0.8 and t.dim() > 3 and t.numel() and not (name == "memory" or name.startswith("prefix")):
            self.words.append(f"{name}-expanded")
            return t[:1].expand(t.shape) if self.chance(0.5) else t[:, :1].expand(t.shape)
        return self.strided(t, name)

    def strided(self, t: Tensor, name: str = "") -> Tensor:
        """Sometimes a part of a larger tensor whose other numbers nobody may read."""
        how = self.draw.random()
        if how < 0.4 or not t.dim():
            return t
        if how < 0.55:  # a stride in the last axis
            wide = torch.stack([t, _poison(t)], -1)
            t = wide[..., 0]
        else:
            axis = self.draw.randrange(t.dim())
            wide = torch.cat([_poison(t), t, _poison(t)], axis)
            t = wide.narrow(axis, t.shape[axis], t.shape[axis])
        if name:
            self.words.append(f"{name}-sliced")
        return t

    def gradient(self, size: tuple[int, ...]) -> Tensor:
        kind = self.draw.choice(("normal", "normal", "biased", "biased", "ones", "small"))
        if kind != "normal":
            self.words.append(f"dout-{kind}")
        if kind == "ones":  # as out.sum() passes it on
            return torch.ones((), dtype=torch.float64).expand(size)
        drawn = self.normal(*size)
        return {"normal": drawn, "biased": drawn + 1, "small": drawn * 1e-3}[kind]

    def wanted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        every = self.chance(0.7)
        if not every:
            self.words.append("some-gradients")
        made = {}
        for name, t in tensors.items():
            likely = 0.3 if name == "attn_mask" else 1.0 if every else 0.5
            made[name] = t.detach().requires_grad_(self.chance(likely))
        return made


def _poison(t: Tensor) -> Tensor:
    return torch.ones_like(t) if t.dtype == torch.bool else torch.full_like(t, torch.nan)
