"""To the bit: a sample's results in other batches, beside other samples and packed; and the switch that makes it so.

The CPU kernels need no switch: tests/native/test_cpu_batches.py asks them on every instruction set.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from prefixattn import backends, prefix_attention, use_batch_invariant_kernels
from prefixattn.attention import cuda, reference
from prefixattn.attention.call import Call, Given, Needs, Wants
from prefixattn.attention.invariance import batch_invariant
from prefixattn.kernels.table import INTERPRETED
from prefixattn.testing.attention import FEATURES, Inputs, Shape, assert_all_as_accurate, exact, make_inputs, ours
from prefixattn.testing.attention import same_dtype as same_type
from prefixattn.testing.batches import alone, differing, of_sequence, rows_of_samples, same_bits, samples, sequences
from prefixattn.testing.varlen import Packed, packed_sequences
from tests.support import accepted

# B is none of 3, the prefixes of a bank
CASES: dict[str, tuple[Shape, dict[str, Any]]] = {
    "folds": (Shape(5, 2, 1, 8, 5, 260, 16), {"causal": True, "grad": False}),
    "folds_bank": (Shape(4, 1, 1, 2, 7, 300, 16), {"prefixes": "bank", "lengths": "B", "grad": False}),
    "short": (Shape(4, 1, 1, 40, 50, 25, 16), {"mask": "B11S"}),
    "shares": (Shape(4, 1, 1, 258, 5, 7, 16), {"prefixes": "per_sample", "memory": "as_prefix"}),
    "sinks_and_memory": (Shape(5, 1, 1, 7, 9, 3, 8), {"sinks": "float", "memory": "shared"}),
}
# what the batch changes in a kernel of Triton's, without the switch and with so many processors
SPLIT = {"folds": "out", "folds_bank": "out", "short": "dq", "shares": "dmemory"}
PROCESSORS = {"folds": 1, "folds_bank": 1, "short": 2, "shares": 1}


@pytest.fixture
def invariant() -> Iterator[None]:
    with use_batch_invariant_kernels():
        yield


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the processors of a case. Skips where Triton's kernels are not interpreted."""
    if reasons := backends.here()["triton"]:
        pytest.skip("triton: " + "; ".join(reasons))
    if not INTERPRETED:
        pytest.skip("the cases are cut for a GPU of one processor or two")

    def set_processors(case: str) -> None:
        for name in ("launch_fwd", "launch_bwd"):
            monkeypatch.setattr(f"prefixattn.kernels.{name}.processors", lambda _: PROCESSORS[case])

    return set_processors


def made(case: str) -> Inputs:
    shape, options = CASES[case]
    return make_inputs(shape, torch.float32, **options)


@pytest.mark.parametrize("case", CASES)
def test_a_sample_has_the_same_bits_in_every_batch(backend: str, case: str, invariant: None) -> None:
    if backend == "triton" and INTERPRETED and case in SPLIT:
        pytest.skip("the next test does it, without the switch too")
    inputs = accepted(backend, made(case))
    whole, names = ours(inputs, backend), rows_of_samples(inputs)
    for keep in ([3], [2, 0]):
        assert not differing(whole, ours(samples(inputs, keep), backend), names, keep)


@pytest.mark.parametrize("case", SPLIT)
def test_on_triton_it_is_the_switch_that_does_it(case: str, triton: Callable[[str], None]) -> None:
    """With few processors: without the switch the batch decides how sums are cut."""
    triton(case)
    inputs, differ = made(case), {}
    one = samples(inputs, [3])
    for on in (False, True):
        with use_batch_invariant_kernels(on):
            differ[on] = differing(ours(inputs, "triton"), ours(one, "triton"), rows_of_samples(inputs), [3])
    assert SPLIT[case] in differ[False] and not differ[True]


