"""A folder on any filesystem that fsspec knows, with the four operations a commit needs.

``write`` replaces a small file as a whole, ``create`` writes one only if it is not there yet, ``begin`` streams a large
file that is durable once closed, ``move`` gives a file its final name. On a local disk that is temp file, fsync and
rename or link; on an object store a single PUT (conditional for ``create``): nothing is visible before it is whole.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeVar

from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem

from pipeline import azure, machine
from pipeline.access import connect, options_for
from pipeline.addresses import LONGEST
from pipeline.failures import behind_the_end, passing, status_of

T = TypeVar("T")
FORBIDDEN = (401, 403)
DIGEST_BYTES, BLOCK_BYTES, END_BYTES = 16, 4 << 20, 1 << 16
PART_BYTES = 5 << 20
"""The least that S3 takes as a part of an upload."""
ATTEMPTS = 5
FIRST_WAIT_S = 0.2
FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_ITS_NUMBERS = re.compile(r"\n(?:RequestId|ErrorCode):")
CLIENTS = frozenset({
    "adlfs", "aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpcore", "httpcore2", "httpx",
    "httpx2",
})  # fmt: skip
"""Packages of store clients whose own exceptions are no OSErrors."""


def of_a_client(error: BaseException | None) -> bool:
    """Whether it is a store client's own exception, or a plain one that a client made of its own: the store refused,
    or credentials are missing.
    """
    home = type(error).__module__.partition(".")[0]
    return home in CLIENTS or (home == "builtins" and error is not None and of_a_client(error.__cause__))


def told_by_a_client(error: BaseException) -> str:
    """What a store's client says, in a line; of Azure's without the answer's text, which repeats it as XML."""
    cause = error.__cause__ if type(error).__module__ == "builtins" and error.__cause__ else error
    return f"{type(cause).__name__}: {' '.join(_ITS_NUMBERS.split(str(cause))[0].split())[:LONGEST]}"


def _refused(error: Exception) -> None:
    """A store's refusal is an OSError, whichever client tells of it: it is raised as one."""
    if not isinstance(error, OSError) and of_a_client(error):
        kind = PermissionError if status_of(error.__cause__ or error) in FORBIDDEN else OSError
        raise kind(told_by_a_client(error)) from error


