"""The stream of a sharded student's weights: complete, the same on every rank, and one tensor at a time."""

import json

import pytest
import torch
from families import write
from runs import run_code
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlkd.config.schema import LoraConfig
from rlkd.models import lora
from rlkd.models.loader_names import loader_names
from rlkd.models.student import Student, load_causal_lm
from rlkd.models.weights import TensorInfo, Weights, Whole
from rlkd.weight_sync.tensor_file import write_checkpoint, write_tensors
from rlkd.weight_sync.weight_file import WeightFile

BEGIN = """
import json, os, sys, weakref
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from builders import config
from rlkd.models.student import build_student, load_causal_lm
from rlkd.models.weights import read_on_rank_zero

rank, folder, ranks = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
settings = config(f"model.path={folder}/model", "trainer.accelerator=cpu", *sys.argv[4:])
student = build_student(settings.model, settings.trainer, init_device_mesh("cpu", (ranks,)), 0)
"""

STREAM = """
import time

live, most = 0, 0
gather = DTensor.full_tensor

def settle():
    until = time.monotonic() + 1  # gloo's thread keeps a tensor for a moment after its gather is complete
    while live and time.monotonic() < until:
        time.sleep(0.001)

def freed(size):
    global live
    live -= size

def watched(tensor, **options):
    global live, most
    settle()
    whole = gather(tensor, **options)
    size = whole.nbytes  # its storage may be padded to a multiple of the ranks
    live, most = live + size, max(most, live + size)
    weakref.finalize(whole.untyped_storage(), freed, size)
    return whole

DTensor.full_tensor = watched
weights = student.checkpoint_weights(torch.bfloat16)
plain = load_causal_lm(f"{folder}/model", torch.float32, attention=None, trust_remote_code=False)
expected = {n: p.to(torch.bfloat16) if p.dim() > 1 else p for n, p in plain.state_dict().items()}
infos, passed = weights.infos, []
for name, tensor in weights:
    passed.append(name)
    assert torch.equal(tensor, expected[name]), name
    del tensor
settle()
assert [info.name for info in infos] == passed
print(json.dumps({
    "passed": passed, "most": most, "left": live,
    "largest": max(info.bytes for info in infos), "all": sum(info.bytes for info in infos),
}))
"""


@pytest.mark.process
@pytest.mark.parametrize("ranks", [2, 3])
def test_one_tensor_at_a_time_is_whole(ranks, tmp_path):
    """And a shard that is cast before it is gathered has the bits of a tensor that the server casts."""
    write("llama", tmp_path / "model")
    found = [
        json.loads(out.splitlines()[-1]) for out in run_code(BEGIN + STREAM, tmp_path, tmp_path, ranks, ranks=ranks)
    ]
    assert all(one["passed"] == found[0]["passed"] for one in found)
    for one in found:
        print(f"{ranks} ranks: {one['most']} bytes at most of {one['all']}, the largest tensor has {one['largest']}")
        assert one["most"] == one["largest"] < one["all"] / 4 and one["left"] == 0


FAILS = """
def refuse(tensors):
    for position, (name, tensor) in enumerate(tensors):
        if position == 3:
            raise OSError("the disk is full")

try:
    read_on_rank_zero(student.weights(), refuse)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.process
def test_a_reader_that_fails_halfway_ends_both_ranks(tmp_path):
    write("llama", tmp_path / "model")
    first, second = run_code(BEGIN + FAILS, tmp_path, tmp_path, 2)
    assert first.splitlines()[-1] == "OSError: the disk is full"
    assert second.splitlines()[-1] == "RuntimeError: on rank 0: the disk is full"


UNCONVERTED = """
from rlkd.models.weights import Weights

def refuse(tensors):
    if rank == 0:
        raise MemoryError("no room for the merged weights")
    return dict(tensors)

parts = student.weights()._parts
weights = Weights([*parts[:2], parts[2].then(refuse), *parts[3:]])
try:
    read_on_rank_zero(weights, dict)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


@pytest.mark.process
def test_a_conversion_that_fails_on_one_rank_ends_both(tmp_path):
    write("llama", tmp_path / "model")
    first, second = run_code(BEGIN + UNCONVERTED, tmp_path, tmp_path, 2)
    assert first.splitlines()[-1] == "MemoryError: no room for the merged weights"
    assert second.splitlines()[-1] == "RuntimeError: on rank 0: no room for the merged weights"


SOME = [
    *("bloom", "deepseek_v3", "falcon_h1", "gemma2", "gpt2", "gpt_oss", "granitemoe", "llama", "mixtral", "phi3"),
    *("qwen2", "qwen3_moe", "zamba2"),
]


