"""Many prefixes in one batch, against each prefix alone."""

import copy

import pytest
import torch

import prefixattn
from prefixattn import PrefixBank, PrefixConfig

pytest.importorskip("transformers", reason="transformers is not installed")

from prefixattn.attach.hf import interface
from prefixattn.testing.models import model_inputs, tiny, token_ids

CLOSE = dict(rtol=2e-5, atol=2e-5)
# dynamo makes a context for each autograd function in a way that torch itself warns of
COMPILES = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
LENGTHS = (5, 2, 4, 3)
IDS = torch.tensor([2, 0, 2])  # prefixes 1 and 3 are nobody's


def prefixes(family, positions=None):
    """Prefixes of several lengths, all on one model."""
    model = tiny(family)
    return model, [prefixattn.attach(model, PrefixConfig(length, "none", positions=positions)) for length in LENGTHS]


def banked(family, **choices):
    model, singles = prefixes(family, **choices)
    return model, PrefixBank.of(model, singles)


def whole(length=6, count=4, family="gpt2", **choices):
    torch.manual_seed(3)
    model = tiny(family)
    return model, prefixattn.attach(model, PrefixConfig(length, "none", count=count, **choices))


CASES = [
    ("gpt2", None),  # positions of each sample shift by its own length
    ("gpt2", "unshifted"),
    ("llama", None),
    ("gemma3", None),
    ("bart", None),
    ("t5", None),
    ("vit", None),
    ("bert", None),
    ("mistral", None),
    ("qwen2", None),
    ("qwen3", None),
    ("gemma2", None),
    ("gpt_oss", None),
    ("deepseek_v2", None),
    ("deepseek_v3", None),
    ("roberta", None),
]


@pytest.mark.parametrize("family, positions", CASES)
def test_a_mixed_batch_equals_each_prefix_alone_with_its_gradients(family, positions):
    inputs, (model, singles) = model_inputs(family), prefixes(family, positions)
    bank = PrefixBank.of(model, singles).requires_grad_()
    out = model(**inputs, prefix_ids=IDS).logits
    out.square().sum().backward()
    grad = bank.encoder.weight.grad.view(bank().shape)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, prefix_ids=IDS).logits, out, **CLOSE)
    for row in IDS.unique().tolist():
        own = {name: t[IDS == row] for name, t in inputs.items()}
        singles[row].activate()
        alone = model(**own).logits
        torch.testing.assert_close(out[IDS == row], alone, **CLOSE)
        alone.square().sum().backward()
        expected = singles[row].encoder.bank.grad
        scale = expected.abs().max().item()
        torch.testing.assert_close(grad[row][..., : LENGTHS[row], :], expected, rtol=1e-4, atol=1e-5 * scale)
        assert scale > 0 and grad[row][..., LENGTHS[row] :, :].abs().sum() == 0
    assert grad[1].abs().sum() == 0 and grad[3].abs().sum() == 0


@pytest.fixture
def seen(monkeypatch):
    """The prefix's keys and values in each call of the op."""
    found, op = [], interface.prefix_attention

    def spy(q, k, v, prefix_k, prefix_v, **options):
        found.extend([prefix_k, prefix_v])
        return op(q, k, v, prefix_k, prefix_v, **options)

    monkeypatch.setattr(interface, "prefix_attention", spy)
    return found


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_the_op_reads_the_bank_where_it_lies(seen, family):
    model, bank = whole(family=family)
    inputs, weight = model_inputs(family), bank.encoder.weight
    first, size = weight.data_ptr(), weight.numel() * 4
    row = weight.stride(0)
    seen.clear()
    with torch.no_grad():
        model(**inputs, prefix_ids=IDS)
    assert len(seen) == 2 * len(bank.slots)
    assert all(t.shape[0] == 4 and t.stride(0) == row and first <= t.data_ptr() < first + size for t in seen)
    assert len({t.data_ptr() for t in seen}) == len(seen)


def test_training_gathers_the_named_rows_alone(seen):
    model, bank = whole(count=50)
    model(token_ids(), prefix_ids=torch.tensor([49, 7, 49])).logits.sum().backward()
    assert {tuple(t.shape) for t in seen[-4:]} == {(2, 2, 6, 16)}
    assert bank.encoder.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [7, 49]


