"""The whole configuration tree: strict, frozen, every key with its type, default and one line of help.

Nothing here imports torch. Reading files, merging and error messages are in `config_file.py`; each algorithm's own
section is defined beside the algorithm, in `algorithms/`, and derives from `AlgorithmConfig`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from rlkd.config.schedules import Constant, Schedule

LARGEST_SERVED_RANK = 512
"""Of an adapter at a vLLM 0.32 server."""

COLDEST_SERVED = 0.01
"""vLLM silently raises a lower temperature, but for 0 (greedy), to this."""

WILDCARDS = ("", "0.0.0.0", "::")
"""What a server may listen on, but nobody can reach."""


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are never coerced, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class RunConfig(Section):
    """Identity and length of the run."""

    name: str = Field(
        "run", pattern=r"^[\w.+-]+$", description="name of the run; its directory is <run.dir>/<run.name>"
    )
    dir: str = Field("runs", description="directory that holds all runs")
    seed: int = Field(0, ge=0, lt=2**31, description="every random choice is a function of this seed")
    iterations: int = Field(
        100, ge=1, description="rollout batches to train on; a finished run may be resumed with more"
    )
    resume: str = Field(
        "never",
        description="never: refuse a directory that holds a run; auto: go on from its last checkpoint; or a path",
    )
    accept_changes: list[str] = Field(
        [], description="keys that a resumed run may have otherwise than its checkpoint, e.g. [optim.lr]"
    )


class LoraConfig(Section):
    """Adapters beside the frozen linear layers. No dropout: the trained distribution must be the sampled one."""

    r: int = Field(16, ge=1, description="rank of an adapter")
    alpha: int = Field(32, ge=1, description="an adapter counts alpha / r times")
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="names of the layers that get one, e.g. [q_proj, v_proj]; never the output layer"
    )


class ModelConfig(Section):
    """The student."""

    path: str = Field(description="folder or hub id of the student, or builtin:student")
    attention: str | None = Field(
        None, description="attention implementation of transformers, e.g. sdpa, flash_attention_2"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    lora: LoraConfig | None = Field(None, description="train adapters instead of all weights; null: all weights")
    trust_remote_code: bool = Field(
        False, description="run Python code that comes with the model; off unless you trust it"
    )


class ServerConfig(Section):
    """A vLLM server: how to start one, or how to treat a running one."""

    launch: bool = Field(False, description="start the server, watch it, and stop it with the run")
    devices: list[list[int]] = Field(
        [[]],
        min_length=1,
        description="one server per entry, with its GPU indices; [[]]: one on the CPU or the default GPU",
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "auto", description="vLLM's compute type; float32 on CPU"
    )
    max_model_len: int | None = Field(
        None, gt=1, description="longest prompt + completion; null: the rollout's own lengths"
    )
    memory: float = Field(0.85, gt=0, lt=1, description="GPU memory fraction that vLLM may use")
    kv_cache_gb: float = Field(1.0, gt=0, description="key-value cache of a CPU server, in GiB")
    host: str = Field(
        "127.0.0.1", description="address of this machine that started servers listen on; loopback: this machine only"
    )
    key_env: str = Field(
        "RLKD_SERVER_KEY",
        pattern=r"^[A-Za-z_]\w*$",
        description="environment variable with the servers' key; for started ones, unset, a fresh key is made",
    )
    allow_open: bool = Field(
        False, description="use servers on other machines whose weights anybody may change, since they ask for no key"
    )
    restarts: int = Field(3, ge=0, description="how often a started server that died is started again, in one run")
    retry_s: float = Field(
        600.0, ge=0, description="seconds to wait for servers, when none answers any more, before the run ends"
    )
    start_timeout_s: float = Field(600.0, gt=0, description="seconds until a started server must answer")
    request_timeout_s: float = Field(
        3600.0, gt=0, description="seconds until a request must be answered, queue included"
    )
    extra_args: list[str] = Field([], description="further arguments for the vLLM command line, as they are")

    @field_validator("host")
    @classmethod
    def _reachable(cls, host: str) -> str:
        if host in WILDCARDS:
            raise ValueError(f"is {host!r}, which is no address that a trainer could reach; name one of this machine")
        return host


class RolloutServerConfig(ServerConfig):
    """The policy's vLLM servers."""

    urls: list[str] = Field([], description="running servers, e.g. http://host:8000; excludes launch")
    weight_sync: Literal["file", "nccl", "ipc"] = Field("file", description="how new weights reach the server")
    sync_dir: str | None = Field(
        None,
        description="directory of the file engine, on a disk that trainer and servers share; null: in memory",
    )


