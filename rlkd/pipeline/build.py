"""Builds the parts that a configuration names: the sampler, the teacher, the reference and the rewards."""

from __future__ import annotations

from typing import Any

import torch

from rlkd.algorithms.base import Algorithm
from rlkd.config.schema import (
    Config,
    LocalTeacherConfig,
    NoTeacherConfig,
    RoutedTeacherConfig,
    SelfTeacherConfig,
    ServedTeacherConfig,
    TeacherConfig,
)
from rlkd.data.prompts import Stream as Prompts
from rlkd.distributed import RunStopped, compute_dtype
from rlkd.generation.hf import HFSampler
from rlkd.generation.sampler import Sampler, eos_ids
from rlkd.generation.vllm import VLLMSampler
from rlkd.generation.vllm_lora import LoraVLLMSampler
from rlkd.models.vocabulary import vocabulary_size
from rlkd.pipeline.line import Line
from rlkd.plugins import SAMPLER, TEACHER, Kind, find
from rlkd.rewards.pool import RewardPool
from rlkd.teachers.local import LocalScorer
from rlkd.teachers.lockstep import Lockstep
from rlkd.teachers.routed import RoutedTeacher
from rlkd.teachers.self_teacher import SelfTeacher
from rlkd.teachers.served import PolicyServerTeacher, ServedTeacher
from rlkd.teachers.teacher import Teacher


def build_line(config: Config, algorithm: Algorithm, prompts: Prompts) -> Line:
    """The left half of the line. None of its parts is opened yet."""
    policy = build_sampler(config)
    # With LoRA the reference is the student with its adapters off, so the trainer computes its scores.
    apart = algorithm.needs_reference and config.model.lora is None
    lockstep = Lockstep() if config.trainer.shard_frozen else None
    scorers: dict[str, Teacher] = {"teacher": build_teacher(config, policy, lockstep)} if algorithm.uses_teacher else {}
    if apart:
        scorers["reference"] = build_reference(config, lockstep)
    scorers |= algorithm.scorers()
    return Line(
        config=config,
        algorithm=algorithm,
        prompts=prompts,
        policy=policy,
        scorers=scorers,
        rewards=RewardPool(config.reward),
        lockstep=lockstep,
    )


def build_sampler(config: Config) -> Sampler:
    """The sampler that `rollout.backend` names, not yet opened."""
    ends = eos_ids(config.model.path, config.model.trust_remote_code)
    if config.rollout.backend == "hf":
        return HFSampler(config, ends)
    if config.rollout.backend != "vllm":
        own: Sampler = _own(config.rollout.backend, SAMPLER, Sampler, config, ends)
        return own
    kind = LoraVLLMSampler if config.publishes_adapter else VLLMSampler
    return kind(config, ends)


def build_teacher(config: Config, policy: Sampler, lockstep: Lockstep | None = None) -> Teacher:
    """The teacher that `teacher.backend` names, not yet opened."""
    teacher = config.teacher
    if isinstance(teacher, RoutedTeacherConfig):
        return RoutedTeacher(teacher.column, {t.name: _one_teacher(config, t, lockstep) for t in teacher.teachers})
    if isinstance(teacher, SelfTeacherConfig):
        if teacher.scorer == "local":
            return SelfTeacher(config, lockstep)
        assert isinstance(policy, VLLMSampler), "the configuration was checked"
        ends = eos_ids(config.model.path, config.model.trust_remote_code)
        return PolicyServerTeacher(policy, ends, base=teacher.weights == "fixed")
    if isinstance(teacher, TeacherConfig):
        own: Teacher = _own(teacher.backend, TEACHER, Teacher, config)
        return own
    assert not isinstance(teacher, NoTeacherConfig), "an algorithm with a teacher refuses backend none"
    return _one_teacher(config, teacher, lockstep)


def _own(name: str, kind: Kind, protocol: Any, *arguments: Any) -> Any:
    """A sampler or teacher from outside the package. Raises: RunStopped if it lacks a part of its protocol."""
    made = find(name, kind, lambda found: found(*arguments))
    missing = [part for part in vars(protocol) if not part.startswith("_") and not hasattr(made, part)]
    if missing:
        raise RunStopped(
            f"{name}: expected what every {protocol.__name__} has, got a class without {', '.join(missing)}; see "
            f"{protocol.__module__}"
        )
    return made


def _one_teacher(
    config: Config, teacher: LocalTeacherConfig | ServedTeacherConfig, lockstep: Lockstep | None
) -> Teacher:
    if isinstance(teacher, LocalTeacherConfig):
        return LocalScorer(
            teacher.path,
            vocabulary=vocabulary_size(config.model),
            temperature=teacher.temperature,
            batch_tokens=teacher.batch_tokens,
            dtype=getattr(torch, teacher.dtype),
            accelerator=config.trainer.accelerator,
            attention=config.model.attention,
            trust_remote_code=config.model.trust_remote_code,
            lockstep=lockstep,
        )
    return ServedTeacher(config, teacher)


def build_reference(config: Config, lockstep: Lockstep | None = None) -> LocalScorer:
    """A frozen copy of the initial policy, which scores at the rollout temperature."""
    return LocalScorer(
        config.model.path,
        vocabulary=vocabulary_size(config.model),
        temperature=config.rollout.temperature,
        batch_tokens=config.trainer.micro_batch_tokens,
        dtype=compute_dtype(config.trainer.precision, config.trainer.accelerator),
        accelerator=config.trainer.accelerator,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
        lockstep=lockstep,
        fp32_head=config.model.fp32_head,
    )
