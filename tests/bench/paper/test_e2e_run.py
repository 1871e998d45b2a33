"""The E2E run on a tiny GPT-2: objective, the published way beside ours, decoding, kill and resume, the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import e2e
import e2e_data
from runs import Refusal, load_state, save_state, thinned, write_json

transformers = pytest.importorskip("transformers", reason="the runs need transformers")
pytest.importorskip("tqdm", reason="the runs need tqdm")
import table_to_text as t2t  # noqa: E402
from methods import IGNORED, load_model, make_method, targets_of, token_losses  # noqa: E402

E2E = Path(e2e.__file__)
P, HIDDEN, SEED = 5, 16, 101


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 with two layers and a tokenizer of 400 from the generator's own texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((" ".join(pair) for pair in e2e_data.generate(200, 2, seed=3)), trainer)
    path = tmp_path_factory.mktemp("tiny")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=bpe.get_vocab_size(), n_positions=256, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture
def tiny(folder: Path) -> tuple[Any, Any]:
    return load_model(str(folder))


def made(name: str, folder: Path, labelled: bool = True) -> Any:
    return make_method(name, *load_model(str(folder)), P, HIDDEN, SEED, labelled)


def samples(tokenizer: Any, count: int) -> list[t2t.Sample]:
    return t2t.encode(tokenizer, e2e_data.generate(count, 1, seed=0)[:count], 200)


def test_encodes_the_papers_string_and_labels_only_the_text(tiny: tuple[Any, Any]) -> None:
    tokenizer = tiny[1]
    eos = tokenizer.eos_token
    (sample,) = t2t.encode(tokenizer, [("name : A | Type : pub", "A is a pub .")], 200)
    # E2E's targets end in a space, and the string puts one more ahead of the last eos
    assert sample.ids == tokenizer(f" name : A | Type : pub {eos} A is a pub .  {eos}")["input_ids"]
    _, labels = t2t.collate([sample], pad=0)
    first = sample.ids.index(tokenizer.eos_token_id)
    assert labels[0, : first + 1].tolist() == [IGNORED] * (first + 1)
    assert labels[0, first + 1 :].tolist() == sample.ids[first + 1 :]
    assert t2t.prompt_ids(tokenizer, ["name : A | Type : pub"]) == [sample.ids[: first + 1]]


def test_loss_is_the_sum_over_tokens_and_ignores_padding(tiny: tuple[Any, Any]) -> None:
    batch = samples(tiny[1], 4)
    ids, labels = t2t.collate(batch, pad=0)
    logits = torch.randn(*ids.shape, 400, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for row, sample in enumerate(batch):
        for at in range(sample.target, len(sample.ids)):
            expected -= logits[row, at - 1].double().log_softmax(0)[sample.ids[at]].item()
    assert token_losses(logits.flatten(0, 1), targets_of(labels)).item() == pytest.approx(expected, rel=1e-6)


def test_deep_and_original_train_alike(folder: Path, tiny: tuple[Any, Any], tmp_path: Path) -> None:
    curves, start = {}, {}
    data = samples(tiny[1], 40)
    for name in ("deep", "original"):
        method = made(name, folder)
        start[name] = [p.detach().clone() for p in method.prefix.parameters()]
        schedule = t2t.Schedule(lr=1e-2, epochs=2)
        curves[name] = t2t.train(method, data, schedule, 0, tmp_path / f"{name}.pt", "x").losses
    assert len(curves["deep"]) == 8
    assert all(torch.equal(a, b) for a, b in zip(start["deep"], start["original"], strict=True))
    torch.testing.assert_close(*map(torch.tensor, (curves["deep"], curves["original"])), rtol=2e-5, atol=0)
    assert sum(curves["deep"][4:]) < sum(curves["deep"][:4])  # the same samples, an epoch later


@pytest.mark.parametrize("name", ["deep", "original", "none"])
def test_decoding_together_equals_one_at_a_time(name: str, folder: Path, tiny: tuple[Any, Any], tmp_path: Path) -> None:
    tokenizer, method = tiny[1], made(name, folder)
    sources = e2e_data.grouped(e2e_data.generate(8, 1, seed=5))[0]
    cpu = torch.device("cpu")
    texts = [
        t2t.decode(method, tokenizer, sources, tmp_path / f"{rows}.json", "x", cpu, 250, max_new=12, rows=rows)
        for rows in (1, 16)
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == len(sources)
    assert all("\n" not in text and text for text in texts[0])


def test_original_decodes_as_deep_does(folder: Path, tiny: tuple[Any, Any], tmp_path: Path) -> None:
    sources = e2e_data.grouped(e2e_data.generate(6, 1, seed=6))[0]
    texts = {}
    for name in ("deep", "original"):
        progress = tmp_path / f"{name}.json"
        method = made(name, folder)
        texts[name] = t2t.decode(method, tiny[1], sources, progress, "x", torch.device("cpu"), 250, max_new=12)
    assert texts["deep"] == texts["original"]


def test_logits_at_labels_alone_give_the_same_loss(folder: Path, tiny: tuple[Any, Any]) -> None:
    ids, labels = t2t.collate(samples(tiny[1], 6), pad=0)
    losses = [made("deep", folder, labelled).loss(ids, labels) for labelled in (True, False)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name, everywhere", [("deep", False), ("deep-all", True)])
def test_deep_all_computes_logits_at_every_position(name: str, everywhere: bool, folder: Path) -> None:
    method, rows = made(name, folder), []
    method.model.lm_head.register_forward_hook(lambda _, inputs, out: rows.append(out.shape[:-1].numel()))
    ids, labels = t2t.collate(samples(load_model(str(folder))[1], 6), pad=0)
    method.loss(ids, labels)
    assert rows == [ids.numel() if everywhere else int((labels[:, 1:] != IGNORED).sum())]


def test_a_text_beyond_the_positions_is_refused(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(Refusal, match="no text begins within 3 positions"):
        t2t.encode(tiny[1], [("name : A | Type : pub", "A is a pub .")], 3)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert t2t.epoch_order(50, 101, 0) == t2t.epoch_order(50, 101, 0)
    assert sorted(t2t.epoch_order(50, 101, 1)) == list(range(50))
    assert t2t.epoch_order(50, 101, 1) != t2t.epoch_order(50, 101, 0) != t2t.epoch_order(50, 102, 0)


@pytest.mark.parametrize("damage, words", [
    ("tensors", "its weights lack 12 tensors of a GPT-2, transformer.h.1.attn.c_attn.bias among them"),
    ("foreign", "its config says 'llama', expected 'gpt2'"),
    ("vocabulary", "its tokenizer has 400 tokens, the model 100 embeddings"),
])  # fmt: skip
def test_a_model_that_is_not_whole_is_refused(damage: str, words: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    if damage == "tensors":
        del model.transformer.h[1]
        model.config.n_layer = 1
        model.save_pretrained(path)
        shutil.copy(folder / "config.json", path)  # which speaks of two layers
    elif damage == "foreign":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
        transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=400, **sizes)).save_pretrained(path)
    else:
        model.resize_token_embeddings(100)
        model.save_pretrained(path)
    with pytest.raises(Refusal) as refusal:
        load_model(str(path))
    assert str(refusal.value) == f"--model {path}: {words}"


def test_a_refused_model_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    (path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    out = tmp_path / "r" / "x.json"
    methods = ("frozen", "deep", "none", "--parallel", "2")
    done = call("--data", "generated", "--model", str(path), "--out", str(out), "--methods", *methods)
    # torchao, where it is installed, logs what it cannot load as soon as transformers looks for it
    own = [line for line in done.stderr.splitlines() if "torchao" not in line and "pytree" not in line]
    assert done.returncode == 1 and len(own) == 1 and own[0].startswith("e2e.py: --model"), done.stderr
    assert "not a GPT-2 with a tokenizer that can be loaded" in done.stderr
    assert not list(out.parent.iterdir())


def test_a_word_longer_than_the_prefix_keeps_within_the_positions(folder: Path, tmp_path: Path) -> None:
    word = load_model(str(folder))[1](" summarize", add_special_tokens=False)["input_ids"]
    assert len(word) > 1
    method = made("none-word", folder)
    assert method.length == len(word)
    config = e2e.Config("small", str(folder), data="generated", subset=20, prompts=2, dev=2, beams=1, epochs=1,
                        length=1, max_new=256 - len(word) - 1, threads=1)  # fmt: skip
    write_json(tmp_path / "config.json", e2e.asdict(config))
    threads = torch.get_num_threads()
    try:
        e2e.work("none-word", config, tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert len(json.loads((tmp_path / "none-word.json").read_text())["texts"]) == 2


def test_a_decoded_text_is_one_line(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    class BreaksLines:
        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.tensor([tiny[1]("a\n\n b\u2028c")["input_ids"]] * len(input_ids))

    assert t2t.decode(BreaksLines(), tiny[1], ["name : A"], tmp_path / "x", "x", torch.device("cpu"), 250) == ["a b c"]


# --- kill and resume ---


def prepared(folder: Path, run: Path) -> e2e.Config:
    config = e2e.Config(
        "small", str(folder), methods=("deep",), data="generated", subset=200, prompts=40, dev=20, hidden=HIDDEN,
        beams=2, max_new=16, threads=1, checkpoint_every=4, epochs=2, lr={"deep": 1e-2},
    )  # fmt: skip
    write_json(run / "config.json", e2e.asdict(config))
    return config


def worker(run: Path) -> list[str]:
    return [sys.executable, str(E2E), "--worker", "deep", "--run", str(run)]


def kill_when(run: Path, ready: Path) -> None:
    """Starts the worker and kills it, with no chance to clean up, as soon as `ready` exists."""
    process = subprocess.Popen(worker(run), stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while not ready.exists():
        assert process.poll() is None, f"the worker ended (status {process.returncode}) before {ready.name} was there"
        assert time.monotonic() < deadline, f"{ready.name} did not appear within five minutes"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_run_ends_with_the_same_bits(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config = prepared(folder, whole)
    prepared(folder, broken)
    threads = torch.get_num_threads()
    try:
        e2e.work("deep", config, whole)
    finally:
        torch.set_num_threads(threads)
    kill_when(broken, broken / "deep.pt")
    state = torch.load(broken / "deep.pt", weights_only=True)
    assert 4 <= state["step"] < 40
    kill_when(broken, broken / "deep.decoded.json")
    assert not (broken / "deep.json").exists()
    subprocess.run(worker(broken), stderr=subprocess.PIPE, check=True)
    expected, got = (json.loads((run / "deep.json").read_text()) for run in (whole, broken))
    for key in ("fingerprint", "steps", "final_loss", "losses", "dev_loss", "texts"):
        assert got[key] == expected[key], key
    assert len(expected["losses"]) == 40
    trained = [torch.load(run / "deep.pt", weights_only=True)["prefix"] for run in (whole, broken)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    data, out = e2e_data.load(e2e_data.GENERATED), tmp_path / "results" / "r.json"
    out.parent.mkdir()
    broken.rename(out.with_name(f"r.{e2e.run_key(config, data)[:10]}.run"))
    monkeypatch.setattr(e2e, "score_all", lambda *_: [])
    e2e.run_all(config, out, data, "command")
    # nothing is left of the run, not even what the kills had left half written
    assert sorted(path.name for path in out.parent.iterdir()) == ["r.deep.txt", "r.json", "r.png"]


@pytest.mark.parametrize("damage", ["truncated", "noise", "foreign", "other_run"])
def test_a_bad_checkpoint_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "deep.pt"
    save_state(path, "f" * 64, {"step": 3, "prefix": {"w": torch.ones(100)}})
    keys = {"step", "prefix"}
    loaded = load_state(path, "f" * 64, keys)
    assert loaded is not None
    assert loaded["step"] == 3
    words = f"{path}: damaged checkpoint"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "noise":
        path.write_bytes(b"\x00\x01noise" * 50)
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
        words = "not a checkpoint of this program (lacks fingerprint, prefix, step)"
    else:
        words = "checkpoint of another run (fingerprint ffffffffffff, expected 000000000000"
    with pytest.raises(Refusal) as refusal:
        load_state(path, "0" * 64 if damage == "other_run" else "f" * 64, keys)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [[], {"fingerprint": "x"}, {"fingerprint": "x", "texts": []}])
def test_a_bad_file_of_decoded_texts_is_refused(content: Any, tiny: tuple[Any, Any], tmp_path: Path) -> None:
    write_json(path := tmp_path / "deep.decoded.json", content)
    with pytest.raises(Refusal, match="decoded texts of another run"):
        t2t.decode(None, tiny[1], ["name : A"], path, "x", torch.device("cpu"), 250)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert load_state(tmp_path / "none.pt", "x", {"step"}) is None


def test_a_diverging_run_says_so(folder: Path, tiny: tuple[Any, Any], tmp_path: Path) -> None:
    method = made("none", folder)
    method.prefix.encoder.bank.data.fill_(float("nan"))
    with pytest.raises(Refusal, match="loss nan at step 1; lower the learning rate"):
        t2t.train(method, samples(tiny[1], 10), t2t.Schedule(lr=1.0), 0, tmp_path / "none.pt", "x", label="none")
    assert not list(tmp_path.iterdir())


# --- the command line ---


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(E2E), *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_whole_run_leaves_a_record(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "results" / "tiny.json"
    done = call(
        "--data", "generated", "--model", str(folder), "--methods", "frozen", "deep", "--subset", "60",
        "--prompts", "6", "--dev", "10", "--threads", "1", "--max-new", "8", "--hidden", "16", "--lr", "deep=1e-3",
        "--parallel", "2", "--out", str(out),
        PATH=str(tmp_path),  # no java: METEOR takes ten seconds to start, and a run without it must work too
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("no E2E data (asked for): ")
    assert "generator" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[-1] == "results: tiny.json and tiny.png; of generated records, not of E2E"
    results = json.loads(out.read_text())
    assert [run["method"] for run in results["methods"]] == ["frozen", "deep"]
    deep = results["methods"][1]
    assert deep["steps"] == 6
    assert deep["kept"] == P * 2 * 2 * 32
    assert deep["trained"] == P * 32 + 32 * 16 + 16 + 16 * 128 + 128
    assert deep["seconds_per_step"] > 0
    assert deep["lr"] == 1e-3
    assert len(deep["samples"]) == 5
    assert set(deep["scores"]) == set(e2e.METRICS)
    assert deep["scores"]["METEOR"] is None
    assert deep["scores"]["BLEU"] >= 0
    assert any(note.startswith("METEOR: not computed: there is no java") for note in results["notes"])
    assert results["config"]["seed"] == SEED
    assert results["command"].endswith("--max-new 8 --hidden 16 --lr deep=1e-3 --parallel 2 --out OUT")
    for place in (str(tmp_path), str(folder), str(Path.home()), str(E2E.parents[2])):
        assert place not in out.read_text()
    files = sorted(path.name for path in out.parent.iterdir())
    assert files == ["tiny.deep.txt", "tiny.frozen.txt", "tiny.json", "tiny.png"]
    assert (out.parent / "tiny.png").stat().st_size <= 200_000
    assert len((out.parent / "tiny.deep.txt").read_text().splitlines()) == 6
    assert f"{deep['trained']:,} / {deep['kept']:,}" in done.stdout


def test_thins_a_curve_to_means_of_equal_windows() -> None:
    assert thinned([4.0, 2.0, 3.0], points=2) == [(2, 3.0), (3, 3.0)]
    assert thinned([], points=2) == []
    curve = thinned([float(i) for i in range(21_030)])
    assert len(curve) <= 500
    assert curve[-1][0] == 21_030