class RolloutConfig(Section):
    """What the student samples for training."""

    backend: Literal["hf", "vllm"] = Field("hf", description="hf: in this process; vllm: one or more servers")
    prompts: int = Field(16, ge=1, description="prompts per iteration, over all ranks")
    temperature: float = Field(1.0, gt=0, description="sampling temperature; policy log-probs are taken at it")
    max_tokens: int = Field(256, ge=1, description="longest completion, in tokens")
    max_staleness: int = Field(0, ge=0, description="weight versions that a sample may lag behind; 0: on-policy")
    max_mismatch: float = Field(
        0.05, gt=0, description="mean |log-prob by sampler − by trainer| above which the run stops"
    )
    batch_rows: int = Field(256, ge=1, description="rows that the hf sampler decodes at a time")
    server: RolloutServerConfig = Field(RolloutServerConfig(), description="vLLM servers of the policy")


class _Teacher(Section):
    temperature: float = Field(
        1.0, gt=0, description="both models are compared at this temperature; a served teacher can do only 1"
    )
    check_parity: bool = Field(
        False, description="at the start, check that the teacher path scores as the trainer does"
    )


class NoTeacher(Section):
    """No teacher."""

    backend: Literal["none"] = Field("none", description="none: no teacher")


class LocalTeacher(_Teacher):
    """A frozen Hugging Face model in every trainer process."""

    backend: Literal["local"] = Field(description="local: a model in this process; served: a vLLM server; none")
    path: str = Field(description="folder or hub id of the teacher, or builtin:teacher, builtin:mentor")
    batch_tokens: int = Field(16384, ge=1, description="tokens, padding included, that the teacher scores at a time")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute type of the teacher")


class ServedTeacher(_Teacher):
    """A frozen model behind a vLLM server."""

    backend: Literal["served"] = Field(description="local: a model in this process; served: a vLLM server; none")
    path: str = Field(description="folder or hub id of the teacher: its tokenizer is compared with the student's")
    url: str | None = Field(None, description="the running server, e.g. http://host:8001; excludes server.launch")
    urls: list[str] = Field([], description="several running servers of this one model; excludes url")
    server: ServerConfig = Field(ServerConfig(), description="how to start the server")

    @model_validator(mode="after")
    def _check(self) -> ServedTeacher:
        if self.temperature != 1.0:
            raise ValueError(
                f"teacher.temperature is {self.temperature}, but a served teacher scores at 1 in every mode; "
                "set it to 1 or use teacher.backend: local"
            )
        if (self.url is not None) + bool(self.urls) + self.server.launch != 1:
            raise ValueError(
                "set either teacher.url (a running server), teacher.urls (several) or teacher.server.launch: true "
                "(start one)"
            )
        return self

    @property
    def addresses(self) -> list[str]:
        """Of the servers that run already."""
        return self.urls if self.url is None else [self.url]


class SelfTeacher(_Teacher):
    """The student itself, which reads more than the student does: self-distillation."""

    backend: Literal["self"] = Field(description="self: the student, under a privileged prompt")
    weights: Literal["fixed", "ema", "live"] = Field(
        "fixed", description="the student's start, a moving average of its weights, or the weights that sampled"
    )
    decay: float = Field(0.999, ge=0, lt=1, description="ema: weight of the average so far, an iteration")
    scorer: Literal["local", "policy_server"] = Field(
        "local", description="local: a copy in every trainer process; policy_server: the vLLM servers that sample"
    )
    batch_tokens: int = Field(16384, ge=1, description="tokens, padding included, that a local copy scores at a time")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute type of a local copy")

    @model_validator(mode="after")
    def _check(self) -> SelfTeacher:
        if self.scorer == "policy_server" and self.weights == "ema":
            raise ValueError(
                "teacher.scorer is policy_server, but teacher.weights is ema: those servers hold no average; set "
                "teacher.weights: live, or teacher.scorer: local"
            )
        if self.scorer == "policy_server" and self.temperature != 1.0:
            raise ValueError(
                f"teacher.temperature is {self.temperature}, but a server scores at 1 in every mode; set it to 1 "
                "or use teacher.scorer: local"
            )
        return self


