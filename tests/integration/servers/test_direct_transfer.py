"""A server that refuses or dies in the middle of a GPU-to-GPU transfer is an error on every rank within seconds.

vLLM's own engines run here, with fakes at the device only: a communicator whose broadcast waits for receivers until it
is aborted, and streams that wait for it.
"""

import json
from pathlib import Path

import pytest
from families import write
from runs import run_code

pytestmark = [pytest.mark.process]

STUB = Path(__file__).with_name("refusing_server.py")

SCRIPT = """
import contextlib, json, os, signal, subprocess, sys, threading, time
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from vllm.distributed.weight_transfer import nccl_engine, ipc_engine, packed_tensor
from builders import config
from rlkd import distributed
from rlkd.models.student import build_student
from rlkd.servers.client import VLLMClient
from rlkd.weight_sync import nccl

rank, folder, stub, cases = int(sys.argv[1]), *sys.argv[2:4], json.loads(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
settings = config(f"model.path={folder}/model", "trainer.accelerator=cpu")
student = build_student(settings.model, settings.trainer, init_device_mesh("cpu", (2,)), 0)

class Group:
    # Its first broadcast reaches the servers; later ones wait for those that fail until it is aborted.
    def __init__(self):
        self.sent, self.received = 0, threading.Event()
        self.received.set()

    def broadcast(self, tensor, src, stream=None):
        self.sent += 1
        if self.sent > 1 and not self.aborted and path != "/finish_weight_update":
            self.received.clear()

    aborted = False

    def destroy(self):
        self.aborted = True
        self.received.set()

class Stream:
    def synchronize(self):
        group.received.wait()

def endpoint(info):
    if path == "/init_weight_transfer_engine":
        threading.Event().wait()  # vLLM waits 300 s here for servers that never join
    return group

class Properties:
    uuid = "a GPU"

real_empty = torch.empty
torch.empty = lambda *a, **k: real_empty(*a, **(k | ({"device": "cpu"} if k.get("device") == "cuda" else {})))
torch.accelerator.current_device_index = lambda: 0
torch.accelerator.set_device_index = lambda index: None
torch.cuda.get_device_properties = lambda index: Properties
torch.cuda.ipc_collect = torch.cuda.synchronize = lambda: None
torch.cuda.current_stream = Stream
torch.cuda.stream = lambda stream: contextlib.nullcontext()
packed_tensor._get_streams = lambda device, count: (Stream(),) * count
packed_tensor.reduce_tensor = lambda tensor: (None, ("handle",) * 8)
nccl_engine.open_trainer_endpoint = endpoint
nccl.BUFFER = 4096  # many chunks, and tensors that are larger

def case(where, what, kind, others):
    global path, group
    path, group = where, Group()
    clients, servers, killed = [], [], []
    if rank == 0:
        for one, how in [("/nothing", "refuse")] * others + [(where, what)]:
            server = subprocess.Popen([sys.executable, stub, one, how], stdout=subprocess.PIPE, text=True)
            servers.append(server)
            clients.append(VLLMClient(f"http://127.0.0.1:{int(server.stdout.readline())}", 3600.0, None))

    def kill():
        servers[-1].stdout.readline()  # it has the request
        time.sleep(0.3)
        killed.append(time.monotonic())
        servers[-1].kill()

    if rank == 0 and what == "hang":
        threading.Thread(target=kill, daemon=True).start()
    transfer = nccl.DirectTransfer(kind, clients)
    started, error = time.monotonic(), None
    try:
        transfer.send(student.checkpoint_weights(torch.bfloat16), 1)
    except Exception as found:
        error = f"{type(found).__name__}: {found}"
    distributed.barrier()
    ended = time.monotonic()
    for server in servers:
        server.kill()
    return {"error": error, "seconds": ended - (killed or [started])[0]}

distributed.barrier()
print(json.dumps([case(*one) for one in cases]), flush=True)
"""

INIT, START, UPDATE = "/init_weight_transfer_engine", "/start_weight_update", "/update_weights"
CASES = [
    (path, how, kind, others)
    for kind in ("nccl", "ipc")
    for path, how in ((INIT, "refuse"), (INIT, "hang"), (START, "refuse"), (UPDATE, "refuse"), (UPDATE, "hang"))
    for others in (0, 1)
]


def test_a_server_that_fails_in_a_transfer_is_an_error_on_every_rank(tmp_path):
    """Rank 0 raises it, and the other ranks, which gathered along, learn it from the sampler."""
    write("llama", tmp_path / "model")
    printed = run_code(SCRIPT, tmp_path, tmp_path, STUB, json.dumps(CASES))
    first, second = (json.loads(output.splitlines()[-1]) for output in printed)
    for (path, how, kind, others), one, other in zip(CASES, first, second, strict=True):
        print(f"{kind} {path} {how}, {others} other servers: {one['seconds']:.1f} s: {one['error']}")
        assert ("no room for these weights" if how == "refuse" else "ServerLost: ") in one["error"]
        assert other["error"] is None
        assert max(one["seconds"], other["seconds"]) < 10


ON_ANOTHER_RANK = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from builders import config
from rlkd.generation.vllm import VLLMSampler
from rlkd.models.student import build_student

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
vllm = ("rollout.backend=vllm", "rollout.server.launch=false", "rollout.server.urls=[http://127.0.0.1:1]")
settings = config(f"model.path={folder}/model", "trainer.accelerator=cpu", *vllm)
student = build_student(settings.model, settings.trainer, init_device_mesh("cpu", (2,)), 0)

class Device:
    def send(self, weights, version):
        weights.gather_along()
        if rank == 1:
            raise RuntimeError("CUDA out of memory")

sampler = VLLMSampler(settings, [0])
sampler._dtype, sampler._direct = torch.bfloat16, Device()
try:
    sampler.publish(student, 1)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_what_fails_on_another_rank_is_named(tmp_path):
    """Only rank 0 speaks to the servers, and no other rank would print its own error."""
    write("llama", tmp_path / "model")
    for output in run_code(ON_ANOTHER_RANK, tmp_path, tmp_path):
        last = output.splitlines()[-1]
        assert last.startswith("RunStopped: ") and last.endswith("CUDA out of memory")
