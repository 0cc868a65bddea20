"""The trained model: a Hugging Face causal LM behind one forward, sharded with FSDP2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlkd import distributed
from rlkd.config.schema import LoraConfig, ModelConfig, TrainerConfig
from rlkd.distributed import RunStopped
from rlkd.losses import token_ratios
from rlkd.losses.lm_head import OutputLayer
from rlkd.models import lora, weights
from rlkd.models.loading import check_whole, loading, pretrained
from rlkd.models.logprob_head import ByProducts, Needs, PolicyOutput, teacher_divergence, token_logprobs
from rlkd.models.output_check import check_output
from rlkd.models.sharded_loading import Unread, begin
from rlkd.models.shared_prompts import check_sharing, shared_hidden
from rlkd.models.vocabulary import load_config, vocabulary_size
from rlkd.models.weights import Group, Weights
from rlkd.types import Batch


class Student(nn.Module):
    """The root of the sharding. Everything that needs the output layer runs inside its forward."""

    def __init__(
        self, hf: PreTrainedModel, vocabulary: int, adapters: LoraConfig | None = None, fp32_head: bool = False
    ):
        """
        Args:
            vocabulary: how many rows of the output layer belong to tokens (vocabulary.py).
            adapters: the settings with which `lora.inject` added adapters to `hf`; None without adapters.
            fp32_head: see `OutputLayer.fp32`.
        """
        super().__init__()
        self.hf = hf
        self.vocabulary = vocabulary
        self.adapters = adapters
        self.fp32_head = fp32_head
        if adapters is not None:
            self.register_state_dict_post_hook(_leave_out_frozen)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(_miss_no_frozen)  # type: ignore[no-untyped-call]

    def forward(self, batch: Batch, needs: Needs) -> PolicyOutput:
        """One pass over the batch's rows. Column t of each per-token tensor is about token t given tokens < t.

        Only the tokens under the completion mask get log-probs. Padding is on the right and attention is causal, so
        real tokens never see padding and no mask is passed.
        """
        head = OutputLayer.of(self.hf, self.vocabulary, self.fp32_head)
        if needs.comparison is not None:  # before the blocks, which compute meanwhile
            name = needs.comparison.scores
            scores = {**batch.scores, name: batch.scores[name].brought(batch.input_ids.device)}
            batch = replace(batch, scores=scores)
        if batch.sequences:
            hidden = shared_hidden(self.hf, batch.input_ids, batch.prompt_lengths, batch.lengths, batch.sequences)
        else:
            hidden = self.hf.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        known = ByProducts.of(batch)
        total = per_token = None
        if needs.at_once:
            assert needs.comparison is not None
            total, per_token = teacher_divergence(
                hidden, head, batch, needs.comparison, self.hf.config, by_products=known
            )
        logprobs, entropy = token_logprobs(
            hidden,
            head,
            batch.input_ids,
            temperature=needs.temperature,
            config=self.hf.config,
            mask=batch.completion_mask & ~known.known,
            entropy=needs.entropy,
        )
        if needs.at_once:  # each is 0 where the other one is computed
            logprobs, entropy = logprobs + known.logprobs, None if entropy is None else entropy + known.entropy
        elif needs.comparison is not None:
            cap = needs.comparison.ratio_cap
            old = logprobs if batch.old_logprobs is None else batch.old_logprobs  # in the first update both are equal
            student, sampler = batch.student_mask, batch.sampler_logprobs
            ratios = None if cap is None else token_ratios(logprobs, old, sampler, student, cap)
            total, per_token = teacher_divergence(hidden, head, batch, needs.comparison, self.hf.config, ratios)
        return PolicyOutput(logprobs=logprobs, entropy=entropy, divergence=total, token_divergence=per_token)

    def weights(self) -> Weights:
        """See `Published.weights`."""
        return weights.in_memory(self.hf, self.adapters)

    def checkpoint_weights(self, dtype: torch.dtype, vectors: bool = False) -> Weights:
        """See `Published.checkpoint_weights`."""
        return weights.as_checkpoint(self.hf, self.adapters, dtype, vectors, self._grouping)

    @cached_property
    def _grouping(self) -> Group:
        return weights.grouping(self.hf, self.adapters)  # once, and not in each publish

    def adapter_weights(self) -> Weights:
        """See `Published.adapter_weights`."""
        return weights.adapter(self)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Inside, the student computes exactly (bit for bit) what it did before training."""
        lora.set_scale(self.hf, 0.0)
        try:
            yield
        finally:
            lora.set_scale(self.hf, 1.0)


