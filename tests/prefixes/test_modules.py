"""The modules that make prefixes, without a language model."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from prefixattn import Prefix, PrefixConfig
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.networks import DeepShare, FreePrefix, make_encoder

GEOMETRY = Geometry(model_type="toy", layers=3, kv_heads=2, head_dim=4, width=6)


class ToyAdapter:
    """A model that is nothing but a projection for share="simple"."""

    geometry = GEOMETRY

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.weight = torch.randn(3, 6, 2 * 2 * 4, generator=torch.Generator().manual_seed(3))

    def install(self, prefix: Prefix) -> None: ...

    def remove(self) -> None: ...

    def disabled(self) -> nullcontext[None]:
        return nullcontext()

    def projection_parameters(self, layer: int) -> list[Tensor]:
        return [self.weight]

    def project(self, layer: int, vectors: Tensor) -> Tensor:
        self.calls.append(layer)
        return (vectors @ self.weight[layer]).view(-1, 2, 2, 4).permute(1, 2, 0, 3)


def make_prefix(**choices: object) -> Prefix:
    torch.manual_seed(0)
    config = PrefixConfig(**{"length": 5, "hidden": 7, **choices})  # type: ignore[arg-type]
    return Prefix(config, ToyAdapter(), make_encoder(config, GEOMETRY))


def test_deep_share_lays_out_layer_then_key_or_value_then_head():
    encoder = DeepShare(layers=3, length=5, hidden=7, geometry=GEOMETRY)
    out = encoder.up(torch.tanh(encoder.down(encoder.embedding.weight)))  # [P, N * 2 * Hkv * D]
    kv = encoder()
    assert kv.shape == (3, 2, 2, 5, 4)
    for layer, side, head, d in ((0, 0, 0, 0), (0, 1, 0, 3), (1, 0, 1, 2), (2, 1, 1, 3)):
        column = ((2 * layer + side) * 2 + head) * 4 + d
        torch.testing.assert_close(kv[layer, side, head, :, d], out[:, column])


NETWORKS = {
    "language": {"layers": 3},
    "encoder_decoder": {"layers": 2, "networks": 3},  # self, cross and encoder attention
    "vision": {"layers": 1, "networks": 3, "interleaved": True},
    "gelu": {"layers": 3, "activation": "gelu"},
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_deep_share_fused_equals_its_layers(kind):
    network = DeepShare(length=5, hidden=7, geometry=GEOMETRY, **NETWORKS[kind])
    found = {}
    for fused in (True, False):
        network.fused = fused
        kv = network()
        kv.square().sum().backward()
        found[fused] = [kv.detach(), *(p.grad.clone() for p in network.parameters())]
        network.zero_grad()
        half = network(torch.bfloat16)
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half, kv.to(torch.bfloat16), rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(found[True], found[False])
    assert not torch.equal(found[True][1], torch.zeros_like(found[True][1]))


def test_several_networks_are_drawn_and_run_as_one_each():
    torch.manual_seed(0)
    network = DeepShare(length=500, hidden=40, geometry=GEOMETRY, layers=2, networks=3)
    alone = DeepShare(length=500, hidden=40, geometry=GEOMETRY, layers=2)
    kv, ours, theirs = network(), network.state_dict(), alone.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name][0].std(), theirs[name].std(), rtol=0.4, atol=0)
        assert ours[name].abs().max() <= 6**-0.5 or name == "embedding.weight"
    for g in range(3):
        alone.load_state_dict({name: t[g] for name, t in ours.items()})
        torch.testing.assert_close(alone(), kv[2 * g : 2 * g + 2])


def test_deep_share_keeps_the_names_and_random_numbers_of_its_layers():
    """So that prefixes saved or seeded before the op was there are the same now."""
    torch.manual_seed(0)
    network = DeepShare(layers=3, length=5, hidden=7, geometry=GEOMETRY)
    torch.manual_seed(0)
    layers = {"embedding": nn.Embedding(5, 6), "down": nn.Linear(6, 7), "up": nn.Linear(7, 3 * 2 * 2 * 4)}
    expected = {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.state_dict().items()}
    assert network.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in network.state_dict().items())


def test_deep_share_refuses_in_words():
    sizes = dict(layers=3, length=5, hidden=7, geometry=GEOMETRY)
    with pytest.raises(ValueError, match="activation is 'swish', expected 'tanh', 'relu', 'gelu', 'none'"):
        DeepShare(**sizes, activation="swish")
    with pytest.raises(ValueError, match="networks is 0, expected an integer from 1"):
        DeepShare(**sizes, networks=0)


def test_simple_share_sends_each_layers_rows_through_it_once():
    """P rows, whatever the batch: the vectors are not repeated for samples."""
    prefix = make_prefix(share="simple", length=4)
    seen = []
    project = prefix._adapter.project
    prefix._adapter.project = lambda layer, vectors: (seen.append(vectors.shape), project(layer, vectors))[1]
    pairs = prefix.layer_prefixes(torch.float32, torch.device("cpu"))
    sum((key * value).sum() for key, value in pairs).backward()
    assert seen == [(4, 6)] * 3


def test_gpt2_medium_has_the_published_numbers_of_parameters():
    with torch.device("meta"):
        geometry = Geometry(model_type="gpt2", layers=24, kv_heads=16, head_dim=64, width=1024)
        config = PrefixConfig(length=5, share="deep", hidden=512)
        encoder = make_encoder(config, geometry)
    adapter = ToyAdapter()
    adapter.geometry = geometry
    prefix = Prefix(config, adapter, encoder)
    assert prefix.num_parameters() == 5 * 1024 + 1024 * 512 + 512 + 512 * 49152 + 49152  # 25.74 M
    assert prefix.num_parameters(kept=True) == 245_760


@pytest.mark.parametrize("share", ["deep", "simple", "none"])
def test_a_prefix_of_chosen_layers_has_their_parameters_only(share):
    every, some = make_prefix(share=share), make_prefix(share=share, layers=(0, 2))
    assert every().shape == (3, 2, 2, 5, 4)
    assert some().shape == (2, 2, 2, 5, 4)
    assert some.num_parameters() < every.num_parameters()
    assert some.num_parameters(kept=True) == some().numel()


def test_simple_share_projects_each_layers_vectors_with_that_layer():
    prefix = make_prefix(share="simple", layers=(0, 2))
    kv = prefix()
    adapter = prefix._adapter
    assert adapter.calls == [0, 2]
    keys = prefix.encoder.vectors[1] @ adapter.weight[2][:, :8]  # [P, Hkv * D]
    torch.testing.assert_close(kv[1, 0], keys.view(5, 2, 4).transpose(0, 1))


@pytest.mark.parametrize("share", ["deep", "simple", "none"])
def test_layer_prefixes_are_kv_by_layer(share):
    prefix = make_prefix(share=share)
    kv = prefix()
    pairs = prefix.layer_prefixes(torch.float32, torch.device("cpu"))
    assert len(pairs) == 3
    for layer, (key, value) in enumerate(pairs):
        assert torch.equal(key, kv[layer, 0]) and torch.equal(value, kv[layer, 1])
    sum((key * value).sum() for key, value in pairs).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prefix.parameters())


def count_runs(prefix: Prefix) -> list[int]:
    runs: list[int] = []
    prefix.encoder.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_without_gradients_the_network_runs_once_until_a_parameter_changes():
    prefix, cpu = make_prefix(), torch.device("cpu")
    runs = count_runs(prefix)
    with torch.no_grad():
        first = prefix.layer_prefixes(torch.float32, cpu)
        prefix.layer_prefixes(torch.float32, cpu)
        assert len(runs) == 1
        prefix.encoder.up.bias.add_(1.0)
        second = prefix.layer_prefixes(torch.float32, cpu)
    assert len(runs) == 2
    torch.testing.assert_close(second[0][0], first[0][0] + 1.0)


def test_an_update_that_leaves_no_trace_is_seen_after_a_training_pass():
    prefix, cpu = make_prefix(), torch.device("cpu")
    with torch.no_grad():
        first = prefix.layer_prefixes(torch.float32, cpu)
    prefix.layer_prefixes(torch.float32, cpu)
    prefix.encoder.up.bias.data.add_(1.0)  # moves no version counter
    with torch.no_grad():
        second = prefix.layer_prefixes(torch.float32, cpu)
    torch.testing.assert_close(second[0][0], first[0][0] + 1.0)


def test_other_weights_in_the_frozen_model_are_seen_too():
    prefix, cpu = make_prefix(share="simple"), torch.device("cpu")
    with torch.no_grad():
        first = prefix.layer_prefixes(torch.float32, cpu)
        prefix._adapter.weight.mul_(2.0)
        second = prefix.layer_prefixes(torch.float32, cpu)
    torch.testing.assert_close(second[0][0], 2.0 * first[0][0])


def test_another_type_and_inference_mode_do_not_spoil_what_is_kept():
    prefix, cpu = make_prefix(), torch.device("cpu")
    with torch.inference_mode():
        half = prefix.layer_prefixes(torch.bfloat16, cpu)
        full = prefix.layer_prefixes(torch.float32, cpu)
    assert half[0][0].dtype == torch.bfloat16 and full[0][0].dtype == torch.float32
    assert not full[0][0].is_inference()
    prefix.double()
    with torch.no_grad():
        assert prefix.layer_prefixes(torch.float64, cpu)[0][0].dtype == torch.float64


@pytest.mark.parametrize("share", ["deep", "simple", "none"])
def test_fold_keeps_the_prefixes_and_nothing_else(share):
    prefix = make_prefix(share=share)
    kv = prefix().detach()
    assert prefix.fold() is prefix and prefix.folded
    assert torch.equal(prefix(), kv)
    assert isinstance(prefix.encoder, FreePrefix)
    assert sum(p.numel() for p in prefix.parameters()) == prefix.num_parameters(kept=True)
    assert prefix.num_parameters() == (0 if share != "none" else kv.numel())


def test_the_network_runs_in_its_own_type_under_autocast():
    prefix = make_prefix()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prefix().dtype == torch.float32


REFUSED = {
    "length_zero": (dict(length=0), "length is 0, expected an integer from 1 to 1048576"),
    "length_float": (dict(length=2.5), "length is 2.5, expected an integer"),
    "length_bool": (dict(length=True), "length is True, expected an integer"),
    "hidden": (dict(hidden=-1), "hidden is -1, expected an integer from 1 to 1048576"),
    "length_huge": (dict(length=10**30), "length is 10{30}, expected an integer from 1 to 1048576"),
    "hidden_huge": (dict(hidden=2**20 + 1), "hidden is 1048577, expected an integer from 1 to 1048576"),
    "share": (dict(share="Deep"), "share is 'Deep', expected one of 'deep', 'simple', 'none'"),
    "positions": (dict(positions="moved"), "positions is 'moved', expected one of 'shifted', 'unshifted'"),
    "dropout": (dict(dropout=1.0), r"dropout is 1.0, expected a probability in \[0, 1\)"),
    "layers_word": (dict(layers="last"), "layers is 'last', expected 'all', 'first' or a list"),
    "layers_empty": (dict(layers=[]), r"layers is \[\], expected increasing layer indices"),
    "layers_order": (dict(layers=[2, 1]), r"layers is \[2, 1\], expected increasing layer indices"),
    "layers_number": (dict(layers=3), "layers is 3, expected increasing layer indices"),
    "layers_negative": (dict(layers=[-1]), r"layers is \[-1\], expected increasing layer indices"),
    "init_empty": (
        dict(share="none", init=" "),
        "init is ' ', expected 'random', .* a text, or token ids",
    ),
    "init_no_ids": (
        dict(share="none", init=[]),
        r"init is \[\], expected 'random', .* a text, or token ids",
    ),
    "init_number": (
        dict(share="none", init=7),
        "init is 7, expected 'random', .* a text, or token ids",
    ),
    "init_share": (
        dict(init="summarize", share="simple"),
        "init is 'summarize' with share='simple'; keys and values of a text",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_config_is_refused_in_words(case):
    choices, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        PrefixConfig(**choices)


def test_a_layer_the_model_lacks_is_refused_in_words():
    with pytest.raises(ValueError, match="layers names layer 3, but the model has 3 layers"):
        make_prefix(layers=(1, 3))


def test_a_config_survives_a_dictionary_and_refuses_a_foreign_one():
    config = PrefixConfig(length=3, share="none", layers=[0, 2], init=[7, 8])
    assert PrefixConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"unknown fields \['size'\] and lacks \['length'\]"):
        values = config.to_dict()
        PrefixConfig.from_dict({"size": values.pop("length"), **values})
