"""Held-out accuracy: greedy, avg@k and pass@k, of a run's student or of any model.

python -m rlkd.evaluate runs/x [key=value …]
python -m rlkd.evaluate --config X.yaml model.path=FOLDER [key=value …]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rlkd.command_line import Command, Words, config_option, run


def evaluate(config: tuple[str, ...], words: tuple[str, ...]) -> int:
    """Print one JSON object, and on stderr what was measured. Returns: see `main`. Raises: ConfigError."""
    from rlkd.run.asked_for import asked_for

    settings = asked_for(config, words)
    from rlkd.distributed import RunStopped
    from rlkd.planning.preflight import check_evaluation
    from rlkd.run.fit import quiet
    from rlkd.run.measure import measured

    problems = check_evaluation(settings)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    quiet()
    try:
        print(json.dumps(measured(settings)))
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


command = Command(
    "evaluate",
    params=[config_option(), Words("words", metavar="[RUN] [key=value …]")],
    callback=evaluate,
    help="Measure the held-out accuracy of a run's student, or of the model at model.path.",
)


def main(argv: Sequence[str]) -> int:
    """Evaluate a student on the held-out data of a config.

    Exit code 0 for success, 2 for a wrong config or set-up (one line per mistake on stderr), 1 if it stopped.
    """
    return run(command, argv, "python -m rlkd.evaluate")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