class NamedLocalTeacher(LocalTeacher):
    """One of several teachers, in every trainer process."""

    name: str = Field(description="rows whose teacher.column has this value are its own")


class NamedServedTeacher(ServedTeacher):
    """One of several teachers, behind a vLLM server."""

    name: str = Field(description="rows whose teacher.column has this value are its own")


class RoutedTeacher(Section):
    """Several teachers; a column of the data says whose a prompt is."""

    backend: Literal["routed"] = Field(description="routed: several teachers, by a column of the data")
    column: str = Field("teacher", description="column with the name of the prompt's teacher")
    teachers: list[Annotated[NamedLocalTeacher | NamedServedTeacher, Field(discriminator="backend")]] = Field(
        min_length=1, description="the teachers, each with a name"
    )

    @property
    def temperature(self) -> float:
        return self.teachers[0].temperature

    @property
    def check_parity(self) -> bool:
        return False

    @model_validator(mode="after")
    def _check(self) -> RoutedTeacher:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teacher.teachers: names must differ, got {', '.join(names)}")
        if len({teacher.temperature for teacher in self.teachers}) > 1:
            raise ValueError("teacher.teachers: all must have one temperature, at which the student is compared too")
        if any(isinstance(teacher, ServedTeacher) and teacher.server.launch for teacher in self.teachers):
            raise ValueError("teacher.teachers: servers of several teachers are not launched; start them, give url")
        return self


Teacher = Annotated[
    NoTeacher | LocalTeacher | ServedTeacher | SelfTeacher | RoutedTeacher, Field(discriminator="backend")
]


class MessageKeys(Section):
    """How the messages of the data are written, where it is not as role and content."""

    role: str = Field("role", description="key of a message's author, e.g. from")
    content: str = Field("content", description="key of a message's text, e.g. value")
    roles: dict[str, str] = Field(
        {}, description="author in the data → role in the chat template, e.g. {human: user, gpt: assistant}"
    )