def _leave_out_frozen(student: nn.Module, weights: dict[str, Any], prefix: str, _: Any) -> None:
    """Keep only the adapters in a checkpoint: the rest is at model.path, which a resumed run cannot change."""
    for name in [name for name in weights if name.startswith(prefix) and not lora.is_adapter(name)]:
        del weights[name]


def _miss_no_frozen(student: nn.Module, keys: Any) -> None:
    """Do not report the weights that `_leave_out_frozen` left out as missing; they were loaded from model.path."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if lora.is_adapter(name)]


def load_causal_lm(
    path: str,
    dtype: torch.dtype,
    *,
    attention: str | None,
    trust_remote_code: bool,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The model at `path` (folder, hub id, builtin:…) in evaluation mode, without dropout even in training mode.

    Args:
        device: where the loaded model is moved; None: it stays on the CPU.

    Raises: RunStopped, one line, if it cannot be loaded completely or rlkd would compute its log-probs wrongly.
    """
    hf, report = pretrained(path, _config(path, trust_remote_code), dtype, attention, trust_remote_code)
    check_whole(hf, path, report)
    quantised = getattr(hf.config, "quantization_config", None) is not None
    if not quantised:
        check_output(hf, path)  # before the move, since on the CPU it does not depend on a GPU's kernels
    if device is not None:
        torch.nn.Module.to(hf, device)
    if quantised:
        check_output(hf, path)  # the kernels of most quantised types run on a GPU only
    return hf


def _config(path: str, trust_remote_code: bool) -> PreTrainedConfig:
    """Its config.json, without dropout."""
    with loading(path):
        config = load_config(path, trust_remote_code)
        _without_dropout(config)
    return config


