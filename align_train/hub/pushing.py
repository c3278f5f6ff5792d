"""An exported folder to the Hugging Face Hub, only ever where the user asks for it."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from align_train.hub.exporting import is_export

# What an earlier upload may have left that the new folder lacks: weights of another model beside the new card.
REPLACED = ["*.safetensors", "*.safetensors.index.json", "onnx/*"]
LOG_IN = "log in with a token that may write there: hf auth login, or set HF_TOKEN"


def require_token(repo: str) -> None:
    """Raise OSError where nobody is logged in at the Hub: before the work, not after it."""
    if get_token() is None:
        raise OSError(f"nothing can be pushed to {repo}, there is no token of the Hugging Face Hub: {LOG_IN}")


def push(folder: str | Path, repo: str, private: bool = True) -> str:
    """Upload an exported folder to a model repository, which is made where there is none.

    Args:
        folder: one that `export_hf` has written.
        repo: NAME/MODEL.
        private: only you can see it; nothing is uploaded to a repository that is public already.

    Returns:
        The address of the repository.

    Raises:
        ValueError: the folder is no export, `repo` is no name of a repository, or it is public and `private` is true.
        OSError: there is no token, it may not write there, or the Hub cannot be reached.
    """
    folder = Path(folder)
    if not is_export(folder):
        raise ValueError(
            f"{folder} is no exported model, so it is not pushed: give a folder that an export has written"
        )
    require_token(repo)
    try:
        return _uploaded(HfApi(), folder, repo, private)
    except HFValidationError as error:
        raise ValueError(f"push_to={repo} names no repository, give one as NAME/MODEL: {error}") from error
    except (HTTPError, OSError) as error:
        raise OSError(f"{folder} could not be pushed to {repo}: {_remedy(error)} ({str(error).strip()})") from error


def _uploaded(api: HfApi, folder: Path, repo: str, private: bool) -> str:
    made = api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.model_info(made.repo_id).private:
        raise ValueError(
            f"{made.repo_id} is there and is public, so nothing was pushed: set private=false to publish the model, or "
            "choose another push_to"
        )
    api.upload_folder(
        repo_id=made.repo_id,
        folder_path=folder,
        commit_message="Model exported by align_train",
        delete_patterns=REPLACED,
    )
    return str(made)


def _remedy(error: Exception) -> str:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return LOG_IN if status in (401, 403, 404) else f"the Hub answered {status}"
    return "the Hub cannot be reached, look at the network and at HF_ENDPOINT and HF_HUB_OFFLINE"
