"""The server's side of weight updates through a file: a vLLM weight-transfer engine that reads one safetensors file.

It serves CPU servers, for which vLLM has no engine of its own, and GPU servers that share a disk with the trainer.
Loaded by vLLM's workers only (see plugin.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

_FUSED = ("weight", "w13_weight", "w13_bias", "w2_weight", "w2_bias")
"""vLLM's names of a linear layer's weight and of the tensors of a layer's experts."""


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Sent once."""

    directory: str
    """The only directory from which files are read."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """Sent with each update."""

    file: str
    """Relative to the directory. It contains the whole model like a checkpoint, under the names that vLLM loads."""


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Loads a file into the running model, in the checkpoint's own names and shapes.

    After loading weights vLLM changes their layout and, on the CPU, empties the originals. So an update runs inside
    vLLM's layer-wise reload, which first restores empty originals and finally changes the layout of each layer again.
    """

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo
    supports_draft_weight_update = False

    def __init__(
        self, config: WeightTransferConfig, vllm_config: VllmConfig, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._directory: Path | None = None
        # Read once here, since a reload separates tied weights, and their second name would then be missing.
        self._names = {name for name, _ in model.named_parameters()}

    def init_transfer_engine(self, init_info: FileInitInfo) -> None:
        directory = Path(init_info.directory)
        if not directory.is_dir():
            raise ValueError(
                f"{directory} is not a directory on the server's machine; use one that trainer and server share"
            )
        self._directory = directory.resolve()

    def start_weight_update(self) -> None:
        self._forget_packed_experts()
        self._forget_half_loaded()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Raises: ValueError if the file lacks a part of the model, or has a tensor that the model does not use.

        vLLM itself ignores both: weights that the file lacks keep their old values, and many models skip unknown
        names, which has the same effect.
        """
        model: Any = self.model
        file = update_info.file
        with Unread() as unread:
            loaded: set[str] | None = model.load_weights(unread.watch(_tensors(self._path(file))))
        if loaded is not None and not loaded >= self._names:
            missing = sorted(self._names - loaded)
            raise ValueError(f"{file} lacks {len(missing)} of the model's weights, e.g. {missing[0]}")
        if partly := self._partly_loaded():
            raise ValueError(f"{file} lacks some of the weights of {len(partly)} layers, e.g. {partly[0]}")
        parallel = self.parallel_config
        everywhere = parallel.pipeline_parallel_size == 1 and not parallel.enable_expert_parallel
        if unread.names and everywhere:  # otherwise another worker may have read them
            known = sorted(unread.names)
            raise ValueError(f"{file} has {len(known)} weights that the model does not know, e.g. {known[0]}")

    def _partly_loaded(self) -> list[str]:
        """The names of linear layers and fused experts of which only some elements were loaded.

        vLLM reports a fused parameter as loaded after one expert, or after q_proj of qkv_proj.
        """
        found = []
        for name, module in self.model.named_modules():
            if isinstance(module, (LinearBase, RoutedExperts)):  # embeddings may be padded
                info, own = get_layerwise_info(module), module.named_parameters(recurse=False)
                # Not `info.load_numel_total`: it may count a router's bias, which is loaded elsewhere.
                expected = sum(get_tensor_load_numel(value) for key, value in own if key in _FUSED)
                if info.can_load() and info.load_numel < expected:
                    found.append(name)
        return found

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)  # type: ignore[no-untyped-call]
        self._refresh_tied_head()

    def shutdown(self) -> None:
        self._directory = None

    def _forget_packed_experts(self) -> None:
        """Let vLLM pack fused experts again, as on their first loading (CPU).

        vLLM 0.32 packs them when it creates their kernel, and keeps that kernel in an update. The new weights would
        then be read as if they were packed, while every call answers 200.
        """
        if self.device.type != "cpu":
            return
        for module in self.model.modules():
            if isinstance(module, RoutedExperts):
                module.quant_method.moe_kernel = None

    def _forget_half_loaded(self) -> None:
        """Reset layers that a failed update has loaded in part.

        vLLM counts the elements that a layer has received and finishes the layer when the count is complete. Elements
        of the failed update would be counted too, and as many new ones ignored.
        """
        for module in self.model.modules():
            info = get_layerwise_info(module)
            if info.can_load():
                info.load_numel, info.loaded_weights = 0, []

    def _refresh_tied_head(self) -> None:
        """Pack the output layer again from the weights just loaded (CPU).

        With tied embeddings the reload replaces the embedding, but the output layer keeps the packed copy from the
        start: every call answers 200, the version changes, and the logits are those of the old output layer.
        """
        if self.device.type != "cpu":
            return
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def _path(self, name: str) -> Path:
        """The file of that name.

        Raises: ValueError if it is outside the directory after links are resolved.
        """
        if self._directory is None:
            raise ValueError("the file engine was not given its directory: call /init_weight_transfer_engine first")
        path = (self._directory / name).resolve()
        if not path.is_relative_to(self._directory) or not path.is_file():
            raise ValueError(f"{name!r} is not a file inside {self._directory}")
        return path


class Unread(TorchDispatchMode):
    """Records, while active, which of the tensors that it yields are never an operand.

    `load_weights` reports which of the model's parameters were loaded, not which tensors of the file it ignored.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self._at: dict[int, str] = {}
        """Memory address → name of the last tensor that was yielded there."""

    def watch(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            self._at[tensor.untyped_storage().data_ptr()] = name
            self.names.add(name)
            yield name, tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for operand in tree_leaves((args, kwargs)):
            if isinstance(operand, torch.Tensor) and operand.device.type != "meta":
                self.names.discard(self._at.get(operand.untyped_storage().data_ptr(), ""))
        return func(*args, **(kwargs or {}))


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor at a time, so that a model is never twice in memory."""
    file: Any
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            yield name, file.get_tensor(name)
