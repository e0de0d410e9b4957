"""Whether an input file is still the one that the run was planned with, asked when it is opened."""

from __future__ import annotations

from pipeline.access import connect
from pipeline.input.files import InputFile
from pipeline.input.read import scanned_again
from pipeline.input.rows import Pin, Span
from pipeline.input.source import GENERATED, Source, SourceError
from pipeline.storage import patiently, version_of


class Pins:
    """Compares files with what the plan says of them. Each that has another time stamp is scanned once.

    Folders of pictures on a store are left to the driver, which lists them once more before it publishes: a request a
    picture would take as long as fetching it.

    Args:
        source: Resolved.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._same: set[tuple[str, int, str]] = set()
        """Files, as they are now, whose content has been found to be the planned one."""

    def check(self, span: Span) -> None:
        """Ask before a span is read.

        Raises:
            SourceError: Its file has changed since the run was planned, or is gone.
        """
        far = "://" in span.path
        if span.pin is None or self._source.format in GENERATED.values() or (far and self._source.format == "images"):
            return
        now = self._now(span)
        key = (span.path, now.size, now.version)
        if (now.size, now.version) == (span.pin.size, span.pin.version) or key in self._same:
            return
        scan, same = scanned_again(self._source, now, span.pin.digest, span.pin.rows)
        if not same:
            raise SourceError(f"{span.path}: {changed(span.pin, now.size, scan.rows)}")
        self._same.add(key)

    def _now(self, span: Span) -> InputFile:
        filesystem, path = connect(self._source.whole(span.path), self._source.storage_options)
        filesystem.invalidate_cache(path.rpartition("/")[0])
        try:
            info = patiently(lambda: filesystem.info(path))
        except FileNotFoundError:
            raise SourceError(f"{span.path}: is gone; the input changed during the run") from None
        return InputFile(span.name, span.path, int(info["size"] or 0), version_of(info))


def changed(pin: Pin, size: int, rows: int) -> str:
    """What to tell of a file that is not the planned one."""
    was, now = f"{pin.rows} rows in {pin.size} bytes", f"{rows} rows in {size} bytes"
    what = "other content of that size" if was == now else now
    return (
        f"the input changed during the run: {was} were planned, there are {what} now; put the file back and run the "
        "job again, or name another output folder"
    )