@pytest.mark.parametrize("family", SOME)
def test_every_family_gives_what_its_checkpoint_has(family, tmp_path):
    """Part by part, even where memory and file differ, as with fused experts."""
    write(family, tmp_path / "model")
    hf = load_causal_lm(str(tmp_path / "model"), torch.float32, attention=None, trust_remote_code=False)
    student = Student(hf, 8)
    together = loader_names(hf, hf.state_dict())
    weights = student.checkpoint_weights(torch.float32)
    apart = dict(weights)
    assert apart.keys() == together.keys() == {info.name for info in weights.infos}
    assert all(torch.equal(apart[name], value) for name, value in together.items())
    assert len(weights._parts) > 5, "otherwise the whole model would be gathered at once"
    memory = dict(student.weights())
    assert memory.keys() == hf.state_dict().keys()
    assert all(torch.equal(memory[name], value) for name, value in hf.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_adapters_are_merged_layer_by_layer(family, tmp_path):
    write(family, tmp_path / "model")
    path = str(tmp_path / "model")
    hf = load_causal_lm(path, torch.float32, attention=None, trust_remote_code=False)
    settings = LoraConfig(r=2, alpha=4)
    lora.inject(hf, settings, 0)
    for name, parameter in hf.named_parameters():
        if lora.is_adapter(name):
            torch.nn.init.normal_(parameter)
    student = Student(hf, 8, settings)
    merged = lora.merged(hf.state_dict(), settings)
    memory = dict(student.weights())
    assert memory.keys() == merged.keys() and all(torch.equal(memory[name], merged[name]) for name in merged)
    files = dict(student.checkpoint_weights(torch.bfloat16))
    named = loader_names(hf, merged)
    assert files.keys() == named.keys()
    for name, value in named.items():
        assert torch.equal(files[name], value.to(torch.bfloat16) if value.dim() > 1 else value)
    adapter = dict(student.adapter_weights())
    assert adapter.keys() == lora.peft_names(hf.state_dict()).keys()


def test_a_file_is_written_tensor_by_tensor_and_reads_as_any_other(tmp_path):
    """Odd sizes and mixed types: each tensor must be aligned for its type."""
    tensors = {
        "a": torch.arange(3, dtype=torch.bfloat16),
        "b": torch.randn(5, 3),
        "c": torch.tensor([True, False, True]),
        "d": torch.randn(7).double(),
        "e": torch.zeros(0, 4),
        "f": torch.randn(4, 6).t(),  # not contiguous
    }
    weights = Weights.of(tensors)
    write_tensors(weights.infos, weights, tmp_path / "x.safetensors")
    again = load_file(tmp_path / "x.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], value) for name, value in tensors.items())
    with pytest.raises(ValueError, match="expected TensorInfo"):
        write_tensors([TensorInfo("a", torch.float32, (3,))], [("a", tensors["a"])], tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match="got none of the name b"):
        write_tensors(weights.infos, [(n, v) for n, v in weights if n != "b"], tmp_path / "y.safetensors")


def test_bf16_halves_the_file():
    tensors = {f"layer.{i}": torch.randn(64, 64) for i in range(8)}
    files = WeightFile(None)
    sizes = []
    for version, dtype in enumerate((torch.float32, torch.bfloat16)):
        weights = Weights.of({name: value.to(dtype) for name, value in tensors.items()})
        sizes.append((files.directory / files.write(weights.infos, weights, version)).stat().st_size)
    files.close()
    print(f"{sizes[0]} bytes in fp32, {sizes[1]} in bf16")
    assert sizes[1] < 0.51 * sizes[0]


def test_a_large_checkpoint_is_several_files(tmp_path):
    write("llama", tmp_path / "model")
    hf = load_causal_lm(str(tmp_path / "model"), torch.float32, attention=None, trust_remote_code=False)
    weights = Student(hf, 8).checkpoint_weights(torch.float32)
    hf.config.save_pretrained(tmp_path / "parts")
    write_checkpoint(weights.infos, weights, tmp_path / "parts", largest=20_000)
    assert len(list((tmp_path / "parts").glob("model-*-of-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    assert all(torch.equal(again[name], value) for name, value in hf.state_dict().items())


def test_whole_tensors_are_published_once():
    first = torch.randn(4, 2)
    given = Whole({"embed": first, "head": first, "norm": torch.ones(2)})
    assert [name for name, _ in given.checkpoint_weights(torch.float32)] == ["embed", "norm"]
    assert [name for name, _ in given.weights()] == ["embed", "head", "norm"]
