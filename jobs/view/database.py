"""DuckDB as the app uses it: it reads the folders that are shown, and no other file or address."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs.view.columns import literal
from jobs.view.query import BadRequest, Sql

if TYPE_CHECKING:
    from pipeline.storage import Folder

LONGEST_S = 60
MEMORY = "2GB"
CLOSING_S = 10
AT_ONCE = 4
"""Queries that run beside each other; more wait."""


class Database:
    """One for all runs that are shown; safe to use from several threads.

    Args:
        folders: What it may read.
    """

    def __init__(self, folders: Sequence[Folder]) -> None:
        import duckdb

        self._scratch = tempfile.mkdtemp(prefix="latentmill-view-")
        self._con = duckdb.connect(":memory:")
        self._turns = threading.Semaphore(AT_ONCE)
        self._running: set[Any] = set()
        for fs in {id(folder.fs): folder.fs for folder in folders if not folder.local}.values():
            self._con.register_filesystem(fs)  # httpfs would be an extension from the web
        allowed = ", ".join(literal(address(folder, "").rstrip("/") + "/") for folder in folders)
        for line in (
            f"temp_directory = {literal(self._scratch)}", f"memory_limit = '{MEMORY}'",
            "parquet_metadata_cache = true", "autoinstall_known_extensions = false",
            "autoload_known_extensions = false", f"allowed_directories = [{allowed}]",
            "enable_external_access = false", "lock_configuration = true",
        ):  # fmt: skip
            self._con.execute(f"SET {line}")

    def rows(self, query: Sql) -> list[tuple[Any, ...]]:
        """The rows of an answer, which the query itself keeps few.

        Raises:
            BadRequest: It took too long, or too much memory.
            OSError: A file cannot be read, or is not there any more.
        """
        import duckdb

        with self._turns:
            cursor = self._con.cursor()
            self._running.add(cursor)
            timer = threading.Timer(LONGEST_S, cursor.interrupt)
            timer.start()
            try:
                found: list[tuple[Any, ...]] = cursor.execute(query.text, list(query.values)).fetchall()
                return found
            except duckdb.InterruptException:
                raise BadRequest(f"this took more than {LONGEST_S} s and was stopped; filter further first") from None
            except duckdb.OutOfMemoryException:
                raise BadRequest(f"this takes more than {MEMORY} of memory; filter further first") from None
            except duckdb.IOException as error:
                raise OSError(str(error)) from None
            finally:
                timer.cancel()
                cursor.close()
                self._running.discard(cursor)

    def close(self) -> None:
        """Interrupt what runs, wait for it to end, and let go of everything; nothing is answered any more."""
        until = time.monotonic() + CLOSING_S
        while self._running and time.monotonic() < until:
            for cursor in list(self._running):
                cursor.interrupt()  # has no effect on one that is about to begin
            time.sleep(0.02)
        self._con.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


def address(folder: Folder, name: str) -> str:
    """How DuckDB names a file of a folder."""
    if folder.local:
        return folder.path(name)
    protocol = folder.fs.protocol
    return f"{protocol if isinstance(protocol, str) else protocol[0]}://{folder.path(name)}"
