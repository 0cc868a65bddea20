"""The weights of a sharded model as a stream: names and shapes are known before anything moves; then a tensor at a time
is gathered, converted and handed on, so that no rank ever holds the whole model."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from rlkd import distributed
from rlkd.config.schema import LoraConfig
from rlkd.models import lora
from rlkd.models.loader_names import loader_names

T = TypeVar("T")
Convert = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class TensorInfo(NamedTuple):
    """A tensor before it exists."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Part:
    """What is gathered at a time: one tensor, or those that a conversion needs together."""

    tensors: Mapping[str, Tensor]
    """By name in memory, sharded or not."""
    dtypes: Mapping[str, torch.dtype]
    """In which each is gathered: a shard is cast before it travels, which gives the same bits as a cast afterwards."""
    convert: Convert = dict
    """From whole tensors to those that are handed on."""

    @cached_property
    def infos(self) -> list[TensorInfo]:
        """What `convert` gives, without any data."""
        shapes = {
            name: torch.empty(tensor.shape, dtype=self.dtypes[name], device="meta")
            for name, tensor in self.tensors.items()
        }
        return [TensorInfo(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.convert(shapes).items()]

    def gathered(self) -> dict[str, Tensor]:
        """The whole tensors. A collective."""
        return {name: _whole(tensor.detach().to(self.dtypes[name])) for name, tensor in self.tensors.items()}

    def then(self, convert: Convert) -> Part:
        """This part with a further conversion."""
        return Part(self.tensors, self.dtypes, lambda tensors: convert(self.convert(tensors)))


class Weights:
    """Named tensors, `infos` of which are known in advance. Each iteration is a fresh pass, in the same order.

    Iterating is a collective: every rank passes through all tensors. Where only rank 0 reads them, see
    `read_on_rank_zero`. On a GPU tensors are gathered on the stream that is current when this object is made, whatever
    stream its reader uses, and are complete when they are handed on: vLLM's engines read them on streams of their own,
    where gathers of three or more ranks would wait for each other (trl#6798).
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = parts
        on_gpu = any(tensor.device.type == "cuda" for part in parts for tensor in part.tensors.values())
        self._stream = torch.cuda.current_stream() if on_gpu else None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Weights:
        """These tensors, as they are."""
        return cls([Part({name: tensor}, {name: tensor.dtype}) for name, tensor in tensors.items()])

    @cached_property
    def infos(self) -> list[TensorInfo]:
        """Name, dtype and shape of every tensor, in the order of iteration."""
        return [info for part in self._parts for info in part.infos]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        parts = iter(self._parts)
        for part in parts:
            made = dict(self._complete(partial(_made, part, parts)))
            while made:
                name = next(iter(made))
                yield name, made.pop(name)  # kept by the reader alone, and only until it asks for the next

    def gather_along(self) -> None:
        """Pass through all tensors for the sake of a rank that reads them. A collective."""
        for part in self._parts:
            self._complete(part.gathered)

    def _complete(self, act: Callable[[], T]) -> T:
        with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
            made = act()
        if self._stream is not None:
            self._stream.synchronize()
        return made


class Published(Protocol):
    """What gives out its weights: the `Student`. Nothing is gathered before the result is iterated."""

    def weights(self) -> Weights:
        """All weights under the names in memory, adapters merged."""
        ...

    def checkpoint_weights(self, dtype: torch.dtype, vectors: bool = False) -> Weights:
        """All weights as checkpoint files have them, which is what vLLM loads, adapters merged; see `as_checkpoint`."""
        ...

    def adapter_weights(self) -> Weights:
        """Only the adapters, under the names of PEFT's files."""
        ...


@dataclass(frozen=True)
class Whole:
    """Whole tensors to be published as they are, where nothing is trained."""

    tensors: Mapping[str, Tensor]

    def weights(self) -> Weights:
        """All of them."""
        return Weights.of(self.tensors)

    def checkpoint_weights(self, dtype: torch.dtype, vectors: bool = False) -> Weights:
        """A tensor with two names (tied embeddings) once, under the first."""
        first: dict[tuple[int, torch.Size], str] = {}
        for name, tensor in self.tensors.items():
            first.setdefault((tensor.data_ptr(), tensor.shape), name)
        return Weights.of({name: self.tensors[name] for name in first.values()})

    def adapter_weights(self) -> Weights:
        """All of them."""
        return Weights.of(self.tensors)


def read_on_rank_zero(weights: Weights, read: Callable[[Iterable[tuple[str, Tensor]]], T]) -> T:
    """What `read`, which gets the tensors on rank 0, returns, on every rank. A collective.

    Raises: what `read` raises, on every rank (see `on_rank_zero`).
    """

    def act() -> T:
        tensors = iter(weights)
        try:
            return read(tensors)
        finally:
            for _ in tensors:  # if it failed: the other ranks are waiting in the gathers that are left
                pass

    if distributed.rank() != 0:
        weights.gather_along()
    return distributed.on_rank_zero(act)


@torch.no_grad()
def copy_into(hf: nn.Module, weights: Weights) -> None:
    """Copy the weights, under their names in memory, into a whole model, one tensor at a time.

    Raises: ValueError if it lacks a weight, or has others.
    """
    own = hf.state_dict()
    different = own.keys() ^ {info.name for info in weights.infos}
    if different:
        raise ValueError(f"expected the weights of {type(hf).__name__}, got a difference in {min(different)}")
    for name, tensor in weights:
        own[name].copy_(tensor)
        del tensor


def in_memory(hf: PreTrainedModel, adapters: LoraConfig | None) -> Weights:
    """All weights under their names in memory, adapters merged, in the dtypes that they have."""
    ties = hf.all_tied_weights_keys
    parts = _parts(hf, adapters, lambda _, tensor: tensor.dtype)
    seconds = {first: [second for second, one in ties.items() if one == first] for first in ties.values()}
    plain = [(part, [info.name for info in part.infos]) for part in parts]
    there = {name for _, names in plain for name in names}
    return Weights(
        [
            part.then(partial(_with_ties, seconds=seconds)) if set(names) & set(seconds) else part
            for part, names in plain
            if not all(ties.get(name) in there for name in names)
        ]
    )


def _with_ties(tensors: Mapping[str, Tensor], seconds: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """The tensors, and each under the further names that it has in the model."""
    return {name: value for first, value in tensors.items() for name in (first, *seconds.get(first, ()))}


Group = Callable[[str], str]
"""From the name of a tensor in memory to that of the part in which it is gathered."""


def as_checkpoint(
    hf: PreTrainedModel, adapters: LoraConfig | None, dtype: torch.dtype, vectors: bool, group: Group
) -> Weights:
    """All weights under the names and in the shapes of checkpoint files, adapters merged; a tied tensor once.

    Args:
        group: see `grouping`.
        dtype: of all floating-point weights but those that transformers always keeps in fp32.
        vectors: whether it is that of norms and biases, too. A server may keep those in fp32, and they are small.
    """
    kept = [pattern.replace("*", ".*") for pattern in hf._get_dtype_plan(dtype)]

    def sent(name: str, tensor: Tensor) -> torch.dtype:
        cast = tensor.is_floating_point() and (vectors or tensor.dim() > 1)
        return dtype if cast and not any(re.search(pattern, name) for pattern in kept) else tensor.dtype

    return Weights(_converted(hf, _stored(hf, _parts(hf, adapters, sent)), group))


def grouping(hf: PreTrainedModel, adapters: LoraConfig | None) -> Group:
    """Which weights must be gathered together, since a conversion to the files' names and shapes joins them.

    It is found by trying: the smallest groups that together give what the whole model does. Nearly always that is each
    tensor alone, since files have more tensors than the model in memory, not fewer.
    """
    parts = _stored(hf, _parts(hf, adapters, lambda _, tensor: tensor.dtype))
    expected = sorted(_joined(parts).then(partial(loader_names, hf)).infos)
    groups: tuple[Group, ...] = (str, _layer, lambda name: "")
    return next(
        group
        for group in groups
        if sorted(info for part in _converted(hf, parts, group) for info in part.infos) == expected
    )


def _stored(hf: PreTrainedModel, parts: Sequence[Part]) -> list[Part]:
    """The parts that checkpoint files have: a tied tensor under its first name only, and none that is never saved."""
    there = {name for part in parts for name in part.tensors}
    ties = hf.all_tied_weights_keys
    left_out = {second for second, first in ties.items() if first in there} | set(hf._keys_to_ignore_on_save or ())
    return [part for part in parts if not left_out & part.tensors.keys()]


def adapter(student: nn.Module) -> Weights:
    """Only the adapters, under the names of PEFT's files. `student` leaves the frozen weights out of its state."""
    tensors = {name.removeprefix("hf."): value for name, value in _state(student).items()}
    return Weights([_alone(name, value, value.dtype).then(lora.peft_names) for name, value in tensors.items()])


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module, sharded as they are.

    It uses the state dict because `named_parameters()` are stale views after a forward without gradient.
    """
    return {name: value for name, value in get_model_state_dict(module).items() if isinstance(value, Tensor)}


def _made(part: Part, left: Iterator[Part]) -> Mapping[str, Tensor]:
    """The tensors of `part`. If it cannot be converted, the parts that are `left` are gathered before this raises."""
    whole = part.gathered()
    try:
        return part.convert(whole)
    except Exception:  # perhaps on this rank alone: the others wait in the gathers that are left
        for other in left:
            other.gathered()
        raise


def _alone(name: str, tensor: Tensor, dtype: torch.dtype) -> Part:
    return Part({name: tensor}, {name: dtype})


def _parts(hf: PreTrainedModel, adapters: LoraConfig | None, dtype: Callable[[str, Tensor], torch.dtype]) -> list[Part]:
    """A part for every tensor under its name without adapters; an adapted layer's is merged with its adapter in fp32.

    Args:
        dtype: of a tensor, by its name in memory.
    """
    state = _state(hf)
    if adapters is None:
        return [_alone(name, value, dtype(name, value)) for name, value in state.items()]
    parts = []
    for name, value in state.items():
        if name.endswith(".base_layer.weight"):
            layer = name.removesuffix("base_layer.weight")
            three = [name, *(f"{layer}lora_{side}.{lora.NAME}.weight" for side in "AB")]
            whole = Part({one: state[one] for one in three}, {one: state[one].dtype for one in three})
            merged = whole.then(partial(lora.merged, lora=adapters))
            parts.append(merged.then(partial(_cast, dtype=dtype(name, value))))
        elif not lora.is_adapter(name):
            plain = name.replace(".base_layer.", ".")
            parts.append(_alone(name, value, dtype(name, value)).then(partial(_renamed, name=plain)))
    return parts


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in tensors.items()}


def _renamed(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    (value,) = tensors.values()
    return {name: value}


def _converted(hf: PreTrainedModel, parts: Sequence[Part], group: Group) -> list[Part]:
    """The parts with the names and shapes of checkpoint files, those of a group as one."""
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(group(part.infos[0].name), []).append(part)
    return [_joined(members).then(partial(loader_names, hf)) for members in groups.values()]


def _joined(parts: Sequence[Part]) -> Part:
    """One part that is gathered at a time, in place of several."""
    if len(parts) == 1:
        return parts[0]

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = [part.convert({name: tensors[name] for name in part.tensors}) for part in parts]
        return {name: value for one in given for name, value in one.items()}

    return Part(
        {name: value for part in parts for name, value in part.tensors.items()},
        {name: dtype for part in parts for name, dtype in part.dtypes.items()},
        convert,
    )


def _layer(name: str) -> str:
    """The name up to the number of the layer; without one, the name."""
    found = re.match(r".*?\.\d+\.", name)
    return name if found is None else found[0]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
