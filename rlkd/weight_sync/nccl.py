"""The trainer's side of vLLM's own GPU engines, `nccl` and `ipc`. Thin: the engines gather, send and hand-shake."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from torch import Tensor

from rlkd import distributed
from rlkd.servers.client import VLLMClient
from rlkd.servers.responses import WorldSize

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer import ParamMeta


class CurrentWeights:
    """A `WeightSource` for vLLM over the mapping in `weights`."""

    def __init__(self) -> None:
        self.weights: Mapping[str, Tensor] = {}

    def metadata(self) -> list[ParamMeta]:
        from vllm.distributed.weight_transfer import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights.items())


def versioned_client(client: VLLMClient) -> Any:
    """vLLM's weight client on top of ours, which has the server's key and time-out and raises its errors.

    Its updates carry the version in `.version`, since the engines themselves send none.
    """
    from vllm.distributed.weight_transfer import HTTPVLLMWeightSyncClient

    class Client(HTTPVLLMWeightSyncClient):
        version: int

        def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
            client.order(f"/{path}", json)

        def finish_weight_update(self, weight_version: str | None = None) -> None:
            super().finish_weight_update(str(self.version))

    return Client(client.url)


class DirectTransfer:
    """Sends weights from GPU to GPU, one server after the other. Every trainer rank makes one and calls `send`.

    NCCL cannot join a trainer and a server on the same GPU; there use `ipc` or the file engine.
    """

    def __init__(self, kind: Literal["nccl", "ipc"], servers: Sequence[VLLMClient]) -> None:
        self._kind = kind
        self._servers = list(servers)
        self._source: Any = CurrentWeights()
        self._clients: list[Any] = []
        self._engines: list[Any] = []

    def send(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Send `weights` (full tensors on the GPU, the same on every rank) to every server as `version`."""
        self._source.weights = weights
        if not self._engines:
            self._connect()
        for client, engine in zip(self._clients, self._engines, strict=True):
            client.version = version
            engine.send_weights()

    def _connect(self) -> None:
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        for server in self._servers:
            client = versioned_client(server)
            info = self._nccl_info(server) if self._kind == "nccl" else _ipc_info()
            self._engines.append(WeightTransferTrainerFactory.trainer_init(info, client=client, source=self._source))
            self._clients.append(client)

    def _nccl_info(self, server: VLLMClient) -> Any:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        def agree() -> tuple[str, int, int]:
            return (*_meeting_point(server.url), 1 + server.get("/get_world_size", WorldSize).world_size)

        address, port, members = distributed.on_rank_zero(agree)
        return NCCLTrainerInitInfo(
            master_address=address, master_port=port, world_size=members, rank=distributed.rank()
        )

    def close(self) -> None:
        for engine in self._engines:
            engine.shutdown()
        self._engines, self._clients = [], []


def _ipc_info() -> Any:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(rank=distributed.rank(), packed=True)


def _meeting_point(url: str) -> tuple[str, int]:
    """This machine's address as the server at `url` reaches it, and a free port."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # a datagram socket: nothing is sent
        address = probe.getsockname()[0]
    with socket.socket() as listener:
        listener.bind((address, 0))
        return address, listener.getsockname()[1]
