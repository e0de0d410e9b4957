"""What a job's ``finish`` makes beside the rows, such as an index: listed with size and checksum once it is made.

``products.json`` in the bookkeeping folder is the list. Output folders that older code finished have none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from pipeline.input.files import OWN
from pipeline.output.dataset import Output
from pipeline.storage import checksum, patiently, version_of

PRODUCTS = f"{OWN}/products.json"


@dataclass(frozen=True)
class Product:
    """One file.

    Attributes:
        name: Below the output folder.
        size: Bytes.
        checksum: BLAKE2b of a file on a disk; None on a store, which has its own.
        version: A store's ETag; empty on a disk.
    """

    name: str
    size: int
    checksum: str | None
    version: str


def take_stock(output: Output, names: Sequence[str]) -> None:
    """List what ``finish`` has made.

    Args:
        names: Files and folders, below the output folder.

    Raises:
        LockLost: Another run has the folder.
    """
    made = [asdict(product) for name in names for product in _found(output, name, checksums=True)]
    output.check()
    output.folder.write(PRODUCTS, json.dumps({"run": output.run, "files": made}, indent=1).encode())


def listed(output: Output) -> list[Product]:
    """The products as they were made; none where the job makes none, or older code ran.

    Raises:
        ValueError, TypeError, KeyError: The list is damaged.
    """
    try:
        told = json.loads(output.folder.read(PRODUCTS))
    except FileNotFoundError:
        return []
    return [Product(**product) for product in told["files"]] if told["run"] == output.run else []


def problems(output: Output, checksums: bool) -> list[str]:
    """What is wrong with the products, one sentence a file.

    Args:
        checksums: Also compare digests, which reads all bytes of files on a disk.
    """
    try:
        planned = listed(output)
    except (ValueError, TypeError, KeyError) as error:
        return [f"{PRODUCTS} is damaged ({error})"]
    wrong = []
    for product in planned:
        found = next(_found(output, product.name, checksums and product.checksum is not None), None)
        if found is None:
            wrong.append(f"{product.name} is gone")
        elif found.size != product.size:
            wrong.append(f"{product.name} has {found.size} bytes, {product.size} were made")
        elif None not in (found.checksum, product.checksum) and found.checksum != product.checksum:
            wrong.append(f"{product.name} is not what was made: its checksum differs; delete it")
        elif found.version and product.version and found.version != product.version:
            wrong.append(f"{product.name} is not what was made: the store has another version of it")
    return wrong


def _found(output: Output, name: str, checksums: bool) -> Iterator[Product]:
    """The file of this name, or all files below the folder of this name."""
    folder = output.folder
    if not folder.local:
        folder.fs.invalidate_cache()
    paths = patiently(lambda: folder.fs.find(folder.path(name)))
    for path in sorted(paths):
        below = path[len(folder.root) :].lstrip("/")
        info = patiently(lambda below=below: folder.fs.info(folder.path(below)))  # type: ignore[misc]
        digest = None
        if folder.local and checksums:
            with folder.open(below) as file:
                digest = checksum(file)
        yield Product(below, int(info["size"]), digest, "" if folder.local else version_of(info))
