"""A finished output as a dataset repository of the Hugging Face hub: card, data files, products.

Contents go up first, a few files at a time, and are named by commits afterwards: the hub keeps a content by its hash,
so what an interrupted push has sent is not sent again. Up to `COMMIT_FILES` files are one commit, all there or none.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.copies import fetch
from pipeline.output.dataset import PART, Output
from pipeline.output.planfile import OutputError
from pipeline.output.products import listed
from pipeline.output.publish import CARD
from pipeline.output.verify import verify

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

COMMIT_FILES = 500
GROUP_FILES, GROUP_BYTES = 8, 2 << 30
"""Files that are sent together; of a store, so much lies on this machine's disk (or the one file that is larger)."""
ANSWER_S = 10.0
"""For the first answer of a hub."""
TAG = "latentmill"
SHA256_DIGITS = 64


@dataclass(frozen=True)
class Pushed:
    """What a push did, or with `dry_run` would do.

    Attributes:
        url: The repository's page.
        files, bytes: The dataset's.
        sent_files, sent_bytes: Those of them that the repository did not have.
        deleted: Files of an earlier dataset that were removed with the same commit.
    """

    url: str
    files: int
    bytes: int
    sent_files: int
    sent_bytes: int
    deleted: tuple[str, ...]


@dataclass(frozen=True)
class _Repository:
    """Where files go.

    Attributes:
        there: Path -> hash of its content: SHA-256 of large files, git's SHA-1 of small ones.
    """

    api: HfApi
    name: str
    revision: str | None
    there: Mapping[str, str]


def push(
    path: str, name: str, *, revision: str | None = None, private: bool = False, dry_run: bool = False,
    tell: Callable[[str], None] = lambda said: None,
) -> Pushed:  # fmt: skip
    """Make or renew the dataset repository `name` from an output. Safe to repeat: what is there is not sent again.

    Args:
        path: The output folder.
        name: ``user/name``.
        revision: A branch, made if it is not there; None: the main one.
        private: A repository that has to be made is; one that is there has to be.
        dry_run: Change nothing on the hub.
        tell: Gets a line about how far it is.

    Raises:
        OutputError: The output is unfinished or damaged.
        ValueError, OSError: The hub refuses; the message is one sentence.
    """
    output = Output.open(path)
    _require_name(name)
    with _hub(name):
        api = _logged_in(dry_run)
        found = _find(api, name, revision, private)
    _require_whole(path)
    files = _files(output)
    with _hub(name):
        if not dry_run:
            _make(api, name, revision, private, found)
        stale = sorted(own for own in found or {} if _is_ours(own, files) and own not in files)
        repository = _Repository(api, name, revision, found or {})
        sent = list(_send(output, repository, files, dry_run, tell))
        if not dry_run:
            _commit(repository, sent, stale)
        url = f"{api.endpoint}/datasets/{name}" + (f"/tree/{revision}" if revision else "")
    sent_bytes = sum(operation.upload_info.size for operation in sent)
    return Pushed(url, len(files), sum(files.values()), len(sent), sent_bytes, tuple(stale))


def _require_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise ValueError("a dataset's name on the hub is USER/NAME, of letters, digits, '-', '_' and '.'")


def _require_whole(path: str) -> None:
    report = verify(path)
    if not report.ok:
        first, more = report.problems[0], len(report.problems) - 1
        raise OutputError(f"{path}: not pushed, `latentmill verify` says: {first}{f' (and {more} more)' * (more > 0)}")


def _files(output: Output) -> dict[str, int]:
    """Name -> bytes of all that a reader of the dataset wants: no bookkeeping, no report."""
    data = {f"data/{name}": size for name, size in output.folder.listing("data").items()}
    products = {product.name: product.size for product in listed(output)}
    return {CARD: output.folder.size(CARD) or 0, **data, **products}