def test_sparse_gradients_have_the_named_rows_and_leave_others_alone():
    grads = []
    for sparse in (False, True):
        model, bank = whole()
        bank.sparse = sparse
        model(token_ids(), prefix_ids=IDS).logits.square().mean().backward()
        grads.append(bank.encoder.weight.grad)
    assert grads[1].is_sparse and grads[1].coalesce().indices().tolist() == [[0, 2]]
    torch.testing.assert_close(grads[1].to_dense(), grads[0])
    before = bank().detach().clone()
    torch.optim.SparseAdam(bank.parameters(), lr=0.1).step()
    moved = (bank() - before).abs().flatten(1).sum(1)
    assert (moved > 0).tolist() == [True, False, True, False]


def test_what_lies_past_a_length_is_not_read_and_not_trained():
    model, bank = banked("gpt2")
    bank.requires_grad_()
    with torch.no_grad():
        bank()[2, ..., 4:, :] = float("inf")
        expected = model(token_ids(), prefix_ids=IDS).logits
        assert expected.isfinite().all()
        bank()[2, ..., 4:, :] = 0
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1)
    for _ in range(2):
        model(token_ids(), prefix_ids=IDS).logits.square().mean().backward()
        optimizer.step()
    assert all(bank()[i][..., n:, :].abs().sum() == 0 for i, n in enumerate(LENGTHS))
    assert bank.num_parameters(kept=True) == sum(LENGTHS) * 2 * 2 * 32


