"""Completions that share one pass of their prompt: the repeated batch of plain transformers is the definition."""

import copy

import pytest
import torch

import prefixattn
from prefixattn import PrefixConfig

pytest.importorskip("transformers", reason="transformers is not installed")
from prefixattn.attach import attached
from prefixattn.attach.hf import probe
from prefixattn.testing.models import DECODERS, VOCABULARY, tiny, token_ids

LENGTHS = (7, 4)  # of the prompts
GROUPS = torch.tensor([0, 1, 1, 0, 0])
AFTER = (5, 3, 5, 1, 4)  # tokens of the completions
# PEFT asks
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
# within a completion the prompts slide out of sight
SIZES = {name: {"sliding_window": 4} for name in ("mistral", "gemma2", "gemma3", "gpt_oss")}


def make(family):
    model = tiny(family, **SIZES.get(family, {}))
    if family == "gpt_oss":
        model.set_experts_implementation("eager")  # the grouped products take no float64
    return model


def padded(rows, side):
    """Rows of unequal length as one tensor, and its mask."""
    most = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), most, dtype=torch.int64).unbind()
    for row, into, kept in zip(rows, ids, mask, strict=True):
        place = slice(most - len(row), most) if side == "left" else slice(len(row))
        into[place], kept[place] = row, 1
    return ids, mask


PROMPTS = [token_ids(1, n, seed=n)[0] for n in LENGTHS]
COMPLETIONS = [token_ids(1, n, seed=20 + i)[0] for i, n in enumerate(AFTER)]
COMPLETION_IDS, COMPLETION_MASK = padded(COMPLETIONS, "right")
# what the loss weighs each logit with
WEIGHTS = torch.randn(len(AFTER), max(AFTER), VOCABULARY, generator=torch.Generator().manual_seed(3))


def repeated(model, **options):
    """Logits of each completion behind its own prompt, a sample at a time: there is no padding to go wrong."""
    found = []
    for group, completion in zip(GROUPS.tolist(), COMPLETIONS, strict=True):
        ids = torch.cat([PROMPTS[group], completion])[None]
        found.append(model(ids, **options).logits[0, -len(completion) :])
    return found


def behind_shared_prompts(model, side="left", shared=None):
    """The same by one pass of each prompt."""
    shared = shared or prefixattn.SharedPrompt(model)
    ids, mask = padded(PROMPTS, side)
    with shared(ids, attention_mask=mask):
        logits = model(COMPLETION_IDS, attention_mask=COMPLETION_MASK, prefix_ids=GROUPS).logits
    return [row[:n] for row, n in zip(logits, AFTER, strict=True)]


def loss_of(logits):
    return sum((row * w[: len(row)].to(row)).sum() for row, w in zip(logits, WEIGHTS, strict=True))


def flat_gradients(parameters):
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([g.flatten() for g in grads])


def assert_same(mine, truth):
    """In float64; but norms of most families compute in float32 whatever a model's type, and round there."""
    apart = float((mine - truth).detach().norm() / truth.detach().norm())
    assert apart < 1e-6, f"they differ by {apart:.1e} of their size"


def measured(model, logits, parameters=None):
    """Logits and the gradients of the model's parameters, each as one vector, in float64."""
    parameters = list(model.parameters()) if parameters is None else parameters
    for parameter in parameters:
        parameter.grad = None
    loss_of(logits).backward()
    return torch.cat(logits).flatten().double().detach(), flat_gradients(parameters).double()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DECODERS)
def test_logits_and_gradients_are_those_of_the_repeated_batch(family, side):
    exact_model, model = make(family).double(), make(family)
    exact = measured(exact_model, repeated(exact_model))
    plain = measured(model, repeated(model))
    ours = measured(model, behind_shared_prompts(model, side))
    ours64 = measured(exact_model, behind_shared_prompts(exact_model, side))
    for name, truth, theirs, mine, mine64 in zip(("logits", "gradients"), exact, plain, ours, ours64, strict=True):
        bar = 2 * (theirs - truth).norm()
        assert (mine - truth).norm() <= bar, f"{name}: {(mine - truth).norm():.1e}, the bar is {bar:.1e}"
        assert_same(mine64, truth)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_half_types_err_no_more_than_the_repeated_batch(family, how):
    model = make(family)
    if how == "bfloat16":
        model.bfloat16()
    exact_model = copy.deepcopy(model).double()
    exact = measured(exact_model, repeated(exact_model))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        plain, ours = repeated(model), behind_shared_prompts(model)
    found = measured(model, plain), measured(model, ours)
    for name, truth, theirs, mine in zip(("logits", "gradients"), exact, *found, strict=True):
        bar = 2 * (theirs - truth).norm()
        assert (mine - truth).norm() <= bar, f"{name}: {(mine - truth).norm():.1e}, the bar is {bar:.1e}"


