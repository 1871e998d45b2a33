"""Adapters of PEFT for models whose layers differ in size, or attend to each other's keys."""

from contextlib import nullcontext

import pytest
import torch

import prefixattn
from prefixattn import PrefixConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed: its adapters are not read with it")

from prefixattn.prefixes.config import Defaults  # noqa: E402
from prefixattn.prefixes.geometry import Geometry  # noqa: E402
from prefixattn.prefixes.peft import export, read  # noqa: E402
from prefixattn.testing.models import token_ids  # noqa: E402

P = 4
CLOSE = dict(rtol=1e-5, atol=1e-5)
_COMMON = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
    layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=16, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
)  # fmt: skip
_BY_LAYER = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=50)
_LAUREL = dict(laurel_rank=4, activation_sparsity_pattern=[0.0] * 4)


def _gemma4(key_heads, wide, **sizes):
    more = dict(hidden_size_per_layer_input=0, num_key_value_heads=key_heads, per_layer_config={"1": wide, "3": wide})
    return "Gemma4", "Gemma4TextConfig", more | sizes


# name -> class, config, sizes; then the layers with a prefix and where positions start
MODELS = {
    "gemma3n": (
        "Gemma3n",
        "Gemma3nTextConfig",
        dict(num_key_value_heads=2, num_kv_shared_layers=2) | _BY_LAYER | _LAUREL,
    ),
    "wide": _gemma4(1, {"head_dim": 16}),
    "wide_shared": _gemma4(1, {"head_dim": 16}, num_kv_shared_layers=2, **_BY_LAYER),
    "wide_and_fewer": _gemma4(2, {"head_dim": 16, "num_key_value_heads": 1}),
}
REACHED = {"wide_and_fewer": ((1, 3), "unshifted")}
SHARED = "gemma3n", "wide_shared"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT asks
    pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers"),
]


def model_of(name):
    cls, config, sizes = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, f"{cls}ForCausalLM")(getattr(transformers, config)(**_COMMON | sizes)).eval()


def warns(name):
    """A Gemma 4 that slices its masks, as it does where layers share keys, gets masks that say no window."""
    slices = name == "wide_shared" and hasattr(model_of(name).model, "_maybe_slice_kv_shared_inputs")
    if slices:
        return pytest.warns(UserWarning, match=r"makes its masks itself, and here the prefix stays in sight")
    return nullcontext()


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_peft_gives_its_logits_and_goes_back(name, tmp_path):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    theirs = peft.get_peft_model(model_of(name), config).eval()
    expected = logits_of(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    model = model_of(name)
    plain = logits_of(model)
    with warns(name):
        prefix = prefixattn.load(model, tmp_path / "theirs")
    assert (prefix.config.layers, prefix.config.positions) == REACHED.get(name, ("all", "shifted"))
    torch.testing.assert_close(logits_of(model), expected, **CLOSE)
    assert not torch.allclose(plain, expected, **CLOSE)
    prefix.export_peft(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(model_of(name), tmp_path / "ours").eval()
    torch.testing.assert_close(logits_of(again), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_prefix_that_peft_cannot_have_is_not_written(name, tmp_path):
    layers, positions = REACHED.get(name, ("all", "shifted"))
    model = model_of(name)
    prefix = prefixattn.attach(model, PrefixConfig(P, share="none", layers=layers, positions=positions))
    if name in SHARED:
        with pytest.raises(ValueError, match=r"layers 0 and 2 of a .* attend to the same keys, to which PEFT adds one"):
            prefix.export_peft(tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        with torch.no_grad():
            prefix.encoder.bank[2:] = prefix.encoder.bank[:2]
    prefix.export_peft(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(model_of(name), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(theirs), logits_of(model), **CLOSE)
    other = {"shifted": "unshifted", "unshifted": "shifted"}[positions]
    wrong = prefixattn.attach(model, PrefixConfig(P, share="none", layers=layers, positions=other))
    with pytest.raises(ValueError, match=f"positions is '{other}'; PEFT (always shifts|shifts no) position"):
        wrong.export_peft(tmp_path / "adapter")
    some = prefixattn.attach(model, PrefixConfig(P, share="none", layers=[1], positions=positions))
    with pytest.raises(ValueError, match=r"layers is \(1,\); a PEFT adapter has a prefix in (every layer|the layers)"):
        some.export_peft(tmp_path / "adapter")


def test_an_encoder_decoder_of_several_sizes_is_refused_by_name(tmp_path):
    kinds = {"encoder": 1, "decoder": 1, "cross": 1}
    sizes = [(2, 8, 8), (1, 16, 16), (1, 16, 16)]
    geometry = Geometry.of_layers("t5gemma", sizes, 32, kinds, 4, range(3))
    config = PrefixConfig(P, "none", attentions=("decoder",), positions="shifted")
    for act in (
        lambda: read(tmp_path, geometry, Defaults()),
        lambda: export(tmp_path, config, geometry, torch.zeros(1)),
    ):
        with pytest.raises(NotImplementedError, match=r"layers of t5gemma have keys of several sizes.*encoder-decoder"):
            act()
    assert not list(tmp_path.iterdir())