class DataConfig(Section):
    """Prompts and their answers.

    A column may stand in another: `meta.gold.value` is `value` of `gold` of the column `meta`. A column that has the
    whole name, dots included, comes first.
    """

    path: str = Field(description="a .jsonl file, a folder or hub id of a Hugging Face data set, or builtin:reverse")
    split: str = Field("train", description="split of a Hugging Face data set")
    prompt_column: str = Field(
        "prompt", description="column with the prompt: a text, or a list of chat messages; a.b.c: within another column"
    )
    answer_column: str | None = Field("answer", description="column with the reference answer; null: none")
    privileged_column: str | None = Field(None, description="column that only a teacher may see, e.g. a solution")
    completion_column: str | None = Field(None, description="column with a completion to imitate (SFT, GKD, REDI)")
    rejected_column: str | None = Field(None, description="column with a completion to avoid (REDI)")
    id_column: str | None = Field(None, description="column with a unique id; null: the row number")
    tools_column: str | None = Field(
        None, description="column with the tools of a prompt for the chat template: a list, or its JSON; null: none"
    )
    messages: MessageKeys = Field(MessageKeys(), description="how the messages in the prompt column are written")
    chat_template: bool = Field(True, description="wrap the prompt in the student's chat template; false: plain text")
    template_variables: dict[str, Any] = Field(
        {}, description="variables of the chat template, e.g. {enable_thinking: false}; teachers' prompts get them too"
    )
    continue_final_message: bool = Field(
        False,
        description="where the last message is by the assistant, the student goes on with it; false: it is refused",
    )
    special_tokens: Literal["text", "tokens"] = Field(
        "text",
        description="what a prompt that spells a special token, such as <|im_end|>, has there: text; or the token, for "
        "prompts that were put into a template beforehand",
    )
    system: str | None = Field(None, description="system message put before a text prompt")
    limit: int | None = Field(None, ge=1, description="use only the first rows")
    max_prompt_tokens: int = Field(1024, ge=1, description="longest prompt, in tokens")
    max_completion_tokens: int = Field(4096, ge=1, description="longest completion in the data, in tokens")
    too_long: Literal["error", "skip"] = Field(
        "error", description="what to do with a row whose prompt or completion is longer"
    )

    @field_validator("template_variables")
    @classmethod
    def _are_the_templates(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(value.keys() & _NO_TEMPLATE_VARIABLES)
        if taken:
            raise ValueError(f"has {taken[0]}, which is no variable of a template: it is set by other keys of data")
        return value


_NO_TEMPLATE_VARIABLES = frozenset(
    (
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        "return_assistant_tokens_mask",
    )
)
"""What `apply_chat_template` takes for itself."""


class RewardFunction(Section):
    """One reward and its weight."""

    name: str = Field(description="exact_match, math, format, or module:function of your own")
    weight: float = Field(1.0, description="factor in the sum of rewards")
    options: dict[str, Any] = Field({}, description="keyword arguments of the function")


class RewardConfig(Section):
    """What a completion is worth."""

    functions: list[RewardFunction] = Field(
        [RewardFunction(name="exact_match")], min_length=1, description="rewards, added up with their weights"
    )
    workers: int = Field(1, ge=1, description="worker processes of each rank")
    timeout_s: float = Field(10.0, gt=0, description="seconds per completion and function; then the worker is killed")
    max_error_rate: float = Field(
        0.1, ge=0, le=1, description="share of failed rewards in an iteration above which the run stops"
    )
    correct_at: float = Field(
        1.0, description="a completion counts as correct (accuracy, KD masks) from this reward on"
    )


class AlgorithmConfig(Section):
    """What every algorithm has; each derives its own from it."""

    name: str = Field(description="the algorithm")
    group_size: int = Field(8, ge=1, description="completions per prompt")

    @property
    def sampling_rounds(self) -> int:
        """How many times `rollout.prompts` prompts an iteration may sample, to train on as many as that."""
        return 1

    @property
    def teacher_writes(self) -> bool:
        """Whether the teacher completes prompts or answers, rather than only scoring what is there."""
        return False

    def trained_lengths(self, config: Config) -> dict[str, int]:
        """Key → tokens; together they are the longest sequence that the student is trained on."""
        return {
            "data.max_prompt_tokens": config.data.max_prompt_tokens,
            "rollout.max_tokens": config.rollout.max_tokens,
        }

    def teacher_lengths(self, config: Config) -> dict[str, int]:
        """Key → tokens; together they are the longest sequence that a teacher reads and writes."""
        return {
            "data.max_prompt_tokens": config.data.max_prompt_tokens,
            "rollout.max_tokens": config.rollout.max_tokens,
        }

    def problems(self, config: Config) -> list[tuple[str, str]]:
        """Contradictions between this section and the rest of `config`: (key, one line) each."""
        return []


class OptimConfig(Section):
    """AdamW."""

    lr: Schedule = Field(Constant(value=1e-6), description="learning rate, a number or a schedule over iterations")
    betas: list[float] = Field([0.9, 0.999], min_length=2, max_length=2, description="AdamW's decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled weight decay of weight matrices and embeddings; norms and biases have none"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    max_skipped: int = Field(
        2, ge=0, description="of the last 20 updates, how many may be skipped for a gradient that is not finite"
    )


class TrainerConfig(Section):
    """Devices and the split of an update."""

    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="what to train on")
    devices: int = Field(1, ge=1, description="processes per node; torchrun's --nproc-per-node must agree")
    num_nodes: int = Field(1, ge=1, description="nodes; torchrun's --nnodes must agree")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="compute type; master weights and reductions are always fp32"
    )
    micro_batch_tokens: int = Field(16384, ge=1, description="tokens, padding included, of one forward on one device")
    updates_per_iteration: int = Field(
        1, ge=1, description="optimizer steps per rollout batch; 1 is strictly on-policy"
    )


