"""Commit records, added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.output.commit import Record, fold_errors
from pipeline.output.schema import means, merge_measures

_COUNTS = ("shards", "ok", "failed", "duplicates", "bytes")


@dataclass
class Tally:
    """Running totals over commit records."""

    shards: int = 0
    ok: int = 0
    failed: int = 0
    duplicates: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        self._errors: Counter[str] = Counter()
        self._measures: dict[str, dict[str, float]] = {}
        self.made_with: Counter[str] = Counter()
        """Versions that shards were made with -> shards; those of older code say none."""

    def add(self, record: Record) -> None:
        self.shards += 1
        self.ok += record.rows_ok
        self.failed += record.rows_failed
        self.duplicates += record.rows_duplicate
        self.bytes += record.size
        self._errors.update(record.errors)
        if record.made_with:
            self.made_with[record.made_with] += 1
        merge_measures(self._measures, record.measures)

    def join(self, said: Mapping[str, Any]) -> None:
        """Add what another one `says`."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + int(said[name]))
        self._errors.update({reason: int(count) for reason, count in said["errors"].items()})
        self.made_with.update({name: int(count) for name, count in said["made_with"].items()})
        merge_measures(self._measures, said["measures"])

    def says(self) -> dict[str, Any]:
        """All of it, as JSON may hold it."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {**counts, "errors": dict(self._errors), "made_with": dict(self.made_with), "measures": self._measures}

    @property
    def rows(self) -> int:
        return self.ok + self.failed + self.duplicates

    @property
    def errors(self) -> dict[str, int]:
        return fold_errors(self._errors)

    @property
    def measures(self) -> dict[str, dict[str, float]]:
        return means(self._measures)
