"""The vLLM sampler: rollouts from one or more servers, which this run starts or finds running."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rlkd import distributed
from rlkd.builtin import resolve
from rlkd.config.cross_checks import COLDEST_SERVED
from rlkd.config.schema import LARGEST_SERVED_RANK, Config, SelfTeacherConfig
from rlkd.data.seeds import request_seed
from rlkd.distributed import RunStopped, on_rank_zero
from rlkd.generation.rollout_answers import read_rollouts
from rlkd.generation.sampler import Sampling
from rlkd.models.lora import layer_names, skeleton
from rlkd.models.vocabulary import padding, vocabulary_size
from rlkd.models.weights import Published, TensorInfo, read_on_rank_zero
from rlkd.servers import sleep
from rlkd.servers.client import ServerError, ServerLost, VLLMClient, check_model, parse_version
from rlkd.servers.command import ServerRole
from rlkd.servers.placement import weight_sync
from rlkd.servers.plugin import ENGINE
from rlkd.servers.pool import Answer, Job, ServerPool
from rlkd.servers.responses import CacheReset, GenerateAnswer
from rlkd.storage.disk_errors import writing
from rlkd.types import Prompt, Rollout
from rlkd.weight_sync.nccl import DirectTransfer
from rlkd.weight_sync.weight_file import WeightFile

QUEUED = 2
"""How many completions a server is given for each one that it batches. A request is a prompt with all its samples and
counts until the longest has ended; what waits in the server's queue takes the places of those that end before."""

ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, LARGEST_SERVED_RANK)
"""The values of --max-lora-rank that vLLM 0.32 accepts; it pads an adapter of a smaller rank."""