def _without_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout rate of `config` and of its nested configs to 0.

    Evaluation mode is not enough: gradient checkpointing needs the blocks in training mode, and some families (OPT,
    Falcon, Bloom) call functional dropout in the block itself.
    """
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _without_dropout(value)
        elif "drop" in name and type(value) in (int, float):  # a bool is a switch for something else
            setattr(config, name, type(value)(0))


def build_student(model: ModelConfig, trainer: TrainerConfig, mesh: DeviceMesh, seed: int) -> Student:
    """Load the student in fp32 and shard it over `mesh` (1-D, data parallel): each block, then the root.

    With `model.lora` it gets adapters, which are a function of `seed`, and everything else is frozen.

    The weights are read when the model is sharded, each rank's own rows (sharded_loading.py), so neither a host nor a
    device holds the full model. Master weights are fp32 for any `trainer.precision`: in bf16 a learning rate of 1e-6
    would be rounded away.
    """
    attention, trusted = model.attention, model.trust_remote_code
    unread = _begin(model.path, torch.float32, attention, trusted, trainer.share_prompts)
    if isinstance(unread, Unread):
        hf = unread.hf
    else:
        if distributed.rank() == 0:
            print(f"model.path: every rank loads the whole model {model.path}, since {unread}", flush=True)
        hf = load_causal_lm(model.path, torch.float32, attention=attention, trust_remote_code=trusted)
        if trainer.share_prompts:
            check_sharing(hf, model.path)
    if model.lora is not None:
        frozen = lora.unadapted(hf, model.lora)
        if frozen and model.lora.target_modules == "all-linear" and distributed.rank() == 0:
            print(f"model.lora: not linear layers, so frozen without adapters: {', '.join(frozen)}", flush=True)
        lora.inject(hf, model.lora, seed)
    hf.eval()  # the distribution that is trained must be the one that is sampled
    if model.gradient_checkpointing:
        if not hf.supports_gradient_checkpointing:
            raise RunStopped(
                f"model.gradient_checkpointing: transformers does not support it for {type(hf).__name__}; set it to "
                "false"
            )
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in blocks(hf)[:: model.recompute_every]:
            module.training = True  # a block checks only its own flag; the modules inside stay in evaluation mode
    if trainer.compile:
        for module in blocks(hf):  # before sharding, and for any length, since those of micro-batches differ
            module.compile(dynamic=True)
    student = Student(hf, vocabulary_size(model), model.lora, model.fp32_head)
    dtype = distributed.compute_dtype(trainer.precision, trainer.accelerator)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype != torch.float32 else None,
        reduce_dtype=torch.float32,
        # Otherwise the root would cast the batch's log-probs and advantages to bf16.
        cast_forward_inputs=False,
    )
    for module in _owners(hf):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    if isinstance(unread, Unread):
        unread.fill(mesh.device_type)
    return student


def load_frozen(
    path: str, dtype: torch.dtype, *, attention: str | None, trust_remote_code: bool, mesh: DeviceMesh
) -> PreTrainedModel:
    """As `load_causal_lm`, with the repeated layers sharded over `mesh`. A collective, and so is each forward.

    The rest (embeddings, output layer) is whole on every rank, so that there is no root whose forward it needs.
    """
    unread = _begin(path, dtype, attention, trust_remote_code, False)
    if isinstance(unread, str):
        raise RunStopped(f"trainer.shard_frozen: {path} cannot be loaded in shards, since {unread}; set it to false")
    hf = unread.hf.requires_grad_(False)
    for module in _owners(hf):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    unread.fill(mesh.device_type)
    for module in hf.modules():  # `Module.to` would touch the shards too
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(mesh.device_type))
    return hf


def _begin(
    path: str, dtype: torch.dtype, attention: str | None, trust_remote_code: bool, share_prompts: bool
) -> Unread | str:
    """A model before it is sharded, checked; or why it must be loaded whole. A collective."""

    def begin_here() -> Unread | str:
        return begin(path, _config(path, trust_remote_code), dtype, attention, trust_remote_code)

    def check(unread: Unread) -> None:
        try:
            with unread.readable(blocks(unread.hf)):
                check_output(unread.hf, path)
                if share_prompts:
                    check_sharing(unread.hf, path)
        except RunStopped:
            unread.refuse_not_finite()  # the reason for all else
            raise

    unread = distributed.on_every_rank(begin_here)
    # Nodes may have different files of one model, but what follows is a collective only where it is loaded in shards.
    reasons: list[str] = distributed.gather(unread if isinstance(unread, str) else "")
    if isinstance(unread, str) or any(reasons):
        return next(filter(None, reasons))
    distributed.on_rank_zero(lambda: check(unread))  # before sharding, so that it does not add to its memory
    return unread


def blocks(hf: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers of the model, none inside another: those of the classes in `_no_split_modules`, or, if the
    model declares none, the layers that transformers can checkpoint."""
    names = set(hf._no_split_modules or ())
    declared = _outermost(hf, lambda module: type(module).__name__ in names)
    return declared or _outermost(hf, lambda module: isinstance(module, GradientCheckpointingLayer))


def _owners(hf: PreTrainedModel) -> list[nn.Module]:
    """The blocks whose parameters are theirs alone. Zamba's blocks share some: the root has them."""
    uses = Counter(parameter for module in blocks(hf) for parameter in module.parameters())
    return [module for module in blocks(hf) if all(uses[parameter] == 1 for parameter in module.parameters())]


def _outermost(module: nn.Module, matches: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules under `module` that match, each once, without matches inside another match."""
    found: dict[nn.Module, None] = {}  # ordered
    for child in module.children():
        found |= dict.fromkeys([child] if matches(child) else _outermost(child, matches))
    return list(found)
