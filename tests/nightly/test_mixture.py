"""A mixture of experts trains, is published to a real vLLM server, and samples as it trains."""

import pytest
import torch
from run_results import rows
from runs import train
from safetensors.torch import load_file
from served_families import FAMILIES
from transformers import AutoModelForCausalLM
from vllm_fixtures import save_model

pytestmark = [pytest.mark.server, pytest.mark.process]


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.soak)])
def test_a_mixture_of_experts_trains_and_is_served(family, tmp_path):
    """Every expert and router has moved, and the server's log-probs are those of the trainer after each update."""
    torch.manual_seed(0)
    path = save_model(AutoModelForCausalLM.from_config(FAMILIES[family]()), tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(f'{{"prompt": "{chr(97 + i)}bc", "answer": "a"}}' for i in range(16)), encoding="utf-8")
    train(
        [
            *("--config", "configs/quickstart_vllm.yaml", f"run.dir={tmp_path}", "run.name=run", "run.iterations=3"),
            *(f"model.path={path}", "teacher=null", "algorithm={name: grpo, group_size: 4}", "optim.lr=0.01"),
            *(f"data={{path: {data}, max_prompt_tokens: 16, chat_template: false}}", "eval.every=0"),
            *("rollout.prompts=8", "reward={functions: [{name: format, options: {pattern: '.*[a-f]{2}.*'}}]}"),
        ],
        tmp_path,
    )
    measured = [row["mismatch/max"] for row in rows(tmp_path / "run") if row["iteration"] > 0]
    print(f"{family}: mismatch/max {', '.join(f'{gap:.1e}' for gap in measured)}")
    assert len(measured) == 3 and max(measured) < 1e-4
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "run" / "hf")
    )
    assert before.keys() == after.keys() and sum(".experts." in name for name in before) >= 12
    still = [name for name in before if before[name].dim() > 1 and torch.equal(before[name], after[name])]
    assert not still, still
