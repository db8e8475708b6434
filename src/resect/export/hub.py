"""Putting an export on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resect.errors import UsageError


def push(path: Path, repository: str, *, card: str, private: bool = True, api: Any = None) -> str:
    """Uploads a directory, or a file with a model card, to a repository that is made if it is not there; gives its address.

    Raises `UsageError` when the hub refuses or is out of reach.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    unreached: Any = HfHubHTTPError.__bases__[0]  # the errors of whatever library speaks HTTP for it: no route, no answer

    api = api or HfApi(library_name="resect")
    try:
        place = api.create_repo(repository, private=private, exist_ok=True)
        if path.is_dir():
            api.upload_folder(repo_id=repository, folder_path=path, commit_message="A pruned model")
        else:
            api.upload_file(repo_id=repository, path_or_fileobj=path, path_in_repo=path.name)
            api.upload_file(repo_id=repository, path_or_fileobj=card.encode(), path_in_repo="README.md")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError) as error:
        raise UsageError(
            f"Asked to push to {repository!r}; the hub refused: {str(error).splitlines()[0]}. What was written stays at {path}. "
            "Log in with `hf auth login`."
        ) from error
    except (unreached, OSError) as error:
        raise UsageError(
            f"Asked to push to {repository!r}; the hub could not be reached: {str(error).splitlines()[0]}. What was written "
            f"stays at {path}."
        ) from error
    return str(place)