@pytest.mark.parametrize("case", ["other_type", "autocast"])
def test_rows_of_another_type_are_brought_over_once(monkeypatch, case):
    """As those on another device are: what is copied is the rows of the batch, when they or their choice change."""
    model, bank = whole(count=9)
    lookup, brought = bank.encoder.lookup, []

    def counted(named, sparse):
        brought.append(len(named))
        return lookup(named, sparse)

    monkeypatch.setattr(bank.encoder, "lookup", counted)
    if case == "other_type":
        bank.to(torch.bfloat16)
    mask = torch.ones(3, 9, dtype=torch.long)

    def generate(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            return model.generate(token_ids(), prefix_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=4)

    ids = torch.tensor([8, 1, 8])
    generate(ids)
    assert brought == [2]
    generate(ids)
    generate(ids.clone())
    assert brought == [2]
    ids[0] = 4
    generate(ids)
    assert brought == [2, 3]
    with torch.no_grad():
        bank().mul_(3)
    generate(ids)
    assert len(brought) == 3
    bank.encoder.lengths[4] = 2
    out = generate(ids)
    assert len(brought) == 4
    other = torch.nn.Parameter(torch.ones(1))
    other.grad = torch.ones(1)
    torch.optim.SGD([other], lr=0.1).step()  # torch's fused optimizers leave no trace in a version
    assert torch.equal(generate(ids), out) and len(brought) == 5
    bank.float()
    assert len({tuple(row) for row in generate(torch.tensor([0, 4, 8])).tolist()}) == 3
    if case == "other_type":  # now read in place, with the same rounded numbers
        assert len(brought) == 5 and torch.equal(generate(ids), out)


def test_a_layer_of_another_type_takes_its_samples_rows_along(seen):
    bank = torch.randn(7, 2, 3, 8)
    q = torch.randn(2, 2, 4, 8, dtype=torch.float64)
    ids, lengths = torch.tensor([6, 1]), torch.tensor([3, 2, 3, 3, 3, 3, 1])
    layer = torch.nn.Module()
    layer.prefix_slot = 0
    layer.is_causal = True
    call = interface.PrefixCall({0: (bank, bank)}, 0.0, ids, lengths)
    out, _ = interface.attention_with_prefix(layer, q, q, q, None, prefix_call=call)
    assert seen[0].shape == (2, 2, 3, 8)
    expected = prefixattn.prefix_attention(
        *(q, q, q, bank.double(), bank.double()), prefix_ids=ids, prefix_lengths=lengths, is_causal=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_a_bank_of_one_needs_no_ids():
    model = tiny("gpt2")
    single = prefixattn.attach(model, PrefixConfig(3, "none"))
    expected = model(token_ids()).logits
    PrefixBank.of(model, [single])
    torch.testing.assert_close(model(token_ids()).logits, expected, **CLOSE)
    zeros = torch.zeros(3, dtype=torch.long)
    torch.testing.assert_close(model(token_ids(), prefix_ids=zeros).logits, expected, **CLOSE)


REFUSED = {
    "missing": (None, r"prefix_ids is missing for a bank of T=4 prefixes; expected torch.int64 of shape \[B=3\]"),
    "list": ([0, 1, 2], r"prefix_ids is a list; expected torch.int64 of shape \[B=3\]"),
    "int32": (IDS.int(), r"prefix_ids is torch.int32 of shape \[3\]; expected torch.int64"),
    "short": (IDS[:2], r"prefix_ids is torch.int64 of shape \[2\]; expected torch.int64 of shape \[B=3\]"),
    "matrix": (IDS[None], r"of shape \[1, 3\]; expected torch.int64 of shape \[B=3\]"),
    "past": (IDS + 2, r"prefix_ids\[0\] is 4, expected 0 to 3 \(T=4\)"),
    "negative": (-IDS, r"prefix_ids\[0\] is -2, expected 0 to 3"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_ids_that_name_no_prefixes_are_refused(case, training):
    ids, words = REFUSED[case]
    model, _ = whole()
    with torch.set_grad_enabled(training), pytest.raises(ValueError, match=words):
        model(token_ids(), prefix_ids=ids)


CONFIGS = {
    "count": (dict(share="none", count=0), "count is 0, expected None or an integer from 1"),
    "count_text": (dict(share="none", count="3"), "count is '3', expected None"),
    "deep": (dict(count=3), "share is 'deep' with count=3; a bank holds keys and values only"),
    "gate": (dict(share="none", count=3, gate=True), "gate is True with count=3"),
    "lengths": (dict(share="none", count=3, length=[1, 2]), r"length is \(1, 2\) with count=3; expected one length"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_no_bank_has_are_refused(case):
    choices, words = CONFIGS[case]
    with pytest.raises(ValueError, match=words):
        PrefixConfig(**choices)


def test_prefixes_that_make_no_bank_are_refused():
    model = tiny("gpt2")
    plain = prefixattn.attach(model, PrefixConfig(3, "none"))
    cases = (
        ([], "expected a list of prefixes or folders, at least one"),
        ([plain, prefixattn.attach(tiny("llama"), PrefixConfig(3, "none"))], "prefix 1 is of another model"),
        ([plain, prefixattn.attach(model, PrefixConfig(3, "none", layers=[1]))], r"prefix 1 has layers \(1,\)"),
        (
            [plain, prefixattn.attach(model, PrefixConfig(3, "none", positions="unshifted"))],
            "prefix 1 has positions 'unshifted', and prefix 0 'shifted'",
        ),
        ([plain, prefixattn.attach(model, PrefixConfig([3, 2], "none"))], "a bank needs one length for all layers"),
        ([whole()[1]], "expected a single prefix, got a bank of T=4"),
    )
    for given, words in cases:
        with pytest.raises(ValueError, match=words):
            PrefixBank.of(model, given)
    plain.activate()
    with pytest.raises(ValueError, match="prefix_ids chooses among the prefixes of a PrefixBank"):
        model(token_ids(), prefix_ids=IDS)


def test_rows_are_read_replaced_and_added():
    model, bank = banked("gpt2")
    assert [bank.get(i).shape[3] for i in range(4)] == list(LENGTHS)
    with torch.no_grad():
        first = model(token_ids(), prefix_ids=IDS).logits
        bank.set(1, bank.get(2))
        assert torch.equal(model(token_ids(), prefix_ids=torch.tensor([1, 0, 1])).logits, first)
        deep = prefixattn.attach(tiny("gpt2"), PrefixConfig(3, hidden=8))
        assert bank.append(deep) == 4 and len(bank) == 5 and bank.config.count == 5
        torch.testing.assert_close(
            model(token_ids(), prefix_ids=torch.full((3,), 4)).logits, deep._adapter.model(token_ids()).logits, **CLOSE
        )
        assert torch.equal(model(token_ids(), prefix_ids=IDS).logits, first)
    for index, item, words in (
        (5, deep, r"index is 5, expected an integer from 0 to 4 \(T=5\)"),
        (0, torch.zeros(2, 2, 2, 6, 16), r"shape \[2, 2, 2, 6, 16\], expected .* n from 1 to the bank's P=5"),
        (0, torch.full((2, 2, 2, 1, 16), float("nan")), "infinite or not a number"),
        (0, prefixattn.attach(tiny("gpt2"), PrefixConfig(3, "none", positions="unshifted")), "has positions"),
    ):
        with pytest.raises(ValueError, match=words):
            bank.set(index, item)


def test_a_bank_can_be_disabled_copied_measured_and_detached():
    model, ids = tiny("gpt2"), token_ids()
    with torch.no_grad():
        plain = model(ids).logits
    bank = PrefixBank.of(model, prefixes("gpt2")[1])
    with torch.no_grad():
        out = model(ids, prefix_ids=IDS).logits
        with bank.disabled():
            assert torch.equal(model(ids, prefix_ids=IDS).logits, plain)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids, prefix_ids=IDS).logits, out)
        mass = bank.mass(ids, prefix_ids=IDS)
        assert mass.shape == (2, 3, 2, 9) and ((mass > 0) & (mass < 1)).all()
        bank.get(0).zero_()  # a copy
        copied = bank.get(2)
        bank.detach()
        assert torch.equal(model(ids).logits, plain)
        assert torch.equal(bank.get(2), copied) and bank.fold() is bank
    assert torch.equal(copy.deepcopy(bank)(), bank())
    with pytest.raises(NotImplementedError, match="a PEFT adapter holds one prefix, and the bank T=4"):
        bank.export_peft("nowhere")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_give_the_same_gradients(reentrant):
    grads = []
    for checkpointed in (False, True):
        model, bank = whole(family="llama")
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
            model.train()
        model(token_ids(), prefix_ids=IDS).logits.square().mean().backward()
        grads.append(bank.encoder.weight.grad)
    torch.testing.assert_close(*grads, **CLOSE)


def test_prefix_dropout_draws_for_each_sample():
    model, bank = whole(dropout=0.5)
    same = token_ids(1).expand(3, -1)
    with torch.no_grad():
        out = model(same, prefix_ids=torch.zeros(3, dtype=torch.long)).logits
        assert not torch.allclose(out[0], out[1])
        bank.eval()
        out = model(same, prefix_ids=torch.zeros(3, dtype=torch.long)).logits
        torch.testing.assert_close(out[0], out[1], **CLOSE)


@COMPILES
def test_it_compiles_whole_in_training_and_in_inference_and_is_exported():
    torch._dynamo.reset()
    model, bank = whole(family="llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for forward in (model, compiled):
        bank.zero_grad()
        forward(token_ids(), prefix_ids=IDS, use_cache=False).logits.square().mean().backward()
        grads.append(bank.encoder.weight.grad)
    torch.testing.assert_close(*grads, **CLOSE)
    inputs = {"prefix_ids": IDS, "use_cache": False}
    with torch.no_grad():
        exported = torch.export.export(model, (token_ids(),), inputs, strict=False).module()
        inputs["prefix_ids"] = IDS + 1  # no constant of the graph
        wanted = model(token_ids(), **inputs).logits
        for made in (compiled, exported):
            torch.testing.assert_close(made(token_ids(), **inputs).logits, wanted, **CLOSE)


def test_starts_are_those_of_a_single_prefix():
    model = tiny("llama")
    bank = prefixattn.attach(model, PrefixConfig(share="none", init=[5, 9, 3], count=3))
    single = prefixattn.attach(tiny("llama"), PrefixConfig(share="none", init=[5, 9, 3]))
    assert bank.config.length == 3 and all(torch.equal(bank.get(i), single()) for i in range(3))
    zero = prefixattn.attach(model, PrefixConfig(2, "none", init="zero", count=3))
    assert zero().abs().max() == 0


def test_a_bank_elsewhere_sends_the_named_rows(seen):
    """The model's device is meta, which knows shapes and devices."""
    model, bank = whole(family="vit", count=9)
    model.to("meta")
    seen.clear()
    ids = torch.tensor([8, 1, 8])
    pixels = model_inputs("vit")["pixel_values"].to("meta")
    with torch.no_grad():
        out = model(pixels, prefix_ids=ids).logits
        model(pixels, prefix_ids=ids)
    assert out.device.type == "meta" and bank.encoder.weight.device.type == "cpu"
    assert {(tuple(t.shape), t.device.type) for t in seen} == {((2, 4, 6, 8), "meta")}
    assert seen[0] is seen[4]  # in the second forward pass
