"""Fetches a model from the Hugging Face hub when it is named by its repository."""

import errno
import re
import sys
from pathlib import Path

from llava_jax.convert.errors import ConversionError

# The hub's rule for names, and a branch, tag or commit behind an @.
_REPOSITORY = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
# First parts of the paths that our recipes and documents name, and others in use: whoever has such an account on the hub
# must not become the one who supplies a model that is only misspelled here.
LOCAL = ("checkpoints", "data", "export", "models", "output", "outputs", "playground", "runs", "saves")
_SETTINGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.*",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "adapter_config.json",
    "mm_projector.*",
    "non_lora_trainables.*",
)
_SAFETENSORS = (
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
)
_PICKLED = (
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
)
# A model may be stored as components, each in a directory (TinyLLaVA Factory).
_DIRECTORIES = ("", "language_model/", "vision_tower/", "connector/")


def fetch(name) -> Path:
    """`name` as a path; a repository `org/name` or `org/name@revision` that is no path here is downloaded.

    Files that lie in the hub's cache already are not fetched again, and a download that was interrupted goes
    on. The commit is printed on stderr: give it as the revision, and the same files come for ever. Nothing that
    begins with `.`, `/` or `~`, with a directory that is here, or with one of `LOCAL`, is looked up. Raises
    ConversionError.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    repository = _REPOSITORY.fullmatch(str(name))
    if repository is None:
        raise ConversionError(
            f"{path} does not exist. Give the path of a model, or ORG/NAME to fetch one from the Hugging Face hub."
        )
    if reason := _why_local(path):
        raise ConversionError(
            f"{path} does not exist. It is taken for a path and not looked up on the Hugging Face hub, because {reason}. "
            f"Correct the path, or bring a model there: hf download ORG/NAME --local-dir={path}"
        )
    snapshot = _download(repository["id"], repository["revision"])
    print(f"{repository['id']} is at commit {snapshot.name}, in {snapshot}", file=sys.stderr, flush=True)
    return snapshot


def is_repository(name: str) -> bool:
    """Whether `fetch` would look on the hub for `name`."""
    path = Path(name).expanduser()
    return not path.exists() and _REPOSITORY.fullmatch(name) is not None and not _why_local(path)


def download_command(name: str, directory: str) -> str:
    """The command that brings a repository into `directory`."""
    found = _REPOSITORY.fullmatch(name)
    revision = f" --revision={found['revision']}" if found["revision"] else ""
    return f"hf download {found['id']}{revision} --local-dir={directory}"


def _why_local(path: Path) -> str:
    first = path.parts[0]
    if Path(first).is_dir():
        return f"there is a directory {first} here"
    return f"{first}/ is where local files are kept" if first in LOCAL else ""


def _download(repository: str, revision: str | None) -> Path:
    """Settings and safetensors; the same weights as .bin files only where there are no safetensors."""
    from huggingface_hub import errors, snapshot_download

    try:
        snapshot = Path(
            snapshot_download(repository, revision=revision, allow_patterns=_in(_SETTINGS + _SAFETENSORS))
        )
        if not any(any(snapshot.glob(pattern)) for pattern in _in(_SAFETENSORS)):
            # Of the same commit, even if the branch has moved on in between.
            snapshot_download(repository, revision=snapshot.name, allow_patterns=_in(_SETTINGS + _PICKLED))
        return snapshot
    except errors.GatedRepoError as error:
        raise ConversionError(
            f"{repository} is given only to those who accept its terms; accept them on "
            f"https://huggingface.co/{repository}, then log in here (hf auth login) or set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConversionError(
            f"{repository} does not exist here, and the Hugging Face hub has no model of that name that you may see; "
            "check the spelling, or log in (hf auth login) if it is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConversionError(
            f"{repository} on the Hugging Face hub has no branch, tag or commit {revision!r}; "
            f"https://huggingface.co/{repository}/commits lists them."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ConversionError(
            f"{repository} does not exist here, is not in the hub's cache as a whole, and the hub cannot be reached "
            f"({_reason(error)}). Connect, unset HF_HUB_OFFLINE, or give the path of a copy."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise _failed(repository, error) from error
        raise ConversionError(
            f"The disk is full before all of {repository} was fetched; make room or set HF_HOME to a directory with "
            "more. What has arrived is kept, and the same command goes on from there."
        ) from error
    except Exception as error:  # each transport of the hub's client has kinds of its own
        raise _failed(repository, error) from error


def _failed(repository: str, error: Exception) -> ConversionError:
    return ConversionError(
        f"{repository} does not exist here, and could not be fetched from the Hugging Face hub ({_reason(error)}). "
        "What has arrived is kept; run the same command again."
    )


def _reason(error: BaseException) -> str:
    """The first line of what the error says, or of what caused it."""
    error = error.__cause__ or error
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _in(patterns: tuple[str, ...]) -> list[str]:
    return [directory + pattern for directory in _DIRECTORIES for pattern in patterns]