class _AsOSError:
    """`_refused` of what is raised within."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            _refused(error)


_as_os_error = _AsOSError()
"""Entered for each block that is written."""


def patiently(action: Callable[[], T]) -> T:
    """Do it, and again after a dropped connection or a server's error; give up after `ATTEMPTS`.

    A full disk, and answers that will not change (missing, exists, forbidden), are raised at once.
    """
    for attempt in range(ATTEMPTS):
        try:
            try:  # not `_as_os_error`, which costs more than much of what is asked
                return action()
            except Exception as error:
                _refused(error)
                raise
        except FINAL as error:
            if not passing(error) or attempt == ATTEMPTS - 1:
                raise
            machine.here.sleep(FIRST_WAIT_S * 2**attempt)
        except (OSError, TimeoutError) as error:
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
            if full or attempt == ATTEMPTS - 1:
                raise
            machine.here.sleep(FIRST_WAIT_S * 2**attempt)
    raise AssertionError("unreachable")


def version_of(info: dict[str, Any]) -> str:
    """What changes when a file does, from its entry in a listing: an ETag, a digest, or a time."""
    for key in ("ETag", "etag", "md5Hash", "md5", "blob_id", "mtime", "LastModified", "last_modified", "created"):
        if info.get(key):
            return str(info[key]).strip('"')
    return ""


def _sync_folder(path: str) -> None:
    """Make a rename in the folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(handle: IO[bytes]) -> str:
    """BLAKE2b of what is left to read, 128 bits, in hex."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for block in iter(partial(handle.read, BLOCK_BYTES), b""):
        digest.update(block)
    return digest.hexdigest()


class Upload:
    """A write-only file that hashes and counts what goes through it.

    Attributes:
        size: Bytes so far.
        tail: The last of them, `END_BYTES` at most; kept of one that is refused a taken name.
    """

    def __init__(self, handle: IO[bytes], local: bool, once: bool = False) -> None:
        self._handle, self._local, self._once = handle, local, once
        self._digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self.size, self.tail = 0, b""
        self.closed = self._abandoned = False

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if self._abandoned:  # Parquet's writer ends its file once more when it is collected
            return view.nbytes
        with _as_os_error:
            self._handle.write(view)
        self._digest.update(view)
        self.size += view.nbytes
        if self._once:
            self.tail = (self.tail + view.cast("B")[-END_BYTES:])[-END_BYTES:]
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Nothing to do before `close`: a half-written file has no readers."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    @property
    def checksum(self) -> str:
        return self._digest.hexdigest()

    def close(self) -> None:
        """Durable from here on: fsync on a local disk, the end of the upload on an object store.

        Raises:
            FileExistsError: It was begun to be refused a taken name, and the name is: by another file, or by this one,
                of which a first answer was lost.
        """
        if self.closed:
            return
        self.closed = True
        try:
            if self._local:
                self._handle.flush()
                os.fsync(self._handle.fileno())
        finally:
            try:
                with _as_os_error:
                    self._handle.close()
            except OSError:
                if self._once:
                    self._forget()
                raise

    def abandon(self) -> None:
        """Close without finishing: an object store keeps nothing, a local disk a part that is to be removed."""
        if not self.closed:
            self.closed = self._abandoned = True
            self._discard()

    def _forget(self) -> None:
        """Whatever a client does when this is collected, it must not be to end it. S3 keeps its parts, which cost."""
        with suppress(Exception):
            self._handle.closed = True  # type: ignore[misc]
            if getattr(self._handle, "parts", None):
                self._discard()

    def _discard(self) -> None:
        discard = getattr(self._handle, "discard", None)
        if discard is None:
            self._handle.close()
        else:  # fsspec's buffered uploads: closing would complete them
            with suppress(AttributeError):
                self._handle.closed = True  # type: ignore[misc]
            discard()


def _works(check: Callable[[], bool]) -> bool:
    try:
        return check()
    except (NotImplementedError, ValueError, TypeError, FileNotFoundError):
        return False  # a client that does not know how; that the store is away is told as it is


@dataclass(frozen=True)
class Folder:
    """A folder; names are relative to it, with ``/``."""

    url: str
    fs: Any
    root: str
    local: bool

    @staticmethod
    def at(url: str, storage_options: Mapping[str, Any] | None = None) -> Folder:
        """The folder at a path or address; it need not exist.

        Args:
            storage_options: fsspec's; left out: those that were granted for the address (`pipeline.access`).

        Raises:
            ValueError: No filesystem is installed for the address's protocol, or its options do not fit it.
        """
        try:
            fs, root = connect(url, storage_options or options_for(url))
        except ImportError as error:
            raise ValueError(f"{url}: {error}") from None
        return Folder(url, fs, root.rstrip("/") or "/", isinstance(fs, LocalFileSystem))

    def path(self, name: str) -> str:
        """Where a name lies: inside, whoever wrote the record that holds the name, or made the folder.

        Raises:
            ValueError: It leads out, itself or as a link on a disk.
        """
        if name.startswith("/") or (".." in name and ".." in name.split("/")):
            raise ValueError(f"{self.url}: names {name[:200]!r}, which lies outside; no run leaves such a folder")
        if not name:
            return self.root
        if self.local:
            self._refuse_links_out(name)
        return f"{self.root}/{name}"

    def _refuse_links_out(self, name: str) -> None:
        """Whoever made a folder may not have what lies elsewhere on this disk read, published or written over."""
        place = self.root
        for part in name.split("/"):
            place = f"{place}/{part}"
            if os.path.islink(place):
                target, home = os.path.realpath(place), os.path.realpath(self.root)
                if os.path.commonpath((target, home)) != home:
                    below = place[len(self.root) + 1 :]
                    raise ValueError(f"{self.url}: {below!r} is a link to {target}, which lies outside; no run leaves "
                                     "such a folder: put the file itself in its place, or delete the link")  # fmt: skip

    def exists(self, name: str) -> bool:
        path = self.path(name)
        return bool(patiently(lambda: self._fresh(path).exists(path)))

    def size(self, name: str) -> int | None:
        """Bytes, or None if it is not there."""
        path = self.path(name)
        try:
            return int(patiently(lambda: self._fresh(path).size(path)))
        except FileNotFoundError:
            return None

    def _fresh(self, path: str) -> Any:
        """The filesystem, which knows nothing of earlier of what lies beside a path."""
        if not self.local:
            self.fs.invalidate_cache(path.rpartition("/")[0])
        return self.fs

    def read(self, name: str) -> bytes:
        path = self.path(name)
        if self.local:
            with open(path, "rb") as handle:
                return handle.read()
        at_once = {"max_concurrency": 1} if "s3" in self.fs.protocol else {}  # s3fs asks for the size first otherwise
        return bytes(patiently(lambda: self._fresh(path).cat_file(path, **at_once)))

    def end(self, name: str, size: int) -> bytes | None:
        """The last bytes of a file on a store, in one request; None if it does not have this size."""
        start = max(0, size - END_BYTES)
        found = self._part(name, start, size + 1)
        return found if len(found) == size - start else None

    def _part(self, name: str, start: int, stop: int) -> bytes:
        path = self.path(name)

        def part() -> bytes:
            try:
                return bytes(self._fresh(path).cat_file(path, start=start, end=stop))
            except Exception as error:
                if behind_the_end(error):
                    return b""
                raise

        return patiently(part)

    def listing(self, name: str) -> dict[str, int]:
        """File name -> size of the files directly in a subfolder, sorted; empty if there is none."""
        if self.local:
            return dict(sorted(self._scan(name)))
        path = self.path(name)
        try:
            infos = patiently(lambda: self._fresh(f"{path}/x").ls(path, detail=True, refresh=True))
        except FileNotFoundError:
            return {}
        files = {info["name"].rpartition("/")[2]: int(info["size"] or 0) for info in infos if info["type"] == "file"}
        return dict(sorted(item for item in files.items() if item[0]))

    def _scan(self, name: str) -> Iterator[tuple[str, int]]:
        try:
            entries = os.scandir(self.path(name))
        except FileNotFoundError:
            return
        with entries as found:
            for entry in found:
                with suppress(FileNotFoundError):  # of one that has gone since: the others are there
                    if entry.is_file():
                        yield entry.name, entry.stat().st_size

    def _parent(self, name: str) -> str:
        parent = self.path(name).rpartition("/")[0]
        os.makedirs(parent, exist_ok=True)
        return parent

    def write(self, name: str, data: bytes | Callable[[], bytes]) -> None:
        """Put a small file in place as a whole: readers see the old one or the new one.

        Args:
            data: Or what makes it, for each attempt anew.
        """
        make = data if callable(data) else lambda: data
        if not self.local:
            patiently(lambda: self.fs.pipe_file(self.path(name), make()))
            return
        self._replace(name, make(), lambda temp: os.replace(temp, self.path(name)))

    def create(self, name: str, data: bytes) -> bool:
        """Put a small file in place unless there is one already.

        Returns:
            Whether the file there now is this one. (After a dropped connection a store, or NFS, may report our own as
            existing.)
        """
        if self.local:
            try:
                self._replace(name, data, lambda temp: os.link(temp, self.path(name)))
                return True
            except FileExistsError:
                return self.read(name) == data
        try:
            patiently(lambda: self.fs.pipe_file(self.path(name), data, mode="create"))
            return True
        except FileExistsError:
            return self.read(name) == data

    def is_exclusive(self, name: str) -> bool:
        """Whether `create` refuses a name that is taken, as asked of a new file that is made and removed for it."""
        try:
            return self.create(name, b"first") and not self.create(name, b"second")
        finally:
            self.remove(name)

    def lacks(self, name: str) -> list[str]:
        """What a run needs of a store and this one does not do, as asked of two new files, made and removed for it."""
        first, second, other = b"first", b"second one", f"{name}.copy"
        place, _, base = name.rpartition("/")

        def replaced() -> bool:
            self.write(name, second)
            return self.read(name) == second

        def copied() -> bool:
            self.copy(name, other)
            return self.read(other) == second

        def deleted() -> bool:
            self.remove(name)
            return not self.exists(name) and base not in self.listing(place)

        needs: dict[str, Callable[[], bool]] = {
            "create a file": lambda: self.create(name, first),
            "list what has just been written": lambda: self.listing(place).get(base) == len(first),
            "tell a file's size": lambda: self.size(name) == len(first),
            "read a part of a file": lambda: self._part(name, 1, 3) == first[1:3],
            "replace a file": replaced,
            "copy a file": copied,
            "forget what has just been deleted": deleted,
        }
        try:
            return [need for need, works in needs.items() if not _works(works)]
        finally:
            self.remove(name)
            self.remove(other)

    def _replace(self, name: str, data: bytes, place: Callable[[str], None]) -> None:
        parent = self._parent(name)
        temp = f"{parent}/.{machine.here.token()}.tmp"
        try:
            with open(temp, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            place(temp)
            _sync_folder(parent)
        finally:
            if os.path.exists(temp):
                os.unlink(temp)

    def begin(self, name: str, once: bool = False, part: int | None = None) -> Upload:
        """Start a large file; it counts once closed.

        Args:
            once: On a store: its end is refused if there is a file of this name by then.
            part: Bytes that a store is sent at a time, rather than what its client thinks fit.

        Raises:
            FileExistsError: As `Upload.close` does, if the client asks at once.
        """
        if self.local:
            self._parent(name)
            return Upload(open(self.path(name), "wb", buffering=1 << 20), True)
        path, mode, sent = self.path(name), "xb" if once else "wb", {} if part is None else {"block_size": part}
        return Upload(patiently(lambda: self.fs.open(path, mode, **sent)), False, once)

    def ends_once(self, name: str) -> bool:
        """Whether a store refuses a taken name at the end of an upload in parts, and says that it does: asked with two
        files of 5 MB, made and removed for it.
        """

        def uploaded(byte: bytes) -> bool:
            with suppress(FileExistsError):  # also where a first answer was lost
                upload = self.begin(name, True, PART_BYTES)
                upload.write(byte * PART_BYTES)
                upload.write(byte)
                upload.close()
            return self.end(name, PART_BYTES + 1) == byte * min(END_BYTES, PART_BYTES + 1)

        try:
            return (
                not self.local
                and _works(lambda: patiently(lambda: uploaded(b"1")))
                and not patiently(lambda: uploaded(b"2"))
            )
        except OSError as error:
            if passing(error):
                raise
            return False  # it refuses the condition
        finally:
            self.remove(name)

    def open(self, name: str) -> Any:
        """Open for reading, seekable."""
        path = self.path(name)
        if self.local:
            return open(path, "rb")
        return patiently(lambda: self._fresh(path).open(path, "rb"))

    def move(self, name: str, target: str) -> None:
        """Give a file another name. An object store copies; a crash between leaves both, which readers accept."""
        if self.local:
            parent = self._parent(target)
            os.replace(self.path(name), self.path(target))
            _sync_folder(parent)
            return
        self.copy(name, target)
        self.remove(name)

    def copy(self, name: str, target: str) -> None:
        """Copy a file on an object store, which does it by itself; it is whole on return."""
        copy = partial(azure.copy, self.fs) if "abfs" in self.fs.protocol else self.fs.cp_file
        patiently(lambda: copy(self.path(name), self.path(target)))  # fsspec's `copy` would list both first

    def remove(self, name: str) -> None:
        """Delete a file; it is fine if it is gone already."""
        with suppress(FileNotFoundError):
            patiently(lambda: self.fs.rm_file(self.path(name)))
        if not self.local:
            self.fs.invalidate_cache(self.path(name).rpartition("/")[0])

    @property
    def at_once(self) -> int:
        """How many files a request deletes."""
        return 1 if self.local or "s3" not in self.fs.protocol or has_magic(self.root) else 1000

    def remove_all(self, names: Sequence[str]) -> None:
        """Delete up to `at_once` files; those that are gone already are fine."""
        if len(names) > 1:
            patiently(lambda: self.fs.rm([self.path(name) for name in names]))
        else:
            self.remove(*names)

    def names(self) -> Iterator[str]:
        """Names directly in the folder, files and folders."""
        try:
            infos = patiently(lambda: self._fresh(self.path("x")).ls(self.root, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return
        for path in sorted(infos):
            name = path.rstrip("/").rpartition("/")[2]
            if name and path.rstrip("/") != self.root:
                yield name
