"""Held-out accuracy: greedy, avg@k and pass@k, of a run's student or of any model.

python -m rlkd.evaluate runs/x [key=value …]
python -m rlkd.evaluate --config X.yaml model.path=FOLDER [key=value …]
"""

from __future__ import annotations

import json
import sys

from rlkd.config.load import ConfigError


def main(argv: list[str]) -> int:
    """Evaluate a student on the held-out data of a config; prints one JSON object, and on stderr what was measured.

    Exit code 0 for success, 2 for a wrong config or set-up (one line per mistake on stderr), 1 if it stopped.
    """
    from rlkd.run.asked_for import asked_for

    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}\nKeys are those of rlkd.train; python -m rlkd.train --help lists them.")
        return 0
    try:
        config = asked_for(argv)
    except ConfigError as error:
        print("\n".join(error.lines), file=sys.stderr)
        return 2
    from rlkd.distributed import RunStopped
    from rlkd.planning.preflight import check_evaluation
    from rlkd.run.fit import quiet
    from rlkd.run.measure import measured

    problems = check_evaluation(config)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    quiet()
    try:
        print(json.dumps(measured(config)))
    except RunStopped as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
