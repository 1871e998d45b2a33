"""The table of families and features in docs/models.md: a cell is a test that runs for the family."""

import ast
from typing import Any

import pytest

from tests.support import ROOT

pytest.importorskip("transformers", reason="transformers is not installed")

FAMILIES = {  # the table's name -> that of the tests
    "GPT-2": "gpt2",
    "LLaMA": "llama",
    "Mistral": "mistral",
    "Qwen 2": "qwen2",
    "Qwen 3": "qwen3",
    "Gemma 2": "gemma2",
    "Gemma 3": "gemma3",
    "gpt-oss": "gpt_oss",
    "DeepSeek V2": "deepseek_v2",
    "DeepSeek V3": "deepseek_v3",
    "BART": "bart",
    "T5": "t5",
    "BERT": "bert",
    "RoBERTa": "roberta",
    "ViT (HF)": "vit",
}
# heading -> test file, test functions of which one has to run
FEATURES: dict[str, tuple[str, ...]] = {
    "deep, simple, none": (
        "attach/hf/test_families.py",
        "test_equals_concatenation_with_its_gradients",
        "attach/hf/test_gpt2.py",
    ),
    "padding": ("attach/hf/test_families.py", "test_padding_takes_no_part", "attach/hf/test_gpt2.py"),
    "Prefix-Tuning+": ("attach/test_plus.py", "test_adds_phi_of_q_times_m_with_its_gradients"),
    "generate": ("attach/hf/test_generate.py", "test_greedy_generation_with_each_cache"),
    "bank": ("attach/test_bank.py", "test_a_mixed_batch_equals_each_prefix_alone_with_its_gradients"),
    "labelled loss": ("attach/hf/test_labelled.py", "test_it_is_the_models_own_loss"),
    "checkpointing": ("attach/hf/test_interplay.py", "test_gradient_checkpointing_gives_identical_gradients"),
    "compile": ("attach/hf/test_interplay.py", "test_compiles_as_one_graph_with_its_backward"),
    "export": ("attach/hf/test_interplay.py", "test_exports"),
    "bf16, fp16, autocast": ("attach/hf/test_interplay.py", "test_a_float32_prefix_trains_in_a_half_precision_model"),
    "cache": ("attach/hf/test_cache.py", "test_plain_transformers_makes_of_the_cache_what_the_prefix_makes"),
    "shared prompt": (
        "attach/hf/test_shared_prompt.py",
        "test_logits_and_gradients_are_those_of_the_repeated_batch",
    ),
    "packed": ("attach/hf/test_packed.py", "test_logits_and_gradients_are_those_of_the_padded_sequences"),
    "PEFT": ("prefixes/test_peft.py", "test_an_adapter_of_peft_gives_its_logits_and_goes_back"),
}
# what a model has not: images no padding, encoders no generation and no cache, what is not causal no shared prompt and
# no packed sequences, PEFT no prefix for a family (or one that we refuse), latent vectors no place for one in a cache
ABSENT = {
    "vit": {"padding", "generate", "labelled loss", "cache", "shared prompt", "packed", "PEFT"},
    "bert": {"generate", "cache", "shared prompt", "packed", "PEFT"},
    "roberta": {"generate", "cache", "shared prompt", "packed", "PEFT"},
    "deepseek_v2": {"cache", "PEFT"},
    "deepseek_v3": {"cache", "PEFT"},
    "bart": {"shared prompt", "packed"},
    "t5": {"shared prompt", "packed", "PEFT"},
}


def values(module: Any, function: ast.FunctionDef) -> set[str]:
    """What stands in the first place of a test's parameters, as the module itself evaluates it."""
    found: set[str] = set()
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.parametrize":
            names = ast.literal_eval(decorator.args[0]).split(", ")
            if names[0] in ("family", "name"):
                listed = eval(ast.unparse(decorator.args[1]), vars(module))
                found |= {item if isinstance(item, str) else item[0] for item in listed}
    return found


def families_of(file: str, *tests: str) -> set[str]:
    import importlib.util

    path = ROOT / "tests" / file
    spec: Any = importlib.util.spec_from_file_location(f"features_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    return set().union(*(values(module, functions[name]) for name in tests))


def table() -> list[str]:
    rows = {name: [] for name in FAMILIES}
    for feature, (file, *names) in FEATURES.items():
        known = families_of(file, *[n for n in names if not n.endswith(".py")])
        if "attach/hf/test_gpt2.py" in names:  # GPT-2 has a file of its own, of the same tests
            known.add("gpt2")
        for name, family in FAMILIES.items():
            absent = feature in ABSENT.get(family, set())
            assert not (absent and family in known), f"{feature} is tested for {family}"
            rows[name].append("-" if absent else "yes" if family in known else "")
    lines = [f"| | {' | '.join(FEATURES)} |", "|---" * (len(FEATURES) + 1) + "|"]
    return lines + [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]


def test_the_table_is_what_is_tested() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    wrong = [line for line in table() if line not in page]
    assert not wrong, "the table in docs/models.md lacks:\n" + "\n".join(table())
