"""One prefix made of several."""

import pytest
import torch

import prefixattn
from prefixattn import PrefixConfig

pytest.importorskip("transformers", reason="transformers is not installed")
from prefixattn.attach import attached
from prefixattn.testing.models import concat_twin, model_inputs, tiny, token_ids

CLOSE = dict(rtol=2e-5, atol=2e-5)


def prefixes(model, *choices):
    made = [prefixattn.attach(model, PrefixConfig(**one)) for one in choices]
    for prefix in made:
        if prefix.gate is not None:
            with torch.no_grad():
                prefix.gate.uniform_(0.5, 1.5)
    return made


def rows(prefix):
    """Key and value of each layer, [2, Hkv, P, D], without rows that it does not use."""
    return [bank[:, :, :n] for bank, n in zip(prefix().detach(), prefix.lengths, strict=True)]


SEVERAL = {
    "llama": ("llama", [dict(length=3, hidden=8, gate=True), dict(length=4, share="none"), dict(length=1, hidden=8)]),
    "ragged": ("llama", [dict(length=[2, 5], share="none", gate=True), dict(length=[1, 3], hidden=8)]),
    "evened": ("llama", [dict(length=[2, 5], share="none"), dict(length=[4, 1], share="none")]),
    "simple": ("llama", [dict(length=3, share="simple", layers=[1]), dict(length=2, share="none", layers=[1])]),
    "unshifted": ("gpt2", [dict(length=3, share="none", positions="unshifted")] * 2),
    "bart": ("bart", [dict(length=2, hidden=8), dict(length=3, share="none")]),
    "bart_decoder": ("bart", [dict(length=2, share="none", attentions=["decoder"], positions="unshifted")] * 2),
    "vit": ("vit", [dict(length=2), dict(length=3, share="none")]),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_concatenation_is_all_of_them_in_front(case):
    family, choices = SEVERAL[case]
    model, inputs = tiny(family), model_inputs(family)
    several = prefixes(model, *choices)
    joined = prefixattn.combine(model, several)
    assert joined.is_active and joined.config.share == "none" and joined.slots == several[0].slots
    assert joined.lengths == tuple(sum(n) for n in zip(*(p.lengths for p in several), strict=True))
    assert isinstance(joined.config.length, int) == (len(set(joined.lengths)) == 1)
    twin, adapter = concat_twin(model, joined), joined._adapter
    base = getattr(twin, twin.base_model_prefix)
    for slot, *parts in zip(joined.slots, *(rows(p) for p in several), strict=True):
        base.get_submodule(adapter.sites[slot].path).reference_prefix = torch.cat(parts, 2)
    shift = {}
    if joined.config.positions == "shifted":
        longest = max(joined.lengths)
        shift = {"position_ids": torch.arange(9)[None] + longest}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, twin(**inputs, **shift).logits, **CLOSE)


@pytest.mark.parametrize("weights", [None, (3, 1)])
@pytest.mark.parametrize("length", [4, [3, 5]])
def test_an_average_is_the_mean_of_keys_and_values(weights, length):
    model, ids = tiny("llama"), token_ids()
    one, two = prefixes(model, dict(length=length, hidden=8, gate=True), dict(length=length, share="none"))
    mean = prefixattn.combine(model, [one, two], how="average", weights=weights)
    assert mean.config.length == one.config.length
    share = 0.5 if weights is None else 0.75
    torch.testing.assert_close(mean(), share * one() + (1 - share) * two())
    before = mean().detach().clone()
    optimizer = torch.optim.SGD(mean.parameters(), lr=1.0)
    model(ids).logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(mean(), before) and all(p.grad is None for q in (one, two) for p in q.parameters())


def test_saved_and_detached_prefixes_and_those_of_another_model_are_taken(tmp_path):
    model, other, ids = tiny("llama"), tiny("llama"), token_ids()
    kept, saved = prefixes(model, dict(length=2, hidden=8), dict(length=3, share="none"))
    saved.save_pretrained(tmp_path)
    kept.detach()
    elsewhere = prefixattn.load(other, tmp_path)
    joined = prefixattn.combine(model, [kept, elsewhere])
    assert all(torch.equal(row, torch.cat(pair, 2)) for row, *pair in zip(joined(), kept(), saved(), strict=True))
    assert attached(model) is joined and attached(other) is elsewhere
    joined.save_pretrained(tmp_path / "joined")
    prefixattn.load(other, tmp_path / "joined")
    with torch.no_grad():
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_a_copy_of_one_is_a_prefix_of_its_own():
    model = tiny("llama")
    (one,) = prefixes(model, dict(length=3, share="none"))
    for how in ("concatenate", "average"):
        copy = prefixattn.combine(model, [one], how)
        assert torch.equal(copy(), one()) and copy.encoder.bank.data_ptr() != one.encoder.bank.data_ptr()


FREE = dict(share="none")
REFUSED = {
    "none": (lambda p: ([],), {}, r"prefixes is \[\], expected a list of at least one Prefix"),
    "one_alone": (lambda p: (p[0],), {}, "prefixes is Prefix, expected a list"),
    "words": (lambda p: (["a"],), {}, r"prefixes is \[str\], expected a list"),
    "how": (lambda p: (p,), dict(how="add"), "how is 'add', expected 'concatenate' or 'average'"),
    "lengths": (lambda p: (p[:2],), dict(how="average"), r"prefixes\[1\] has lengths \(3, 3\), expected the first's"),
    "weights_of_rows": (lambda p: (p[:2],), dict(weights=[1, 2]), "weights is .* with how='concatenate'"),
    "weights_fewer": (lambda p: (p[:1] * 2,), dict(how="average", weights=[1]), "expected 2 finite numbers from 0"),
    "weights_zero": (lambda p: (p[:1] * 2,), dict(how="average", weights=[0, 0]), "expected 2 finite numbers from 0"),
    "weights_nan": (lambda p: (p[:1],), dict(how="average", weights=[float("nan")]), "expected 1 finite numbers"),
    "weights_negative": (lambda p: (p[:1] * 2,), dict(how="average", weights=[2, -1]), "finite numbers from 0"),
    "weights_words": (lambda p: (p[:1] * 2,), dict(how="average", weights="ab"), "finite numbers from 0"),
    "layers": (lambda p: ([p[0], p[2]],), {}, r"prefixes\[1\] is in layers \(1,\), expected those of"),
    "positions": (lambda p: ([p[0], p[3]],), {}, r"prefixes\[1\] has positions='unshifted', expected the first's"),
    "model": (
        lambda p: ([p[0], *prefixes(tiny("qwen2"), FREE)],),
        {},
        r"prefixes\[1\] is of a model Geometry\(model_type='qwen2'",
    ),
}


@pytest.fixture(scope="module")
def four():
    model = tiny("llama")
    choices = [dict(length=2), dict(length=3), dict(length=2, layers=[1]), dict(length=2, positions="unshifted")]
    return model, prefixes(model, *(FREE | one for one in choices))


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_prefix_is_refused(four, case):
    arguments, options, words = REFUSED[case]
    model, several = four
    with pytest.raises(ValueError, match=words):
        prefixattn.combine(model, *arguments(several), **options)
    assert attached(model) is several[-1]


def test_positions_go_on_after_all_rows():
    model, ids = tiny("gpt2"), token_ids(1, 9)
    several = prefixes(model, dict(length=30, share="none"), dict(length=30, share="none"))
    prefixattn.combine(model, several)
    with torch.no_grad():
        model(ids[:, :4])
        with pytest.raises(ValueError, match="position 68 is past the model's 64 positions, 60 of which"):
            model(ids)
