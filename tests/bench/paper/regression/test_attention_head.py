"""The bridge to attention: what is planted, what is shared, and that descent recovers it."""

from typing import Any

import numpy as np
import pytest
import torch

from bench.paper.regression import attention_head
from bench.paper.regression.attention_head import ROWS, SHARES, Setting


def test_the_output_is_softmax_attention_over_prefix_and_own_keys() -> None:
    frozen = attention_head.head()
    p, _ = attention_head.planted(frozen, ROWS["twice"])
    prefix_k, prefix_v = p @ frozen.W_K, p @ frozen.W_V
    found = frozen.out(prefix_k.expand(2, -1, -1), prefix_v.expand(2, -1, -1))
    keys = torch.cat([prefix_k.expand(len(frozen.k), -1, -1), frozen.k[:, 0]], 1)
    values = torch.cat([prefix_v.expand(len(frozen.v), -1, -1), frozen.v[:, 0]], 1)
    weights = (frozen.q[:, 0] @ keys.mT / attention_head.WIDTH**0.5).softmax(-1)
    for one in found:
        torch.testing.assert_close(one, (weights @ values)[:, 0], rtol=1e-12, atol=1e-13)


def test_twice_plants_one_atom_of_weight_two() -> None:
    p, true = attention_head.planted(attention_head.head(), ROWS["twice"])
    assert true.weights.tolist() == [2.0, 1.0] and torch.equal(p[0], p[2])
    assert attention_head.planted(attention_head.head(), ROWS["distinct"])[1].weights.tolist() == [1.0, 1.0]


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, int], dict[str, Any]]:
    found = {}
    for share in SHARES:
        for n in (10**3, 10**7):
            found[share, n] = attention_head.cell(Setting(share, "twice", steps=300).config(n, 4, 1))
    return found


def test_descent_ends_below_the_truth(cells: dict[Any, Any]) -> None:
    for share in SHARES:
        assert cells[share, 10**3]["fits"]["worse_than_truth"] == 0


def test_with_more_data_rows_and_output_are_found(cells: dict[Any, Any]) -> None:
    for share in SHARES:
        few, many = (cells[share, n]["measures"] for n in (10**3, 10**7))
        assert np.mean(few["l2"]) > 10 * np.mean(many["l2"]), share
        assert np.mean(few["value_alone"]) > 5 * np.mean(many["value_alone"]), share
    few, many = (cells["simple", n]["measures"] for n in (10**3, 10**7))
    assert np.mean(few["value_crowd"]) > 3 * np.mean(many["value_crowd"])


def test_sharing_makes_the_output_better(cells: dict[Any, Any]) -> None:
    """Half as many parameters for the same function. With much more data these few steps are not the end of descent."""
    separate, shared = (np.mean(cells[share, 10**3]["measures"]["l2"]) for share in ("separate", "simple"))
    assert shared < separate
