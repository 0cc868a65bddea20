"""The vLLM sampler of a student with adapters: the servers hold its base, and get a new adapter each version."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from rlkd import distributed
from rlkd.builtin import resolve
from rlkd.config.schema import Config
from rlkd.distributed import on_rank_zero
from rlkd.generation.vllm import VLLMSampler
from rlkd.servers.client import ServerError, ServerLost, UnknownModel, VLLMClient
from rlkd.servers.pool import Answer, Job
from rlkd.servers.responses import Span
from rlkd.storage.disk_errors import writing
from rlkd.types import VersionSpan
from rlkd.weight_sync.adapter_folder import AdapterFolder


class LoraVLLMSampler(VLLMSampler):
    """Implements `Sampler`, but `publish` takes the adapter alone (`Student.adapter_weights`).

    Every request names the adapter of the published version, and the answer's model must be it. The base never
    changes, so a server that was started again lacks the adapter only, and says so.
    """

    def __init__(self, config: Config, eos_ids: Sequence[int]) -> None:
        super().__init__(config, eos_ids)
        self._folder: AdapterFolder | None = None

    def open(self) -> None:
        """See `VLLMSampler.open`. Raises: RunStopped also when a server's base is not the one that it started with."""
        settings, model = self._config.rollout.server, self._config.model
        base = resolve(model.path)
        self.pool.open(settings.urls, base)
        self.check_version()
        if distributed.rank() == 0:
            assert model.lora is not None
            self._folder = AdapterFolder(settings.sync_dir, model.lora, base, self._config.rollout.max_staleness + 1)

    def publish(self, weights: Mapping[str, Tensor], version: int) -> None:
        """See `VLLMSampler.publish`. `weights`: the adapter, under the names of PEFT's files."""
        self._version = version
        self._published, lost = on_rank_zero(lambda: self._publish_adapter(weights, version))
        self.pool.agree(lost)

    def _publish_adapter(self, weights: Mapping[str, Tensor], version: int) -> tuple[str, Mapping[str, str]]:
        """(its name, the servers that are lost)."""
        assert self._folder is not None, "publish before open"
        with writing(f"the adapter, to {self._folder.directory},"):
            self._published = self._folder.write(weights, version)
        self._everywhere(self._restore)
        self.pool.revive(self._restore)
        self._folder.remove_old()
        return self._published, self.pool.lost

    def _restore(self, client: VLLMClient) -> None:
        """Have one server know the published adapter, and no old one."""
        assert self._folder is not None, "publish before open"
        if self._published not in client.adapters():
            path = str(self._folder.path(self._published))
            client.order("/v1/load_lora_adapter", {"lora_name": self._published, "lora_path": path})
        self._unload_old(client)

    def _unload_old(self, client: VLLMClient) -> None:
        assert self._folder is not None
        for name in client.adapters():
            if self._folder.is_old(name):
                client.order("/v1/unload_lora_adapter", {"lora_name": name})

    def check_version(self) -> None:
        """All servers in service must hold the base that they were started with.

        Raises: ServerError when one was given other weights.
        """
        for client in self.pool.serving:
            if (held := client.weight_version()) is not None:
                raise ServerError(_changed(client.url, held))

    def run(self, jobs: Sequence[Job], act: Callable[[VLLMClient, str, Job], Answer], at_once: int) -> list[Answer]:
        def with_adapter(client: VLLMClient, base: str, job: Job) -> Answer:
            try:
                return act(client, self._published, job)
            except UnknownModel as error:
                raise ServerLost(
                    f"{client.url} has lost the adapter, as one that was started again: {error}"
                ) from error

        return super().run(jobs, with_adapter, at_once)

    def _span(self, span: Span, where: str) -> VersionSpan:
        """vLLM speaks of the base's weights; the adapter's version is in the name that `check_model` has seen."""
        if span.version != "default":
            raise ServerError(_changed(where, span.version))
        assert self._version is not None, "publish() comes before sample()"
        return VersionSpan(start=span.start, end=span.end, version=self._version)

    def close(self) -> None:
        """See `VLLMSampler.close`. Servers that go on are left without our adapters, whose folders are removed."""
        if self._folder is not None:
            if not self.pool.servers:
                self._folder.retire()
                self._everywhere(self._unload_old)
            self._folder.close()
        self._folder = None
        super().close()


def _changed(where: str, version: object) -> str:
    return (
        f"{where} holds weight version {version!r}, but with model.lora the adapters belong to the weights that it was "
        "started with; start it again"
    )
