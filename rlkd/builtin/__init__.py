"""A task that a CPU learns in a minute: a verifiable toy task, and three models that were pretrained on it.

`builtin:student`, `builtin:teacher` and `builtin:mentor`, which writes feedback, can be used wherever a config needs a
model folder.
"""

from __future__ import annotations

from pathlib import Path

BUILTIN = "builtin:"
MODELS = ("student", "teacher", "mentor")


def resolve(path: str) -> str:
    """The packaged folder for `builtin:student` and the others; any other string unchanged.

    Raises: ValueError for an unknown `builtin:` name.
    """
    if not path.startswith(BUILTIN):
        return path
    name = path.removeprefix(BUILTIN)
    if name not in MODELS:
        choices = ", ".join(BUILTIN + model for model in MODELS)
        raise ValueError(f"no built-in model is called {path!r}; choose one of {choices}, or give a folder")
    return str(Path(__file__).parent / name)