@pytest.mark.parametrize("on", [False, True])
def test_how_many_share_a_gradient_per_sample(
    on: bool, triton: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of prefixes in float32 have the same bits anyway: their sums are compensated."""
    triton("shares")
    from prefixattn.kernels import launch_bwd

    class Planned(Exception):
        pass

    def stops(*args: Any, plain: Callable[..., int] = launch_bwd._shares) -> int:
        raise Planned(plain(*args))

    monkeypatch.setattr(launch_bwd, "_shares", stops)
    inputs, found = made("shares"), []
    with use_batch_invariant_kernels(on):
        for batch in (inputs, samples(inputs, [2])):
            q, k, v, prefix_k, prefix_v = (batch.tensors[n].detach() for n in ("q", "k", "v", "prefix_k", "prefix_v"))
            call, given = Call(q, k, v, prefix_k, prefix_v), Given(q, None, q, q[..., 0])
            with pytest.raises(Planned) as planned:
                backends.module("triton").bwd(call, given, Needs(prefix_k=True))
            found.append(planned.value.args[0])
        for ends in ([0, 258, 260], [0, 2]):  # packed, where the longest sequence is no reason either
            q, offsets = torch.zeros(1, 1, ends[-1], 16), torch.tensor(ends)
            prefix = torch.zeros(len(ends) - 1, 1, 7, 16)
            call = Call(q, q, q, prefix, prefix, cu_seqlens_q=offsets, cu_seqlens_k=offsets)
            call = call._replace(max_seqlen_q=max(offsets.diff()).item(), max_seqlen_k=258)
            with pytest.raises(Planned) as planned:
                backends.module("triton").bwd(call, Given(q, None, q, q[..., 0]), Needs(prefix_k=True))
            found.append(planned.value.args[0])
    assert found == ([2, 2, 1, 1] if on else [1, 2, 2, 1])


@pytest.mark.parametrize("case", ["folds_bank", "short", "sinks_and_memory"])
def test_under_the_switch_results_are_right(backend: str, case: str, invariant: None) -> None:
    inputs = accepted(backend, made(case))
    assert_all_as_accurate(ours(inputs, backend), same_type(inputs), exact(inputs))


@pytest.mark.parametrize("feature", FEATURES)
def test_the_reference_under_the_switch(feature: str, invariant: None) -> None:
    """Every option: right, in any batch, whatever the layout, a bias and its gradient among them."""
    inputs = make_inputs(Shape(4, 4, 2, 7, 9, 5, 24), torch.float32, **FEATURES[feature])
    found, names = ours(inputs, "reference"), rows_of_samples(inputs)
    assert_all_as_accurate(found, same_type(inputs), exact(inputs))
    if inputs.options.get("prefix_lengths") is None or "bank_sample" in feature or feature == "lengths":
        for keep in ([3], [2, 0]):
            assert not differing(found, ours(samples(inputs, keep), "reference"), names, keep)


def test_dropout_is_the_batchs(backend: str, invariant: None) -> None:
    """Samples have the numbers of their places, so a batch's first ones are what they are without those behind."""
    inputs = make_inputs(Shape(3, 2, 1, 3, 4, 3, 8), prefixes="per_sample")
    inputs.options |= {"dropout_p": 0.3, "prefix_dropout_p": 0.2}
    found = []
    for batch in (inputs, samples(inputs, [0, 1])):
        torch.manual_seed(5)
        found.append(ours(batch, backend))
    assert not differing(found[0], found[1], rows_of_samples(inputs), [0, 1])
    torch.manual_seed(5)
    with use_batch_invariant_kernels(False):
        right = ours(inputs.to(torch.float64), "reference")
    for name, t in right.items():
        torch.testing.assert_close(found[0][name].double(), t.double(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("on", [False, True])
def test_what_others_hold_changes_nothing(backend: str, on: bool) -> None:
    """Not even a nan, and neither does how much of them is padding."""
    inputs = make_inputs(Shape(3, 2, 1, 6, 9, 4, 16), mask="B11S", prefixes="per_sample")
    others = torch.tensor([0, 1])
    changed = {n: t.detach().clone() for n, t in inputs.tensors.items()}
    for t in changed.values():
        t[others] = torch.nan
    mask = inputs.options["attn_mask"].clone()
    mask[others] = mask[others].roll(2, -1) & (torch.arange(9) < 5)
    changed = {n: t.requires_grad_() for n, t in changed.items()}
    beside = replace(inputs, tensors=changed, options={**inputs.options, "attn_mask": mask})
    with use_batch_invariant_kernels(on):
        first, second = ours(inputs, backend), ours(beside, backend)
    for name in rows_of_samples(inputs):
        assert same_bits(first[name][2], second[name][2]), name
        assert not second[name][0].isfinite().all() or name == "mass"


def packed(**options: Any) -> Packed:
    sizes = [3, 20, 1, 6], [5, 24, 9, 6]
    return packed_sequences(sizes, torch.float32, Shape(0, 2, 1, 0, 0, 5, 16), prefixes="per_sample", **options)


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (6, 4)}, {"memory": "as_prefix"}], ids=str)
def test_a_packed_sequence_has_the_same_bits_beside_others(
    backend: str, options: dict[str, Any], invariant: None
) -> None:
    """Beside none too, and whatever the longest is."""
    inputs = packed(**options)
    whole = ours(inputs, backend)
    for keep in ([2], [3, 0]):
        some = sequences(inputs, keep)
        found = ours(some, backend)
        for i, at in enumerate(keep):
            mine, right = of_sequence(found, some, i), of_sequence(whole, inputs, at)
            for name, t in mine.items():
                assert same_bits(t, right[name]), f"{name} of sequence {at} beside {keep}"


