"""Checks for contradictions between keys of different sections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlkd.config.sections.model import LoraConfig
from rlkd.config.sections.servers import RolloutServerConfig, ServerConfig
from rlkd.config.sections.teacher import RoutedTeacherConfig, SelfTeacherConfig, ServedTeacherConfig

if TYPE_CHECKING:
    from rlkd.config.schema import Config

LARGEST_SERVED_RANK = 512
"""The largest LoRA rank that vLLM 0.32 can serve."""

COLDEST_SERVED = 0.01
"""vLLM silently raises a lower temperature to this, except 0, which is greedy."""


def contradictions(config: Config) -> list[tuple[str, str]]:
    """Contradictions between keys of different sections: (first key, one-line message with both keys and the fix)."""
    found: list[tuple[str, str]] = []
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        found.append(("optim.betas", f"expected two numbers >= 0 and < 1, got {config.optim.betas}"))
    if config.rollout.prompts % config.world_size:
        found.append(
            (
                "rollout.prompts",
                f"is {config.rollout.prompts}, not divisible by trainer.devices × trainer.num_nodes = "
                f"{config.world_size}; "
                "each rank samples complete groups, so choose a multiple",
            )
        )
    rollouts = config.rollout.prompts * config.algorithm.group_size // config.world_size
    if rollouts % config.trainer.updates_per_iteration:
        found.append(
            (
                "trainer.updates_per_iteration",
                f"is {config.trainer.updates_per_iteration}, which does not divide the {rollouts} rollouts of a rank "
                "(rollout.prompts × algorithm.group_size / ranks); choose a divisor",
            )
        )
    server = config.rollout.server
    if config.rollout.backend == "vllm" and server.launch == bool(server.urls):
        found.append(
            (
                "rollout.server",
                "rollout.backend is vllm: set either rollout.server.urls (running servers) or "
                "rollout.server.launch: true (start them)",
            )
        )
    if config.rollout.backend == "hf" and (server.launch or server.urls):
        found.append(
            (
                "rollout.backend",
                "is hf, but rollout.server configures vLLM servers; set rollout.backend: vllm or remove rollout.server",
            )
        )
    if config.rollout.backend == "vllm":
        asked = {"rollout.temperature": config.rollout.temperature}
        if config.eval.every:
            asked["eval.temperature"] = config.eval.temperature
        why = f"but vLLM silently raises it to {COLDEST_SERVED}; set it to at least that"
        found += [(key, f"is {value}, {why}") for key, value in asked.items() if value < COLDEST_SERVED]
    if config.rollout.max_staleness > 1 and not config.publishes_in_flight:
        why = (
            f"is {config.rollout.max_staleness}, but only servers that sample while weights are published can be more "
            "than one iteration ahead; set it to 1 or 0, or set rollout.backend: vllm and rollout.in_flight: true"
        )
        found.append(("rollout.max_staleness", why))
    if config.eval.fraction is not None and config.eval.path is not None:
        why = f"is {config.eval.fraction:g}, a share of data.path, but eval.path is {config.eval.path}; drop one"
        found.append(("eval.fraction", why))
    if config.run.stop_after is not None and config.checkpoint.best is None:
        why = f"is {config.run.stop_after}, but checkpoint.best names no metric; set it to eval/avg@k"
        found.append(("run.stop_after", why))
    if config.checkpoint.best is not None and not (config.eval.every and config.holds_out):
        which = "eval.every is 0" if config.holds_out else "nothing is held out; set eval.path or eval.fraction"
        found.append(("checkpoint.best", f"is {config.checkpoint.best}, but {which}"))
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    trained = config.algorithm.trained_lengths(config)
    if config.trainer.micro_batch_tokens < sum(trained.values()):
        found.append(
            (
                "trainer.micro_batch_tokens",
                f"is {config.trainer.micro_batch_tokens}, less than one sequence of {' + '.join(trained)} = "
                f"{sum(trained.values())} tokens; raise it",
            )
        )
    if server.max_model_len is not None and server.max_model_len < longest:
        found.append(
            (
                "rollout.server.max_model_len",
                f"is {server.max_model_len}, less than data.max_prompt_tokens + rollout.max_tokens = {longest}; "
                "raise it",
            )
        )
    if isinstance(config.teacher, SelfTeacherConfig) and config.teacher.scorer == "policy_server":
        found.extend(_scorer_problems(config, config.teacher))
    if config.publishes_adapter:
        assert config.model.lora is not None
        found.extend(_adapter_problems(config.model.lora, server))
    if config.model.recompute_every > 1 and not config.model.gradient_checkpointing:
        why = (
            f"is {config.model.recompute_every}, but model.gradient_checkpointing is false, so nothing is recomputed; "
            "set that to true, or this to 1"
        )
        found.append(("model.recompute_every", why))
    if config.trainer.shard_frozen:
        found.extend(_sharding_problems(config))
    overrides = [word for word in server.extra_args if word.replace("_", "-").startswith("--hf-overrides")]
    if config.model.fp32_head and overrides:
        why = (
            f"contains {overrides[0]}, which would replace the one of model.fp32_head: true; set that to false, and "
            'add "head_dtype": "float32" to yours'
        )
        found.append(("rollout.server.extra_args", why))
    found.extend(_launch_problems(config))
    if server.sleep:
        found.extend(_sleep_problems(config))
    found.extend(config.algorithm.problems(config))
    return found


def _sharding_problems(config: Config) -> list[tuple[str, str]]:
    """What keeps ranks from running the forwards of frozen models together."""
    teacher, whys = config.teacher, []
    if config.rollout.max_staleness > 0:
        whys.append(
            f"rollout.max_staleness is {config.rollout.max_staleness}, and scoring beside training would gather "
            "weights in another order on each rank; set rollout.max_staleness: 0"
        )
    teachers = teacher.teachers if isinstance(teacher, RoutedTeacherConfig) else [teacher]
    local = any(one.backend == "local" or getattr(one, "scorer", None) == "local" for one in teachers)
    if local and config.algorithm.teacher_writes:
        whys.append("the teacher writes, for which ranks need different numbers of forwards; serve it")
    if isinstance(teacher, SelfTeacherConfig) and teacher.scorer == "local" and teacher.weights != "fixed":
        whys.append(f"teacher.weights is {teacher.weights}, and whole weights are copied into such a teacher")
    return [("trainer.shard_frozen", f"is true, but {why}; or set it to false") for why in whys]


def _scorer_problems(config: Config, teacher: SelfTeacherConfig) -> list[tuple[str, str]]:
    found = []
    if config.rollout.backend != "vllm":
        why = "is policy_server, but rollout.backend is hf; set rollout.backend: vllm, or teacher.scorer: local"
        found.append(("teacher.scorer", why))
    elif teacher.weights == "fixed" and config.model.lora is None:
        why = (
            "is fixed, but with teacher.scorer: policy_server and no model.lora the servers hold only the live "
            "weights; set teacher.weights: live, or teacher.scorer: local (or teacher.backend: served with the "
            "student's path, for a separate server)"
        )
        found.append(("teacher.weights", why))
    return found


def _launch_problems(config: Config) -> list[tuple[str, str]]:
    launched: dict[str, ServerConfig] = {}
    if config.rollout.backend == "vllm" and config.rollout.server.launch:
        launched["rollout.server"] = config.rollout.server
    if isinstance(config.teacher, ServedTeacherConfig) and config.teacher.server.launch:
        launched["teacher.server"] = config.teacher.server
    found = []
    for key, server in launched.items():
        shared = {gpu for gpus in server.devices for gpu in gpus} & set(range(config.trainer.devices))
        sleeps = key == "rollout.server" and config.rollout.server.sleep > 0
        if shared and config.trainer.accelerator != "cpu" and not sleeps:
            why = (
                f"contains GPU {min(shared)}, which trainer.devices = {config.trainer.devices} also uses; choose "
                f"other GPUs, or [[]] with a small {key}.memory to share one GPU on purpose"
            )
            if key == "rollout.server":
                why += ", or rollout.server.sleep: 2 to take turns"
            found.append((f"{key}.devices", why))
    return found


def _sleep_problems(config: Config) -> list[tuple[str, str]]:
    """Settings under which the policy's servers cannot sleep while the student trains."""
    key, level = "rollout.server.sleep", f"is {config.rollout.server.sleep}"
    found = []
    if config.rollout.backend != "vllm" or not config.rollout.server.launch:
        why = f"{level}, but only servers that the run starts can sleep; set rollout.server.launch: true, or sleep: 0"
        found.append((key, why))
    if config.rollout.max_staleness:
        why = (
            f"{level}, but with rollout.max_staleness = {config.rollout.max_staleness} the servers sample while the "
            "student trains; set one of the two to 0"
        )
        found.append((key, why))
    if config.model.lora is not None:
        why = f"{level}, but with model.lora only adapters are sent to a server that wakes up; set it to 0"
        found.append((key, why))
    return found


def _adapter_problems(lora: LoraConfig, server: RolloutServerConfig) -> list[tuple[str, str]]:
    """Settings under which vLLM servers cannot load the published adapter."""
    found = []
    if server.weight_sync not in ("auto", "file"):
        why = (
            f"is {server.weight_sync}, but model.lora publishes an adapter, which vLLM can only read from disk; set it "
            "to file"
        )
        found.append(("rollout.server.weight_sync", why))
    if lora.r > LARGEST_SERVED_RANK:
        why = f"is {lora.r}, but vLLM serves adapters only up to rank {LARGEST_SERVED_RANK}; lower it"
        found.append(("model.lora.r", why))
    return found