class EvalConfig(Section):
    """Held-out prompts."""

    every: int = Field(
        25, ge=0, description="iterations between evaluations, before the first and after the last too; 0: never"
    )
    path: str | None = Field(
        None, description="held-out data, read like data.path; null: none (a builtin task has its own)"
    )
    split: str = Field("test", description="split of a Hugging Face data set at eval.path")
    prompts: int = Field(128, ge=1, description="held-out prompts")
    samples: int = Field(4, ge=1, description="k of avg@k and pass@k")
    temperature: float = Field(1.0, gt=0, description="temperature of avg@k and pass@k")


class LogConfig(Section):
    """Where figures go; metrics.jsonl is always written."""

    wandb: Literal["online", "offline", "off"] = Field("off", description="Weights & Biases")
    project: str = Field("rlkd", description="project in Weights & Biases")
    rollouts_every: int = Field(1, ge=0, description="iterations between dumps of all rollouts as JSONL; 0: never")
    progress: bool = Field(True, description="progress bar (on a terminal) or one line an iteration")


class CheckpointConfig(Section):
    """Checkpoints and the exported student."""

    every: int = Field(50, ge=0, description="iterations between checkpoints; 0: only the last")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay on disk")
    export: bool = Field(True, description="write the student in Hugging Face form to <run>/hf at the end")
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of the exported weights; auto: the one that the config at model.path names"
    )


