"""Whether there is a model at a path, asked before any library loads one. Imports neither torch nor transformers."""

from __future__ import annotations

import os
from pathlib import Path

from rlkd.builtin import BUILTIN, MODELS, resolve
from rlkd.storage import hub
from rlkd.storage.near import did_you_mean


def find(path: str) -> str:
    """The folder or the hub id of the model at `path` (folder, hub id, builtin:…), which exists.

    Raises: ValueError, one line, if there is no such folder, if it holds no model, or if the hub has no such model or
        does not answer. Whatever else a hub answers is left to the library that loads the model.
    """
    folder = resolve(path)
    if os.path.isdir(folder):
        if not Path(folder, "config.json").is_file():
            raise ValueError(_no_model(folder))
    elif os.path.exists(folder):
        raise ValueError(f"expected a model's folder, got the file {path}; give the folder that holds config.json")
    elif folder[:1] in "/.~" or folder.count("/") > 1:
        hint = " (~ is not expanded here)" if folder.startswith("~") else ""
        raise ValueError(f"no folder {folder}{hint}{did_you_mean(folder)}")
    else:
        hub.require(folder, "model", did_you_mean(folder, [BUILTIN + model for model in MODELS]))
    return folder


def _no_model(folder: str) -> str:
    """What a folder without a config.json is instead of a model's."""
    expected = "expected a model folder in Hugging Face form, got"
    runs = (above for above in (Path(folder), *Path(folder).parents) if Path(above, "hf", "config.json").is_file())
    run = next(runs, None)
    if run is not None:
        return f"{expected} {folder} of a run; did you mean {run / 'hf'}?"
    if Path(folder, "adapter_config.json").is_file():
        return (
            f"{expected} {folder}, which is a LoRA adapter without its base; merge it into the base "
            "(merge_and_unload of peft), and give the merged model's folder"
        )
    return f"{expected} {folder}, which has no config.json"