def test_on_triton_the_longest_sequence_chooses_nothing(
    triton: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixattn.attention.triton import _readable_call
    from prefixattn.kernels import launch_fwd

    kernels: list[str] = []
    monkeypatch.setattr(launch_fwd.Call, "launch", lambda _, kernel: kernels.append(kernel))
    differ = {}
    for on in (False, True):
        compiled_in = []
        for longest in (1, 40, 600):
            q, offsets = torch.zeros(1, 1, longest, 16, dtype=torch.float16), torch.tensor([0, longest])
            prefix = torch.zeros(1, 1, 70, 16, dtype=torch.float16)
            call = Call(q, q, q, prefix, prefix, is_causal=True, window_left=90, window_right=30)
            packed = {"max_seqlen_q": longest, "max_seqlen_k": longest, "prefix_in_window": True}
            call = call._replace(cu_seqlens_q=offsets, cu_seqlens_k=offsets, **packed)
            with use_batch_invariant_kernels(on):
                readable = _readable_call(call)
                compiled_in.append((readable.features(), readable.rest(64), readable.window))
                kernels.clear()
                with pytest.raises(AssertionError):  # there is no plan
                    launch_fwd.forward(readable, Wants())
                compiled_in[-1] += (kernels[0],)
        differ[on] = [sum(a != b for a in column for b in column) > 0 for column in zip(*compiled_in, strict=True)]
    assert differ == {False: [True] * 4, True: [False] * 4}


def test_the_reference_reads_copies(invariant: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine the bits of products may depend on strides, and on where in memory rows begin."""
    seen: list[torch.Tensor] = []
    plain = reference._fwd
    monkeypatch.setattr(reference, "_fwd", lambda call, *rest: seen.extend(call[:3]) or plain(call, *rest))
    make_inputs(Shape(3, 2, 1, 3, 5, 2, 8), layout="packed", grad=False).call("reference")
    assert len(seen) == 9 and all(t.is_contiguous() and t.storage_offset() == 0 for t in seen)


def test_the_reference_gives_a_packed_sequence_the_bits_of_a_sample(invariant: None) -> None:
    inputs = packed(causal=True, memory="as_prefix")
    whole = ours(inputs, "reference")
    for i in range(4):
        mine = ours(alone(inputs, i), "reference")
        for name, t in of_sequence(whole, inputs, i).items():
            assert same_bits(t, mine[name]), f"{name} of sequence {i}"


def test_it_is_a_switch_and_a_context() -> None:
    assert not batch_invariant()
    use_batch_invariant_kernels()
    try:
        assert batch_invariant()
        with use_batch_invariant_kernels(False):
            assert not batch_invariant()
            with pytest.raises(KeyError), use_batch_invariant_kernels():
                assert batch_invariant()
                raise KeyError
            assert not batch_invariant()
        assert batch_invariant()
    finally:
        use_batch_invariant_kernels(False)
    assert not batch_invariant()


@pytest.mark.parametrize("mode", [1, None, "yes", torch.tensor(True)])
def test_only_a_bool_turns_it(mode: Any) -> None:
    with pytest.raises(ValueError, match="expected a bool"):
        use_batch_invariant_kernels(mode)
    assert not batch_invariant()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_programs_read_it_when_they_run() -> None:
    """Those that were compiled before it was turned too."""
    inputs, seen = make_inputs(Shape(2, 1, 1, 3, 4, 2, 8)), []
    module = backends.module("reference")

    def spied(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            seen.append(batch_invariant())
            return plain(*args)

        return call

    compiled = torch.compile(prefix_attention, backend="aot_eager", fullgraph=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fwd", "bwd"):
            patch.setattr(module, name, spied(getattr(module, name)))
        for on in (False, True):
            with use_batch_invariant_kernels(on):
                compiled(**inputs.tensors, backend="reference").sum().backward()
            assert seen == [on, on]
            seen.clear()
    torch.compiler.reset()


def test_a_graph_does_not_take_it() -> None:
    def call(q: torch.Tensor) -> torch.Tensor:
        with use_batch_invariant_kernels():
            return prefix_attention(q, q, q, q[0], q[0])

    q = torch.ones(1, 1, 2, 8)
    with pytest.raises(Exception, match="call it outside of what is compiled"):
        torch.compile(call, backend="aot_eager", fullgraph=True)(q)
    assert not batch_invariant()
    torch.compiler.reset()


def of_cuda(B: int, T: int) -> Call:
    q, prefix = torch.zeros(1, 1, 2, 64).expand(B, -1, -1, -1), torch.zeros(1, 1, 3, 64).expand(T, -1, -1, -1)
    return Call(q, q, q, prefix, prefix, prefix_ids=None if T in (1, B) else torch.zeros(B, dtype=torch.int64))


def test_the_cuda_kernels_refuse_what_they_cut_by_the_batch() -> None:
    own, split = Needs(prefix_k=True), "gradients of prefixes per sample under use_batch_invariant_kernels"
    large = "B=65536 under use_batch_invariant_kernels; needs 65535 or fewer"
    for on in (False, True):
        with use_batch_invariant_kernels(on):
            assert (split in str(cuda.unsupported(of_cuda(4, 4), own))) == on
            assert (large in str(cuda.unsupported(of_cuda(65536, 1), Needs()))) == on
            for call, needs in ((of_cuda(4, 1), own), (of_cuda(4, 3), own), (of_cuda(4, 4), Needs(q=True))):
                assert "under use_batch_invariant_kernels" not in str(cuda.unsupported(call, needs))


def test_the_cuda_kernels_refuse_it_of_a_backend_that_was_chosen_before(invariant: None) -> None:
    call = of_cuda(4, 4)
    given = Given(call.q, None, call.q, call.q[..., 0])
    with pytest.raises(NotImplementedError, match=r"gradients of prefixes per sample .* \(triton has them\)"):
        cuda.bwd(call, given, Needs(prefix_k=True))
