"""A model folder that is broken, cut off or of another model is the user's to know, in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlkd.distributed import RunStopped


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Around the loading of the model at `path`. transformers' own table of what is amiss is left out.

    Raises: RunStopped for whatever goes wrong: files, architectures and code of a model raise anything.
    """
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunStopped(f"the model {path} cannot be loaded: {said}") from error
    finally:
        transformers_logging.set_verbosity(before)


def check_whole(hf: PreTrainedModel, path: str, report: Mapping[str, Any]) -> None:
    """transformers makes up what a file of weights lacks, at random, and goes on: we do not.

    Args:
        report: transformers' loading info, with sizes that do not match ignored.

    Raises: RunStopped where weights are missing, of other shapes than config.json wants, or not finite.
    """
    missing = sorted(report["missing_keys"])
    other = sorted(report["mismatched_keys"])
    if other:
        name, found, wanted = other[0]
        raise RunStopped(
            f"the model {path}: {_count(other)} of another shape than its config.json says: {name} is {list(found)}, "
            f"wanted {list(wanted)}; config.json and weights are of different models"
        )
    if missing:
        raise RunStopped(
            f"the model {path}: {_count(missing)} missing that its config.json asks for: {', '.join(missing[:3])}; "
            "copy the whole folder again, or use the config.json that belongs to these weights"
        )
    # torch cannot look at every 8-bit float; none of the integers of a quantised model is infinite.
    broken = [n for n, p in hf.named_parameters() if not (p.half() if p.element_size() == 1 else p).isfinite().all()]
    if broken:
        raise RunStopped(f"the model {path}: {_count(broken)} not finite: {', '.join(broken[:3])}; use another model")


def _count(names: list[Any]) -> str:
    return f"{len(names)} weights are" if len(names) > 1 else "1 weight is"
