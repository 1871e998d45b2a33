"""A network that an optimizer owns: one leaf for a state of the parameters, and what comes back through it."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.prefixes import networks
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.networks import DeepShare
from prefixattn.prefixes.ownership import Hidden
from prefixattn.reparam import reference

GEOMETRY = Geometry(model_type="toy", layers=3, kv_heads=2, head_dim=4, width=6)
# torch's own: Dynamo makes an autograd.Function's context by calling the class; Inductor still uses TorchScript
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*"),
]
KINDS = {
    "one": {"layers": 3},
    "three": {"layers": 2, "networks": 3},
    "per_layer": {"layers": 1, "networks": 3, "interleaved": True, "activation": "gelu"},
}


class Owner:
    """An optimizer's part in it: takes what arrives, and can make ordinary gradients of it."""

    def __init__(self, *networks: DeepShare) -> None:
        self.arrived: list[tuple[DeepShare, Tensor, Hidden]] = []
        for network in networks:
            network.take_over(self.receive)

    def receive(self, network: DeepShare, dkv: Tensor, made: Hidden) -> None:
        self.arrived.append((network, dkv, made))

    def gradients(self) -> list[Tensor]:
        """Of the network's parameters, summed over all that arrived."""
        total = None
        for network, dkv, made in self.arrived:
            x, _, _, w2, _ = (t.detach() for t in network.operands())
            dy = reference.rows_of(dkv, network.form, len(x), x.dtype)
            grads = (*made.pull(dy @ w2, network.parameters_in_order()[:3]), dy.mT @ made.h, dy.sum(1))
            total = grads if total is None else tuple(map(torch.add, total, grads))
        assert total is not None
        return [grad.view_as(p) for grad, p in zip(total, network.parameters_in_order(), strict=True)]


def make(kind: str = "one") -> DeepShare:
    torch.manual_seed(0)
    return DeepShare(length=5, hidden=7, geometry=GEOMETRY, **KINDS[kind])  # type: ignore[arg-type]


def ordinary(network: DeepShare, *weights: Tensor) -> list[Tensor]:
    for weight in weights:
        (network(weight.dtype) * weight).sum().backward()
    grads = [p.grad.clone() for p in network.parameters_in_order()]
    network.zero_grad()
    return grads


def weights(count: int = 2, dtype: torch.dtype = torch.float32, kind: str = "one") -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = make(kind)().shape
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_arrives_makes_the_ordinary_gradients(kind: str, dtype: torch.dtype) -> None:
    network, given = make(kind), weights(3, dtype, kind)
    right = ordinary(network, *given)
    plain = network(dtype).detach()
    owner = Owner(network)
    for weight in given:
        kv = network(dtype)
        assert torch.equal(kv, plain) and kv.dtype == dtype and kv.is_leaf
        (kv * weight).sum().backward()
        assert kv.grad is None
    assert all(p.grad is None for p in network.parameters())
    assert [dkv.dtype for _, dkv, _ in owner.arrived] == [dtype] * 3
    assert all(made is owner.arrived[0][2] for _, _, made in owner.arrived)
    torch.testing.assert_close(owner.gradients(), right)


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    runs: list[int] = []
    run = networks.kv_and_z
    monkeypatch.setattr(networks, "kv_and_z", lambda *args: (runs.append(1), run(*args))[1])
    return runs


def changes(network: DeepShare) -> dict[str, object]:
    state = {name: t + 1 for name, t in network.state_dict().items()}

    def in_place() -> None:
        with torch.no_grad():
            network.down.bias.add_(1.0)

    def through_a_pointer() -> None:
        network.up.weight.data.add_(1.0)
        torch.autograd.graph.increment_version(network.up.weight)

    def replaced() -> None:
        network.up.weight = nn.Parameter(network.up.weight.detach() + 1)

    return {
        "in_place": in_place,
        "through_a_pointer": through_a_pointer,
        "loaded": lambda: network.load_state_dict(state),
        "assigned": lambda: network.load_state_dict(state, assign=True),
        "replaced": replaced,
        "of_another_type": lambda: network.double(),
    }


