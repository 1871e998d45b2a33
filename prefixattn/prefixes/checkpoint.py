"""Prefixes on disk: a JSON file that names a safetensors file. Nothing is ever unpickled."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn.prefixes import files, peft, saving
from prefixattn.prefixes.config import Defaults, PrefixConfig
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.networks import FreePrefix, make_encoder
from prefixattn.prefixes.plus import Memories, PrefixPlusConfig

FORMAT = "prefixattn"
VERSION = 2  # 1 was never released
JSON = "prefix.json"
WEIGHTS = re.compile(r"prefix-[0-9a-f]{12}\.safetensors")
BANK = "bank.safetensors"  # of a `PrefixBank`, in the place of both
# what a folder is read as depends on these: a bank comes first, then a prefix, then an adapter
STATE = BANK, JSON, peft.JSON, peft.TENSORS
METHODS = "prefix", "prefix_plus"
FIELDS = {
    "format": str,
    "version": int,
    "method": str,
    "config": dict,
    "model": dict,
    "folded": bool,
    "weights": str,
    "sha256": str,
}


Config = PrefixConfig | PrefixPlusConfig


def save(folder: Path, config: Config, geometry: Geometry, tensors: dict[str, Tensor], folded: bool) -> None:
    """Writes a prefix, in the place of one or of a bank that is there; of an adapter it leaves the files.

    With `folded`, `tensors` is its keys and values; otherwise its encoder's `state_dict`, and its gate.
    """
    chunks = files.tensor_chunks(tensors)
    digest = files.digest_of(chunks)
    # The tensors' file is named after its content and the JSON, placed last, names it: a process killed at any moment
    # leaves the old checkpoint or the new one, never a mixture.
    weights = f"prefix-{digest[:12]}.safetensors"
    description = files.json_bytes(
        {
            "format": FORMAT,
            "version": VERSION,
            "method": METHODS[isinstance(config, PrefixPlusConfig)],
            "config": config.to_dict(),
            "model": geometry.to_dict(),
            "folded": folded,
            "weights": weights,
            "sha256": digest,
        }
    )
    with saving.saver(folder) as saver:
        saver.write(weights, chunks)
        saver.write(JSON, [description])
        saver.place(weights)
        saver.place(JSON)
        saver.remove(BANK)  # until then the folder is read as the bank that was there
        saver.tidy(lambda name: WEIGHTS.fullmatch(name) is not None and name != weights)


Read = tuple[Config, nn.Module, Tensor | None]


def read(folder: Path, geometry: Geometry, defaults: Defaults) -> Read:
    """Config, encoder and gate of a saved prefix for such a model; an error in words if anything is wrong.

    The encoder is trainable if it was saved unfolded. So is that of a PEFT adapter, which holds keys and values only,
    PEFT having dropped the network: it is one of share="none".
    """
    return saving.whole(folder, STATE, lambda: _read_any(folder, geometry, defaults))


def _read_any(folder: Path, geometry: Geometry, defaults: Defaults) -> Read:
    if (folder / JSON).is_file():
        with files.described(folder / JSON):
            return _read(folder, geometry, defaults)
    if peft.is_there(folder):
        with files.described(folder / peft.JSON):
            config, kv = peft.read(folder, geometry, defaults)
            return config, FreePrefix(kv), None
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder with a saved prefix")
    raise ValueError(f"{folder} holds neither {JSON} nor {peft.JSON}; expected a folder with a saved prefix")


def _read(folder: Path, geometry: Geometry, defaults: Defaults) -> Read:
    path = folder / JSON
    values = files.read_json(path)
    _check_fields(path, values)
    check_geometry(path, values["model"], geometry)
    weights, digest = folder / values["weights"], values["sha256"]
    if values["method"] == "prefix_plus":
        plus = PrefixPlusConfig.from_dict(values["config"])
        with torch.device("meta"):
            memories = Memories(plus, geometry)
        return plus, _filled(memories, files.read_tensors(weights, _shapes(memories), digest)), None
    config = PrefixConfig.from_dict(values["config"])
    if config.count is not None:
        raise ValueError(f"{path} has count={files.shown(config.count, 40)}, expected None: a bank is one file, {BANK}")
    slots = config.slots(geometry.kinds)
    resolved = config.resolved(defaults)
    open_ = [name for name, value in config.to_dict().items() if value != resolved.to_dict()[name]]
    if open_:
        raise ValueError(f"{path} leaves {', '.join(open_)} of the prefix to the model; a saved config says it")
    with torch.device("meta"):  # no memory, and no random numbers drawn
        encoder = make_encoder(config, geometry)
        if values["folded"]:
            encoder = FreePrefix(torch.empty(geometry.kv_shape(len(slots), config.longest)))
    gated = {"gate": [len(slots)]} if config.gate and not values["folded"] else {}
    tensors = files.read_tensors(weights, _shapes(encoder) | gated, digest)
    gate = tensors.pop("gate") if gated else None
    return config, _filled(encoder, tensors).requires_grad_(not values["folded"]), gate


def _shapes(encoder: nn.Module) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in encoder.state_dict().items()}


def _filled(encoder: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    # Assigned, not copied: a float64 prefix does not come back rounded.
    encoder.load_state_dict(tensors, assign=True)
    return encoder


def _check_fields(path: Path, values: dict[str, Any]) -> None:
    # what it is, before what is wrong with it
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {files.shown(values.get('format'))}, expected {FORMAT!r}: not a prefixattn checkpoint"
        )
    if values.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {files.shown(values.get('version'))}; this prefixattn reads version {VERSION}"
        )
    if set(values) != set(FIELDS):
        missing, unknown = sorted(set(FIELDS) - set(values)), sorted(set(values) - set(FIELDS))
        raise ValueError(f"{path} lacks the fields {missing} and has unknown fields {files.shown(unknown)}")
    for name, kind in FIELDS.items():
        if type(values[name]) is not kind:
            raise ValueError(f"{path} has {name} {files.shown(values[name])}, expected a {kind.__name__}")
    if values["method"] not in METHODS:
        raise ValueError(
            f"{path} has method {files.shown(values['method'])}, expected one of {', '.join(map(repr, METHODS))}"
        )
    if not WEIGHTS.fullmatch(values["weights"]):
        raise ValueError(
            f"{path} names the weights {files.shown(values['weights'])}, expected a file {WEIGHTS.pattern} beside it"
        )


def check_geometry(path: Path, saved: Any, geometry: Geometry) -> None:
    here = geometry.to_dict()
    if isinstance(saved, dict) and ("value_dim" in saved) != ("value_dim" in here):  # one of them has one width
        here, saved = ({**sizes, "value_dim": sizes.get("value_dim", sizes.get("head_dim"))} for sizes in (here, saved))
    if not isinstance(saved, dict) or set(saved) != set(here):
        raise ValueError(f"{path} describes the model as {files.shown(saved)}, expected the fields {', '.join(here)}")
    differing = [
        f"{name}={files.shown(saved[name])}, here {here[name]!r}" for name in here if saved[name] != here[name]
    ]
    if differing:
        raise ValueError(f"{path} is of a prefix for another model: {'; '.join(differing)}")
