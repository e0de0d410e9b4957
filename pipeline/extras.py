"""Parts of latentmill that are packages of their own, and what to say where they are asked for and not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingExtra(ValueError):
    """Something is asked for that needs a package that is not installed; the message has the command."""


@contextmanager
def miniature() -> Iterator[None]:
    """Within it, something of `micro` is imported: the miniature world and its models, a distribution of their own.

    Raises:
        MissingExtra: That is not installed.
    """
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "micro":
            raise
        raise MissingExtra(
            'the miniature models and their world are not installed: pip install "latentmill[micro]"'
        ) from None
