"""The sharded student has, on every rank, exactly the weights that loading the whole model gives."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, write
from runs import run_code
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlkd.builtin import resolve

pytestmark = [pytest.mark.process, pytest.mark.long]

SOME = ["bert", "bloom", "deepseek_v3", "falcon_h1", "gemma2", "gpt2", "llama", "mamba2", "qwen3_moe", "zamba"]

BEGIN = """
import gc, json, sys, warnings
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from rlkd.config.schema import LoraConfig, ModelConfig, TrainerConfig
from rlkd.distributed import RunStopped
from rlkd.models import lora
from rlkd.models import student as students

rank, ranks, meet, *folders = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{meet}/meet", rank=int(rank), world_size=int(ranks))
mesh = init_device_mesh("cpu", (int(ranks),))
adapters = LoraConfig(r=4, alpha=8)

def build(folder, adapters=None):
    return students.build_student(ModelConfig(path=folder, lora=adapters), TrainerConfig(), mesh, 3).hf

def tell(value):
    print("found " + json.dumps(value), flush=True)
"""

SAME = """
def whole(folder, adapters):
    hf = students.load_causal_lm(folder, torch.float32, attention=None, trust_remote_code=False)
    if adapters is not None:
        lora.inject(hf, adapters, 3)
    return hf.eval()

def outcome(load):
    try:
        return load(), None
    except (RunStopped, ValueError) as error:
        return None, str(error).removeprefix("on rank 0: ")

def facts(hf):
    named = dict(hf.named_parameters(remove_duplicate=False))
    tensors = {n: p.full_tensor() if isinstance(p, torch.distributed.tensor.DTensor) else p for n, p in named.items()}
    tensors |= dict(hf.named_buffers(remove_duplicate=False))
    ties = [[n for n, q in named.items() if q is p] for p in hf.parameters()]
    rest = (list(hf.state_dict()), ties, [p.requires_grad for p in named.values()], hf.all_tied_weights_keys)
    rest += (repr(hf._weight_conversions), hf.config.to_dict(), hf.generation_config.to_dict())
    return tensors, (*rest, [(n, m.training) for n, m in hf.named_modules()])

found = {}
for folder in folders:
    for lora_of_it in (None, adapters):
        before, refused = outcome(lambda: whole(folder, lora_of_it))
        after, also = outcome(lambda: build(folder, lora_of_it))
        case = folder if lora_of_it is None else f"{folder} with adapters"
        if refused or also:
            found[case] = "refused" if refused == also else [refused, also]
            continue
        (expected, rest), (got, also_rest) = facts(before), facts(after)
        differ = [n for n in expected if not (n in got and got[n].dtype == expected[n].dtype)]
        differ += [n for n in expected if n not in differ and not torch.equal(got[n], expected[n])]
        differ += [f"fact {i}" for i, (a, b) in enumerate(zip(rest, also_rest, strict=True)) if a != b]
        differ += [] if list(got) == list(expected) else ["names"]
        found[case] = differ
tell(found)
"""


def on_ranks(ranks, script, meet, *folders):
    """What each rank told, and the rest of what it printed."""
    meet.mkdir()
    outputs = run_code(BEGIN + script, meet, ranks, meet, *folders, ranks=ranks)
    told = [[json.loads(line[6:]) for line in output.splitlines() if line.startswith("found ")] for output in outputs]
    return [values[-1] for values in told], outputs


def differences(ranks, meet, *folders):
    told, _ = on_ranks(ranks, SAME, meet, *folders)
    assert all(of_rank == told[0] for of_rank in told)
    return told[0]


@pytest.fixture(scope="session")
def families(soak, tmp_path_factory):
    """Folders of the families that can be built."""
    root, written = tmp_path_factory.mktemp("families"), []
    for family in FAMILIES if soak else SOME:
        try:
            write(family, root / family)
            written.append(str(root / family))
        except Exception:  # test_families.py lists those that cannot be built
            assert soak
    return written


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_weight_and_buffer_is_that_of_the_whole_model(ranks, soak, families, tmp_path):
    """With adapters and without, or both ways refuse it with the same words."""
    few = [folder for folder in families if Path(folder).name in ("gemma2", "llama", "qwen3_moe", "zamba")]
    found = differences(ranks, tmp_path / "meet", *(families if soak or ranks == 2 else few))
    assert {case: what for case, what in found.items() if what not in ([], "refused")} == {}
    if not soak:
        refused = {Path(case).name for case, what in found.items() if what == "refused"}
        names = "bert falcon_h1 gpt2 mamba2"  # the last three have layers that PEFT cannot adapt, or none that it can
        assert refused <= {"bert", *(f"{name} with adapters" for name in names.split())}


def test_files_of_every_form(tmp_path):
    """In parts, in bf16, without a prefix, with a tied head that is there twice, differs, or is alone."""
    forms = ("parts", "bf16", "trunk", "twice", "differs", "alone", "bin", "unused")
    folders = {name: tmp_path / name for name in forms}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    for name, folder in folders.items():
        write("gemma2" if name in ("twice", "differs", "alone", "trunk") else "qwen3_moe", folder)
        file = folder / "model.safetensors"
        weights = load_file(file)
        if name == "parts":
            hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            hf.save_pretrained(folder, max_shard_size="20KB")
            file.unlink()
            assert len(list(folder.glob("*.safetensors"))) > 3
            continue
        if name == "bf16":
            weights = {key: value.bfloat16() for key, value in weights.items()}
        elif name == "trunk":
            weights = {key.removeprefix("model."): value for key, value in weights.items()}
        elif name == "unused":
            weights["more"] = torch.zeros(3)
        elif name == "twice":
            weights[head] = weights[embedding].clone()
        elif name == "differs":
            weights[head] = weights[embedding].clone()
            weights[head][-1, -1] += 1
        elif name == "alone":
            weights[head] = weights.pop(embedding)
        if name == "bin":
            torch.save(weights, folder / "pytorch_model.bin")
            file.unlink()
        else:
            save_file(weights, file, metadata={"format": "pt"})
    told, outputs = on_ranks(2, SAME, tmp_path / "meet", *folders.values())
    assert told == [{f"{folder}{end}": [] for folder in folders.values() for end in ("", " with adapters")}] * 2
    whole = [line for line in outputs[0].splitlines() if "every rank loads the whole model" in line]
    assert len(whole) == 2 and all(str(folders["bin"]) in line for line in whole)  # without and with adapters
    assert "every rank loads" not in outputs[1]


REFUSED = """
found = []
for folder in folders:
    try:
        build(folder)
    except RunStopped as stopped:
        found.append(str(stopped).removeprefix("on rank 0: "))
