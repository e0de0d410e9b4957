"""``latentmill push``: a finished output to the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.commands.errors import errors, stderr
from jobs.commands.single import single
from jobs.commands.stores import StorageOptions, reaching


def push(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Output folder of a run, here or on a store.")],
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="The dataset repository; made if it is not there.")],
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="A branch of it; made if it is not there.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Only you and your organisation may read it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")] = False,
    storage_options: StorageOptions = None,
) -> None:
    """Push a finished dataset to the Hugging Face hub.

    Its card, its data and what the job made beside them; checked first as `latentmill verify` does. Started again
    after a stop, it sends what is not there yet. The token is that of `hf auth login` or HF_TOKEN.
    """
    with errors(), reaching(out, storage_options):
        from pipeline.output.hub import push as pushed

        single(out, "push")
        console = stderr()
        done = pushed(
            out, name, revision=revision, private=private, dry_run=dry_run,
            tell=lambda said: console.print(said, markup=False, soft_wrap=True),
        )  # fmt: skip
    for own in done.deleted:
        typer.echo(f"{'would remove' if dry_run else 'removed'} {own}, which is not of this dataset")
    typer.echo(
        f"{'would send' if dry_run else 'sent'} {done.sent_files:,} of {done.files:,} files, "
        f"{done.sent_bytes / 1e6:,.1f} of {done.bytes / 1e6:,.1f} MB: {done.url}"
    )
