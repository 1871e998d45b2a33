"""Every way into a model of transformers meets its prefix, or is refused: heads that pass the base model by, parts that
are called by themselves, wrappers.
"""

import peft
import pytest
import torch
import transformers
from torch import nn

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.attach import attached
from prefixattn.testing.models import token_ids

TEXT = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
BART = dict(vocab_size=60, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4)
BART |= dict(decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64)
BART |= dict(init_std=0.3, pad_token_id=1)
OPT = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, init_std=0.2)
OPT |= dict(word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=1)
FREE = PrefixConfig(length=3, share="none")


def build(name, config, sizes, **more):
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**sizes, **more)).eval()


def scaled(prefix, by=10.0):
    with torch.no_grad():
        prefix.encoder.bank.mul_(by)


# classes whose forward calls a part of the base model, and not the base model itself
BYPASSING = {
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "bart": ("BartForCausalLM", "BartConfig", BART | dict(is_decoder=True, is_encoder_decoder=False)),
    "pegasus": ("PegasusForCausalLM", "PegasusConfig", BART | dict(is_decoder=True, is_encoder_decoder=False)),
}


@pytest.mark.parametrize("name", BYPASSING)
def test_a_head_that_passes_the_base_model_by_has_the_prefix(name):
    model = build(*BYPASSING[name])
    prefix = prefixattn.attach(model, FREE)
    ids = token_ids(2, 6)
    options = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=1)
    first, generated = model(ids).logits, model.generate(ids, **options).logits[0]
    torch.testing.assert_close(generated, first[:, -1].detach(), rtol=1e-5, atol=1e-5)
    model(ids, labels=ids).loss.backward()
    assert (prefix.encoder.bank.grad.flatten(2).norm(dim=-1) > 0).all()
    assert prefix.mass(input_ids=ids).shape == (2, 2, 4, 6)
    scaled(prefix)
    assert not torch.allclose(model(ids).logits, first)
    assert not torch.allclose(model.generate(ids, **options).logits[0], generated)


@pytest.mark.parametrize("way", ["encoder", "decoder"])
def test_a_part_called_by_itself_does_what_it_does_in_the_whole(way):
    model = build("BartModel", "BartConfig", BART)
    prefixattn.attach(model, FREE)
    ids = token_ids(2, 7)
    whole = model(input_ids=ids, decoder_input_ids=ids)
    states = model.get_encoder()(ids).last_hidden_state
    if way == "encoder":
        found, expected = states, whole.encoder_last_hidden_state
    else:
        found = model.get_decoder()(input_ids=ids, encoder_hidden_states=states).last_hidden_state
        expected = whole.last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["BertModel", "LlamaModel"])
def test_a_call_past_the_hooks_is_refused_not_answered(name):
    model = build(name, name.replace("Model", "Config"), TEXT)
    prefix = prefixattn.attach(model, FREE)
    with pytest.raises(NotImplementedError, match=r"with a prefix was run without it.*model\.forward\(\.\.\.\)"):
        model.forward(token_ids(2, 6))
    with prefix.disabled():
        model.forward(token_ids(2, 6))


def test_choices_are_samples_of_their_own():
    model = build("GPT2DoubleHeadsModel", "GPT2Config", dict(vocab_size=50, n_embd=32, n_layer=2, n_head=4))
    bank = prefixattn.attach(model, PrefixConfig(length=2, share="none", count=5))
    ids = token_ids(2, 4 * 6).view(2, 4, 6)
    found = model(ids, prefix_ids=torch.tensor([3, 1])).logits
    for sample, row in enumerate((3, 1)):
        alone = model(ids[sample], prefix_ids=torch.full((4,), row)).logits
        torch.testing.assert_close(found[sample], alone, rtol=1e-5, atol=1e-5)
    assert len(bank) == 5


class Held(nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # of peft
def test_a_wrapped_model_and_the_model_in_it_are_one():
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    inside = build("LlamaForCausalLM", "LlamaConfig", TEXT)
    model = peft.get_peft_model(inside, lora).eval()
    outer = prefixattn.attach(model, FREE)
    for wrapped in (inside, Held(model), torch.compile(inside, backend="eager")):
        assert attached(wrapped) is outer
    inner = prefixattn.attach(inside, FREE)
    assert inner.is_active and not outer.is_active
    before = model(token_ids(2, 6)).logits
    scaled(inner)
    assert not torch.allclose(model(token_ids(2, 6)).logits, before)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # of peft
def test_detach_leaves_what_peft_froze_frozen():
    model = build("LlamaForCausalLM", "LlamaConfig", TEXT)
    prefix = prefixattn.attach(model, FREE)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    prefix.detach()
    assert trained == [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert all("lora" in name for name in trained)


def test_a_model_whose_layers_take_hidden_states_is_not_asked_for_its_inner_part():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = build("DINOv3ViTModel", "DINOv3ViTConfig", sizes, image_size=8, patch_size=4)
    image = torch.randn(1, 3, 8, 8)
    plain = model(image)[0]
    prefix = prefixattn.attach(model, FREE)
    assert prefix.geometry.kinds == {"self": 2}
    assert not torch.allclose(model(image)[0], plain)


def test_a_prefix_made_in_inference_mode_can_be_trained():
    model = build("LlamaForCausalLM", "LlamaConfig", TEXT)
    with torch.inference_mode():
        prefix = prefixattn.attach(model, PrefixConfig(length=3, hidden=8))
    ids = token_ids(2, 6)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prefix.parameters())


def test_a_model_on_the_meta_device_is_refused_and_meta_as_the_default_device_is_not():
    with torch.device("meta"):
        model = build("BertModel", "BertConfig", TEXT)
    with pytest.raises(NotImplementedError, match="weights of BertModel are on the meta device"):
        prefixattn.attach(model, FREE)
    model = build("BertModel", "BertConfig", TEXT)
    with torch.device("meta"):
        prefix = prefixattn.attach(model, FREE)
    assert prefix.encoder.bank.device.type == "cpu"
    assert model(token_ids(1, 4))[0].isfinite().all()


@pytest.mark.parametrize("share", ["none", "deep", "simple"])
def test_offloaded_weights_are_used_or_refused(share):
    from accelerate import cpu_offload

    model = cpu_offload(build("LlamaForCausalLM", "LlamaConfig", TEXT), execution_device="cpu")
    if share == "simple":
        with pytest.raises(NotImplementedError, match=r"share='simple' reads .* whose weights are offloaded"):
            prefixattn.attach(model, PrefixConfig(length=3, share=share))
        return
    plain = model(token_ids(2, 6)).logits
    prefixattn.attach(model, PrefixConfig(length=3, share=share, hidden=8))
    assert not torch.allclose(model(token_ids(2, 6)).logits, plain)


def test_output_attentions_in_the_config_is_refused():
    model = build("GPT2LMHeadModel", "GPT2Config", dict(n_embd=32, n_layer=2, n_head=4), attn_implementation="eager")
    model.config.output_attentions = True
    with pytest.raises(NotImplementedError, match=r"config\.output_attentions is True in GPT2LMHeadModel"):
        prefixattn.attach(model, FREE)
    model.config.output_attentions = False
    prefixattn.attach(model, FREE)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(token_ids(1, 4), output_attentions=True)