tell(found)
"""


def test_damaged_weights_stop_every_rank_with_the_same_line(tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    folders = [tmp_path / kind for kind in ("missing", "shape", "nan", "cut")]
    for folder in folders:
        shutil.copytree(resolve("builtin:student"), folder)
        weights = load_file(folder / "model.safetensors")
        if folder.name == "missing":
            del weights[name]
        if folder.name == "shape":
            weights[name] = weights[name][1:].clone()
        if folder.name == "nan":
            weights[name][-1, -1] = torch.nan  # in the last rank's rows
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        if folder.name == "cut":
            content = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(content[:-1000])
    told, _ = on_ranks(2, REFUSED, tmp_path / "meet", *folders)
    first, second = told
    assert first == second and len(first) == 4
    assert not any("\n" in line for line in first)
    assert f"1 weight is missing that its config.json requires: {name}; " in first[0]
    assert f"expected {name} [64, " in first[1] and "got [63, " in first[1]
    assert f"nan: 1 weight is not finite: {name}; " in first[2]
    assert "cannot be loaded: SafetensorError: " in first[3]


OTHER_FILES = """
assert students.build_student(ModelConfig(path=folders[int(rank)]), TrainerConfig(), mesh, 3) is not None
dist.barrier()  # both are here, having called the same collectives
tell(True)
"""


def test_a_rank_whose_files_cannot_be_read_in_shards_decides_for_all(tmp_path):
    """As when nodes have downloaded different files of one model."""
    folders = [tmp_path / "safetensors", tmp_path / "pickled"]
    for folder in folders:
        write("llama", folder)
    torch.save(load_file(folders[1] / "model.safetensors"), folders[1] / "pytorch_model.bin")
    (folders[1] / "model.safetensors").unlink()
    told, _ = on_ranks(2, OTHER_FILES, tmp_path / "meet", *folders)
    assert told == [True, True]


MEMORY = """
def memory(key):
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith(f"{key}:"))

build(folders[0])  # what is imported on the way
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # VmHWM begins again
before = memory("VmRSS")
hf = build(folders[1])
tell([memory("VmHWM") - before, 4 * sum(p.numel() for p in hf.parameters())])
"""


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_two_ranks_together_need_little_more_than_one_model(family, tmp_path):
    """The peak of resident memory while the student is built, above what was there before."""
    write(family, tmp_path / "tiny")
    sizes = {"vocab_size": 8192, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16}
    sizes |= {"num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64}
    experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    config = AutoConfig.for_model(family, **sizes, **(experts if family == "qwen3_moe" else {}))
    folder = tmp_path / "large"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in Path(resolve("builtin:student")).glob("tokenizer*"):
        shutil.copy(file, folder)
    told, _ = on_ranks(2, MEMORY, tmp_path / "meet", tmp_path / "tiny", folder)
    peaks, (size, *_) = [peak for peak, _ in told], [size for _, size in told]
    print(f"{family}: {size / 2**20:.0f} MiB in fp32, peaks {[round(peak / 2**20) for peak in peaks]} MiB")
    assert size > 200e6
    assert sum(peaks) < 1.3 * size
