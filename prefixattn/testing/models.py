"""What tests and benchmarks of attached models share: small random models, inputs, and the model that concatenates."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import sdpa_mask

from prefixattn.attach.hf.adapter import HuggingFaceAdapter
from prefixattn.attach.prefix import Prefix

CONCAT = "concat_for_tests"
VOCABULARY = 50

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,  # unequal depths
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 24,
    "patch_size": 8,
}
_WINDOW = {"sliding_window": 5}
_EXPERTS = {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
_LATENT = {  # keys of 12 + 4 numbers, values of 12; layers without experts, as DeepSeek's first ones are
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "first_k_dense_replace": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
_WIDE_HEADS = {"head_dim": 16}  # not hidden_size / heads
# name -> class of the model, class of its config, sizes
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER | _WINDOW),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER | _WIDE_HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _DECODER | _WIDE_HEADS | _WINDOW),  # with softcap
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _DECODER | _WIDE_HEADS | _WINDOW),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", _DECODER | _WIDE_HEADS | _WINDOW | _EXPERTS),  # with sinks
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", _DECODER | _LATENT),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _DECODER | _LATENT),
    "vit": ("ViTForImageClassification", "ViTConfig", _VIT),
    "bert": ("BertForSequenceClassification", "BertConfig", _ENCODER),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _ENCODER),
}
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss", "deepseek_v2", "deepseek_v3")
ENCODER_DECODERS = ("bart", "t5")


def tiny_gpt2(seed: int = 0, cls: Any = GPT2LMHeadModel, **choices: Any) -> Any:
    """A GPT-2 of 2 layers, 2 heads, width 32, 64 positions and 50 tokens, 0 being beginning, end and padding."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": VOCABULARY}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    # Weights larger than the usual 0.02, or a prefix would hardly move the logits.
    model = cls(GPT2Config(**{**sizes, **special, "initializer_range": 0.2, **choices})).eval()
    model.loss_type = "ForCausalLM"  # transformers logs a warning without it, which no compiler can trace
    return model


def tiny(family: str, seed: int = 0, **choices: Any) -> Any:
    """A random model of a family, in evaluation mode: 2 layers of width 32, and 3 in BART's encoder."""
    if family == "gpt2":
        return tiny_gpt2(seed, **choices)
    torch.manual_seed(seed)
    library = importlib.import_module("transformers")
    cls, config, sizes = FAMILIES[family]
    scale = {"bart": "init_std", "t5": "initializer_factor"}.get(family, "initializer_range")
    spread = 1.0 if family == "t5" else 0.2
    return getattr(library, cls)(getattr(library, config)(**{scale: spread, **sizes, **choices})).eval()


def token_ids(batch: int = 3, length: int = 9, seed: int = 1) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randint(1, VOCABULARY, (batch, length), generator=generator, device="cpu")
    return drawn.to(torch.get_default_device())


def model_inputs(family: str, batch: int = 3) -> dict[str, Tensor]:
    """Tokens or images, and for an encoder-decoder targets of another length."""
    if family == "vit":
        return {"pixel_values": torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(1))}
    inputs = {"input_ids": token_ids(batch)}
    if family in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = token_ids(batch, 6, seed=2)
    return inputs


def concat_attention(
    module: Any,
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, Hkv, S, D]
    value: Tensor,
    attention_mask: Tensor | None,  # [B, 1, L, S]; Whisper's encoder makes none
    scaling: float = 1.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,  # sinks [H]
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The definition: the prefix in front of the keys, expanded over the batch, under an explicit mask."""
    kv, P = getattr(module, "reference_prefix", None), 0  # [Hkv, P, D], [Hkv, P, Dv]
    if kv is not None:
        P = kv[0].shape[1]
        key, value = (torch.cat([p.expand(len(x), -1, -1, -1), x], 2) for p, x in zip(kv, (key, value), strict=True))
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + nn.functional.pad(position_bias, (P, 0))
    if attention_mask is None:
        attention_mask = scores.new_ones(*scores.shape[2:], dtype=torch.bool)[..., P:]
    mask = nn.functional.pad(attention_mask, (P, 0), value=True)
    window = getattr(module, "reference_window", None)  # of keys; the prefix lies in it, and there is no cache
    if window is not None:
        query, row = torch.arange(mask.shape[2])[:, None], torch.arange(P)
        mask[..., :P] &= row - P > query - window
    scores = scores.masked_fill(~mask, float("-inf"))
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[:, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : mask.shape[-1]]
    out = (weights @ value.repeat_interleave(group, 1)).transpose(1, 2)  # [B, L, H, D]
    added = getattr(module, "reference_added", None)  # of the queries [B, H, L, D]
    return (out if added is None else out + added(query)), None


def concat_mask(**kwargs: Any) -> Tensor:
    always = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor = sdpa_mask(**{**kwargs, **always})
    return mask


AttentionInterface.register(CONCAT, concat_attention)
AttentionMaskInterface.register(CONCAT, concat_mask)


def concatenate(model: Any) -> None:
    """Has every layer attend by concatenation; older transformers do not tell T5's stacks, whose configs are copies."""
    model.set_attn_implementation(CONCAT)
    for module in model.modules():
        if "config" in module.__dict__:
            module.config._attn_implementation = CONCAT


def concat_twin(model: Any, prefix: Prefix) -> Any:
    """A copy of the plain model that concatenates the prefix; gradients reach the prefix's parameters."""
    adapter = prefix._adapter
    assert isinstance(adapter, HuggingFaceAdapter)
    twin = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()
    twin.load_state_dict(model.state_dict())
    twin.loss_type = model.loss_type
    concatenate(twin)
    base = getattr(twin, twin.base_model_prefix, twin)
    if prefix.config.prefix_in_window:
        for slot, window in adapter.windows.items():
            base.get_submodule(adapter.sites[slot].path).reference_window = window
    for slot, kv, length in zip(prefix.slots, prefix(), prefix.lengths, strict=True):
        D, (h, d, dv) = prefix.geometry.head_dim, prefix.geometry.of(slot)
        key, value = (kv[0, ..., :D], kv[0, ..., D:]) if len(kv) == 1 else kv
        key, value = key[:h, :, :d], value[:h, :, :dv]
        base.get_submodule(adapter.sites[slot].path).reference_prefix = key[:, :length], value[:, :length]
    return twin
