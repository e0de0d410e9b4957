"""Commands that take the output of one run, and not the folder of a chain."""

from __future__ import annotations


def single(out: str, verb: str) -> None:
    """Refuse a chain's folder.

    Raises:
        ValueError: It is one; the message names a step's.
    """
    from jobs.kinds.chain import read_listing

    if steps := read_listing(out):
        raise ValueError(f"{out} is a chain's folder: {verb} one of its steps, such as {steps[-1]['output']}")
