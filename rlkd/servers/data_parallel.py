"""python -m rlkd.servers.data_parallel MODEL … : `vllm serve`, which starts an API process for each copy of the model.

The API server that we start otherwise has one process, however many copies are behind it, and that process cannot build
the answers of eight GPUs. vLLM's own command line would do the same as this file, but it does not start where vLLM is
installed under another name, as the build for CPUs is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> None:
    """Serve with the arguments of `vllm serve`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser, command = FlexibleArgumentParser(), ServeSubcommand()  # type: ignore[no-untyped-call]
    command.subparser_init(parser.add_subparsers())
    settings = parser.parse_args(["serve", *arguments])
    command.validate(settings)
    command.cmd(settings)


if __name__ == "__main__":  # vLLM starts further processes, which import this file
    main(sys.argv[1:])
