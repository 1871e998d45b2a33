"""What tests of the language runs share: folders of random models of two layers, with a tokenizer of 400 tokens."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bench.paper import e2e_data

END = "<|endoftext|>"
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # BART's ids 0 to 3


def made_model(family: str, folder: Path) -> Path:
    """A "gpt2", "llama" (two query heads to a key head) or "bart" with its tokenizer, saved in `folder`."""
    tokenizer = _tokenizer(family == "bart")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    vocabulary = len(tokenizer)
    config: Any
    if family == "gpt2":
        ends = dict(bos_token_id=0, eos_token_id=0)
        config = transformers.GPT2Config(vocab_size=vocabulary, n_positions=256, n_embd=32, n_layer=2, n_head=2, **ends)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    elif family == "llama":
        config = transformers.LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    else:
        config = transformers.BartConfig(
            vocab_size=vocabulary, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=256,
        )  # fmt: skip
        transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    return folder


def _tokenizer(bart: bool) -> Any:
    """Byte pairs of the generator's own texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = SPECIAL if bart else [END]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator((" ".join(pair) for pair in e2e_data.generate(200, 2, seed=3)), trainer)
    if not bart:
        return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END)
    bpe.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
