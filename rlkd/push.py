"""python -m rlkd.push runs/x [--repo OWNER/NAME] [--private]: put a run's student on the Hugging Face hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from rlkd.command_line import Command, run
from rlkd.storage.run_folder import exported

PARTS = ("hf", "adapter")
"""The folders of a run that can be put on the hub: the whole student, and its adapter alone."""


def push(run_dir: str, part: str, repo: str | None, private: bool) -> int:
    """Upload `<run>/<part>` and print the address of its page. Returns: the exit code, see `main`."""
    folder = Path(run_dir, part)
    if not (Path(run_dir).is_dir() and folder.is_dir()):
        what = f"has no {part}/; a run writes it at its end" if Path(run_dir).is_dir() else "is no folder"
        return _failed(f"{run_dir} {what}; expected the folder of a finished run", 2)
    name = repo if repo is not None else Path(run_dir).resolve().name
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

    if get_token() is None:
        return _failed("no token for the Hugging Face hub; run hf auth login, or set HF_TOKEN", 2)
    if constants.HF_HUB_OFFLINE:
        return _failed("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it", 2)
    api = HfApi()
    try:
        page = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=page.repo_id,
            folder_path=folder,
            commit_message=f"{Path(run_dir).resolve().name}/{part} after {exported(run_dir)} iterations",
        )
    except HFValidationError as error:
        return _failed(f"--repo: expected NAME or OWNER/NAME, got {name!r}: {error}", 2)
    except (HTTPError, OSError, RuntimeError) as error:  # hf_xet, which sends large files, raises the last two
        return _failed(f"{api.endpoint}: {folder} was not uploaded: {type(error).__name__}: {error}", 1)
    print(page)
    return 0


def _failed(line: str, code: int) -> int:
    print(" ".join(line.split())[:400], file=sys.stderr)
    return code


command = Command(
    "push",
    params=[
        click.Argument(["run_dir"], metavar="RUN", type=click.Path()),
        click.Option(["--part"], type=click.Choice(PARTS), default=PARTS[0], help="the student, or its adapter alone"),
        click.Option(["--repo"], metavar="[OWNER/]NAME", help="by default the run's name, for the token's user"),
        click.Option(["--private"], is_flag=True, help="make a new repository private"),
    ],
    callback=push,
    help="Put a run's student on the Hugging Face hub (or on HF_ENDPOINT), with its model card.",
)


def main(argv: Sequence[str]) -> int:
    """Upload. Exit code 0 for success, 2 for a wrong argument or no token, 1 if the hub fails (one line on stderr)."""
    return run(command, argv, "python -m rlkd.push")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
