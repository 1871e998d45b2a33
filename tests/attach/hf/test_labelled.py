"""`labelled_loss` is the model's own loss, value and gradients, of logits at labelled positions alone."""

import pytest
import torch

import prefixattn
from prefixattn import PrefixConfig, labelled_loss

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from prefixattn.testing.models import DECODERS, ENCODER_DECODERS, FAMILIES, tiny, token_ids  # noqa: E402

CLOSE = {"rtol": 2e-6, "atol": 2e-6}


def language_model(family):
    if family in ("bert", "roberta"):
        cls = getattr(transformers, {"bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM"}[family])
        config = getattr(transformers, FAMILIES[family][1])(**FAMILIES[family][2], initializer_range=0.2)
        torch.manual_seed(0)
        return cls(config).eval()
    model = tiny(family)
    if family == "t5":
        model.config.decoder_start_token_id = 0
    if family == "bart":
        model.final_logits_bias.normal_()
    return model


def labelled():
    """ids, labels [3, 9], each row labelled elsewhere."""
    ids = token_ids()
    labels = ids.clone()
    labels[:, :4] = -100
    labels[0, 6:] = -100
    labels[1, 8] = -100
    return ids, labels


def gradients(prefix):
    found = [p.grad.clone() for p in prefix.parameters()]
    prefix.zero_grad()
    return found


@pytest.mark.parametrize("family", [*DECODERS, *ENCODER_DECODERS, "bert", "roberta"])
def test_it_is_the_models_own_loss(family):
    model = language_model(family)
    prefix = prefixattn.attach(model, PrefixConfig(length=3, share="none", init="normal"))
    ids, labels = labelled()
    rows = []
    model.get_output_embeddings().register_forward_hook(lambda head, args, out: rows.append(out.shape[:-1].numel()))
    expected = model(input_ids=ids, labels=labels).loss
    expected.backward()
    wanted = gradients(prefix)
    found = labelled_loss(model, labels, input_ids=ids)
    found.backward()
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(gradients(prefix), wanted, **CLOSE)
    there = int((labels != -100).sum())
    assert rows == [ids.numel(), there]
    torch.testing.assert_close(labelled_loss(model, labels, num_items_in_batch=5, input_ids=ids), found * there / 5)
    torch.testing.assert_close(
        labelled_loss(model, labels, num_items_in_batch=torch.tensor(5), input_ids=ids), found * there / 5
    )
    with torch.no_grad():  # no hook is left
        decoder = {"decoder_input_ids": ids} if family in ENCODER_DECODERS else {}
        assert model(input_ids=ids, **decoder).logits.shape[:2] == ids.shape


def test_a_label_of_the_first_token_has_no_prediction():
    model, ids = language_model("llama"), token_ids()
    torch.testing.assert_close(labelled_loss(model, ids, input_ids=ids), model(input_ids=ids, labels=ids).loss, **CLOSE)


def test_decoder_input_ids_of_the_caller_are_taken():
    model, (ids, labels) = language_model("bart"), labelled()
    decoder = token_ids(seed=9)
    expected = model(input_ids=ids, decoder_input_ids=decoder, labels=labels).loss
    found = labelled_loss(model, labels, input_ids=ids, decoder_input_ids=decoder)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_within_a_wrapper_compiled_and_in_float64():
    model, (ids, labels) = language_model("gpt2"), labelled()
    expected = model(input_ids=ids, labels=labels).loss

    class Wrapper(torch.nn.Module):  # as DistributedDataParallel
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    torch.testing.assert_close(labelled_loss(Wrapper(model), labels, input_ids=ids), expected, **CLOSE)
    compiled = torch.compile(model, backend="eager")
    compiled(input_ids=ids)
    torch.testing.assert_close(labelled_loss(compiled, labels, input_ids=ids), expected, **CLOSE)
    assert labelled_loss(model.double(), labels, input_ids=ids).dtype == torch.float64


def test_what_it_refuses():
    ids, labels = labelled()
    with pytest.raises(NotImplementedError, match="ViTForImageClassification; labelled_loss takes causal, masked"):
        labelled_loss(tiny("vit"), labels, pixel_values=torch.zeros(3, 3, 24, 24))
    with pytest.raises(NotImplementedError, match="BertForSequenceClassification; labelled_loss takes"):
        labelled_loss(tiny("bert"), labels, input_ids=ids)
    with pytest.raises(NotImplementedError, match="Linear; labelled_loss takes"):
        labelled_loss(torch.nn.Linear(2, 2), labels)
    model = language_model("llama")
    with pytest.raises(ValueError, match=r"labels is a list, expected a tensor int64 \[B, S\]"):
        labelled_loss(model, labels.tolist(), input_ids=ids)
    with pytest.raises(ValueError, match=r"labels is torch\.float32 \[3, 9\]; expected int64 \[B, S\]"):
        labelled_loss(model, labels.float(), input_ids=ids)
    with pytest.raises(ValueError, match=r"labels is \[3, 8\]; the model's states are \[3, 9\]"):
        labelled_loss(model, labels[:, 1:], input_ids=ids)
    with torch.no_grad():  # nor is one left where it raised
        assert model(input_ids=ids).logits.shape[:2] == ids.shape


def test_routers_with_a_loss_of_their_own_are_refused():
    sizes = FAMILIES["llama"][2] | {"num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
    ids, labels = labelled()
    expected = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(labelled_loss(model, labels, input_ids=ids), expected, **CLOSE)
    with pytest.raises(NotImplementedError, match="MixtralForCausalLM adds a loss of its routers"):
        labelled_loss(model, labels, input_ids=ids, output_router_logits=True)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        labels = token_ids(12, 9)[i]
        labels[: 2 + i % 5] = -100
        return {"input_ids": token_ids(12, 9)[i], "labels": labels}


def train(folder, **choices):
    """Losses and norms that a Trainer logs, and the rows that the head saw."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: transformers' Trainer needs it")
    model, rows = language_model("llama"), []
    torch.manual_seed(5)
    prefixattn.attach(model, PrefixConfig(length=4, hidden=8))
    model.get_output_embeddings().register_forward_hook(lambda head, args, out: rows.append(out.shape[:-1].numel()))
    smoothing = {"label_smoothing_factor": 0.1} if choices.pop("smooth", False) else {}
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        dataloader_pin_memory=False,
        **smoothing,
    )
    trainer = prefixattn.PrefixTrainer(model, args, train_dataset=Rows(), eval_dataset=Rows(), **choices)
    trainer.train()
    log = [(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
    trained = rows.copy()
    return log, trained, trainer.evaluate()["eval_loss"]


def test_the_trainer_uses_it(tmp_path):
    log, rows, evaluated = train(tmp_path)
    expected, all_rows, same = train(tmp_path, labelled=False)
    torch.testing.assert_close(torch.tensor(log), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert set(all_rows) == {18} and len(rows) == len(all_rows) == 6
    assert max(rows) < 14 and abs(evaluated - same) < 1e-5


def test_the_trainer_leaves_smoothed_losses_to_the_model(tmp_path):
    assert set(train(tmp_path, smooth=True)[1]) == {18}
