"""Where a model's files are: a local folder, or the Hugging Face hub and its cache."""

from __future__ import annotations

import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def find_file(source: str | Path, *names: str) -> Path:
    """The first of ``names`` that the folder or hub repository ``source`` holds, as a local path.

    Hub files come through huggingface_hub: its cache, its ``HF_HUB_OFFLINE`` switch and its progress bars apply.

    Raises:
        FileNotFoundError: neither a folder nor a reachable hub repository, or it holds none of ``names``.
        ImportError: ``source`` is a hub id and huggingface_hub is not installed.
        TypeError: ``source`` is neither a string nor a path.
    """
    if not isinstance(source, (str, Path)):
        raise TypeError(f"source is a {type(source).__name__}: expected a folder or a Hugging Face hub id")
    folder = Path(source).expanduser()
    wanted = " or ".join(names)
    if folder.is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise FileNotFoundError(f"the folder {folder} holds no {wanted}")
    if folder.exists() or not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"{source} is neither a folder nor a Hugging Face hub id (expected {wanted} in it)")
    return _hub_file(str(source), names)


def _hub_file(repository: str, names: tuple[str, ...]) -> Path:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError:
        raise ImportError(
            f"{repository} is no local folder; fetching it from the Hugging Face hub needs the extra: "
            "pip install 'convnext-fast[hub]'"
        ) from None
    for name in names:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:
            offline = error
        except EntryNotFoundError:
            offline = None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise FileNotFoundError(
                f"{repository} is no local folder, and the hub does not give it: {error}"
            ) from error
    if offline is not None:
        raise FileNotFoundError(
            f"{repository} is no local folder, and its {' or '.join(names)} is neither in the hub's cache nor reachable"
        ) from offline
    raise FileNotFoundError(f"the hub repository {repository} holds no {' or '.join(names)}")
