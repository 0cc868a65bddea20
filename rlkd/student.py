"""The trained model: a Hugging Face causal LM behind one forward, sharded with FSDP2."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlkd.config import ModelConfig, TrainerConfig
from rlkd.policy_head import Needs, PolicyOutput, compared, token_logprobs
from rlkd.tiny import resolve
from rlkd.types import Batch


class Student(nn.Module):
    """Root of the sharding: whatever needs the output layer runs inside its forward."""

    def __init__(self, hf: PreTrainedModel):
        super().__init__()
        self.hf = hf

    def forward(self, batch: Batch, needs: Needs) -> PolicyOutput:
        """One pass over the batch's rows; per-token tensors, column t about token t given tokens < t.

        Padding is on the right and attention is causal, so real tokens never see it and no mask is passed.
        """
        trunk = self.hf.base_model(input_ids=batch.input_ids, use_cache=False)
        hidden, head = trunk.last_hidden_state, self.hf.get_output_embeddings()
        logprobs, entropy = token_logprobs(
            hidden,
            head,
            batch.input_ids,
            temperature=needs.temperature,
            config=self.hf.config,
            entropy=needs.entropy,
        )
        if needs.comparison is None:
            return PolicyOutput(logprobs=logprobs, entropy=entropy)
        total, per_token = compared(hidden, head, batch, needs.comparison, self.hf.config)
        return PolicyOutput(logprobs=logprobs, entropy=entropy, divergence=total, token_divergence=per_token)

    def full_weights(self) -> Mapping[str, Tensor]:
        """All weights, unsharded, on every rank, under Hugging Face names. A collective.

        Through the state dict and never `named_parameters()`, which are stale views after a forward without
        gradient; without `cpu_offload`, which hands ranks other than 0 an empty dictionary.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=False)
        weights = get_model_state_dict(self.hf, options=options)
        return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def load_causal_lm(path: str, dtype: torch.dtype, *, attention: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """The model at `path` (folder, hub id, builtin:…) in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(
        resolve(path), dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
    )


def build_student(model: ModelConfig, trainer: TrainerConfig, mesh: DeviceMesh) -> Student:
    """Load the student in fp32 and shard it over `mesh` (1-D, data parallel): each block, then the root.

    The model is loaded on the CPU; sharding moves each part to the mesh's device, so no device ever holds it whole.
    Master weights are fp32 whatever `trainer.precision` says: in bf16 a learning rate of 1e-6 would be rounded away.
    """
    hf = load_causal_lm(model.path, torch.float32, attention=model.attention, trust_remote_code=model.trust_remote_code)
    hf.eval()  # no dropout of any kind: the trained distribution must be the sampled one
    if model.gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in blocks(hf):  # they look at their own flag; what is inside them stays in evaluation mode
            module.training = True
    student = Student(hf)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if trainer.precision == "bf16" else None,
        reduce_dtype=torch.float32,
        # Else the root would cast log-probs and advantages of the batch to bf16 on the way in.
        cast_forward_inputs=False,
    )
    for module in blocks(hf):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(student, mesh=mesh, mp_policy=policy)
    return student


def blocks(hf: PreTrainedModel) -> list[nn.Module]:
    """The repeated layers of the model, by the class names that it declares as not to be split."""
    names = set(hf._no_split_modules or ())
    return [module for module in hf.modules() if type(module).__name__ in names]
