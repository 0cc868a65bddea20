"""Asks the Hugging Face hub once, with a short time limit, whether it has what a user names.

The libraries that load a model or a data set ask six times with pauses, 23 s in all, before they report that the hub
cannot be reached. Imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
from typing import Literal

ANSWER_S = 5.0
"""Time limit of the question, in seconds."""


@functools.cache
def require(name: str, kind: Literal["model", "dataset"], hint: str = "") -> None:
    """Raises: ValueError, one line, if the hub has no such model or data set, or if it cannot be asked.

    A model that was downloaded before needs no hub. Whatever else the hub answers is left to the library that loads.

    Args:
        hint: the end of the line, such as another name.
    """
    import huggingface_hub
    from huggingface_hub import errors

    no_folder, file = f"{name} is no folder here", "config.json" if kind == "model" else "README.md"
    try:
        if isinstance(huggingface_hub.try_to_load_from_cache(name, file, repo_type=kind), str):
            return
        url = huggingface_hub.hf_hub_url(name, file, repo_type=kind)
        huggingface_hub.get_hf_file_metadata(url, timeout=ANSWER_S)
    except errors.HFValidationError as error:
        raise ValueError(f"{no_folder}, and no hub id: {_line(error)}{hint}") from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{no_folder}, and the hub's {kind} is gated; ask for access on its page, then set HF_TOKEN{hint}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{no_folder}, and the hub has no such {kind}; if it is a private one, set HF_TOKEN{hint}"
        ) from error
    except errors.EntryNotFoundError as error:
        if kind == "model":  # a data set need not have a README
            raise ValueError(f"{no_folder}, and the hub's {name} has no {file}{hint}") from error
    except errors.OfflineModeIsEnabled as error:
        raise ValueError(
            f"{no_folder}, and it was not downloaded from the hub before; HF_HUB_OFFLINE forbids asking it{hint}"
        ) from error
    except errors.HfHubHTTPError:
        pass  # it is busy, for example; the library that loads the model asks again
    except Exception as error:  # of the HTTP library, which is another one in each version of huggingface_hub
        raise ValueError(
            f"{no_folder}, and the hub cannot be reached to look for it there ({_line(error)}); correct the path, or "
            f"the connection{hint}"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]
