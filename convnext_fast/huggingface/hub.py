"""The Hugging Face hub: the options of loading, under transformers' names, downloads and uploads."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..console import needing
from ..files import local_path

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Loading(NamedTuple):
    """Where files are loaded from; options of transformers' ``from_pretrained``."""

    revision: str | None = None  # branch, tag or commit of a hub repository
    subfolder: str = ""  # of the folder or repository
    token: str | bool | None = None  # for the hub; True for the stored one, False for none
    cache_dir: str | Path | None = None  # where downloaded files are kept
    local_files_only: bool = False  # use only those, without a network
    force_download: bool = False  # download them again
    variant: str | None = None  # such as "fp16", of ``model.fp16.safetensors``
    use_safetensors: bool | None = None  # True for only such weights, False for only others


ANYWHERE = Loading()
_NO_EFFECT = {
    "_commit_hash",
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "code_revision",
    "proxies",
    "resume_download",
    "trust_remote_code",
    "use_fast",
    "user_agent",
}
"""Other options that transformers passes. No code of a repository ever runs here."""


def split_loading(options: Mapping[str, Any]) -> tuple[Loading, dict[str, Any]]:
    """The options of `Loading` among ``options``, and the others."""
    loading = {name: value for name, value in options.items() if name in Loading._fields and value is not None}
    rest = {name: options[name] for name in options if name not in _NO_EFFECT and name not in Loading._fields}
    return Loading(**loading), rest


def find_file(source: str | Path, *names: str, loading: Loading = ANYWHERE) -> Path:
    """The first of ``names`` that the folder or hub repository ``source`` holds, as a local path.

    Hub files come through huggingface_hub: its cache, its ``HF_HUB_OFFLINE`` switch and its progress bars apply.

    Raises:
        FileNotFoundError: neither a folder nor a reachable hub repository, or it holds none of ``names``.
        ImportError: ``source`` is a hub id and huggingface_hub is not installed.
    """
    folder, wanted = local_path(source), " or ".join(names)
    if folder.is_dir():
        folder = folder / loading.subfolder
        found = next((folder / name for name in names if (folder / name).is_file()), None)
        if found is not None:
            return found
        raise FileNotFoundError(f"the folder {folder} holds no {wanted}")
    if folder.exists() or not _HUB_ID.fullmatch(str(source)):
        raise FileNotFoundError(f"{source} is neither a folder nor a Hugging Face hub id (expected {wanted} in it)")
    return _hub_file(str(source), names, loading)


def _hub_file(repository: str, names: tuple[str, ...], loading: Loading) -> Path:
    """The first of ``names`` that a hub repository holds, as a local path; see `find_file`."""
    with needing(f"{repository} is not a local folder; fetching it from the Hugging Face hub needs the extra", "hub"):
        from huggingface_hub import errors, hf_hub_download
    options = {name: getattr(loading, name) for name in Loading._fields[:6]}
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, **options))
        except errors.EntryNotFoundError as error:
            missing = error
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            raise FileNotFoundError(
                f"{repository} is not a local folder, and the hub does not provide it: {error}"
            ) from error
    wanted, offline = " or ".join(names), isinstance(missing, errors.LocalEntryNotFoundError)
    if offline:
        text = f"{repository} is not a folder, and its {wanted} is neither in the hub's cache nor reachable"
    else:
        text = f"the hub repository {repository} holds no {wanted}"
    raise FileNotFoundError(text) from missing


def push(
    write: Callable[[Path], Any],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Sequence[str] | None = None,
) -> Any:
    """Upload what ``write`` writes into a folder to a hub repository, and return huggingface_hub's ``CommitInfo``.

    ``tags`` are added to those of its model card. The repository and the card are made if they are missing.
    """
    if isinstance(tags, str):
        raise TypeError(f"tags={tags!r}: expected a list of strings")
    with needing("push_to_hub needs the extra", "hub"):
        from huggingface_hub import HfApi
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))  # first: if it fails, no repository is made
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if tags:
            _tagged_card(repo_id, tags, revision, token).save(Path(folder, "README.md"))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _tagged_card(repo_id: str, tags: Sequence[str], revision: str | None, token: str | bool | None) -> Any:
    from huggingface_hub import ModelCard, errors, hf_hub_download

    try:
        path = hf_hub_download(repo_id, "README.md", revision=revision, token=token)
        card = ModelCard(Path(path).read_text(encoding="utf-8"))
    except errors.LocalEntryNotFoundError:  # there may be a card, but it cannot be reached
        raise
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError):
        card = ModelCard("---\nlibrary_name: transformers\n---\n")
    card.data.tags = list(dict.fromkeys([*(card.data.tags or ()), *tags]))
    return card
