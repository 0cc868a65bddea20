"""python -m rlkd: the console script `rlkd`."""

import sys

from rlkd.cli import main

sys.exit(main())
