"""Loads a model whose weights stay in their files until it is sharded; then each rank reads its own rows.

transformers builds the model on the meta device, where it renames, fuses and ties weights without reading them, and
reports what is missing. It can also read into sharded parameters (`from_pretrained(distributed_config=…)`), but only
into those that it shards itself, and it slices a tensor before it converts it, which is wrong wherever a conversion
mixes rows (two matrices joined along the first dimension, a transposed one). So conversions are done here: on the
rows alone where that is the same, and otherwise on the whole tensors that one weight is made of.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from rlkd import distributed
from rlkd.builtin import resolve
from rlkd.distributed import local_part
from rlkd.models.loading import check_report, loading, pretrained, refuse_not_finite

_MAPPED = 16 * 2**20
"""Bytes read from a file after which it is mapped again: the pages of a mapping stay in memory while it exists."""
_COMPARED = 2**22
"""Numbers of two weights that are compared at once."""


def begin(
    path: str, config: PreTrainedConfig, dtype: torch.dtype, attention: str | None, trust_remote_code: bool
) -> Unread | str:
    """The model at `path` (folder, hub id, builtin:…) in evaluation mode, its weights not yet read.

    Returns: the reason, if only `load_causal_lm` can load the model.

    Raises: RunStopped, one line, if its weights are incomplete or of other shapes than `config` implies.
    """
    with loading(path):
        folder = resolve(path)
        if getattr(config, "quantization_config", None) is not None:
            return "it is quantised"
        if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            return "its own code may load it in another way"
        if getattr(config, "transformers_weights", None) is not None or _file(folder, "adapter_config.json"):
            return "its config.json or adapter_config.json names other weights"
        files = _files(folder)
        if files is None:
            return "its weights are not in safetensors files"
    hf, report = pretrained(path, config, dtype, attention, trust_remote_code, device="meta")
    check_report(path, report)
    with loading(path):
        unread = Unread(hf, path, _Files(files))
    made = unread.made_by_the_model()
    return f"the model itself makes {made[0]}" if made else unread


class Unread:
    """A model on the meta device, with real buffers, whose weights are still in their files."""

    def __init__(self, hf: PreTrainedModel, path: str, files: _Files):
        self.hf = hf
        self._path = path
        self._files = files
        self._readings = _readings(hf, files)
        self._tie()
        self._real_buffers()
        self._names = [name for name, _ in hf.named_parameters()]
        self._places = {name: _place(hf, name) for reading in self._readings for name in reading.targets}
        """The module and the attribute of each weight. They stay the same when adapters or sharding rename it."""

    def made_by_the_model(self) -> list[str]:
        """The weights that are in no file although none is missing: the model's constructor computes them."""
        read = {getattr(*place) for place in self._places.values()}
        return [name for name, parameter in self.hf.named_parameters() if parameter not in read]

    @contextmanager
    def readable(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Inside, `hf` computes on the CPU as if it were loaded, before it is sharded.

        Args:
            blocks: modules that need their weights only during their forward. The other weights are held throughout.
        """
        first = next(self.hf.parameters())  # its device is `hf.device`, so its block holds it throughout
        blocks = [block for block in blocks if all(parameter is not first for parameter in block.parameters())]
        inside = {module for block in blocks for module in block.modules()}
        held = self._hold(module for module in self.hf.modules() if module not in inside)
        of_block: dict[nn.Module, Held] = {}
        hooks = []
        for block in blocks:
            hooks.append(
                block.register_forward_pre_hook(lambda block, _: of_block.update({block: self._hold(block.modules())}))
            )
            hooks.append(block.register_forward_hook(lambda block, *_: _release(of_block.pop(block)), always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            _release(held)

    def refuse_not_finite(self) -> None:
        """Read all weights, one after the other. Raises: RunStopped if some are not finite."""
        found = set()
        for reading in self._readings:
            for name, value in reading.whole(self.hf, self._files).items():
                if value.numel() > 0 and not _finite(value):
                    found.add(name)
        refuse_not_finite(self._path, [name for name in self._names if name in found])

    def fill(self, device: str) -> None:
        """Read this rank's rows of the weights that `fully_shard` has sharded, and all of others, to `device`.

        A collective.

        Raises: RunStopped on all ranks if weights are not finite.
        """
        not_finite = distributed.on_every_rank(lambda: self._fill(device))
        anywhere = set(itertools.chain.from_iterable(distributed.gather(not_finite)))
        refuse_not_finite(self._path, [name for name in self._names if name in anywhere])

    @torch.no_grad()
    def _fill(self, device: str) -> list[str]:
        """Returns: the names of the weights with rows here that are not finite."""
        not_finite = []
        fresh: dict[nn.Parameter, nn.Parameter] = {}  # so that tied weights stay one parameter
        for module in self.hf.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.device.type == "meta":
                    if parameter not in fresh:
                        empty = torch.empty_like(parameter, device=device)
                        fresh[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    setattr(module, name, fresh[parameter])
        with loading(self._path):
            for reading in self._readings:
                parameters = {name: getattr(*self._places[name]) for name in reading.targets}
                rows = {name: _rows(parameter) for name, parameter in parameters.items()}
                for name, part, value in reading.rows(self.hf, self._files, rows):
                    local = local_part(parameters[name])[part]
                    local.copy_(value)
                    if not _finite(local):
                        not_finite.append(name)
        self._files.close()
        return not_finite

    def _hold(self, modules: Iterable[nn.Module]) -> Held:
        """Put the whole weights into `modules`, on the CPU. Returns: what `_release` undoes."""
        unread = {getattr(*self._places[name]): reading for reading in self._readings for name in reading.targets}
        held = [
            (module, name, parameter)
            for module in modules
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.is_meta
        ]
        values: dict[nn.Parameter, nn.Parameter] = {}
        for _, _, parameter in held:
            if parameter not in values:
                for name, value in unread[parameter].whole(self.hf, self._files).items():
                    original = getattr(*self._places[name])
                    values[original] = nn.Parameter(value, requires_grad=original.requires_grad)
        for module, name, parameter in held:
            setattr(module, name, values[parameter])
        return held

    def _tie(self) -> None:
        """Tie what transformers left apart because the files hold both and it cannot compare them on the meta device.

        Like transformers, only if they are equal. Otherwise they are weights of their own.
        """
        for second, first in list(self.hf.all_tied_weights_keys.items()):
            module, attribute = _place(self.hf, second)
            here, there = getattr(module, attribute), getattr(*_place(self.hf, first))
            if here is there:
                continue
            a, b = (self._reading(name) for name in (second, first))
            if here.shape == there.shape and self._equal(a, second, b, first, len(here)):
                setattr(module, attribute, there)
                self._readings.remove(a)
            else:
                del self.hf.all_tied_weights_keys[second]

    def _reading(self, name: str) -> _Reading:
        return next(reading for reading in self._readings if name in reading.targets)

    def _equal(self, a: _Reading, a_name: str, b: _Reading, b_name: str, rows: int) -> bool:
        step = max(1, _COMPARED * rows // max(1, getattr(*_place(self.hf, a_name)).numel()))
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            pieces = (a.rows(self.hf, self._files, {a_name: part}), b.rows(self.hf, self._files, {b_name: part}))
            if not all(torch.equal(one, other) for (_, _, one), (_, _, other) in zip(*pieces, strict=True)):
                return False
        return True

    def _real_buffers(self) -> None:
        """Read the buffers that are in the files, and let the model compute the others as it does in any loading."""
        for reading in [reading for reading in self._readings if _is_buffer(self.hf, reading.targets[0])]:
            for name, value in reading.whole(self.hf, self._files).items():
                value._is_hf_initialized = True  # type: ignore[attr-defined]
                setattr(*_place(self.hf, name), value)
            self._readings.remove(reading)
        for module in self.hf.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(module, name, torch.empty_like(buffer, device="cpu"))
            module._is_hf_initialized = False  # type: ignore[assignment]
        self.hf.initialize_weights()  # leaves alone what is marked as initialised: all parameters, and what was read


Held = list[tuple[nn.Module, str, nn.Parameter]]
"""Modules, names of their parameters, and the parameters on the meta device that were there."""


def _release(held: Held) -> None:
    for module, name, parameter in held:
        setattr(module, name, parameter)


@dataclass(eq=False)
class _Reading:
    """How one weight is made from tensors of the files, or several weights from one tensor."""

    key: str
    """The name under which transformers collects the tensors: that of the first weight."""
    dtype: torch.dtype
    converter: WeightConverter | None
    sources: list[tuple[str, str]] = field(default_factory=list)
    """The name in the files, and the pattern of the converter that it matches."""
    targets: list[str] = field(default_factory=list)

    def whole(self, hf: PreTrainedModel, files: _Files) -> dict[str, Tensor]:
        """The weights by name."""
        if self.converter is None:
            return {self.key: files.read(self.sources[0][0]).to(self.dtype, copy=True)}
        return self._converted(hf, files, self.sources)

    def rows(
        self, hf: PreTrainedModel, files: _Files, rows: Mapping[str, slice | None]
    ) -> Iterator[tuple[str, Any, Tensor]]:
        """These rows of each weight (None: all) in pieces: the name, the index of the piece in them, and its values.

        The experts of a mixture are stacked, so that each is a row of one weight. They are read one at a time, and
        only those that are asked for.
        """
        some = {name: part for name, part in rows.items() if part is None or part.stop > part.start}
        if some and self.converter is not None and self._stacks():
            patterns = dict.fromkeys(pattern for _, pattern in self.sources)
            lists = [[source for source in self.sources if source[1] == pattern] for pattern in patterns]
            part = some[self.key] or slice(0, len(lists[0]))
            for row in range(part.start, part.stop):
                one = self._converted(hf, files, [sources[row] for sources in lists])
                yield self.key, slice(row - part.start, row - part.start + 1), one[self.key]
        elif some and self.converter is not None:
            whole = self._converted(hf, files, self.sources)
            yield from ((name, ..., whole[name][... if part is None else part]) for name, part in some.items())
        elif some:
            yield self.key, ..., files.read(self.sources[0][0], some[self.key])

    def _stacks(self) -> bool:
        """Whether each row of the one weight is made of the tensors of one number, in order."""
        assert self.converter is not None
        first, *others = self.converter.operations
        stacked = isinstance(first, MergeModulelist) and first.dim == 0
        return stacked and all(isinstance(other, Concatenate) and other.dim > 0 for other in others)

    def _converted(self, hf: PreTrainedModel, files: _Files, sources: list[tuple[str, str]]) -> dict[str, Tensor]:
        """Cast before the conversion, as transformers does."""
        converter: Any = copy.deepcopy(self.converter)
        for name, pattern in sources:
            read = functools.partial(lambda name: files.read(name).to(self.dtype, copy=True), name)
            converter.add_tensor(self.key, name, pattern, read)
        made = converter.convert(self.key, model=hf, config=hf.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _readings(hf: PreTrainedModel, files: _Files) -> list[_Reading]:
    """How each weight of `hf`, which is on the meta device, is read from the files.

    As transformers' `convert_and_load_state_dict_in_model` does, by the conversions that it used for `hf`.
    """
    state = hf.state_dict()
    conversions: list[Any] = hf._weight_conversions  # type: ignore[assignment]
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = hf.base_model_prefix
    readings: dict[str, _Reading] = {}
    for name in sorted(files.names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = rename_source_key(name, [], [], prefix, state)
        if key in state:
            converter = None if pattern is None else of_pattern[pattern]
            reading = readings.setdefault(key, _Reading(key, state[key].dtype, converter))
            reading.sources.append((name, pattern or name))
    for key, reading in readings.items():
        shapes = files.on_meta() if reading.converter else None
        reading.targets = [key] if shapes is None else list(reading._converted(hf, shapes, reading.sources))
    return list(readings.values())


class _Files:
    """The tensors of some safetensors files."""

    def __init__(self, paths: Sequence[str]):
        self._handles: dict[str, Any] = {path: safe_open(path, framework="pt", device="cpu") for path in paths}
        self._path = {name: path for path, handle in self._handles.items() for name in handle.keys()}  # noqa: SIM118
        self._read: dict[str, int] = dict.fromkeys(paths, 0)

    @property
    def names(self) -> Iterable[str]:
        return self._path

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor, or its rows: a view of the file, to be copied before the next one is read."""
        path = self._path[name]
        if self._read[path] > _MAPPED:
            del self._handles[path]
            self._handles[path], self._read[path] = safe_open(path, framework="pt", device="cpu"), 0
        tensor: Tensor = self._handles[path].get_slice(name)[... if rows is None else rows]
        self._read[path] += tensor.nbytes
        return tensor

    def on_meta(self) -> _Files:
        """The same without their values."""
        meta = copy.copy(self)
        meta.read = lambda name, rows=None: self.read(name, rows).to("meta")  # type: ignore[method-assign]
        return meta

    def close(self) -> None:
        self._handles.clear()


def _files(folder: str) -> list[str] | None:
    """The safetensors files that transformers would load from a folder or hub id; None: it has none."""
    single = _file(folder, SAFE_WEIGHTS_NAME)
    if single is not None:
        return [single]
    index = _file(folder, SAFE_WEIGHTS_INDEX_NAME)
    return None if index is None else list(get_checkpoint_shard_files(folder, index)[0])


def _file(folder: str, name: str) -> str | None:
    if os.path.isdir(folder):
        path = os.path.join(folder, name)
        return path if os.path.isfile(path) else None
    found: str | None = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    return found


def _place(hf: PreTrainedModel, name: str) -> tuple[nn.Module, str]:
    module, _, attribute = name.rpartition(".")
    return hf.get_submodule(module), attribute


def _is_buffer(hf: PreTrainedModel, name: str) -> bool:
    module, attribute = _place(hf, name)
    return attribute in module._buffers


def _rows(parameter: Tensor) -> slice | None:
    """This rank's rows of a parameter that `fully_shard` has sharded; None: it is not sharded."""
    if not isinstance(parameter, DTensor):
        return None
    (placement,), mesh = parameter.placements, parameter.device_mesh
    assert isinstance(placement, Shard) and placement.dim == 0
    size, start = Shard.local_shard_size_and_offset(parameter.shape[0], mesh.size(), mesh.get_local_rank())
    return slice(start, start + size)


def _finite(tensor: Tensor) -> bool:
    """Without a copy of the tensor, which may not be empty."""
    return bool(torch.stack(tensor.aminmax()).isfinite().all())  # of NaN and a number, each is NaN