def test_what_autocast_rounds_is_not_held_to_the_type_of_the_output():
    out = torch.zeros(1)
    strict, half = probe.tolerance(out), probe.tolerance(out.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert probe.tolerance(out) == half > strict
        assert probe.tolerance(out.double()) < strict


def test_a_token_that_only_prompts_have_gets_a_gradient():
    model = make("llama")
    own = sorted(set(torch.cat(PROMPTS).tolist()) - set(torch.cat(COMPLETIONS).tolist()))
    loss_of(behind_shared_prompts(model)).backward()
    assert own and (model.model.embed_tokens.weight.grad[own].abs().amax(1) > 0).all()


def test_the_prompts_are_run_once_and_never_repeated():
    model, seen = make("llama"), []
    shared = prefixattn.SharedPrompt(model)
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:2])))
    behind_shared_prompts(model, shared=shared)
    assert seen == [(len(PROMPTS), max(LENGTHS)), (len(AFTER), max(AFTER))]


def test_loras_gradients_are_those_of_the_repeated_batch():
    peft = pytest.importorskip("peft", reason="peft is not installed: LoRA is not tried")
    model = make("llama").double()
    torch.manual_seed(0)
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], r=2)).eval()
    trained = [p for p in lora.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_()  # or half of the gradients are zero
    exact = measured(lora, repeated(lora), trained)
    for mine, truth in zip(measured(lora, behind_shared_prompts(lora), trained), exact, strict=True):
        assert_same(mine, truth)
    assert [p for p in lora.parameters() if p.requires_grad] == trained


def test_one_prompt_needs_no_ids_and_an_empty_one_is_none():
    model = make("gpt2").double()
    shared = prefixattn.SharedPrompt(model)
    ids = token_ids(2, 6, seed=5)
    with torch.no_grad():
        with shared(PROMPTS[0][None]):
            one = model(ids).logits
        both = model(torch.cat([PROMPTS[0].expand(2, -1), ids], 1)).logits[:, LENGTHS[0] :]
        assert_same(one, both)
        prompts = torch.stack([PROMPTS[0], torch.zeros_like(PROMPTS[0])])
        with shared(prompts, torch.tensor([[1] * 7, [0] * 7])):
            mixed = model(ids, prefix_ids=torch.tensor([0, 1])).logits
        assert_same(mixed[0], both[0])
        assert_same(mixed[1], model(ids[1:]).logits[0])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_labelled_loss_is_the_repeated_batchs(family):
    """The last token of a prompt goes to its completions, where it predicts their first."""
    model = make(family).double()
    total, labels_seen = 0.0, 0
    for group, completion in zip(GROUPS.tolist(), COMPLETIONS, strict=True):
        ids = torch.cat([PROMPTS[group], completion])[None]
        labels = torch.cat([torch.full_like(PROMPTS[group], -100), completion])[None]
        total = total + model(ids, labels=labels, num_items_in_batch=1).loss
        labels_seen += len(completion)
    (total / labels_seen).backward()
    expected, value = flat_gradients(model.parameters()), float(total.detach() / labels_seen)
    model.zero_grad()

    prompts, mask = padded([prompt[:-1] for prompt in PROMPTS], "left")
    rows = [torch.cat([PROMPTS[g][-1:], c]) for g, c in zip(GROUPS.tolist(), COMPLETIONS, strict=True)]
    ids, kept = padded(rows, "right")
    labels = ids.masked_fill(kept == 0, -100)
    labels[:, 0] = -100
    with prefixattn.SharedPrompt(model)(prompts, mask):
        loss = prefixattn.labelled_loss(model, labels, input_ids=ids, attention_mask=kept, prefix_ids=GROUPS)
        loss.backward()
    assert abs(float(loss.detach()) - value) < 1e-6 * value
    assert_same(flat_gradients(model.parameters()), expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_completions_are_generated_behind_a_shared_prompt(family):
    model = make(family)
    greedy = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    groups = torch.tensor([1, 0, 1])
    expected = []
    for group in groups.tolist():
        ids = PROMPTS[group][None]
        expected.append(model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)[0, -4:])
    prompts, mask = padded([prompt[:-1] for prompt in PROMPTS], "left")
    last = torch.stack([PROMPTS[group][-1:] for group in groups.tolist()])
    with prefixattn.SharedPrompt(model)(prompts, mask):
        made = model.generate(last, attention_mask=torch.ones_like(last), prefix_ids=groups, **greedy)
    assert torch.equal(made[:, 1:], torch.stack(expected))


# what is around it


def checkpoint_layers(model, reentrant):
    # The newer name is missing from older transformers, the older deprecated by newer ones.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def test_the_model_is_left_as_it_was():
    model = make("llama")
    model.lm_head.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = model(token_ids()).logits
    shared = prefixattn.SharedPrompt(model)
    behind_shared_prompts(model, shared=shared)
    with pytest.raises(RuntimeError, match="something else"), shared(PROMPTS[0][None]):
        raise RuntimeError("something else")
    assert torch.equal(model(token_ids()).logits, before)
    assert [p.requires_grad for p in model.parameters()] == flags and attached(model) is None
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any("prefix_slot" in module.__dict__ for module in model.modules())


def test_parts_of_a_batch_share_the_prompts_pass_too():
    model = make("gpt2").double()
    exact = measured(model, repeated(model))[1]
    model.zero_grad()
    with prefixattn.SharedPrompt(model)(*padded(PROMPTS, "left")):
        for part, keep in ((slice(0, 2), True), (slice(2, None), False)):
            options = {"attention_mask": COMPLETION_MASK[part], "prefix_ids": GROUPS[part]}
            logits = model(COMPLETION_IDS[part], **options).logits
            weighed = (logits * WEIGHTS[part].double())[COMPLETION_MASK[part] == 1].sum()
            weighed.backward(retain_graph=keep)
    assert_same(flat_gradients(model.parameters()), exact)


def test_without_gradients_nothing_is_kept_for_them():
    model = make("llama")
    with torch.no_grad():
        exact, ours = repeated(model), behind_shared_prompts(model)
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
        assert not mine.requires_grad


@pytest.mark.parametrize("positions", ["shifted", "unshifted"])
def test_a_learned_prefix_stands_before_the_prompts_and_learns_from_both_passes(positions):
    model = make("llama").double()
    shared = prefixattn.SharedPrompt(model)  # which was made before the model had a prefix
    check_a_learned_prefix(model, shared, PrefixConfig(length=3, hidden=8, positions=positions))


@pytest.mark.parametrize("family", SIZES)
def test_a_learned_prefix_slides_out_of_windows_ahead_of_the_prompts(family):
    model = make(family).double()
    shared = prefixattn.SharedPrompt(model)
    check_a_learned_prefix(model, shared, PrefixConfig(length=3, hidden=8, prefix_in_window=True))


def check_a_learned_prefix(model, shared, config):
    prefix = prefixattn.attach(model, config)
    prefix.double()
    trained = list(prefix.parameters())
    exact = measured(model, repeated(model), trained)
    ours = measured(model, behind_shared_prompts(model, shared=shared), trained)
    for mine, truth in zip(ours, exact, strict=True):
        assert_same(mine, truth)
    assert prefix.is_active and (exact[1] != 0).any()
    assert torch.equal(measured(model, repeated(model), trained)[1], exact[1])


def test_gradient_checkpoints_give_the_same_gradients():
    model = make("llama").double()
    exact = measured(model, repeated(model))
    checkpoint_layers(model, reentrant=False)
    model.train()  # its dropouts are 0
    shared = prefixattn.SharedPrompt(model)
    ids, mask = padded(PROMPTS, "left")
    with shared(ids, mask):
        logits = model(COMPLETION_IDS, attention_mask=COMPLETION_MASK, prefix_ids=GROUPS).logits
        ours = measured(model, [row[:n] for row, n in zip(logits, AFTER, strict=True)])
    for mine, truth in zip(ours, exact, strict=True):
        assert_same(mine, truth)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):  # the layers would run again without the prompts
        measured(model, behind_shared_prompts(model, shared=shared))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # torch's, of none wanted
