"""`SharedPrompt`: a prompt is run once for all completions that begin with it, in training too."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn.attach.adapter import evaluating
from prefixattn.attach.base import Attached
from prefixattn.attach.find import adapter_of, make_adapter
from prefixattn.attach.hf import interface, probe, reentrant
from prefixattn.attach.hf.adapter import HuggingFaceAdapter
from prefixattn.attach.hf.cache import windows
from prefixattn.attach.hf.positions import padding_on_the_left
from prefixattn.attach.ids import checked
from prefixattn.attach.prefix import Prefix
from prefixattn.attach.records import Chosen, LayerPrefix
from prefixattn.prefixes.config import PrefixConfig


class SharedPrompt:
    """Lets the completions of a group share one pass of their prompt, with its gradients.

    The prompts' keys and values are the prefixes of the completions, each of which names its own by `prefix_ids`::

        shared = prefixattn.SharedPrompt(model)  # once; the model is left as it is
        with shared(prompt_ids, attention_mask=prompt_mask):  # runs the T prompts
            logits = model(completion_ids, attention_mask=mask, prefix_ids=groups).logits
            loss(logits).backward()

    Logits and gradients are those of the repeated batch, where each completion stands behind its prompt: positions go
    on from each prompt's own length, and gradients flow on into the prompts' pass. To predict a completion's first
    token, leave the prompt's last token out of the prompts and begin each completion with it. Inside, `generate` and
    `labelled_loss` take `prefix_ids` as the model does. One prompt needs none.

    Weights may be trained in any way, as a whole or as LoRA's; nothing is frozen. If the model has a learned prefix, it
    stands before the prompts. Attention dropout draws one mask for a prompt's own pass, whatever its completions.

    Args:
        model: A causal language model of transformers that `attach` takes, perhaps in a wrapper of PEFT's.

    Raises:
        NotImplementedError: the model is no such, or does not make of a prompt and what follows it what it makes of
            both together (its layers carry more than keys and values from token to token, for example).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        adapter = make_adapter(model)
        if not isinstance(adapter, HuggingFaceAdapter) or not adapter.decodes:
            raise NotImplementedError(
                f"model is {type(adapter.base).__name__}; SharedPrompt takes causal language models of transformers"
            )
        if not adapter.positions.shiftable:
            raise NotImplementedError(
                f"{type(adapter.base).__name__} hands its positions on nowhere that a prompt could shift them"
            )
        if adapter.own:
            raise NotImplementedError(
                f"{type(adapter.base).__name__} has layers with an attention of their own, which would not see the "
                f"prompt: {adapter.own[0]}"
            )
        self._adapter = adapter
        self._try()

    @contextmanager
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Iterator[None]:
        """Runs the prompts; inside, every pass of the model is one of completions.

        `backward` may be inside or, unless layers are under gradient checkpoints, after it. Several backward passes of
        one context need `retain_graph=True`, as they share the prompts' pass. No other thread may run the model.

        Args:
            input_ids: Prompts, int64 ``[T, P]``.
            attention_mask: ``[T, P]``, 0 where there is padding, on either side; default: none. A prompt may be empty.

        Raises:
            ValueError: wrong shapes or types; padding between tokens; or, from a pass inside, a prompt and a completion
                that together do not fit into a sliding window of the model's, where a learned prefix stands before the
                prompts that stays in sight.
            NotImplementedError: reentrant gradient checkpoints, whose layers hand no gradient to the prompts; a bank, a
                Prefix-Tuning+ or a prefix that is not the same in all layers on the model.
        """
        adapter = self._here()
        learned = _learned(adapter)
        aligned, lengths = _aligned(input_ids, attention_mask)
        if torch.is_grad_enabled() and reentrant.needed(adapter.base):
            raise NotImplementedError(
                "a layer under a reentrant gradient checkpoint hands no gradient to the prompts; enable checkpoints "
                'with {"use_reentrant": False}'
            )
        with ExitStack() as stack:
            if not adapter.prefixes:
                stack.enter_context(adapter.entered())
            made = _keys_and_values(adapter, aligned)
            slides = _slides(adapter, learned)
            if (found := windows(adapter)) and not slides:
                check = _Window(type(adapter.base).__name__, found[0], int(lengths.max()))
                stack.callback(adapter.base.register_forward_pre_hook(check, with_kwargs=True).remove)
            stack.enter_context(adapter.lent(_Prompts(adapter, made, lengths, learned, slides)))
            yield

    def _here(self) -> HuggingFaceAdapter:
        """The adapter of the prefixes that the model has by now, or the one that was made for this."""
        found = adapter_of(self.model) or self._adapter
        assert isinstance(found, HuggingFaceAdapter)
        return found

    def _try(self) -> None:
        """Runs some tokens as a whole and in two parts; NotImplementedError if the model makes two things of them."""
        adapter = self._here()
        base, inputs = adapter.base, probe.example(adapter.base)
        most = probe.SOURCE if _slides(adapter, _learned(adapter)) else min([probe.SOURCE, *windows(adapter)])
        tokens, first = inputs["input_ids"][:, :most], most // 2
        whole, _ = probe.run(base, inputs | {"input_ids": tokens})
        with torch.no_grad(), evaluating(base), self(tokens[:, :first]):
            part, _ = probe.run(base, inputs | {"input_ids": tokens[:, first:]})
        trial = probe.Trial(inputs, whole[:, first:], None, probe.tolerance(whole))
        if (apart := probe.differs(trial, part)) is not None:
            raise NotImplementedError(
                f"{type(base).__name__} computes something else of tokens behind a shared prompt: its output "
                f"differs by {apart:.1e} of its size; repeat the prompt"
            )


