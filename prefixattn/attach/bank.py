"""`PrefixBank`: many prefixes on one model, of which every sample of a batch picks its own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefixattn.attach.adapter import making
from prefixattn.attach.find import make_adapter
from prefixattn.attach.ids import checked
from prefixattn.attach.plus import PrefixPlus
from prefixattn.attach.prefix import Prefix
from prefixattn.attach.records import Chosen, Host, LayerPrefix
from prefixattn.attach.training import steps
from prefixattn.prefixes.config import PrefixConfig
from prefixattn.prefixes.networks import PrefixRows
from prefixattn.prefixes.plus import Memories, PrefixPlusConfig


class _Brought(NamedTuple):
    """The rows of a batch in the model's type and on its device, and what they were made for."""

    key: tuple[Any, ...]
    given: Tensor  # the very tensor, so that a decoding step asks no device what is in it
    version: int | None
    ids: Tensor  # its values then
    chosen: Chosen


class PrefixBank(Prefix):
    """T prefixes on a frozen model. Made by `attach` with `count`, by `PrefixBank.of`, `PrefixBank.open` and `load`.

    Each forward pass and `generate` take `prefix_ids`, int64 [B]: the prefix of each sample. On a GPU's model they may
    lie on the CPU. A bank of one prefix needs none. `encoder.weight` has a row for each prefix, `encoder.lengths` its
    length.

    Where no gradient is wanted and the bank lies on the model's device in the model's type, attention reads it where it
    lies. Otherwise the rows that the batch names are brought over, once for the whole of `generate`. In training a
    row's gradient comes from its own samples; that of other rows is zero, with which an optimizer with moments or
    weight decay still moves them. With `sparse = True` the gradient has the named rows only, for torch.optim.SparseAdam
    and SGD; torch's clip_grad_norm_ does not take it.
    """

    encoder: PrefixRows

    def __init__(self, config: PrefixConfig, adapter: Host, encoder: nn.Module) -> None:
        super().__init__(config, adapter, encoder)
        self.sparse = False
        self._brought: _Brought | None = None
        self._source: tuple[Path, Tensor] | None = None  # of a mapped bank: its file, and which rows were looked at

    @classmethod
    @making()
    def of(cls, model: nn.Module, prefixes: Sequence[Prefix | str | Path]) -> "PrefixBank":
        """A bank of prefixes that exist, as frozen keys and values, attached to `model` as its active prefix.

        Each is a prefix on this model or one like it, or a folder that `load` reads. Their lengths may differ; layers,
        positions, dropout and prefix_in_window must be the same. `requires_grad_()` lets the bank be trained on.
        """
        if not isinstance(prefixes, Sequence) or isinstance(prefixes, str) or not prefixes:
            raise ValueError(f"prefixes is {prefixes!r}, expected a list of prefixes or folders, at least one")
        adapter = make_adapter(model)
        found = [_prefix(item, adapter) for item in prefixes]
        _check_alike(found, adapter)
        kvs = [prefix._kv() for prefix in found]
        P = max(kv.shape[3] for kv in kvs)
        rows = torch.stack([_padded(kv, P).to(adapter.device) for kv in kvs])
        lengths = torch.tensor([kv.shape[3] for kv in kvs], device=adapter.device)
        given = found[0].config
        config = PrefixConfig(
            P,
            "none",
            given.layers,
            given.attentions,
            dropout=given.dropout,
            positions=given.positions,
            count=len(rows),
            prefix_in_window=given.prefix_in_window,
        )
        bank = cls(adapter.resolve(config), adapter, PrefixRows(rows, lengths, trainable=False))
        adapter.install(bank)
        return bank

    @classmethod
    @making()
    def open(cls, model: nn.Module, path: str | Path) -> "PrefixBank":
        """Attaches a saved bank without reading it: its rows stay in the file, and those that are used are paged in.

        Args:
            path: What `save_pretrained` wrote, the folder or the file in it. Sizes, types and lengths are checked now;
                whether a row's numbers are finite when it is first used (not in compiled code). Changes, by `set` or
                by training, stay in memory.
        """
        from prefixattn.attach import bank_file  # here, for installations without safetensors

        adapter = make_adapter(model)
        file = bank_file.find(Path(path))
        config, rows, lengths = bank_file.read(file, adapter.geometry, mapped=True)
        bank = cls(config.resolved(adapter.defaults), adapter, PrefixRows(rows, lengths, trainable=False))
        bank._source = file, torch.zeros(len(rows), dtype=torch.bool)
        adapter.install(bank)
        return bank

    def __len__(self) -> int:
        """T, the number of prefixes."""
        return len(self.encoder.weight)

    @property
    def folded(self) -> bool:
        return True

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """All keys and values, `[T, N, 2, Hkv, P, D]` (see `Prefix.forward`): a view, if not asked for another type."""
        rows: Tensor = self.encoder()
        return rows if dtype is None else rows.to(dtype)

    def get(self, index: int) -> Tensor:
        """Keys and values of one prefix, `[N, 2, Hkv, its length, D]`, a copy."""
        index = self._index(index)
        length = int(self.encoder.lengths[index])
        return self.encoder()[index, ..., :length, :].detach().clone()

    @torch.no_grad()
    def set(self, index: int, prefix: Prefix | Tensor | str | Path) -> None:
        """Puts another prefix at `index`: one on a like model, a folder, or keys and values `[N, 2, Hkv, n, D]`."""
        index, keys_and_values = self._index(index), self._tensor(prefix)
        self.encoder()[index].copy_(_padded(keys_and_values, self.config.longest))
        self.encoder.lengths[index] = keys_and_values.shape[3]

    @torch.no_grad()
    def append(self, prefix: Prefix | Tensor | str | Path) -> int:
        """Adds a prefix, and returns its index. The weight is another parameter then: optimizers must be made anew."""
        keys_and_values, encoder = self._tensor(prefix), self.encoder
        row = _padded(keys_and_values, self.config.longest)[None].to(encoder.weight)
        length = encoder.lengths.new_tensor([keys_and_values.shape[3]])
        trainable = encoder.weight.requires_grad
        self.encoder = PrefixRows(torch.cat([encoder(), row]), torch.cat([encoder.lengths, length]), trainable)
        if self._source is not None:
            file, seen = self._source
            self._source = file, torch.cat([seen, seen.new_ones(1)])
        self.config, self._brought = replace(self.config, count=len(self)), None
        return len(self) - 1

    def _index(self, index: int) -> int:
        if not isinstance(index, int) or not 0 <= index < len(self):
            raise ValueError(f"index is {index!r}, expected an integer from 0 to {len(self) - 1} (T={len(self)})")
        return index

    def _tensor(self, item: Prefix | Tensor | str | Path) -> Tensor:
        if not isinstance(item, Tensor):
            prefix = _prefix(item, self._attached())
            _check_alike([self, prefix], self._attached())
            item = prefix._kv()
        N, pair, Hkv, P, D = self.encoder.shape
        shape = list(item.shape)
        if item.dim() != 5 or shape[:3] != [N, pair, Hkv] or shape[4] != D or not 1 <= shape[3] <= P:
            raise ValueError(
                f"the prefix has shape {shape}, expected [N={N}, {pair}, Hkv={Hkv}, n, D={D}] with n from 1 to the "
                f"bank's P={P}"
            )
        if not item.isfinite().all():
            raise ValueError("the prefix holds values that are infinite or not a number")
        return item

    # a forward pass

    def choose(self, ids: Tensor | None, batch: int, dtype: torch.dtype, device: torch.device) -> Chosen:
        weight = self.encoder.weight
        if ids is None and len(self) == 1:
            ids = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        ids = self._checked(ids, batch)
        if torch.is_grad_enabled() and weight.requires_grad:
            if not torch.compiler.is_compiling():
                self._brought = None  # an optimizer that writes through .data leaves no trace
            return self._gathered(ids, dtype, device)
        if weight.device == device and weight.dtype == dtype:
            ids = ids.to(device)
            self._check_finite(ids)
            lengths, pairs = self.encoder.lengths, self._geometry.by_layer(self.encoder().detach(), self.slots, 1)
            return Chosen(pairs, self._shift(lengths, ids), ids, lengths)
        if torch.compiler.is_compiling() or weight.is_inference():
            return self._gathered(ids, dtype, device)
        key = (dtype, device, steps(), weight.data_ptr(), weight._version, self.encoder.lengths._version)
        last = self._brought
        if last is None or last.key != key or not _same(last, ids):
            # not as inference tensors: a later pass may need to save them for a backward
            with torch.inference_mode(False), torch.no_grad():
                chosen = self._gathered(ids, dtype, device)
                self._brought = last = _Brought(key, ids, _version(ids), ids.clone(), chosen)
        return last.chosen

    def layer_prefixes(self, dtype: torch.dtype, device: torch.device) -> list[LayerPrefix]:
        raise NotImplementedError("a PrefixBank works in models of transformers only, whose forward takes prefix_ids")

    def _checked(self, ids: Tensor | None, batch: int) -> Tensor:
        T = len(self)
        return checked(ids, batch, T, f"a bank of T={T} prefixes", "a prefix of the bank")

    def _gathered(self, ids: Tensor, dtype: torch.dtype, device: torch.device) -> Chosen:
        """The prefixes that the samples name, each once; in compiled code, whose shapes must not depend on data, each
        sample's own.
        """
        ids = ids.to(self.encoder.weight.device)
        if torch.compiler.is_compiling():
            named, prefix_ids = ids, None
        else:
            named, prefix_ids = ids.unique(return_inverse=True)
            self._check_finite(named)
        sparse = self.sparse and torch.is_grad_enabled()
        found = self.encoder.lookup(named, sparse).to(device=device, dtype=dtype)
        shift = self._shift(self.encoder.lengths, ids)
        return Chosen(
            self._geometry.by_layer(found, self.slots, 1),
            shift if isinstance(shift, int) else shift.to(device),
            None if prefix_ids is None else prefix_ids.to(device),
            self.encoder.lengths[named].to(device),
        )

    def _shift(self, lengths: Tensor, ids: Tensor) -> int | Tensor:
        return lengths[ids][:, None] if self.config.positions == "shifted" else 0

    def _check_finite(self, ids: Tensor) -> None:
        """Rows of a mapped file are looked at when they are first used: looking at all would read all."""
        if self._source is None or torch.compiler.is_compiling():
            return
        file, seen = self._source
        new = ids.cpu().unique()
        for row in new[~seen[new]].tolist():
            if not self.encoder.weight[row].isfinite().all():
                raise ValueError(f"{file} holds values that are infinite or not a number, in row {row}")
            seen[row] = True

    # what a single prefix does otherwise

    def num_parameters(self, kept: bool = False) -> int:
        """Parameters being trained; with `kept`, the numbers that must be kept to use the prefixes afterwards."""
        if kept:
            N, pair, Hkv, _, D = self.encoder.shape
            return int(self.encoder.lengths.sum()) * N * pair * Hkv * D
        return super().num_parameters()

    def save_pretrained(self, folder: str | Path, folded: bool = False) -> None:
        """Writes the bank to `folder` as one file, which `load` reads and `PrefixBank.open` maps into memory."""
        from prefixattn.attach import bank_file

        bank_file.save(Path(folder), self.config, self._geometry, self.encoder().detach(), self.encoder.lengths)

    def export_peft(self, folder: str | Path) -> None:
        raise NotImplementedError(f"a PEFT adapter holds one prefix, and the bank T={len(self)}")

    def export_cache(self, folder: str | Path, *, tokens: int | None = None) -> None:
        raise NotImplementedError(
            f"a file of a cache holds one prefix, and the bank T={len(self)}; attach one by itself, or take to_cache"
        )

    def _served(self, batch: int, ids: Tensor | None) -> tuple[PrefixConfig, Tensor]:
        self._refuse_uncached()
        ids = self._checked(ids, ids.numel() if isinstance(ids, Tensor) else batch).to(self.encoder.weight.device)
        lengths = self.encoder.lengths[ids].unique().tolist()
        if len(lengths) != 1:
            raise ValueError(
                f"the prefixes of prefix_ids have the lengths {lengths}; a cache has as many rows for every sample: "
                "serve those of each length together"
            )
        with torch.inference_mode(False), torch.no_grad():
            self._check_finite(ids)
            return replace(self.config, length=lengths[0]), self.encoder()[ids, ..., : lengths[0], :]

    def _kv(self) -> Tensor:
        raise ValueError(f"expected a single prefix, got a bank of T={len(self)}; take one out of it with get(index)")

    def _apply(self, fn: Any, recurse: bool = True) -> "PrefixBank":
        self._brought = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_brought": None}