def test_reentrant_checkpoints_are_refused_where_a_gradient_is_wanted():
    model = make("llama").train()
    checkpoint_layers(model, reentrant=True)
    shared = prefixattn.SharedPrompt(model)
    with pytest.raises(NotImplementedError, match=r'enable checkpoints with {"use_reentrant": False}'):
        behind_shared_prompts(model, shared=shared)
    with torch.no_grad():
        assert behind_shared_prompts(model, shared=shared)


def test_prefixes_do_not_change_inside():
    model = make("gpt2")
    shared = prefixattn.SharedPrompt(model)
    with shared(PROMPTS[0][None]):
        with pytest.raises(ValueError, match="the model reads shared prompts; leave their context before"):
            prefixattn.attach(model, PrefixConfig(length=3))
        with pytest.raises(ValueError, match="the model reads shared prompts already"), shared(PROMPTS[0][None]):
            pass
    prefix = prefixattn.attach(model, PrefixConfig(length=3))
    with shared(PROMPTS[0][None]):
        for change in (prefix.activate, prefix.detach):
            with pytest.raises(ValueError, match="the model reads shared prompts; leave their context before"):
                change()
    assert prefix.is_active
    with prefix.disabled(), pytest.raises(ValueError, match=r"inside disabled\(\)"), shared(PROMPTS[0][None]):
        pass