def _is_ours(own: str, files: Mapping[str, int]) -> bool:
    """Whether a file of the repository is such as a push leaves there: a shard, or among a product's files."""
    folder = own.partition("/")[0]
    if folder == "data":
        return PART.fullmatch(own.removeprefix("data/")) is not None
    return folder in {name.partition("/")[0] for name in files if "/" in name}


def _logged_in(dry_run: bool) -> HfApi:
    """Who only looks needs no login, and sees what is public."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None and not dry_run:
        raise ValueError("not logged in to the hub: run `hf auth login`, or set HF_TOKEN to a token that may write")
    return HfApi(library_name=TAG)


def _find(api: HfApi, name: str, revision: str | None, private: bool) -> dict[str, str] | None:
    """The files of the repository's branch with their hashes, as of the main one where the branch is to be made.

    Returns:
        None where there is no repository.

    Raises:
        ValueError: It holds something else, or is public and should not be.
    """
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.dataset_info(name, timeout=ANSWER_S)
    except RepositoryNotFoundError:
        return None
    if private and not info.private:
        raise ValueError(f"{name} is on the hub already, and public: make it private there, or choose another name")
    try:
        info = api.dataset_info(name, revision=revision, timeout=ANSWER_S) if revision else info
    except RevisionNotFoundError:
        revision = None
    tree = api.list_repo_tree(name, recursive=True, revision=revision, repo_type="dataset")
    there = {own.path: own.lfs.sha256 if own.lfs else own.blob_id for own in tree if isinstance(own, RepoFile)}
    tags = (info.card_data.to_dict() if info.card_data else {}).get("tags") or ()
    if TAG not in tags and there.keys() - {".gitattributes"}:
        raise ValueError(f"{name} holds another dataset, none that was pushed from here: choose another name")
    return there


def _make(api: HfApi, name: str, revision: str | None, private: bool, found: Mapping[str, str] | None) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    if found is None:
        api.create_repo(name, repo_type="dataset", private=private or None, exist_ok=True)
        try:
            api.dataset_info(name, timeout=ANSWER_S)
        except RepositoryNotFoundError:
            raise ValueError(f"the name {name} is taken on the hub by something that is no dataset") from None
    if revision is not None:
        api.create_branch(name, branch=revision, repo_type="dataset", exist_ok=True)


def _send(
    output: Output, repository: _Repository, files: Mapping[str, int], dry_run: bool, tell: Callable[[str], None]
) -> Iterator[CommitOperationAdd]:
    """Send the contents that the hub lacks.

    Yields:
        The files that a commit has to name.
    """
    count, done, total = 0, 0, sum(files.values())
    for group in _groups(files):
        with _contents(output, repository, group) as contents:
            new = _new(repository, contents)
            if new and not dry_run:
                repository.api.preupload_lfs_files(
                    repository.name, new, repo_type="dataset", revision=repository.revision, free_memory=True
                )
                for operation in new:
                    if isinstance(operation.path_or_fileobj, str):  # small: it goes up with the commit
                        operation.path_or_fileobj = Path(operation.path_or_fileobj).read_bytes()
            yield from new
        count, done = count + len(group), done + sum(group.values())
        tell(f"{count:,} of {len(files):,} files, {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")


def _groups(files: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Files that are sent together."""
    group: dict[str, int] = {}
    for name, size in files.items():
        if group and (len(group) == GROUP_FILES or sum(group.values()) + size > GROUP_BYTES):
            yield group
            group = {}
        group[name] = size
    yield group


@contextmanager
def _contents(output: Output, repository: _Repository, group: Mapping[str, int]) -> Iterator[dict[str, str | bytes]]:
    """Name -> where the file lies on this machine; the card is what it says on the hub."""
    folder = output.folder
    with tempfile.TemporaryDirectory(prefix="latentmill-push-") as scratch:
        contents: dict[str, str | bytes] = {}
        for name, size in group.items():
            if name == CARD:
                contents[name] = card_for(folder.read(CARD).decode(), repository.name, repository.revision).encode()
            elif folder.local:
                contents[name] = folder.path(name)
            else:
                fetch(folder.fs, {"name": folder.path(name), "size": size}, Path(scratch, name))
                contents[name] = str(Path(scratch, name))
        yield contents


