"""The trainer's side of vLLM's own GPU engines, `nccl` and `ipc`. Thin: the engines pack, send and hand-shake.

An engine whose broadcast has lost a receiver waits for ever, and the other ranks wait for it. So no error of a server
ends a transfer halfway: the communicator is aborted, every rank passes through the rest of the weights, and then the
error is raised.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rlkd import distributed
from rlkd.distributed import RunStopped
from rlkd.models.weights import Weights
from rlkd.servers.client import VLLMClient
from rlkd.servers.responses import WorldSize

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer import ParamMeta

BUFFER = 2**28
"""Bytes that are packed for a transfer. A server receives two such buffers, each with the tensor that overflows it,
beside the memory that it was given, so vLLM's 1 GiB would be too much for many cards."""


class Source:
    """A `WeightSource` for vLLM's engines over the weights that are being published."""

    def __init__(self) -> None:
        self._weights = Weights([])
        self._left: Iterator[tuple[str, Tensor]] | None = None

    def take(self, weights: Weights) -> None:
        """Give out these weights from now on."""
        self._weights, self._left = weights, None

    def metadata(self) -> list[ParamMeta]:
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(*info) for info in self._weights.infos]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._left = iter(self._weights)
        return self._left

    def pass_through(self) -> None:
        """Gather what has not been given out yet, for the sake of the other ranks."""
        for _ in self if self._left is None else self._left:
            pass


def all_servers(servers: Sequence[VLLMClient]) -> Any:
    """vLLM's weight client on top of ours: every call goes to all servers at the same time.

    Its updates carry the version in `.version`, since the engines themselves send none. `.failure` is the first error
    of a server: `.failed(error)` is called at once, and all later calls do nothing.
    """
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient

    class Client(HTTPVLLMWeightSyncClient):
        version: int
        failure: Exception | None = None

        @staticmethod
        def failed(error: Exception) -> None:
            """Replaced by whoever must not wait any longer."""

        def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
            if self.failure is not None:
                return
            try:
                _together(
                    [_order(server, path, body) for server, body in zip(servers, self._bodies(json), strict=True)]
                )
            except Exception as error:
                self.failure = error
                self.failed(error)

        def _bodies(self, json: dict[str, Any] | None) -> list[dict[str, Any] | None]:
            """The same for every server, but each has its own ranks in the group of trainer and servers."""
            offset = (json or {}).get("init_info", {}).get("rank_offset")
            if json is None or offset is None:
                return [json] * len(servers)
            bodies: list[dict[str, Any] | None] = []
            for size in map(ranks_of, servers):
                bodies.append({**json, "init_info": {**json["init_info"], "rank_offset": offset}})
                offset += size
            return bodies

        def finish_weight_update(self, weight_version: str | None = None) -> None:
            super().finish_weight_update(str(self.version))

    return Client("")


def ranks_of(server: VLLMClient) -> int:
    """How many GPUs the server runs on."""
    return server.get("/get_world_size", WorldSize).world_size


def _order(server: VLLMClient, path: str, body: dict[str, Any] | None) -> Callable[[], None]:
    return lambda: server.order(f"/{path}", body)


def _together(calls: Sequence[Callable[[], None]]) -> None:
    """Make all calls at the same time.

    Raises: the first error, at once: the other calls may then never return, since their servers wait for a broadcast.
    Their threads are daemons, so that the process can end.
    """
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def attempt(call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            ended.put(error)
        else:
            ended.put(None)

    for call in calls:
        threading.Thread(target=attempt, args=(call,), daemon=True).start()
    for _ in calls:
        if (error := ended.get()) is not None:
            raise error


class DirectTransfer:
    """Sends weights from GPU to GPU, to all servers at once. Every trainer rank makes one and calls `send`.

    NCCL cannot join a trainer and a server on the same GPU; there use `ipc` or the file engine.
    """

    def __init__(self, kind: Literal["nccl", "ipc"], servers: Sequence[VLLMClient]) -> None:
        self._kind = kind
        self._servers = list(servers)
        self._source: Any = Source()
        self._client: Any = None
        self._engine: Any = None

    def send(self, weights: Weights, version: int) -> None:
        """Send `weights`, on the GPU, to every server as `version`. A collective.

        Raises: on rank 0, the first error of a server, when every rank has passed through all weights.
        """
        self._source.take(weights)
        failure: Exception | None = None
        try:
            if self._client is None:
                self._client = all_servers(self._servers)
                self._engine = self._connected(max(info.bytes for info in weights.infos))
            self._client.version = version
            self._engine.send_weights()
        except Exception as error:
            self._source.pass_through()
            failure = error
        refused = None if self._client is None else self._client.failure  # what a server gave as its reason
        if refused is not None or failure is not None:
            raise refused or failure  # type: ignore[misc]

    def _connected(self, largest: int) -> Any:
        """vLLM's engine for this rank; on rank 0 of `nccl`, once all servers have joined its group.

        Raises: the error of a server that refuses, at once: the engine itself would wait for it for 300 s.
        """
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        def engine(info: Any) -> Any:
            return WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._source)

        rank = distributed.rank()
        if self._kind == "ipc":
            # one buffer, into which every tensor must fit
            return engine(IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=max(BUFFER, largest)))
        if rank != 0:  # gathers along; only rank 0 joins the group
            return engine(NCCLTrainerInitInfo(master_address="", master_port=0, world_size=0, rank=rank))
        address, port = _meeting_point([server.url for server in self._servers])
        info = NCCLTrainerInitInfo(
            master_address=address,
            master_port=port,
            world_size=1 + sum(map(ranks_of, self._servers)),
            rank=rank,
            packed_buffer_size_bytes=BUFFER,
        )
        device = torch.accelerator.current_device_index()
        joined: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._client.failed = joined.put

        def join() -> None:
            try:
                torch.accelerator.set_device_index(device)  # the device is a property of the thread
                joined.put(engine(info))
            except Exception as error:
                joined.put(error)

        threading.Thread(target=join, daemon=True).start()
        outcome = joined.get()
        if isinstance(outcome, Exception):
            raise outcome
        self._client.failed = lambda _: outcome.model_update_group.destroy()
        return outcome

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        self._client = self._engine = None


def _meeting_point(urls: Sequence[str]) -> tuple[str, int]:
    """This machine's address as the servers at `urls` reach it, and a free port.

    Raises: RunStopped for a server without an IPv4 address, since vLLM's groups meet over IPv4 only.
    """
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((parts.hostname, parts.port or 80))  # a datagram socket: nothing is sent
            except OSError as error:
                raise RunStopped(
                    f"rollout.server.weight_sync: nccl needs a server that has an IPv4 address, got {url}: {error}; "
                    "give its url by such an address, or use file"
                ) from error
            addresses.append(probe.getsockname()[0])
    address = next((one for one in addresses if not one.startswith("127.")), addresses[0])
    with socket.socket() as listener:
        listener.bind((address, 0))
        return address, listener.getsockname()[1]
