"""Run directories as a run leaves them, made without a run, for tests of the report."""

import json
import random
from itertools import accumulate
from pathlib import Path

CONFIG = """\
run: {{name: {name}, iterations: {iterations}}}
model: {{path: "builtin:student"}}
teacher: {{backend: served, url: "${{oc.env:NO_SUCH_VARIABLE}}"}}
eval: {{samples: 4}}
algorithm: {{name: kdrl, kd: {{coef: 0.1}}}}
"""


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    """Write JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rollout(iteration: int, number: int, tokens: list[str], **changes: object) -> dict[str, object]:
    """A line of rollouts/*.jsonl: log-probs fall from −0.1, and the teacher's are higher for even tokens."""
    ends = list(accumulate(len(token) for token in tokens))
    logprobs = [-0.1 * (t + 1) for t in range(len(tokens))]
    return {
        "iteration": iteration,
        "id": f"train-{number}",
        "prompt": f"reverse: {number}",
        "completion": "".join(tokens),
        "answer": str(number)[::-1],
        "reward": float(number % 2),
        "reward_parts": {"exact_match": float(number % 2)},
        "error": None,
        "advantage": 0.5 if number % 2 else -0.5,
        "finish_reason": "stop",
        "weight_version": iteration - 1,
        "segments": [],
        "token_ids": list(range(len(tokens))),
        "token_ends": ends,
        "logprobs": logprobs,
        "teacher_logprobs": [logprob + (0.05 if t % 2 == 0 else -0.05) for t, logprob in enumerate(logprobs)],
    } | changes


def long_run(folder: Path, iterations: int, metrics: list[str], dumps: int, completion: int) -> Path:
    """A run with noise in all `metrics`, and `dumps` files of 8 rollouts of `completion` tokens; returns `folder`."""
    chance = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG.format(name=folder.name, iterations=iterations))
    noise = [json.dumps({name: chance.gauss(1, 1) for name in metrics})[1:] for _ in range(101)]
    lines = [f'{{"iteration": {i + 1}, {noise[i % 101]}' for i in range(iterations)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    words = [f" word{i}" for i in range(100)]
    for i in range(dumps):
        at = (i + 1) * iterations // dumps
        lines = [rollout(at, n, chance.choices(words, k=completion)) for n in range(8)]
        write_lines(folder / "rollouts" / f"{at:06d}-rank0.jsonl", lines)
    return folder