def _new(repository: _Repository, contents: Mapping[str, str | bytes]) -> list[CommitOperationAdd]:
    """Those whose content the repository does not have under their name."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    return [own for own in operations if not _is_there(own, repository.there.get(own.path_in_repo))]


def _is_there(operation: CommitOperationAdd, known: str | None) -> bool:
    """Whether a content is the one that the hub has under the name, by the hash that it keeps of it."""
    if known is None:
        return False
    if len(known) == SHA256_DIGITS:
        return operation.upload_info.sha256.hex() == known
    git = hashlib.sha1(b"blob %d\0" % operation.upload_info.size, usedforsecurity=False)
    with operation.as_file() as file:
        while block := file.read(1 << 20):
            git.update(block)
    return git.hexdigest() == known


def _commit(repository: _Repository, operations: Sequence[CommitOperationAdd], stale: Sequence[str]) -> None:
    """Name what was sent; the card, and the removal of what an earlier dataset had, come with the first commit."""
    from huggingface_hub import CommitOperationDelete

    changes: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(own) for own in stale]
    changes += operations
    parts = [changes[start : start + COMMIT_FILES] for start in range(0, len(changes), COMMIT_FILES)]
    for number, part in enumerate(parts, 1):
        of = f", part {number} of {len(parts)}" if len(parts) > 1 else ""
        repository.api.create_commit(
            repository.name, part, commit_message=f"Pushed with latentmill{of}", repo_type="dataset",
            revision=repository.revision,
        )  # fmt: skip


def card_for(card: str, name: str, revision: str | None) -> str:
    """A dataset card that speaks of the repository, and no more of the folder in which the run wrote it."""
    opened = re.search(r'^dataset = (load_dataset\((?:"parquet", data_files=)?"(.+?)(?:/data/part-[^"]+)?".*\))$',
                       card, re.MULTILINE)  # fmt: skip
    if opened is None:
        return card
    at = f', revision="{revision}"' if revision else ""
    text = card.replace(opened[1], f'load_dataset("{name}"{at}, split="train")')
    copy = name.rpartition("/")[2]
    named = rf"([\"'`]|latentmill [\w-]+ ){re.escape(opened[2])}(?=[/\"'` \n])"  # `out` is a word of prose too
    local = re.sub(named, lambda found: found[1] + copy, text)
    if local == text:
        return text
    branch = f" --revision {revision}" if revision else ""
    fetched = f"hf download {name} --repo-type dataset{branch} --local-dir {copy}"
    return f"{local.rstrip()}\n\nThe folder `{copy}` above is a copy of this repository:\n\n```sh\n{fetched}\n```\n"


@contextmanager
def _hub(name: str) -> Iterator[None]:
    """While it lasts the hub's client says nothing by itself, and what it raises is a sentence."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        yield
    except Exception as error:
        said = _sentence(error, name)
        if said is None:
            raise
        raise OSError(said) from error
    finally:
        enable_progress_bars()
        logging.set_verbosity(verbosity)


def _sentence(error: BaseException, name: str) -> str | None:
    """What the hub's refusal means to the user; None where it is not the hub's."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # of an upload's thread
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return "the hub is switched off here: unset HF_HUB_OFFLINE"
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        if code == 401:
            return "the hub does not know this token: run `hf auth login`, or set HF_TOKEN to one that may write"
        if code in (403, 404):
            return f"your token may not write to {name}: log in as its owner, or choose a name of your own"
        told = error.server_message or error.response.reason_phrase
        return f"the hub answers {code} ({told}); push again, what was sent is kept"
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
        told = str(error) or type(error).__name__
        return f"the hub cannot be reached at {constants.ENDPOINT} ({told}); push again, what was sent is kept"
    return None
