"""Small configs: every size field that is known by its name gets a small number, and so in the configs inside."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

WIDTH, FFN, HEADS, HEAD_DIM, VOCABULARY, POSITIONS = 64, 96, 4, 16, 99, 64
IMAGE, PATCH, ROPE = 32, 8, 8
PAD, BOS, EOS, START = 0, 1, 2, 3
FIRST_SPECIAL = 80  # ids of images and the like


class Sizes(NamedTuple):
    """What differs between the tries for one class."""

    layers: int = 2
    kv_heads: int = 2
    mrope: int = HEAD_DIM // 2  # the sum of its sections
    more: bool = True  # what is not of the layers' own sizes, too
    given: bool = False  # sizes that the default config leaves out


Rule = tuple[str, int | Callable[[Any], Any]]  # a function, or the most it may be
_LAYERS = (
    r"num_hidden_layers|n_layers?|num_layers|depth|layers|(num_)?(en|de)coder_(num_)?(hidden_)?layers|\w+_(de|en)coder_layers|"
    r"num_(spatial|temporal|auxiliary|attention)_layers|resampler_depth|num_layers_per_stack|\w+_num_(hidden_)?layers|[lxr]_layers"
)
# The first match counts, of the whole name; whole numbers only.
CORE: list[Rule] = [
    (r"(\w*_)?vocab(ulary)?(_size)?(_per_layer_input|s)?|n_words|additional_vocab_size|src_vocab_size", VOCABULARY),
    (r"mamba_n_heads|mamba_num_heads", 2 * WIDTH // 16),
    (
        r"(\w+_)?(num_attention_heads|num_heads|n_heads?|attention_heads|attn_heads|encoder_heads|resampler_heads)",
        HEADS,
    ),
    (r"qk_rope_head_dim|rotary_dim", ROPE),
    (r"(\w+_)?(head_dim|dim_head|attention_head_dim|kv_channels|d_kv|d_head|attention_head_size)", HEAD_DIM),
    (r"(kv|q|o)_lora_rank", WIDTH // 2),
    (
        r"(\w*_)?(intermediate_size|ffn_dim|mlp_dim|d_ff|n_inner|dim_ff|dim_feedforward|feedforward_dim|ffn_hidden_size)(_mlp)?",
        FFN,
    ),
    (r"feed_forward_(hidden_)?size|share_expert_dim", FFN),
    (r"hidden_size_per_layer_input", 16),
    (
        r"(\w+_)?hidden_size|d_model|n_embd|hidden_dim|emb_dim|(\w+_)?embed_dim|dim|embedding_size|word_embed_proj_dim",
        WIDTH,
    ),
    (
        r"(\w+_)?(projection|project|proj|output|hidden|vision|text|query|latent|condition)_dim|proj(ection)?_size|lru_width",
        WIDTH,
    ),
    (
        r"(\w+_)?max_position_embeddings|n_positions|n_ctx|max_(source|target|encoder|decoder)_positions?(_embeddings)?",
        POSITIONS,
    ),
    (r"max_seq_len|max_sequence_length|position_embedding_size|model_max_length|seq_len", POSITIONS),
    (r"(\w*_)?(num_experts|num_local_experts|n_routed_experts|num_routed_experts|zero_expert_num)", 4),
    (r"(\w*_)?(num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|experts_top_k)", 2),
    (r"n_groups?|topk_groups?|num_expert_groups?", 1),
    (r"first_k_dense_replace|num_dense_layers|num_kv_shared_layers", 0),
    (r"sliding_window(_size)?|attention_chunk_size|attention_window_size|local_attention", 4),
]
MORE: list[Rule] = [
    (r"(\w+_)?image_size|img_size|input_size|crop_size|pretrain_image_size", IMAGE),
    (r"(\w+_)?patch_size", PATCH),
    (r"num_frames|frames_per_clip", 4),
    (r"max_length|max_text_length", POSITIONS),
    (r"num_conv_pos_embeddings", 16),
    (r"num_conv_pos_embedding_groups", 4),
    (r"num_mel_bins|feature_size|input_feat_per_channel|mel_dim|feature_projection_input_dim|input_dim", 32),
    (r"(\w+_)?window_size|attention_window|local_attention_window_len", 4),
    (r"context_size|chunk_size|mamba_chunk_size", 8),
    (r"num_(query_tokens|queries|latents|image_tokens)|image_seq_length|mm_tokens_per_image", 4),
    (r"index_(n_heads|topk)|linear_num_(key|value)_heads|linear_num_heads", 4),
    (r"(mamba_)?(d_)?state(_size|_dim)?|ssm_state_size|time_step_rank|mamba_d_head|mamba_headdim|mamba_head_dim", 16),
    (r"(codebook|codevector|proj_codevector)_(size|dim)|num_codevectors_per_group|classifier_proj_size|tdnn_dim", 32),
    (r"num_filters|conv_channels|output_channels", lambda old: old if old < 64 else 32),
    (r"upsample_groups|num_groups|vit_groups", 16),
    (r"coordinate_size", 10),  # four of it and two of the other make the width
    (r"shape_size", 12),
    (r"num_(position|temporal)_embeddings", 16),
]
KEPT = re.compile(
    r"kernel|stride|merge_size|conv_dim_|num_labels|chunk_size_feed_forward|type_vocab|temporal_patch|"
    r"global_attn|position_id|num_codebooks|num_quantizers|group_size|mask_feature|mask_time|sampling|batch_size"
)
_STAGES = re.compile(
    r"depths|n_attn_blocks|layer_list|stage_num_blocks|num_block_repeats|block_repeats|blocks_per_stage|block_sizes"
)
_DROP = re.compile(r"\w*layer_?drop|drop_path_rate|drop_path|drop_connect_rate|stochastic_depth\w*")
_NEEDED = {"vocab_size": VOCABULARY, "prediction_length": 4, "pad_token_id": PAD}  # where the default is None


class Special:
    """Ids for special tokens, each another."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        key = re.sub(r"_(id|index)$", "", name)
        known = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "decoder_start_token": START}.get(key)
        return (
            self.ids.setdefault(key, FIRST_SPECIAL + len(self.ids) % (VOCABULARY - FIRST_SPECIAL))
            if known is None
            else known
        )