class _Prompts(Attached):
    """What a model attends to inside: its learned prefix, if it has one, and then the prompts."""

    def __init__(
        self,
        adapter: HuggingFaceAdapter,
        rows: list[LayerPrefix],
        lengths: Tensor,
        learned: Prefix | None,
        slides: bool,  # out of layers' windows
    ) -> None:
        config = PrefixConfig(length=rows[0][0].shape[2], share="none", prefix_in_window=slides)
        super().__init__(config, adapter, nn.Identity())
        self.rows = rows  # [T, Hkv, P, D] in each layer
        self.lengths = self.shift = lengths
        if learned is None:
            return
        key = rows[0][0]
        ahead = learned.layer_prefixes(key.dtype, key.device)  # [Hkv, n, D]
        self.rows = [(_behind(k, key), _behind(v, value)) for (k, v), (key, value) in zip(ahead, rows, strict=True)]
        self.lengths = lengths + learned.config.longest
        if learned.config.positions == "shifted":
            self.shift = self.lengths

    def begin(self) -> None:
        """The prompts' own pass began a training, if there is a learned prefix."""

    def choose(self, ids: Tensor | None, batch: int, dtype: torch.dtype, device: torch.device) -> Chosen:
        T = len(self.lengths)
        if ids is None and T == 1:
            ids = torch.zeros(batch, dtype=torch.int64, device=device)
        ids = checked(ids, batch, T, f"T={T} shared prompts", "a prompt").to(device)
        return Chosen(self.rows, self.shift.to(device)[ids][:, None], ids, self.lengths.to(device))