def policy_role(config: Config) -> ServerRole:
    """How the policy servers of `config` must be started."""
    kind, lora = weight_sync(config), config.model.lora
    if lora is None:
        takes: tuple[str, ...] = (
            "--weight-transfer-config",
            json.dumps({"backend": ENGINE if kind == "file" else kind}),
        )
    else:
        rank = min(rank for rank in ADAPTER_RANKS if rank >= lora.r)
        loaded = config.rollout.max_staleness + 2  # those that may be requested, and the next one
        takes = (
            *("--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(loaded)),
            # Without these names vLLM prepares the output layer for adapters too, and vLLM 0.32 on a CPU then crashes
            # when it scores the prompts of two requests at the same time.
            *("--lora-target-modules", *layer_names(skeleton(config.model), lora)),
        )
    environment = {}
    if lora is not None:
        environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if kind == "ipc":
        environment["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles are sent pickled; the server requires its key
    return ServerRole(
        name="policy",
        model=resolve(config.model.path),
        max_model_len=longest(config),
        padding=padding(config.model, config.model.path),
        samples=True,
        arguments=(
            *(sleep.ARGUMENTS if config.rollout.server.sleep and config.rollout.server.launch else ()),
            "--enable-scale-out",  # adds the route with token ids in and out and the weight version of each token
            *("--logprobs-mode", "processed_logprobs"),  # log-probs at the sampling temperature
            *("--max-logprobs", "-1"),
            *takes,
            # vLLM 0.32 on a CPU crashes ("CPU Generator does not use offset") when a request with its own seed is
            # prefilled in two parts, which happens when many requests arrive at the same time.
            *(() if torch.cuda.is_available() else ("--no-enable-chunked-prefill",)),
            *(("--trust-remote-code",) if config.model.trust_remote_code else ()),
            *(("--hf-overrides", json.dumps({"head_dtype": "float32"})) if config.model.fp32_head else ()),
        ),
        environment=environment,
    )


def longest(config: Config) -> int:
    """The length of the longest sequence that a policy server processes, in tokens."""
    teacher, own = config.teacher, config.data.max_prompt_tokens + config.rollout.max_tokens
    if isinstance(teacher, SelfTeacherConfig) and teacher.scorer == "policy_server":
        # the sequences that it scores or writes as a teacher, and one token that vLLM generates when it scores
        return max(own, sum(config.algorithm.teacher_lengths(config).values()) + 1)
    return own


class VLLMSampler:
    """Implements `Sampler`. Rank 0 starts the servers (unless they are already running) and manages their weights."""

    in_process = False

    def __init__(self, config: Config, eos_ids: Sequence[int]) -> None:
        """
        Args:
            eos_ids: the token ids that end a completion; no others do.
        """
        self._config = config
        self._eos_ids = frozenset(eos_ids)
        self.vocabulary = vocabulary_size(config.model)
        self.pool = ServerPool(policy_role(config), config.rollout.server, longest(config))
        self._version: int | None = None
        """The version that every server in service has; None before the first `publish`."""
        self._published = ""
        """The file (or adapter) of that version, sent again to a server that lost its weights."""
        self._holds: dict[str, int] = {}
        """url → the version that this process sent to the server. The version that a server reports may be from another
        run."""
        self._as_started = False
        """Whether the servers keep the weights that they were started with, and nothing is published."""
        self._dtype: torch.dtype | None = None
        """In which the weights travel: that of the servers, or fp32 if they differ."""
        self._batched = 0
        """Completions that a server batches."""
        self._asleep = False
        """Whether nothing may be sampled until the next `publish`."""
        self._file: WeightFile | None = None
        self._direct: DirectTransfer | None = None

    def at_once(self, n: int) -> int:
        """How many prompts with n samples each all servers together take at a time. Call after `open`."""
        return self._prompts_at_once(n) * len(self.pool.clients)

    def _prompts_at_once(self, n: int) -> int:
        """How many prompts with n samples each one server gets from this rank at a time."""
        return max(1, QUEUED * self._batched // distributed.world_size() // n)

    def start(self) -> None:
        """Start the servers if `rollout.server.launch` is set. Raises: RunStopped if one cannot be started."""
        if self._config.rollout.server.launch:
            self.pool.start(self._config)

    def open(self) -> None:
        """Connect to the servers.

        Raises: RunStopped if a server does not come up, cannot be reached, or was started with unsuitable settings.
        """
        server = self._config.rollout.server
        self.pool.open(server.urls, resolve(self._config.model.path))
        for client in self.pool.clients:
            client.weight_version()  # fails now, not after the first rollout, if a server lacks these routes
        self._ask_settings()
        self._find_route()
        kind = weight_sync(self._config)
        if kind == "file":
            if distributed.rank() == 0:
                self._file = WeightFile(server.sync_dir)
        else:
            self._direct = DirectTransfer(kind, self.pool.clients)
        self.sleep()  # the student is loaded next

    def _ask_settings(self) -> None:
        """Learn from the servers what they run. A collective."""
        found = on_rank_zero(lambda: [client.settings() for client in self.pool.clients])
        dtypes = {dtype for dtype, _ in found}
        self._dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        self._batched = min(sequences for _, sequences in found)

    def _find_route(self) -> None:
        """Learn how the servers return scores, if they are the teacher's too. A collective."""
        teacher, server = self._config.teacher, self._config.rollout.server
        if not isinstance(teacher, SelfTeacherConfig) or teacher.scorer != "policy_server":
            return
        if server.sleep:  # a run that was killed may have left them asleep, and then they would not answer

            def wake() -> None:
                for client in self.pool.clients:
                    sleep.wake(client, "weights")
                    sleep.wake(client, "kv_cache")

            on_rank_zero(wake)
        self.pool.find_route(self._config.algorithm.scores_given)

    def sleep(self) -> None:
        """See `Sampler.sleep`."""
        level = self._config.rollout.server.sleep
        if level == 0:
            return

        def act() -> Mapping[str, str]:
            self.pool.everywhere(lambda client: sleep.fall_asleep(client, level), "falling asleep")
            return self.pool.lost

        self.pool.agree(on_rank_zero(act))
        self._asleep = True

    def publish(self, student: Published, version: int) -> None:
        """See `Sampler.publish`. A server that cannot be reached is out of service until a later publish or `recover`.

        Raises: RunStopped on every rank if a server rejects the weights.
        """
        assert self._dtype is not None, "call open() before publish()"
        self._version = version
        weights = student.checkpoint_weights(self._dtype)
        if self._direct is None:
            self._published = read_on_rank_zero(weights, lambda tensors: self._write(weights.infos, tensors, version))
        if self._asleep:
            sleep.make_room()
        if self._direct is None:
            self.pool.agree(on_rank_zero(self._send_file))
        else:
            on_rank_zero(lambda: self._everywhere(self._pause))
            failure = ""
            try:
                self._direct.send(weights, version)
            except Exception as error:  # every rank must reach the collective below
                failure = str(error) or repr(error)
            failures = [one for one in distributed.gather(failure) if one]
            self.pool.agree(on_rank_zero(lambda: self._settle_direct(failures, version)))
        self._asleep = False

    def _write(self, infos: Sequence[TensorInfo], tensors: Iterable[tuple[str, Tensor]], version: int) -> str:
        """The name of the file in which the weights now are."""
        assert self._file is not None, "call open() before publish()"
        with writing(f"the weights, to {self._file.directory},"):
            return self._file.write(infos, tensors, version)

    def _send_file(self) -> Mapping[str, str]:
        """Load the published file into all servers. Returns: the lost servers and why."""
        assert self._file is not None, "call open() before publish()"
        self._everywhere(self._update)
        self.pool.revive(self._update)  # lost servers that are back
        self._file.keep_only(self._published)
        return self.pool.lost

    def _settle_direct(self, failures: Sequence[str], version: int) -> Mapping[str, str]:
        """Go on with the weights that were sent, unless the transfer failed on a rank."""
        if failures:
            for client in self.pool.clients:
                self.pool.lose(client, failures[0])
            raise RunStopped(f"the weights did not reach the servers: {failures[0]}")
        self._everywhere(lambda client: self._resume(client, version))
        return self.pool.lost

    def _update(self, client: VLLMClient) -> None:
        """Load the published file into one server. Raises: ServerLost, ServerError."""
        assert self._file is not None, "call open() before publish()"
        assert self._version is not None
        self._holds.pop(client.url, None)
        self._pause(client)
        client.order("/init_weight_transfer_engine", {"init_info": {"directory": str(self._file.directory)}})
        _begin_update(client)
        client.order("/update_weights", {"update_info": {"file": self._published}})
        client.order("/finish_weight_update", {"weight_version": str(self._version)})
        self._resume(client, self._version)
        self._holds[client.url] = self._version

    def _everywhere(self, act: Callable[[VLLMClient], None]) -> None:
        """See `ServerPool.everywhere`. A server that refuses weights may have any mixture of them."""
        self.pool.everywhere(act, "a weight update")

    def _pause(self, client: VLLMClient) -> None:
        """Hold back new requests. Running ones finish, so that no completion mixes two versions; with
        `rollout.in_flight` they are frozen, and go on after `_resume`."""
        if self._config.rollout.server.sleep:
            sleep.wake(client, "weights")
        keeps = {"mode": "keep", "clear_cache": "false"}
        client.order("/pause", query=keeps if self._config.publishes_in_flight else {"mode": "wait"})

    def _resume(self, client: VLLMClient, version: int) -> None:
        """Go on with new weights. The cache's keys and values come from the old ones: those of frozen requests are
        computed again, so that no request, whether new or frozen, mixes two versions in its attention."""
        if self._config.rollout.server.sleep:
            sleep.wake(client, "kv_cache")
        again = {"reset_running_requests": "true"} if self._config.publishes_in_flight else None
        if not client.post("/reset_prefix_cache", None, CacheReset, again).success:
            raise ServerError(f"{client.url}: the cache still holds keys of the old weights after an update")
        client.order("/resume")
        held = client.weight_version()
        if held != version:
            raise ServerError(f"{client.url}: expected weight version {version} after an update, got {held}")

    def keep_loaded(self) -> None:
        """See `Sampler.keep_loaded`.

        `open` has checked each server's model, but another run may have changed its weights since it was started.
        """
        self._version, self._as_started = 0, True
        for client in self.pool.clients:
            self._check_start_weights(client)

    def _check_start_weights(self, client: VLLMClient) -> None:
        held = client.weight_version()
        if held is not None:
            raise ServerError(
                f"{client.url}: expected the weights that it was started with, got version {held}, which a run has "
                "published; restart that server"
            )

    def recover(self) -> None:
        """See `Sampler.recover`. Raises: RunStopped on every rank if no server comes back within `retry_s`."""
        if self._direct is not None:
            raise RunStopped(
                f"a policy server was lost, and with it the connection over which {weight_sync(self._config)} sends "
                "weights; start the run again with run.resume=auto"
            )

        def act() -> Mapping[str, str]:
            # Rank 0 checks all servers: another rank may have lost one that rank 0 has not noticed.
            known = self.pool.lost
            self.pool.agree({c.url: known.get(c.url, "another rank has lost it") for c in self.pool.clients})
            self.pool.await_one(self._restore)
            return self.pool.lost

        self.pool.agree(on_rank_zero(act))

    def _restore(self, client: VLLMClient) -> None:
        """Load the published version into one server, unless it still has it."""
        assert self._version is not None
        if self._as_started:
            self._check_start_weights(client)
        elif client.weight_version() == self._version == self._holds.get(client.url):
            self._resume(client, self._version)
        else:
            self._update(client)

    def check_version(self) -> None:
        """Check that all servers in service have the published weights, for responses that do not name their version.

        Raises: ServerLost if a server has been restarted.
        """
        for client in self.pool.serving:
            held = client.weight_version()
            if held != self._version:
                self.pool.lose(client, problem := f"{client.url}: expected weight version {self._version}, got {held}")
                raise ServerLost(problem)

    def sample(self, prompts: Sequence[Prompt], *, n: int, iteration: int, sampling: Sampling) -> list[list[Rollout]]:
        """See `Sampler.sample`.

        Raises: ServerLost if no server is in service; ServerError for a response that is incomplete or not finite;
            ValueError for a temperature that vLLM would change.
        """
        if 0 < sampling.temperature < COLDEST_SERVED:
            raise ValueError(
                f"expected a temperature of 0 or at least {COLDEST_SERVED}, to which vLLM silently raises a lower "
                f"one, got {sampling.temperature}; use 0 (greedy)"
            )

        def one(client: VLLMClient, model: str, prompt: Prompt) -> list[Rollout]:
            return self._one_prompt(client, model, prompt, n, iteration, sampling)

        return self.run(prompts, one, at_once=self._prompts_at_once(n))

    def run(self, jobs: Sequence[Job], act: Callable[[VLLMClient, str, Job], Answer], at_once: int) -> list[Answer]:
        """Call `act(client, model name of the published weights, job)` for every job; see `ServerPool.run`."""
        assert not self._asleep, "publish before you sample"
        return self.pool.run(jobs, act, at_once, reconnect=None)

    def _one_prompt(
        self, client: VLLMClient, model: str, prompt: Prompt, n: int, iteration: int, sampling: Sampling
    ) -> list[Rollout]:
        greedy = sampling.temperature == 0
        answer = client.post(
            "/inference/v1/generate",
            {
                "model": model,
                "token_ids": list(prompt.token_ids),
                "sampling_params": {
                    "n": 1 if greedy else n,
                    "temperature": sampling.temperature,
                    "max_tokens": sampling.max_tokens,
                    "seed": request_seed(sampling.seed, iteration, prompt.id),
                    # 0: the sampled token only. Otherwise k + 1, since vLLM truncates a list that begins with it.
                    "logprobs": sampling.top_k + 1 if sampling.top_k else 0,
                    "ignore_eos": True,  # stop only at our ids
                    "stop_token_ids": sorted(self._eos_ids),
                    "detokenize": False,
                },
            },
            GenerateAnswer,
        )
        where = f"{client.url}, prompt {prompt.id!r}"
        check_model(answer.model, model, where)

        def version(reported: str) -> int:
            return self._own_version(reported, where, model)

        rollouts = read_rollouts(
            answer, prompt, 1 if greedy else n, sampling, self._eos_ids, self.vocabulary, version, where
        )
        return rollouts * n if greedy else rollouts

    def _own_version(self, reported: str, where: str, model: str) -> int:
        """Our version of the weights that an answer of `model` names. Raises: ServerLost, ServerError."""
        if not self._as_started:
            return parse_version(reported, where)
        if reported != "default":
            raise ServerError(
                f"{where}: expected the weights that the server was started with, got version {reported[:40]!r}"
            )
        return 0

    def close(self) -> None:
        """Stop the servers that this run started, and disconnect from the others, where our requests end too."""
        if self._config.publishes_in_flight and not self.pool.servers and distributed.rank() == 0:
            for client in self.pool.serving:
                with contextlib.suppress(ServerError):
                    client.order("/abort_requests", {})
        self.pool.close()
        if self._file is not None:
            self._file.close()
        if self._direct is not None:
            self._direct.close()
        self._file, self._direct = None, None


def _begin_update(client: VLLMClient) -> None:
    """Begin a weight update, even if a trainer that died during an update left one open.

    vLLM then refuses to begin another. Only a failing update closes the open one, so we send one without a file.
    """
    try:
        client.order("/start_weight_update")
    except ServerLost:
        raise
    except ServerError:
        with contextlib.suppress(ServerError):
            client.order("/update_weights", {"update_info": {"file": ""}})
        client.order("/start_weight_update")