def small(cls: Any, sizes: Sizes, special: Special | None = None, **choices: Any) -> PreTrainedConfig:
    """A small config of the class."""
    chosen = {n: v for n, v in choices.items() if "." not in n}
    inside: dict[str, dict[str, Any]] = {}
    for name, value in choices.items():
        if "." in name:
            first, rest = name.split(".", 1)
            inside.setdefault(first, {})[rest] = value
    default = cls(**{n: v for n, v in chosen.items() if n in FIRST})
    return cls(**{**_Shrink(cls, default, sizes, special or Special(), inside).fields(), **chosen})


_GIVEN = {
    "head_dim": HEAD_DIM,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_intermediate_size": FFN,
}
FIRST = ("hidden_size_per_layer_input",)  # choices without which a class has no default


class _Shrink:
    """The fields of one config that differ from the default config's."""

    def __init__(
        self, cls: Any, default: Any, sizes: Sizes, special: Special, inside: dict[str, dict[str, Any]]
    ) -> None:
        declared = {f.name: f.default for f in dataclasses.fields(cls) if f.init}
        self.values = {n: v for n, v in vars(default).items() if n in declared}
        self.computed = {n for n, v in declared.items() if v is None}  # by the class itself, if nobody says
        self.sizes, self.special, self.inside = sizes, special, inside
        self.old = {v for n, v in self.values.items() if type(v) is int and re.fullmatch(_LAYERS, n)}
        self.kinds = {n: v for n, v in self.values.items() if _is_kinds(v) and len(v) in self.old}
        self.layers = max([sizes.layers, *(len(dict.fromkeys(v)) for v in self.kinds.values())])
        self.mrope = "mrope_section" in _modeling(cls)

    def fields(self) -> dict[str, Any]:
        changed = {}
        for name, value in self.values.items():
            new = self.one(name, value)
            if new is not value:
                changed[name] = new
        return changed

    def one(self, name: str, value: Any) -> Any:
        if isinstance(value, PreTrainedConfig):
            kept = {
                n: True for n in ("is_decoder", "add_cross_attention", "is_encoder_decoder") if getattr(value, n, False)
            }
            return small(type(value), self.sizes, self.special, **kept, **self.inside.get(name, {}))
        if name in self.kinds:
            return (list(dict.fromkeys(value)) * self.layers)[: self.layers]
        if value is None:
            return _NEEDED.get(name, _GIVEN.get(name) if self.sizes.given else None)
        if isinstance(value, bool):
            return False if name == "apply_spec_augment" else value
        if re.search(r"token_(id|index)$", name) and isinstance(value, int):
            return self.special(name) if value >= FIRST_SPECIAL or value < 0 else value
        if name == "eos_token_id" and isinstance(value, list):
            return EOS
        if isinstance(value, float):
            return 0.0 if _DROP.fullmatch(name) and value else value
        if isinstance(value, dict):
            return self.rope(value) if "rope" in name else value
        if isinstance(value, (list, tuple)):
            return self.several(name, value)
        return self.number(name, value) if isinstance(value, int) else value

    def number(self, name: str, value: int) -> int:
        if KEPT.search(name) or value <= 0:
            return value
        if re.fullmatch(r"head_dim|qk_head_dim", name) and (name in self.computed or "qk_rope_head_dim" in self.values):
            return value if name in self.computed else ROPE if name == "head_dim" else HEAD_DIM + ROPE
        if re.fullmatch(r"(\w+_)?(num_key_value_(attention_)?heads|num_kv_heads|kv_n_heads)", name):
            return min(value, self.sizes.kv_heads)
        if re.fullmatch(_LAYERS, name):
            return min(value, self.layers)
        for pattern, most in CORE + (MORE if self.sizes.more else []):
            if re.fullmatch(pattern, name):
                return most(value) if callable(most) else min(value, most)
        return value

    def several(self, name: str, value: Any) -> Any:
        kind, numbers = type(value), all(type(v) is int for v in value)
        if _STAGES.fullmatch(name) and numbers:
            return kind([1] * len(value))
        if len(value) in self.old and len(value) > self.layers:
            return kind(value[: self.layers])
        if not value or not numbers:
            return value
        if name == "num_heads" and max(value) > 8:  # of stages, each twice as wide as the one before
            return kind([2**i * 2 for i in range(len(value))])
        if re.search(r"index|indices|_layers?$|layer_ids", name):
            return kind(sorted({min(v, self.layers - 1) for v in value})) if max(value) >= self.layers else value
        if not self.sizes.more:
            return value
        if re.search(r"(image|img|crop|input)_size", name):
            return kind([min(v, IMAGE) for v in value])
        if re.search(r"patch_size$|tubelet", name):
            return kind([min(v, PATCH) for v in value])
        if re.search(r"dim|channel|hidden_size|embed", name) and min(value) >= 128:
            return kind([v // 8 for v in value])
        return value

    def rope(self, parameters: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {n: self.rope(v) if isinstance(v, dict) else v for n, v in parameters.items()}
        for name in ("short_factor", "long_factor"):
            if name in out:
                out[name] = [1.0] * (HEAD_DIM // 2)
        if "original_max_position_embeddings" in out:
            out["original_max_position_embeddings"] = POSITIONS // 2
        if self.mrope and ("mrope_section" in out or "rope_theta" in out):
            total, many = self.sizes.mrope, len(out.get("mrope_section", [0, 0, 0]))
            out["mrope_section"] = [total - (many - 1) * (total // 4), *[total // 4] * (many - 1)]
        return out


def _is_kinds(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(v, str) for v in value)


def _modeling(cls: Any) -> str:
    """The source of the models that take the config."""
    import inspect

    folder = Path(inspect.getfile(cls)).parent
    return "\n".join(p.read_text(encoding="utf-8") for p in sorted(folder.glob("modeling_*.py")))