def _padded(bank: Tensor, P: int) -> Tensor:  # kv of n rows -> kv of P rows
    return nn.functional.pad(bank, (0, 0, 0, P - bank.shape[3]))


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _same(last: _Brought, ids: Tensor) -> bool:
    if ids is last.given and last.version is not None and last.version == ids._version:
        return True
    return ids.device == last.ids.device and torch.equal(ids, last.ids)


def _prefix(item: Prefix | str | Path, adapter: Host) -> Prefix:
    """A prefix, or what a folder holds."""
    prefix = item if isinstance(item, Prefix) else read(adapter, item)
    if not isinstance(prefix, Prefix):
        raise ValueError(f"{item} holds a {type(prefix).__name__}, which has no keys and values for a bank")
    return prefix


def _check_alike(prefixes: list[Prefix], adapter: Host) -> None:
    first = prefixes[0]
    for i, prefix in enumerate(prefixes):
        if prefix.geometry != adapter.geometry:
            raise ValueError(f"prefix {i} is of another model: {prefix.geometry}, here {adapter.geometry}")
        if not isinstance(prefix.config.length, int):
            raise ValueError(f"prefix {i} has length {prefix.config.length}; a bank needs one length for all layers")
        for name, mine, others in (
            ("layers", prefix.slots, first.slots),
            ("positions", prefix.config.positions, first.config.positions),
            ("dropout", prefix.config.dropout, first.config.dropout),
            ("prefix_in_window", prefix.config.prefix_in_window, first.config.prefix_in_window),
        ):
            if mine != others:
                raise ValueError(f"prefix {i} has {name} {mine!r}, and prefix 0 {others!r}; expected the same for all")


def read(adapter: Host, folder: str | Path) -> Prefix | PrefixPlus:
    """What is saved in `folder`, for the adapter's model, to which it is not attached yet."""
    from prefixattn.prefixes import checkpoint, saving  # here, for the sake of installations without safetensors

    folder = Path(folder)
    return saving.whole(folder, checkpoint.STATE, lambda: _read(adapter, folder))


def _read(adapter: Host, folder: Path) -> Prefix | PrefixPlus:
    from prefixattn.attach import bank_file
    from prefixattn.prefixes import checkpoint

    file = folder / bank_file.NAME
    if file.is_file():
        config, rows, lengths = bank_file.read(file, adapter.geometry, mapped=False)
        return PrefixBank(config.resolved(adapter.defaults), adapter, PrefixRows(rows, lengths))
    saved, encoder, gate = checkpoint.read(folder, adapter.geometry, adapter.defaults)
    if isinstance(saved, PrefixPlusConfig):
        assert isinstance(encoder, Memories)
        return PrefixPlus(saved, adapter, encoder)
    prefix = Prefix(saved, adapter, encoder)
    if gate is not None and prefix.gate is not None:
        prefix.gate.data = gate
    return prefix
