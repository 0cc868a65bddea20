"""The vLLM sampler for a student with adapters: the servers have the base model and get a new adapter each version."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from rlkd import distributed
from rlkd.builtin import resolve
from rlkd.config.schema import Config
from rlkd.distributed import on_rank_zero
from rlkd.generation.vllm import VLLMSampler
from rlkd.models.weights import Published, read_on_rank_zero
from rlkd.servers.client import ServerError, ServerLost, UnknownModel, VLLMClient
from rlkd.servers.pool import Answer, Job
from rlkd.storage.disk_errors import writing
from rlkd.weight_sync.adapter_folder import AdapterFolder, version_of


class LoraVLLMSampler(VLLMSampler):
    """Implements `Sampler`, but publishes only the adapter.

    Every request names the adapter of the published version, and the response must name the same model. The base never
    changes, so a restarted server lacks only the adapter and reports an unknown model.
    """

    def __init__(self, config: Config, eos_ids: Sequence[int]) -> None:
        super().__init__(config, eos_ids)
        self._folder: AdapterFolder | None = None

    def open(self) -> None:
        """See `VLLMSampler.open`. Raises: RunStopped also if a server no longer has the base that it started with."""
        settings, model = self._config.rollout.server, self._config.model
        base = resolve(model.path)
        self.pool.open(settings.urls, base)
        self._ask_settings()
        self._find_route()
        self.check_version()
        if distributed.rank() == 0:
            assert model.lora is not None
            self._folder = AdapterFolder(settings.sync_dir, model.lora, base, self._config.rollout.max_staleness + 1)

    def publish(self, student: Published, version: int) -> None:
        """See `VLLMSampler.publish`."""
        self._version = version
        name = read_on_rank_zero(student.adapter_weights(), lambda tensors: self._write_adapter(dict(tensors), version))
        self.pool.agree(on_rank_zero(lambda: self._load_everywhere(name)))
        self._published = name  # not before, since requests that are made meanwhile name it

    def _write_adapter(self, adapter: Mapping[str, Tensor], version: int) -> str:
        """The name of the folder in which the adapter now is."""
        assert self._folder is not None, "call open() before publish()"
        with writing(f"the adapter, to {self._folder.directory},"):
            return self._folder.write(adapter, version)

    def _load_everywhere(self, name: str) -> Mapping[str, str]:
        """Load the adapter into all servers. Returns: the lost servers and why."""
        assert self._folder is not None, "call open() before publish()"
        self._everywhere(lambda client: self._load(client, name))
        self.pool.revive(lambda client: self._load(client, name))
        self._folder.remove_old()
        return self.pool.lost

    def _restore(self, client: VLLMClient) -> None:
        self._load(client, self._published)

    def _load(self, client: VLLMClient, name: str) -> None:
        """Load an adapter into one server, and unload the old ones."""
        assert self._folder is not None, "call open() before publish()"
        if name not in client.adapters():
            path = str(self._folder.path(name))
            client.order("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        self._unload_old(client)

    def _unload_old(self, client: VLLMClient) -> None:
        assert self._folder is not None
        for name in client.adapters():
            if self._folder.is_old(name):
                client.order("/v1/unload_lora_adapter", {"lora_name": name})

    def check_version(self) -> None:
        """Check that all servers in service still have the base model that they were started with.

        Raises: ServerError if a server was given other weights.
        """
        for client in self.pool.serving:
            if (held := client.weight_version()) is not None:
                raise ServerError(_changed(client.url, held))

    def run(self, jobs: Sequence[Job], act: Callable[[VLLMClient, str, Job], Answer], at_once: int) -> list[Answer]:
        """See `VLLMSampler.run`; `act` gets the name of the published adapter."""

        def with_adapter(client: VLLMClient, base: str, job: Job) -> Answer:
            try:
                return act(client, self._published, job)
            except UnknownModel as error:
                raise ServerLost(f"{client.url} has lost the adapter; was it restarted? {error}") from error

        return super().run(jobs, with_adapter, at_once)

    def _own_version(self, reported: str, where: str, model: str) -> int:
        """vLLM reports the version of the base; the adapter's version is in the model name (see `check_model`)."""
        if reported != "default":
            raise ServerError(_changed(where, reported))
        return version_of(model)

    def close(self) -> None:
        """See `VLLMSampler.close`. Our adapters are unloaded from servers that keep running, and removed."""
        if self._folder is not None:
            if not self.pool.servers:
                self._folder.retire()
                self._everywhere(self._unload_old)
            self._folder.close()
        self._folder = None
        super().close()


def _changed(where: str, version: object) -> str:
    return (
        f"{where}: with model.lora, expected the weights that the server was started with, got version {version!r}; "
        "restart the server"
    )
