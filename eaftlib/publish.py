"""A checkpoint with its card on the Hugging Face hub, through the hub's own client."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError, PublishError
from .evaluation.gates import Gates
from .evaluation.results import Result
from .files import HUB_NAME
from .model import fingerprint
from .model.checkpoint import Checkpoint
from .pruning.slicing import MANIFEST, read_manifest
from .report import card

_OF_THE_HUB = {".gitattributes"}  # what a new repository has of its own


def publish(folder: Path, name: str, result: Result, baseline: Result, gates: Gates, *, public: bool) -> str:
    """Write the card, send it with the files that the manifest lists, as one commit, and return the commit's address.

    name: owner/name on the hub; made, private unless ``public``, where it is not there. Repeated after an interruption, files
    that the hub has are not sent again. Raises PublishError when the hub refuses or cannot be reached, when the repository
    holds other files or is not as private as asked; CheckpointError where a file differs from the manifest; and what
    ``card.build`` raises. A verdict that says FAIL is no hindrance: the card says so first.
    """
    return _publish(folder, name, lambda checkpoint: card.build(checkpoint, result, baseline, gates), public)


def publish_unjudged(folder: Path, name: str) -> str:
    """The same where the checkpoint was just written and nobody has evaluated it: for its owner alone, and its card says so.

    ``publish`` of the same checkpoint with its results later changes nothing but the card.
    """
    return _publish(folder, name, card.unjudged, public=False)


def require_place(name: str) -> None:
    """Raise PublishError now, before hours of work, unless a checkpoint can go there: its repository is made if need be."""
    with _explained(name):
        _place(_client(), name, public=False)


def _publish(folder: Path, name: str, make_card: Callable[[Checkpoint], card.Card], public: bool) -> str:
    if not re.fullmatch(HUB_NAME, name):
        raise PublishError(f"found {name!r}, expected owner/name of a repository on the hub")
    checkpoint = Checkpoint(str(folder))
    files, made = verified_files(checkpoint), make_card(checkpoint)
    written = card.write(made, folder, name)
    return _send(name, {file.name: file for file in [*files, folder / MANIFEST, written]}, made.label, public)


def verified_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that the manifest lists. Raises CheckpointError unless each has the bytes that were written."""
    listed = read_manifest(checkpoint).get("sha256")
    if not listed:
        raise CheckpointError(f"{checkpoint.folder} has no {MANIFEST} that lists its files; prune again")
    for file, expected in listed.items():
        path = checkpoint.folder / file
        found = fingerprint.file_sha256(path) if path.is_file() else "no such file"
        if found != expected:
            raise CheckpointError(
                f"{path} is not the file that was written: its SHA-256 is {found}, {MANIFEST} says {expected}. Prune again."
            )
    return [checkpoint.folder / file for file in listed]


def _send(name: str, files: dict[str, Path], label: str, public: bool) -> str:
    from huggingface_hub import CommitOperationAdd

    api = _client()
    with _explained(name):
        _require_no_others(_place(api, name, public), files)
        # One commit: nobody ever sees a checkpoint of which a part is missing. The client first sends large files, asking for
        # each whether the hub has it.
        additions = [CommitOperationAdd(path, str(file)) for path, file in files.items()]
        return api.create_commit(name, additions, commit_message=f"Checkpoint {label}").commit_url


def _client():
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise PublishError("no token of the hub: set HF_TOKEN, or log in with its client (hf auth login)")
    return HfApi()


def _place(api, name: str, public: bool):
    """What the hub says of the repository, which is made if need be, and as private as asked."""
    api.create_repo(name, private=not public, exist_ok=True)
    info = api.model_info(name)
    if info.private == public:
        found, wanted = ("private", "public") if info.private else ("public", "private")
        raise PublishError(
            f"{info.id} is there and {found}, not {wanted}: change that on its page, or choose another name"
        )
    return info


def _require_no_others(info, files: dict[str, Path]) -> None:
    """The repository holds nothing that would be taken for a part of this checkpoint."""
    others = sorted({sibling.rfilename for sibling in info.siblings} - files.keys() - _OF_THE_HUB)
    if others:
        raise PublishError(
            f"{info.id} holds files that are none of this checkpoint's: {', '.join(others)}. Remove them there, or choose "
            "another name."
        )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What the client raises, as PublishError: RuntimeError for a large file, ValueError for an answer that makes no sense."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise PublishError(
            f"{name} is not published: {error}{cause}. Repeat the command: what has arrived is not sent again."
        ) from error