class Config(Section):
    """A run."""

    run: RunConfig = Field(RunConfig(), description="identity and length")
    model: ModelConfig
    teacher: Teacher = Field(NoTeacher(), description="who is imitated")
    data: DataConfig
    rollout: RolloutConfig = Field(RolloutConfig(), description="what is sampled")
    reward: RewardConfig = Field(RewardConfig(), description="what it is worth")
    algorithm: SerializeAsAny[AlgorithmConfig]
    optim: OptimConfig = Field(OptimConfig(), description="optimizer")
    trainer: TrainerConfig = Field(TrainerConfig(), description="devices")
    eval: EvalConfig = Field(EvalConfig(), description="held-out prompts")
    log: LogConfig = Field(LogConfig(), description="where figures go")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="what is kept")

    @property
    def run_dir(self) -> str:
        return f"{self.run.dir}/{self.run.name}"

    @property
    def publishes_adapter(self) -> bool:
        """Whether the sampler gets the student's adapter alone, since it holds the base already."""
        return self.model.lora is not None and self.rollout.backend == "vllm"

    @property
    def teachers(self) -> list[tuple[str, LocalTeacher | ServedTeacher]]:
        """(key, settings) of every teacher that is a model of its own."""
        if isinstance(self.teacher, RoutedTeacher):
            return [(f"teacher.teachers[{i}]", teacher) for i, teacher in enumerate(self.teacher.teachers)]
        return [("teacher", self.teacher)] if isinstance(self.teacher, LocalTeacher | ServedTeacher) else []

    @property
    def servers(self) -> list[ServerConfig]:
        """The settings of all servers that the run uses, its own and others'."""
        policy = [self.rollout.server] if self.rollout.backend == "vllm" else []
        return policy + [t.server for _, t in self.teachers if isinstance(t, ServedTeacher)]

    @property
    def world_size(self) -> int:
        return self.trainer.devices * self.trainer.num_nodes

    @field_validator("teacher", mode="before")
    @classmethod
    def _null_is_none(cls, value: Any) -> Any:
        return {"backend": "none"} if value is None else value

    def problems(self) -> list[tuple[str, str]]:
        """Contradictions between keys, each (first key, one line that names both keys and the fix).

        `config_file.load` prints them all at once; a Config built in Python is checked by `check()`.
        """
        found: list[tuple[str, str]] = []
        if self.rollout.prompts % self.world_size:
            found.append(
                (
                    "rollout.prompts",
                    f"is {self.rollout.prompts}, not divisible by trainer.devices × trainer.num_nodes = "
                    f"{self.world_size}; "
                    "each rank samples whole groups: choose a multiple",
                )
            )
        rollouts = self.rollout.prompts * self.algorithm.group_size // self.world_size
        if rollouts % self.trainer.updates_per_iteration:
            found.append(
                (
                    "trainer.updates_per_iteration",
                    f"is {self.trainer.updates_per_iteration}, which does not divide the {rollouts} rollouts of a rank "
                    "(rollout.prompts × algorithm.group_size / ranks); choose a divisor",
                )
            )
        server = self.rollout.server
        if self.rollout.backend == "vllm" and server.launch == bool(server.urls):
            found.append(
                (
                    "rollout.server",
                    "rollout.backend is vllm: set either rollout.server.urls (running servers) or "
                    "rollout.server.launch: true (start them)",
                )
            )
        if self.rollout.backend == "hf" and (server.launch or server.urls):
            found.append(
                (
                    "rollout.backend",
                    "is hf, but rollout.server names servers; set rollout.backend: vllm or drop rollout.server",
                )
            )
        if self.rollout.backend == "vllm":
            asked = {"rollout.temperature": self.rollout.temperature}
            if self.eval.every:
                asked["eval.temperature"] = self.eval.temperature
            why = f"but vLLM silently raises it to {COLDEST_SERVED}; set it to at least that"
            found += [(key, f"is {value}, {why}") for key, value in asked.items() if value < COLDEST_SERVED]
        longest = self.data.max_prompt_tokens + self.rollout.max_tokens
        trained = self.algorithm.trained_lengths(self)
        if self.trainer.micro_batch_tokens < sum(trained.values()):
            found.append(
                (
                    "trainer.micro_batch_tokens",
                    f"is {self.trainer.micro_batch_tokens}, less than one sequence of {' + '.join(trained)} = "
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
        if isinstance(self.teacher, SelfTeacher) and self.teacher.scorer == "policy_server":
            found.extend(self._scorer_problems(self.teacher))
        if self.publishes_adapter:
            assert self.model.lora is not None
            found.extend(_adapter_problems(self.model.lora, server))
        found.extend(self._launch_problems())
        found.extend(self.algorithm.problems(self))
        return found

    def _scorer_problems(self, teacher: SelfTeacher) -> list[tuple[str, str]]:
        found = []
        if self.rollout.backend != "vllm":
            why = "is policy_server, but rollout.backend is hf; set rollout.backend: vllm, or teacher.scorer: local"
            found.append(("teacher.scorer", why))
        elif teacher.weights == "fixed" and self.model.lora is None:
            why = (
                "is fixed, but without model.lora the servers of teacher.scorer policy_server hold the live weights "
                "alone; set teacher.weights: live, or teacher.scorer: local (for a server of its own: teacher.backend: "
                "served with the student's path)"
            )
            found.append(("teacher.weights", why))
        return found

    def _launch_problems(self) -> list[tuple[str, str]]:
        launched: dict[str, ServerConfig] = {}
        if self.rollout.backend == "vllm" and self.rollout.server.launch:
            launched["rollout.server"] = self.rollout.server
        if isinstance(self.teacher, ServedTeacher) and self.teacher.server.launch:
            launched["teacher.server"] = self.teacher.server
        found = []
        for key, server in launched.items():
            shared = {gpu for gpus in server.devices for gpu in gpus} & set(range(self.trainer.devices))
            if shared and self.trainer.accelerator != "cpu":
                why = (
                    f"names GPU {min(shared)}, on which trainer.devices = {self.trainer.devices} trains; choose "
                    f"others, or [[]] with a small {key}.memory to share one GPU on purpose"
                )
                found.append((f"{key}.devices", why))
        return found


def _adapter_problems(lora: LoraConfig, server: RolloutServerConfig) -> list[tuple[str, str]]:
    """What stands in the way of adapters at vLLM servers."""
    found = []
    if server.weight_sync != "file":
        why = (
            f"is {server.weight_sync}, but with model.lora an adapter is published, which vLLM reads from a disk; set "
            "it to file"
        )
        found.append(("rollout.server.weight_sync", why))
    if lora.r > LARGEST_SERVED_RANK:
        why = f"is {lora.r}, but vLLM serves adapters of rank {LARGEST_SERVED_RANK} at most; lower it"
        found.append(("model.lora.r", why))
    return found
