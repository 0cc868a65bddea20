"""Held-out accuracy of a run's student or of any model, and comparisons: docs/evaluation.md.

rlkd evaluate runs/x [key=value …]
rlkd evaluate FOLDER --data gsm8k:test.jsonl [--data FILE …] [key=value …]
rlkd evaluate --compare A B
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from rlkd.command_line import Command, Words, config_option, run
from rlkd.config.load import ConfigError
from rlkd.config.yaml_tree import COMMAND_LINE


def evaluate(
    config: tuple[str, ...],
    words: tuple[str, ...],
    data: tuple[str, ...],
    out: str | None,
    k: str | None,
    compare: tuple[str, str] | None,
) -> int:
    """Print one JSON object, and on stderr what was measured and a table. Returns: see `main`. Raises: ConfigError."""
    if compare is not None:
        return _compare(compare, config + words + data)
    from rlkd.run.asked_for import asked_for, benchmarks, out_folder

    settings = asked_for(config, words, data)
    tests = benchmarks(settings, data)
    ks = _ks(k, settings.eval.samples)
    from rlkd.distributed import RunStopped
    from rlkd.planning.preflight import check_evaluation
    from rlkd.run.evaluated import table
    from rlkd.run.fit import quiet
    from rlkd.run.measure import measured

    problems = check_evaluation(tests)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    quiet()
    try:
        summary = measured(tests, out_folder(settings.model.path) if out is None else Path(out), ks)
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        return 1
    print(f"{table(summary)}\nrecords: {summary['out']}", file=sys.stderr, flush=True)
    print(json.dumps(summary))
    return 0


def _ks(text: str | None, samples: int) -> list[int]:
    """The k of pass@k and majority@k. Raises: ConfigError, one line."""
    from rlkd.run.evaluated import powers

    if text is None:
        return powers(samples)
    words = text.split(",")
    if not all(word.isdecimal() and 1 <= int(word) <= samples for word in words):
        raise ConfigError(
            [
                f"{COMMAND_LINE}: --k: expected numbers from 1 to eval.samples = {samples}, such as 1,{samples}, got "
                f"{text!r}; raise eval.samples for a larger one"
            ]
        )
    return sorted({int(word) for word in words})


def _compare(folders: tuple[str, str], others: tuple[str, ...]) -> int:
    from rlkd.run.comparison import compared, comparison_table

    if others:
        raise ConfigError(
            [f"{COMMAND_LINE}: --compare: expected no other arguments, got {others[0]!r}; evaluate first"]
        )
    a, b = map(Path, folders)
    try:
        comparison = compared(a, b)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    print(comparison_table(comparison), file=sys.stderr, flush=True)
    print(json.dumps(comparison))
    return 0


command = Command(
    "evaluate",
    params=[
        config_option(),
        click.Option(
            ["--data"],
            multiple=True,
            metavar="PATH",
            help="held-out data, in place of eval.path; may be repeated; gsm8k:PATH and math-500:PATH read these",
        ),
        click.Option(["--k"], metavar="K,K", help="the k of pass@k and majority@k, at most eval.samples"),
        click.Option(["--out"], metavar="FOLDER", help="for records and summary, in place of RUN/evaluation"),
        click.Option(["--compare"], nargs=2, metavar="A B", help="compare two evaluations, or two runs that have one"),
        Words("words", metavar="[RUN|MODEL] [key=value …]"),
    ],
    callback=evaluate,
    help="Measure the held-out accuracy of a run's student, or of the model in a folder or at model.path.",
)


def main(argv: Sequence[str]) -> int:
    """Evaluate a student on the held-out data of a config, or compare two evaluations.

    Exit code 0 for success, 2 for a wrong config or set-up (one line per mistake on stderr), 1 if it stopped.
    """
    return run(command, argv, "python -m rlkd.evaluate")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
