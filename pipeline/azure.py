"""Azure's blobs, where fsspec's client (adlfs) drops what the service says."""

from __future__ import annotations

from typing import Any

from pipeline import machine
from pipeline.failures import status_of

PAUSE_S, GONE = 0.5, 404


def copy(fs: Any, source: str, target: str) -> None:
    """Copy a blob within its store, and wait until it is whole: Azure may answer first and copy later, and whoever
    deletes the source then has neither.

    Raises:
        FileNotFoundError: The source is gone.
        OSError: The service has given the copy up.
    """
    from fsspec.asyn import sync

    try:
        state = sync(fs.loop, _started, fs, source, target)
    except Exception as error:
        if status_of(error) == GONE:
            raise FileNotFoundError(source) from error
        raise
    while state == "pending":
        machine.here.sleep(PAUSE_S)
        state = sync(fs.loop, _state, fs, target)
    fs.invalidate_cache(target.rpartition("/")[0])
    if state != "success":
        raise OSError(f"{target}: the store has given up copying {source} ({state})")


def _blob(fs: Any, path: str) -> Any:
    container, name, _ = fs.split_path(path)
    return fs.service_client.get_blob_client(container, name)


async def _started(fs: Any, source: str, target: str) -> str:
    async with _blob(fs, source) as found, _blob(fs, target) as copied:
        return str((await copied.start_copy_from_url(found.url))["copy_status"])


async def _state(fs: Any, target: str) -> str:
    async with _blob(fs, target) as copied:
        return str((await copied.get_blob_properties()).copy.status)
