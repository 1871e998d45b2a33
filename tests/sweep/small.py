"""Small configs: every size field that is known by its name gets a small number, and so in the configs inside."""

import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

WIDTH, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCABULARY, POSITIONS = 64, 96, 4, 2, 16, 2, 99, 64
IMAGE, PATCH = 32, 8
PAD, BOS, EOS, START = 0, 1, 2, 3
FIRST_SPECIAL = 80  # ids of images and the like

Rule = tuple[str, Callable[[Any], Any]]


def _fixed(value: int) -> Callable[[Any], Any]:
    return lambda old: value


def _at_most(value: int) -> Callable[[Any], Any]:
    return lambda old: min(old, value)


# First match counts. Only for whole numbers; the whole name must match.
CORE: list[Rule] = [
    (r"(\w*_)?vocab_size(_\w+)?", _at_most(VOCABULARY)),
    (r"num_hidden_layers|n_layers?|num_layers|depth|(en|de)coder_(num_hidden_)?layers|layers", _at_most(LAYERS)),
    (r"num_(en|de)coder_layers|(num_)?decoder_(num_)?layers|(de|en)coder_num_layers|\w+_(de|en)coder_layers", _at_most(LAYERS)),
    (r"(\w*_)?num_hidden_layers|resampler_depth|num_layers_per_stack|num_(spatial|temporal|auxiliary)_layers", _at_most(LAYERS)),
    (r"(\w+_)?num_key_value_(attention_)?heads|(\w+_)?num_kv_heads|kv_n_heads", _at_most(KV_HEADS)),
    (r"(\w+_)?(num_)?attention_heads|(\w+_)?num_heads|n_heads?|(\w+_)?attention_heads|encoder_heads", _at_most(HEADS)),
    (r"resampler_n?_?heads|swa_num_attention_heads|num_(self|cross)_attention_heads", _at_most(HEADS)),
    (r"qk_rope_head_dim", _at_most(8)),
    (r"(\w+_)?(head_dim|dim_head|attention_head_dim|kv_channels|d_kv|d_head|attention_head_size)", _at_most(HEAD_DIM)),
    (r"(kv|q|o)_lora_rank", _at_most(32)),
    (r"(\w*_)?(intermediate_size|ffn_dim|mlp_dim|d_ff|n_inner|dim_ff|dim_feedforward|feedforward_dim)(_\w+)?", _at_most(FFN)),
    (r"(expert_)?ffn_hidden_size|feed_forward_(hidden_)?size|share_expert_dim|\w+_mlp_dim", _at_most(FFN)),
    (r"hidden_size_per_layer_input", _at_most(16)),
    (r"(\w+_)?hidden_size|d_model|n_embd|hidden_dim|(\w+_)?embed_dim|dim|embedding_size|word_embed_proj_dim", _at_most(WIDTH)),
    (r"(\w+_)?(projection|project|proj|output|hidden|vision|text|query|latent)_dim|projection_size|proj_size|lru_width", _at_most(WIDTH)),
    (r"(left_|right_)?max_position_embeddings|n_positions|n_ctx|max_(source|target|encoder|decoder)_positions?(_embeddings)?", _at_most(POSITIONS)),
    (r"max_seq_len|max_sequence_length|position_embedding_size|t2u_max_position_embeddings|model_max_length|seq_len", _at_most(POSITIONS)),
    (r"(\w*_)?(num_experts|num_local_experts|n_routed_experts|moe_num_experts|zero_expert_num|num_routed_experts)", _at_most(4)),
    (r"(\w*_)?(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|router_top_k|experts_top_k)", _at_most(2)),
    (r"n_groups?|topk_groups?|num_expert_groups?|moe_router_num_groups", _at_most(1)),
    (r"first_k_dense_replace|num_dense_layers|num_kv_shared_layers", _at_most(0)),
    (r"sliding_window(_size)?|attention_chunk_size|attention_window_size|local_attention", _at_most(4)),
]
MORE: list[Rule] = [
    (r"(\w+_)?image_size|img_size|input_size|crop_size|pretrain_image_size", _at_most(IMAGE)),
    (r"(\w+_)?patch_size", _at_most(PATCH)),
    (r"num_frames|frames_per_clip|tubelet_frames", _at_most(4)),
    (r"num_conv_pos_embeddings", _at_most(16)),
    (r"num_conv_pos_embedding_groups", _at_most(4)),
    (r"num_mel_bins|feature_size|input_feat_per_channel|mel_dim|feature_projection_input_dim|input_dim", _at_most(32)),
    (r"(\w+_)?window_size|attention_context_\w+", _at_most(4)),
    (r"attention_window|local_attention_window_len", _at_most(4)),
    (r"num_(query_tokens|queries|latents|image_tokens)|image_seq_length|mm_tokens_per_image", _at_most(4)),
    (r"index_(n_heads|topk)|linear_num_(key|value)_heads|linear_num_heads|mamba_n_heads|mamba_num_heads", _at_most(4)),
    (r"(mamba_)?(d_)?state(_size|_dim)?|mamba_d_state|ssm_state_size|time_step_rank|mamba_d_head|mamba_headdim|mamba_head_dim", _at_most(16)),
    (r"(mamba_)?chunk_size|mamba_chunk_size", _at_most(8)),
    (r"(codebook|codevector|proj_codevector)_(size|dim)|num_codevectors_per_group|classifier_proj_size|tdnn_dim", _at_most(32)),
    (r"(\w+_)?channels?_?(size|dim)?|num_filters|conv_channels|output_channels|fusion_hidden_size", lambda old: old if old < 64 else 32),
    (r"coordinate_size|shape_size", _at_most(WIDTH // 6)),
    (r"num_(position|temporal)_embeddings", _at_most(16)),
    (r"num_feature_levels|\w+_n_points", _at_most(2)),
    (r"(\w+_)?(_dim|_size|_width)", _at_most(WIDTH)),
]
KEPT = re.compile(
    r"kernel|stride|token_id|merge_size|conv_dim_|num_labels|chunk_size_feed_forward|type_vocab|spatial|temporal_patch|"
    r"global_attn|position_id|num_codebooks|num_quantizers|group_size|mask_feature|mask_time|sampling|batch_size"
)
_STAGES = re.compile(r"depths|n_attn_blocks|layer_list|stage_num_blocks|num_block_repeats|block_repeats|blocks_per_stage|block_sizes")
_DROP = re.compile(r"\w*layer_?drop|drop_path_rate|drop_path|drop_connect_rate|stochastic_depth\w*")


class Special:
    """Ids for special tokens, each another."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        known = {"pad": PAD, "bos": BOS, "eos": EOS, "decoder_start": START}.get(re.sub(r"_token_(id|index)$", "", name))
        if known is not None:
            return known
        key = re.sub(r"_(id|index)$", "", name)
        return self.ids.setdefault(key, FIRST_SPECIAL + len(self.ids) % (VOCABULARY - FIRST_SPECIAL))


def small(cls: Any, more: bool = True, special: Special | None = None, **choices: Any) -> PreTrainedConfig:
    """A small config of the class; `more` shrinks also what is not of the layers' own sizes."""
    return cls(**{**shrunk(cls(), more, special or Special()), **choices})


def shrunk(default: PreTrainedConfig, more: bool, special: Special) -> dict[str, Any]:
    """The fields that differ from the default config's."""
    fields = {n: v for n, v in vars(default).items() if not n.startswith("_")}
    old_layers = {v for n, v in fields.items() if type(v) is int and re.fullmatch(CORE[1][0] + "|num_hidden_layers", n)}
    changed: dict[str, Any] = {}
    layers = LAYERS
    kinds = {n: v for n, v in fields.items() if _is_kinds(v) and len(v) in old_layers}
    for name, value in kinds.items():
        layers = max(layers, len(dict.fromkeys(value)))
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            changed[name] = small(type(value), more, special, **_kept_inside(value))
        elif name in kinds:
            distinct = list(dict.fromkeys(value))
            changed[name] = (distinct * layers)[:layers]
        elif isinstance(value, bool) or value is None:
            if name == "pad_token_id":
                changed[name] = PAD
        elif re.fullmatch(r"\w*token_(id|index)", name) and isinstance(value, int):
            if value >= FIRST_SPECIAL or (name[:3] in ("bos", "eos") and value < 0):
                changed[name] = special(name)
        elif name == "eos_token_id" and isinstance(value, list):
            changed[name] = EOS
        elif isinstance(value, float) and _DROP.fullmatch(name):
            changed[name] = 0.0
        elif isinstance(value, (int, list, tuple, dict)):
            new = _number(name, value, more, layers, old_layers)
            if new != value:
                changed[name] = new
    for name in ("apply_spec_augment",):
        if name in fields:
            changed[name] = False
    return changed


def _kept_inside(config: PreTrainedConfig) -> dict[str, Any]:
    return {n: True for n in ("is_decoder", "add_cross_attention", "is_encoder_decoder") if getattr(config, n, False)}


def _is_kinds(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, str) for v in value)


def _number(name: str, value: Any, more: bool, layers: int, old_layers: set[int]) -> Any:
    if isinstance(value, dict):
        return _rope(value) if "rope" in name else value
    if isinstance(value, (list, tuple)):
        return _several(name, value, more, layers, old_layers)
    if KEPT.search(name) and not name.startswith("vocab"):
        return value
    for pattern, rule in CORE + (MORE if more else []):
        if re.fullmatch(pattern, name):
            new = rule(value) if value > 0 else value
            return layers if value > 0 and new == LAYERS and pattern == CORE[1][0] else new
    return value


def _several(name: str, value: Any, more: bool, layers: int, old_layers: set[int]) -> Any:
    kind = type(value)
    if _STAGES.fullmatch(name):
        return kind([1] * len(value))
    if len(value) in old_layers and len(value) > layers:
        return kind(value[:layers])
    if not more or not value or not all(type(v) is int for v in value):
        return value
    if re.search(r"(image|img|crop|input)_size", name):
        return kind([min(v, IMAGE) for v in value])
    if re.search(r"patch_size$|tubelet", name):
        return kind([min(v, PATCH) for v in value])
    if re.search(r"index|indices|_layers?$|layer_ids|out_features", name):
        return kind(sorted({min(v, layers - 1) for v in value})) if max(value) >= layers else value
    if name == "num_heads" and max(value) > 8:  # of stages, each twice as wide as the one before
        return kind([2**i * 2 for i in range(len(value))])
    if re.search(r"dim|channel|hidden_size|embed", name) and min(value) >= 256:
        return kind([v // 8 for v in value])
    return value


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, dict):
            out[name] = _rope(value)
        elif name == "mrope_section":
            out[name] = [4, 2, 2] if len(value) == 3 else [HEAD_DIM // 2 // len(value)] * len(value)
        elif name in ("short_factor", "long_factor"):
            out[name] = [1.0] * (HEAD_DIM // 2)
        elif name == "original_max_position_embeddings":
            out[name] = min(value, POSITIONS // 2)
        else:
            out[name] = value
    return out
