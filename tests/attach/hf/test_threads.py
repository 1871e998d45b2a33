"""Threads on one model, or on two: what a pass has belongs to the pass."""

import sys
import threading

import pytest
import torch

import prefixattn
from prefixattn import PrefixConfig
from prefixattn.testing.models import tiny, token_ids

ROUNDS = 12


@pytest.fixture(autouse=True)
def often():
    """Threads take turns as often as they can."""
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(before)
    torch.set_num_threads(threads)


def beside(*work):
    """What the functions return while they run beside each other, all but those that equal what they return alone."""
    expected, wrong = [f() for f in work], []
    barrier = threading.Barrier(len(work))

    def loop(i):
        barrier.wait()
        for _ in range(ROUNDS):
            try:
                found = work[i]()
                if found.shape != expected[i].shape or not torch.equal(found, expected[i]):
                    wrong.append((i, "other numbers"))
            except Exception as error:
                wrong.append((i, repr(error)))

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


@pytest.fixture
def served():
    model = tiny("llama")
    prefix = prefixattn.attach(model, PrefixConfig(length=3, share="none"))
    return model, prefix


def test_mass_beside_mass_and_beside_generation(served):
    model, prefix = served
    one, other = token_ids(2, 6), token_ids(3, 4, seed=3)

    def generate():
        return model.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=3, do_sample=False)

    assert not beside(generate, lambda: prefix.mass(input_ids=one), lambda: prefix.mass(input_ids=other))


@pytest.mark.parametrize("where", ["another model", "the same model"])
def test_loading_beside_a_model_that_serves(served, where, tmp_path):
    model, prefix = served
    prefix.save_pretrained(tmp_path)
    target = model if where == "the same model" else tiny("llama")
    ids = token_ids(2, 6)

    def load():
        prefixattn.load(target, tmp_path).detach()  # the same as the active one
        return torch.zeros(1)

    assert not beside(lambda: model(ids).logits.detach(), load)


def test_positions_of_two_passes_do_not_mix(served):
    model, prefix = served
    bank = prefixattn.PrefixBank.of(model, [prefix, prefixattn.attach(model, PrefixConfig(length=7, share="none"))])
    ids = token_ids(2, 6)

    def at(row):
        return lambda: model(ids, prefix_ids=torch.full((2,), row)).logits.detach()

    assert len(bank) == 2 and not beside(at(0), at(1))


def test_a_labelled_loss_beside_a_forward_pass(served):
    model, _ = served
    ids = token_ids(2, 6)
    labels = ids.clone()
    labels[:, :4] = -100

    def loss():
        return prefixattn.labelled_loss(model, labels, input_ids=ids).detach()

    assert not beside(lambda: model(ids).logits.detach(), loss)