@pytest.mark.parametrize("change", changes(make()))
def test_the_leaf_is_made_once_until_a_parameter_changes(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, runs = make(), count_runs(monkeypatch)
    owner = Owner(network)
    first = network()
    assert network() is first and network.leaf(torch.float32) is first and len(runs) == 1
    changes(network)[change]()  # type: ignore[operator]
    second = network()
    assert second is not first and len(runs) == 2
    owner.arrived.clear()
    assert not torch.equal(second, first) or change == "of_another_type"
    network.release()
    torch.testing.assert_close(second.detach(), network().detach())


def test_a_backward_pass_after_a_change_is_refused() -> None:
    network = make()
    owner = Owner(network)
    loss = network().sum()
    with torch.no_grad():
        network.up.bias.add_(1.0)
    with pytest.raises(RuntimeError, match="was changed between a forward pass and its backward pass; call backward"):
        loss.backward()
    assert not owner.arrived
    network().sum().backward()  # and the next one works
    assert len(owner.arrived) == 1


def test_without_gradients_no_leaf_is_handed_out() -> None:
    network = make()
    owner = Owner(network)
    with torch.no_grad():
        assert not network().requires_grad
    with torch.inference_mode():
        assert network().is_inference()
    assert not network().is_inference()
    assert not owner.arrived


def test_when_the_optimizer_goes_the_ordinary_gradients_come_back() -> None:
    network, given = make(), weights(2)
    right = ordinary(network, *given)
    owner = Owner(network)
    loss = (network() * given[0]).sum()
    del owner
    gc.collect()
    assert not network.factored
    loss.backward()  # the forward pass was the optimizer's
    (network() * given[1]).sum().backward()
    torch.testing.assert_close([p.grad for p in network.parameters_in_order()], right)


def test_another_optimizer_takes_it_from_the_first() -> None:
    network = make()
    first, second = Owner(network), Owner(network)
    network().sum().backward()
    assert (len(first.arrived), len(second.arrived)) == (0, 1)
    del first
    gc.collect()
    assert network.factored
    network.release()
    assert not network.factored
    network().sum().backward()
    assert network.up.weight.grad is not None and len(second.arrived) == 1


def test_neither_keeps_the_other_alive() -> None:
    network = make()
    owner = Owner(network)
    network().sum().backward()
    gone = weakref.ref(network), weakref.ref(owner)
    owner.arrived.clear()
    gc.disable()  # by counting alone: what autograd holds no collector sees
    try:
        del owner
        assert gone[1]() is None
        del network
        assert gone[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_is_nobodys(way) -> None:
    network = make()
    owner = Owner(network)
    network()
    twin = way(network)
    assert network.factored and not twin.factored
    twin().sum().backward()
    assert not owner.arrived and twin.up.weight.grad is not None


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("why", ["frozen", "unfused", "parametrized", "functional"])
def test_what_cannot_be_factored_is_recorded(why: str, compiled: bool) -> None:
    torch.compiler.reset()
    network = make()
    owner = Owner(network)
    if why == "frozen":
        network.up.weight.requires_grad_(False)
    elif why == "unfused":
        network.fused = False
    elif why == "parametrized":
        nn.utils.parametrizations.weight_norm(network.down)
    tensors = {name: p.detach().requires_grad_() for name, p in network.named_parameters()}
    if why == "functional" and not compiled:
        grads = torch.func.grad(lambda t: torch.func.functional_call(network, t, ()).square().sum())(tensors)
        assert all(grad.any() for grad in grads.values())
    if why == "functional":

        def call() -> Tensor:
            return torch.func.functional_call(network, tensors, ())  # type: ignore[no-any-return]

        call = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
        call().square().sum().backward()
        assert all(t.grad is not None for t in tensors.values())
    else:
        call = torch.compile(network, fullgraph=True, backend="aot_eager") if compiled else network
        assert not network.factored
        call().square().sum().backward()
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    assert not owner.arrived


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_it_arrives_all_the_same(compiler: str) -> None:
    torch.compiler.reset()
    network, given = make(), weights(2)
    right, plain = ordinary(network, *given), network().detach()
    owner = Owner(network)
    call = torch.compile(lambda weight: (network() * weight).sum(), fullgraph=True, backend=compiler)
    for weight in given:
        loss = call(weight)
        torch.testing.assert_close(loss.detach(), (plain * weight).sum())
        loss.backward()
    assert all(p.grad is None for p in network.parameters()) and len(owner.arrived) == 2
    torch.testing.assert_close(owner.gradients(), right)
    del owner
    gc.collect()
    call(given[0]).backward()
    call(given[1]).backward()
    torch.testing.assert_close([p.grad for p in network.parameters_in_order()], right)


CONFIG = PrefixConfig(length=5, hidden=16)


def attached(checkpoints: str = "", **choices: object) -> tuple[nn.Module, prefixattn.Prefix, Tensor]:
    pytest.importorskip("transformers")
    from prefixattn.testing.models import tiny_gpt2, token_ids

    model = tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **choices).train()
    torch.manual_seed(0)
    made = prefixattn.attach(model, CONFIG)
    if checkpoints:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": checkpoints == "reentrant"})
    return model, made, token_ids(4)


def steps(model: nn.Module, ids: Tensor, pieces: int) -> None:
    for piece in ids.chunk(pieces):
        model(piece, labels=piece, use_cache=False).loss.backward()


@pytest.mark.parametrize("checkpoints", ["", "reentrant", "non_reentrant"])
def test_in_a_model_micro_batches_share_one_run(checkpoints: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, ids = attached(checkpoints)
    steps(model, ids, 2)
    right = [p.grad.clone() for p in made.encoder.parameters_in_order()]
    made.zero_grad()
    owner, runs = Owner(made.encoder), count_runs(monkeypatch)
    steps(model, ids, 2)
    assert (len(runs), len(owner.arrived)) == (1, 2)
    assert all(p.grad is None for p in made.parameters())
    torch.testing.assert_close(owner.gradients(), right)


def test_in_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    model, made, ids = attached()
    steps(model, ids, 1)
    right = [p.grad.clone() for p in made.encoder.parameters_in_order()]
    made.zero_grad()
    owner = Owner(made.encoder)
    call = torch.compile(lambda x: model(x, labels=x, use_cache=False).loss, fullgraph=True, backend="aot_eager")
    call(ids).backward()
    assert len(owner.arrived) == 1 and all(p.grad is None for p in made.parameters())
    torch.testing.assert_close(owner.gradients(), right)


def test_decoding_between_micro_batches_disturbs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, ids = attached()
    owner = Owner(made.encoder)
    steps(model, ids, 1)
    right, kv = owner.gradients(), made.encoder()
    owner.arrived.clear()
    loss = model(ids, labels=ids, use_cache=False).loss
    with torch.no_grad():
        model.eval().generate(ids, max_new_tokens=3, do_sample=False)
    model.train()
    loss.backward()
    assert made.encoder() is kv
    torch.testing.assert_close(owner.gradients(), right)


def test_in_a_half_precision_model_the_leaf_has_its_type() -> None:
    model, made, ids = attached()
    model.bfloat16()
    owner = Owner(made.encoder)
    steps(model, ids, 1)
    [(_, dkv, made)] = owner.arrived
    assert (dkv.dtype, made.h.dtype) == (torch.bfloat16, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.float()(ids, labels=ids, use_cache=False).loss.backward()
    assert owner.arrived[-1][1].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_the_layers_in_a_model(dtype: torch.dtype) -> None:
    found = {}
    for fused in (True, False):
        model, made, ids = attached()
        made.encoder.fused = fused
        model.to(dtype)
        out = model(ids, labels=ids, use_cache=False)
        out.loss.backward()
        found[fused] = [out.logits.detach(), *(p.grad for p in made.encoder.parameters_in_order())]
    close = dict(rtol=1e-4, atol=1e-6) if dtype == torch.float32 else dict(rtol=0.05, atol=2e-3)
    torch.testing.assert_close(found[True], found[False], **close)
