"""What has been measured so far, in a file that is whole after each measure, and the table made of it."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOUR = 3600.0


@dataclass(frozen=True)
class Record:
    """The file of one card. A measure is an entry of ``measures``: its `state` (running, done, failed, skipped), and
    `found`, `error` or `why`."""

    path: Path

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {"measures": {}}

    def entry(self, name: str) -> dict[str, Any]:
        return self.read()["measures"].get(name, {})

    def write(self, name: str, **entry: Any) -> None:
        """Replace one measure's entry, at once and as a whole."""
        note = self.read()
        note["measures"][name] = entry
        self._replace(note)

    def describe(self, **about: Any) -> None:
        """Add to what is said of the machine."""
        self._replace({**about, **self.read()} | about)

    def _replace(self, note: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_name(f"{self.path.name}.part")
        with draft.open("w") as file:
            file.write(json.dumps(note, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)


def slug(card: str) -> str:
    """A card's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def table(note: dict[str, Any], price: float) -> str:
    """Markdown: what a million rows cost by each measure that says what a row takes.

    Args:
        note: As `Record.read` gives it.
        price: Of an hour of the card, in dollars.
    """
    card = note.get("card", "card")
    lines = [
        f"| {card} | limit | rows/s | share of the card's peak | hours a million rows | at ${price:g} an hour |",
        "|---|---|---|---|---|---|",
    ]
    for entry in note["measures"].values():
        for job in entry.get("found", {}).get("jobs", ()):
            hours = 1e6 * job["seconds_a_row"] / HOUR
            share = job.get("share_of_peak")
            told = "" if share is None else f"{share:.0%}"
            lines.append(
                f"| {job['job']} | {job['limit']} | {1 / job['seconds_a_row']:.4g} | {told} | {hours:.3g} | "
                f"{hours * price:,.4g} |"
            )
    lines.append("")
    for name, entry in note["measures"].items():
        state = entry["state"]
        why = entry.get("why") or entry.get("error", "").strip().splitlines()[-1:] or ""
        told = why if isinstance(why, str) else why[0]
        lines.append(f"- {name}: {state}{f' ({told})' if told else ''}")
    return "\n".join(lines) + "\n"
