"""Suggests a name where a user's path leads nowhere."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path


def did_you_mean(path: str, others: Sequence[str] = ()) -> str:
    """`; did you mean …?` with the name most like `path`, which does not exist; nothing if none is like it.

    Args:
        others: names, such as builtin:student, that may be meant besides the files and folders beside `path`.
    """
    wrong = Path(path)
    siblings = [entry.name for entry in wrong.parent.iterdir()] if wrong.parent.is_dir() else []
    near = difflib.get_close_matches(wrong.name, siblings, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {wrong.with_name(near[0])}?"
    names = {name.rpartition(":")[2]: name for name in others} | {name: name for name in others}
    like = difflib.get_close_matches(path, names, n=1, cutoff=0.75)
    return f"; did you mean {names[like[0]]}?" if like else ""
