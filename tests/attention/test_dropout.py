"""Dropout: the bits are Philox's, the same on every backend, and the gradients are those of the masked function."""

import pytest
import torch

from prefixattn import prefix_attention
from prefixattn.attention import philox
from prefixattn.testing.attention import (
    Shape,
    assert_all_as_accurate,
    exact,
    make_inputs,
    objections,
    ours,
    same_dtype,
    suited,
)
from tests.grids import DTYPES, FEWER_TYPES, by_backend, without

WORD = 0xFFFFFFFF


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 as its paper states it, on Python's integers."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        m0, m1 = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (m1 >> 32) ^ b ^ k0, m1 & WORD, (m0 >> 32) ^ d ^ k1, m0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return a, b, c, d


# the known answers that the authors publish with their code
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox_by_hand(counter, key) == words
    got = philox.philox(tuple(torch.tensor(c) for c in counter), (torch.tensor(key[0]), torch.tensor(key[1])))
    assert tuple(got.tolist()) == words


@pytest.mark.parametrize("kind", [philox.ATTENTION, philox.PREFIX_K, philox.PREFIX_V])
def test_each_position_has_its_own_word(kind: int) -> None:
    seed, p = 0x1234_5678_9ABC_DEF0 >> 2, 0.37
    B, H, rows, columns = 2, 3, 4, 7
    kept = philox.keep(torch.tensor([seed]), p, (B, H, rows, columns), kind)
    for b, h, row, column in torch.cartesian_prod(*map(torch.arange, (B, H, rows, columns))).tolist():
        words = philox_by_hand((column // 4, row, b * H + h, kind), (seed & WORD, seed >> 32))
        assert bool(kept[b, h, row, column]) == (words[column % 4] >= int(p * 2**32))


def test_the_share_that_is_kept() -> None:
    kept = philox.keep(torch.tensor([5]), 0.25, (4, 4, 64, 250), philox.ATTENTION)
    share = kept.float().mean().item()
    assert abs(share - 0.75) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5


def drawn(seed: int) -> torch.Tensor:
    """The number that prefix_attention draws after torch.manual_seed."""
    torch.manual_seed(seed)
    number = torch.randint(2**62, (1,))
    torch.manual_seed(seed)
    return number


P = {"attention": (0.2, 0.0), "prefix": (0.0, 0.3), "both": (0.1, 0.4)}
SMALL = ["plain", "grouped_causal", "bank", "softcap"]
DROPPED = by_backend(without(FEWER_TYPES, "triton"), P, [*SMALL, "blocks_of_queries"])  # those are of the CPU kernels
DROPPED += by_backend({"triton": FEWER_TYPES["triton"]}, P, SMALL)


@pytest.mark.parametrize("backend, dtype, p, feature", DROPPED, indirect=["backend"])
def test_dropout(backend: str, p: str, feature: str, dtype: str) -> None:
    shape, options = {
        "plain": ("ragged", {"mask": "BHLS", "mask_dtype": "float"}),
        "grouped_causal": ("grouped", {"causal": True}),
        "bank": ("ragged", {"prefixes": "bank", "lengths": "T", "causal": True, "mask": "B11S"}),
        "blocks_of_queries": (Shape(2, 4, 2, 70, 20, 140, 72), {"causal": True}),  # read one prefix each
        "softcap": ("ragged", {"softcap": 0.7, "mask": "BHLS"}),
    }[feature]
    inputs = make_inputs(shape, DTYPES[dtype], **options)
    inputs.options |= dict(zip(("dropout_p", "prefix_dropout_p"), P[p], strict=True))
    inputs, words = suited(backend, inputs)
    if words:
        pytest.skip(words)
    seed = drawn(11)
    assert_all_as_accurate(ours(inputs, backend), same_dtype(inputs, seed), exact(inputs, seed))


def test_manual_seed_repeats_and_time_does_not(backend: str) -> None:
    inputs = make_inputs("even")
    options = {"dropout_p": 0.3, "prefix_dropout_p": 0.3}
    if words := objections(backend, inputs, **options):
        pytest.skip(words)
    torch.manual_seed(1)
    first, second = inputs.call(backend, **options), inputs.call(backend, **options)
    torch.manual_seed(1)
    assert torch.equal(inputs.call(backend, **options), first)
    assert not torch.equal(first, second)


def test_without_dropout_the_generator_is_left_alone() -> None:
    inputs = make_inputs("even")
    before = torch.get_rng_state()
    inputs.call()
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_drop_differently_even_with_equal_inputs() -> None:
    q = torch.randn(1, 2, 5, 8).expand(2, -1, -1, -1)
    prefix = torch.randn(2, 6, 8)
    out = prefix_attention(q, q, q, prefix, prefix, prefix_dropout_p=0.5)
    assert not torch.equal(out[0], out[1])


def test_lse_and_mass_are_those_before_attention_dropout(backend: str) -> None:
    inputs = make_inputs("ragged")
    if words := objections(backend, inputs, dropout_p=0.5):
        pytest.skip(words)
    plain, dropped = ours(inputs, backend), ours(inputs, backend, dropout_p=0.5)
    assert torch.equal(plain["lse"], dropped["lse"])
    assert torch.equal(plain["mass"], dropped["mass"])
    assert not torch.equal(plain["out"], dropped["out"])
