"""What two ranks do together when weights leave, and when what they open is there on one of them alone."""

import json

import pytest
from families import write
from runs import run_code

pytestmark = [pytest.mark.process, pytest.mark.long]

BEGIN = """
import json, os, sys
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from builders import GRPO, config
from rlkd.algorithms import GRPO as GRPOModule  # a LightningModule
from rlkd.pipeline.loader import RolloutLoader

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
"""

PUBLISH = """
from safetensors.torch import load_file
import torch
import rlkd.models.student as students
import rlkd.models.weights as streams
from rlkd.run.publish import Publish
from rlkd.weight_sync.weight_file import WeightFile

served = ("rollout.backend=vllm", "rollout.server.launch=true", f"rollout.server.sync_dir={folder}/sync")
settings = config(*GRPO, *served, f"model.path={folder}/model", "trainer.accelerator=cpu")
module = GRPOModule(settings)
mesh = init_device_mesh("cpu", (2,))
module.student = students.build_student(settings.model, settings.trainer, mesh, 0)
loader = RolloutLoader(settings, module)
if rank == 0:
    loader.policy._file = WeightFile(settings.rollout.server.sync_dir)  # as `open` does, without any server
loader.policy._dtype = torch.float32
converted, convert = [], streams.loader_names
streams.loader_names = lambda hf, weights: convert(hf, note(weights))

def note(weights):
    converted.extend(name for name, tensor in weights.items() if tensor.device.type != "meta")
    return weights

Publish(loader)._publish(module, 1)
said = {"conversions": len(converted), "published": loader.policy._published}
if rank == 0:
    written = load_file(loader.policy._file.directory / loader.policy._published)
    started = load_file(f"{folder}/model/model.safetensors")
    said["names"] = sorted(written)
    said["same"] = written.keys() == started.keys() and all(bool((written[n] == started[n]).all()) for n in started)
print(json.dumps(said))
"""

OPEN = """
from rlkd.distributed import RunStopped

if rank == 1:
    sys.path.append(f"{folder}/there")
loader = RolloutLoader(s := config(*GRPO, "reward.functions=[{name: 'mine_x:f'}]", "reward.workers=1"), GRPOModule(s))
try:
    loader.open()
except RunStopped as stopped:
    print(json.dumps(str(stopped)))
finally:
    loader.close()
"""


def on_two_ranks(script, folder):
    """The last line that each printed."""
    return [json.loads(output.splitlines()[-1]) for output in run_code(BEGIN + script, folder, folder)]


def test_the_file_engine_converts_names_on_rank_0_alone(tmp_path):
    """Unfused experts are a copy of most of the model, and rank 0 alone writes the file."""
    write("qwen3_moe", tmp_path / "model")
    first, second = on_two_ranks(PUBLISH, tmp_path)
    assert first["conversions"] > 0 and second["conversions"] == 0
    assert first["published"] == second["published"]
    assert first["same"] and any("experts.3.down_proj" in name for name in first["names"])


def test_a_reward_that_is_there_on_one_rank_alone_ends_both(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine_x.py").write_text("def f(completion, answer, **_):\n    return 1.0\n")
    first, second = on_two_ranks(OPEN, tmp_path)
    assert first.startswith("reward 'mine_x:f': importing mine_x raised ModuleNotFoundError")
    assert second == "another rank failed; its error is above or in its own log"
