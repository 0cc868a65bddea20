"""Whether there is a model at a path, asked before any library loads one. Imports neither torch nor transformers."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from rlkd.builtin import BUILTIN, MODELS, resolve
from rlkd.storage.near import did_you_mean

HUB_ANSWER_S = 5.0
"""Time limit of the one question to the hub."""


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
        _ask_hub(folder)
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


@functools.cache
def _ask_hub(name: str) -> None:
    """Raises: ValueError, one line, if the hub has no model of that name, or cannot be asked and none was downloaded.

    transformers itself asks six times with pauses, 23 s in all, before it reports a hub that cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    no_folder, hint = f"{name} is no folder here", did_you_mean(name, [BUILTIN + model for model in MODELS])
    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
            return
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, "config.json"), timeout=HUB_ANSWER_S)
    except errors.HFValidationError as error:
        raise ValueError(f"{no_folder}, and no hub id: {_line(error)}{hint}") from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{no_folder}, and the hub's model is gated; ask for access on its page, then set HF_TOKEN{hint}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{no_folder}, and the hub has no such model; if it is a private one, set HF_TOKEN{hint}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise ValueError(f"{no_folder}, and the hub's {name} has no config.json{hint}") from error
    except errors.OfflineModeIsEnabled as error:
        raise ValueError(
            f"{no_folder}, and it was not downloaded from the hub before; HF_HUB_OFFLINE forbids asking it{hint}"
        ) from error
    except errors.HfHubHTTPError:
        return  # it is busy, for example; the library that loads the model asks again
    except Exception as error:  # of the HTTP library, which is another one in each version of huggingface_hub
        raise ValueError(
            f"{no_folder}, and the hub cannot be reached to look for it there ({_line(error)}); correct the path, or "
            f"the connection{hint}"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]
