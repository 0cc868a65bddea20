"""Loads a model folder, and reports one that is damaged, incomplete or inconsistent as a one-line RunStopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlkd.builtin import resolve
from rlkd.distributed import RunStopped


@contextmanager
def loading(path: str) -> Iterator[None]:
    """Wrap the loading of the model at `path` and suppress transformers' own table of problems.

    Raises: RunStopped for any exception, since a model's files, architecture and code can raise any type.
    """
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunStopped(f"the model {path} cannot be loaded: {message}") from error
    finally:
        transformers_logging.set_verbosity(before)


def pretrained(
    path: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: str | None,
    trust_remote_code: bool,
    device: str | None = None,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model at `path` (folder, hub id, builtin:…) as transformers loads it, and its report for `check_report`.

    Args:
        device: "meta" to read no weights; None: the CPU.

    Raises: RunStopped, one line, if transformers cannot load it.
    """
    with loading(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(path),
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            device_map=None if device is None else {"": device},
            ignore_mismatched_sizes=True,  # check_report reports them by name
            output_loading_info=True,
        )
    hf, report = loaded
    return hf, report


def check_whole(hf: PreTrainedModel, path: str, report: Mapping[str, Any]) -> None:
    """Check that all weights were loaded; transformers would initialise missing ones at random and continue.

    Args:
        report: transformers' loading info, from loading with mismatched sizes ignored.

    Raises: RunStopped if weights are missing, have other shapes than config.json implies, or are not finite.
    """
    check_report(path, report)
    # torch cannot check every 8-bit float; the integers of a quantised model are always finite.
    values = {n: p.half() if p.element_size() == 1 else p for n, p in hf.named_parameters()}
    refuse_not_finite(path, [name for name, value in values.items() if not value.isfinite().all()])


def check_report(path: str, report: Mapping[str, Any]) -> None:
    """The part of `check_whole` that needs no values. Raises: RunStopped, see there."""
    missing = sorted(report["missing_keys"])
    other = sorted(report["mismatched_keys"])
    if other:
        name, found, expected = other[0]
        raise RunStopped(
            f"the model {path}: {_count(other)} not of the shape given by its config.json: expected {name} "
            f"{list(expected)}, got {list(found)}; use the config.json that belongs to these weights"
        )
    if missing:
        raise RunStopped(
            f"the model {path}: {_count(missing)} missing that its config.json requires: {', '.join(missing[:3])}; "
            "copy the complete folder again, or use the config.json that belongs to these weights"
        )


def refuse_not_finite(path: str, names: list[str]) -> None:
    """Raises: RunStopped if there are any `names`: those of weights that are not finite."""
    if names:
        raise RunStopped(f"the model {path}: {_count(names)} not finite: {', '.join(names[:3])}; use another model")


def _count(names: list[Any]) -> str:
    return f"{len(names)} weights are" if len(names) > 1 else "1 weight is"