class _Window:
    """A hook on the model: all that a layer with a sliding window would hide must not be there."""

    def __init__(self, name: str, window: int, prompt: int) -> None:
        self.name, self.window, self.prompt = name, window, prompt

    def __call__(self, base: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tokens = next(kwargs[name].shape[1] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
        cache = kwargs.get("past_key_values")
        seen = 0 if cache is None else int(cache.get_seq_length())
        if self.prompt + seen + tokens > self.window:
            raise ValueError(
                f"{self.name} has layers with a window of {self.window} tokens, but the longest prompt has "
                f"{self.prompt} and the completions {seen + tokens}: a prompt cannot slide out of sight behind a "
                "learned prefix that stays; shorten them, repeat the prompt, or attach the prefix with "
                "prefix_in_window=True"
            )


def _learned(adapter: HuggingFaceAdapter) -> Prefix | None:
    """The model's own prefix, if it can stand before prompts."""
    prefix = adapter.prefix
    if isinstance(prefix, _Prompts):
        raise ValueError("the model reads shared prompts already; leave that context before")
    if prefix is None:
        return None
    if not adapter.active:
        raise ValueError("the model runs without its prefix, inside disabled(); detach the prefix to share prompts")
    config = prefix.config
    if not isinstance(prefix, Prefix) or config.count is not None:
        raise NotImplementedError(f"shared prompts behind a {type(prefix).__name__}; a single Prefix can stand there")
    if len(prefix.slots) < len(adapter.sites) or len(set(prefix.lengths)) > 1:
        raise NotImplementedError(
            f"shared prompts behind a prefix with layers={config.layers!r} and length={config.length!r}; it can stand "
            "there with one length in all layers"
        )
    if config.dropout and prefix.training:
        raise NotImplementedError(
            f"shared prompts behind a prefix with dropout={config.dropout}, which would fall on the prompts too; put "
            "it into evaluation mode"
        )
    return prefix


def _slides(adapter: HuggingFaceAdapter, learned: Prefix | None) -> bool:
    """Whether prompts slide out of layers' windows as tokens do: not behind rows that every token sees."""
    return bool(adapter.windows) and (learned is None or learned.config.prefix_in_window)


def _aligned(input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts [T, P] that begin in the first column, and their lengths [T]."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(f"input_ids is {_shown(input_ids)}, expected integers [T, P], a prompt in each row")
    T, P = input_ids.shape
    if not T or not P:
        raise ValueError(f"input_ids has shape {[T, P]}, expected [T, P] with a prompt and a token at least")
    if mask is None:
        return input_ids, torch.full((T,), P, device=input_ids.device)
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {_shown(mask)}, expected a tensor [T={T}, P={P}], as input_ids")
    kept = mask.to(input_ids.device) != 0
    lengths, start = kept.sum(1), padding_on_the_left(kept) * kept.any(1, keepdim=True)
    place = torch.arange(P, device=input_ids.device)
    if not torch.equal(kept, (place >= start) & (place < start + lengths[:, None])):
        raise ValueError("attention_mask hides tokens between others; a prompt's padding is before or after it")
    longest = max(int(lengths.max()), 1)
    # what is behind a prompt's end is seen by nothing before it, and read by nobody
    return input_ids.gather(1, (place + start) % P)[:, :longest], lengths


def _shown(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _keys_and_values(adapter: HuggingFaceAdapter, ids: Tensor) -> list[LayerPrefix]:
    """Those of prompts [T, P], [T, Hkv, P, D] for each layer, with what made them behind them."""
    options = {"use_cache": False} if "use_cache" in interface.arguments(adapter.base) else {}
    with interface.watched() as calls:
        adapter.base(input_ids=ids, **options)
    made = {call.module: (call.key, call.value) for call in calls}
    modules = [adapter.base.get_submodule(site.path) for site in adapter.sites]
    if missing := [module for module in modules if module not in made]:
        raise NotImplementedError(
            f"a {type(missing[0]).__name__} told no keys and values of the prompts: it did not run, or in compiled code"
        )
    return [made[module] for module in modules]


def _behind(ahead: Tensor, rows: Tensor) -> Tensor:  # [Hkv, n, D], [T, Hkv, P, D] -> [T, Hkv, n + P, D]
    return torch.cat([ahead.to(rows).expand(len(rows), -1, -1, -1), rows], 2)
