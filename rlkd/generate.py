"""Completions by a run's student, or by any model: what the sampler of a run would write, without rewards.

python -m rlkd.generate runs/x "a prompt" …
python -m rlkd.generate FOLDER --data prompts.jsonl --samples 4 --out completions.jsonl [key=value …]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rlkd.command_line import Command, Words, config_option, run
from rlkd.config.errors import ConfigError
from rlkd.config.yaml_tree import COMMAND_LINE

if TYPE_CHECKING:
    from rlkd.config.schema import Config

_OVERRIDE = re.compile(r"[a-z]\w*(\.\w+)+=")
"""How a word begins that is `key=value` rather than a prompt."""


def settings_for(model: str, config: Sequence[str], overrides: Sequence[str]) -> Config:
    """The configuration to generate with: that of the run that `model` belongs to, without its teacher and servers.

    The sampler is in this process, unless an override sets `rollout.backend=vllm`; it then starts a server, or asks
    those of `rollout.server.urls`.

    Args:
        model: a run's folder, the folder of an exported student, or any model.
        config: YAML files on top of the run's; without a run, instead of it.
        overrides: `key=value`.

    Raises: ConfigError.
    """
    from rlkd.config.schema import NoTeacherConfig, RolloutServerConfig
    from rlkd.run.asked_for import asked_for

    own = [word for word in overrides if word.startswith("rollout.server.urls=")]
    serves = "rollout.backend=vllm" in overrides
    changes = [*overrides, *(["rollout.server.urls=[]", "rollout.server.launch=true"] if serves and not own else [])]
    changes += ["rollout.server.launch=false"] if serves and own else []
    folder = Path(model).parent if Path(model).name == "hf" else Path(model)
    of_run = Path(folder, "config.yaml").is_file()
    which = str(folder) if of_run else f"model.path={json.dumps(model)}"
    unread = () if of_run or config else ("builtin:reverse",)  # a configuration must name data
    found = asked_for(config, [which, *changes], unread)
    # The limits of the run's data do not hold for other prompts, whose lengths are known later (`for_prompts`).
    free: dict[str, object] = {"max_prompt_tokens": 1}
    if not any(word.startswith("data.limit=") for word in overrides):
        free["limit"] = None
    alone: dict[str, object] = {"teacher": NoTeacherConfig(), "data": found.data.model_copy(update=free)}
    if not serves:
        alone["rollout"] = found.rollout.model_copy(update={"backend": "hf", "server": RolloutServerConfig()})
    return found.model_copy(update=alone)


def generate(
    config: tuple[str, ...],
    model: str,
    words: tuple[str, ...],
    data: str | None,
    samples: int,
    temperature: float | None,
    max_tokens: int | None,
    out: str | None,
) -> int:
    """Print the completions, or write them to `out`. Returns: the exit code, see `main`. Raises: ConfigError."""
    overrides = [word for word in words if _OVERRIDE.match(word)]
    texts = [word for word in words if word not in overrides]
    if bool(texts) == (data is not None):
        raise ConfigError([f"{COMMAND_LINE}: expected prompts or --data FILE, got {'both' if texts else 'neither'}"])
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise ConfigError([f"{COMMAND_LINE}: --out: no folder {Path(out).parent}; make it"])
    length = [] if max_tokens is None else [f"rollout.max_tokens={max_tokens}"]
    settings = settings_for(model, config, [*overrides, *length])
    from rlkd.distributed import RunStopped
    from rlkd.planning.preflight import check_generation
    from rlkd.run.completions import completions, for_prompts, given_prompts, lines
    from rlkd.run.fit import quiet

    quiet()
    problems = check_generation(settings)
    if problems:
        return _refused(problems)
    try:
        prompts = given_prompts(settings, texts, data)
    except ValueError as error:
        return _refused([str(error)])
    settings = for_prompts(settings, prompts)
    problems = check_generation(settings)  # now their lengths
    if problems:
        return _refused(problems)
    try:
        drawn = settings.rollout.temperature if temperature is None else temperature
        written = lines(settings, completions(settings, prompts, samples, drawn))
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        return 1
    if out is not None:
        Path(out).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in written), encoding="utf-8")
        print(f"{len(written)} completions of {len(prompts)} prompts: {out}", file=sys.stderr)
        return 0
    for line in written:
        if len(written) > 1:
            print(f"--- prompt {line['id']}, sample {line['sample']}")
        print(line["completion"])
        if line["finish_reason"] == "length":
            print(f"(cut off after {line['tokens']} tokens; --max-tokens allows more)", file=sys.stderr)
    return 0


def _refused(problems: Sequence[str]) -> int:
    print("\n".join(problems), file=sys.stderr)
    return 2


command = Command(
    "generate",
    params=[
        config_option(),
        click.Argument(["model"], metavar="MODEL", type=click.Path()),
        click.Option(["--data"], metavar="FILE", help="read the prompts from it as from data.path, not from arguments"),
        click.Option(["--samples"], type=click.IntRange(min=1), default=1, metavar="N", help="completions of a prompt"),
        click.Option(
            ["--temperature"], type=click.FloatRange(min=0), metavar="T", help="0: greedy; by default that of rollouts"
        ),
        click.Option(
            ["--max-tokens"],
            type=click.IntRange(min=1),
            metavar="N",
            help="by default that of rollouts, 256 if unknown",
        ),
        click.Option(["--out"], metavar="FILE", type=click.Path(dir_okay=False), help="write JSONL to it"),
        Words("words", metavar="[PROMPT …] [key=value …]"),
    ],
    callback=generate,
    help="Write completions by MODEL: a run's folder, an exported student, or any model. "
    "rollout.backend=vllm starts a vLLM server for it.",
)


def main(argv: Sequence[str]) -> int:
    """Generate.

    Exit code 0 for success, 2 for a wrong config, prompt or set-up (one line per mistake on stderr), 1 if it stopped.
    """
    return run(command, argv, "python -m rlkd.generate")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
