"""Where in the user's own code an exception was raised."""

from __future__ import annotations

import os
import traceback

_OURS = os.path.dirname(__file__)
_PYTHON = os.path.dirname(os.__file__)
_INSTALLED = ("site-packages", "dist-packages")


def place(error: BaseException) -> str:
    """` at FILE:LINE` of the innermost line of `error`'s traceback that is the user's; nothing if none is.

    Lines of rlkd, of Python's library and of installed packages are not, since a user corrects what called them.
    """
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _of_others(frame.filename):
            return f" at {frame.filename}:{frame.lineno}"
    return ""


def _of_others(file: str) -> bool:
    inside = any(file.startswith(folder + os.sep) for folder in (_OURS, _PYTHON))
    return inside or file.startswith("<") or any(name in file.split(os.sep) for name in _INSTALLED)
