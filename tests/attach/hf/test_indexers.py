"""Models that choose which keys each query may see: DeepSeek V3.2 key by key, MiniMax M3 by blocks."""

import pytest
import torch

import prefixattn
from prefixattn import PrefixConfig

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers

from prefixattn.attach.hf.interface import PLAIN
from prefixattn.testing.models import FAMILIES, token_ids

CLOSE = dict(rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(not hasattr(transformers, "DeepseekV32Config"), reason="this transformers has no DeepSeek V3.2")
@pytest.mark.parametrize("chosen", [3, 64])
def test_keys_that_an_indexer_leaves_out_stay_out(chosen):
    """DeepSeek V3.2 hands the keys that each query may see to attentions that it does not know."""
    torch.manual_seed(0)
    sizes = FAMILIES["deepseek_v3"][2] | {"index_topk": chosen, "index_n_heads": 2, "index_head_dim": 8}
    config = transformers.DeepseekV32Config(**sizes, initializer_range=0.2)
    model, ids = transformers.DeepseekV32ForCausalLM(config).eval(), token_ids(2)
    plain = model(ids, use_cache=False).logits
    prefix = prefixattn.attach(model, PrefixConfig(3, share="none"))
    with prefix._adapter.overriding(PLAIN):
        torch.testing.assert_close(model(ids, use_cache=False).logits, plain, **CLOSE)
    out = model(ids, use_cache=False).logits
    assert not torch.allclose(out, plain, atol=0.1)
    mass = prefix.mass(ids, use_cache=False)
    with torch.no_grad():
        prefix.encoder.bank[..., :16] = 0  # every prefix key scores 0
        for layer in model.model.layers:  # and so does every own key
            layer.self_attn.q_b_proj.weight.zero_()
    seen = torch.arange(1, 10).clamp(max=chosen)
    torch.testing.assert_close(prefix.mass(ids, use_cache=False), (3 / (3 + seen)).expand_as(mass), **CLOSE)


@pytest.mark.skipif(not hasattr(transformers, "MiniMaxM3VLTextConfig"), reason="this transformers has no MiniMax M3")
def test_blocks_of_keys_are_refused_where_some_are_left_out():
    sizes = FAMILIES["llama"][2] | {"head_dim": 8, "rotary_dim": 8, "dense_intermediate_size": 48}
    sizes |= {"index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4}
    sizes |= {"layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense"] * 2}
    torch.manual_seed(0)
    config = transformers.MiniMaxM3VLTextConfig(**sizes, index_topk_blocks=2, initializer_range=0.2)
    model, ids = transformers.MiniMaxM3VLForCausalLM(config).eval(), token_ids(2)
    prefix = prefixattn.attach(model, PrefixConfig(3, share="none"))
    with torch.no_grad():
        model(ids[:, :8], use_cache=False)
        with pytest.raises(NotImplementedError, match=r"lets a query see 2 blocks of 4 keys; .* there are 9"):
            model(ids, use_cache=False)
        with prefix.disabled():
            model(ids, use_cache=False)
