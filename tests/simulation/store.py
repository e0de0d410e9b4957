"""An object store in memory, with the faults of one: late, refused and lost answers, and callers that crash.

What it promises is what S3, GCS and Azure promise: an object is there as a whole or not at all; what has been written
is read and listed from then on; one that is to be created is refused if there is one. What fails may have been done.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeVar

import fsspec
from fsspec.spec import AbstractFileSystem

from tests.simulation.world import Crash, Process, World, current

T = TypeVar("T")


@dataclass(frozen=True)
class Weather:
    """How often requests go wrong: probabilities.

    Attributes:
        refused: Nothing is done, an error comes back.
        lost: It is done, but an error comes back.
        crash: The process that asks dies, before or after it is done.
        stall: The process that asks stands still before it is done, for up to `stall_s` seconds.
        delay_s: Of an answer, on average.
    """

    refused: float = 0.0
    lost: float = 0.0
    crash: float = 0.0
    stall: float = 0.0
    stall_s: float = 400.0
    delay_s: float = 0.03


CALM = Weather()
PAGE = 1000
"""Names that an answer lists."""


class _Objects(dict[str, bytes]):
    """Path -> content; the paths of a folder are found without looking at all others."""

    def __init__(self) -> None:
        super().__init__()
        self._folders: dict[str, set[str]] = {}

    def __setitem__(self, path: str, content: bytes) -> None:
        super().__setitem__(path, content)
        self._folders.setdefault(path.rpartition("/")[0], set()).add(path)

    def __delitem__(self, path: str) -> None:
        super().__delitem__(path)
        place = path.rpartition("/")[0]
        self._folders[place].remove(path)
        if not self._folders[place]:
            del self._folders[place]

    def remove(self, path: str) -> None:
        if path in self:
            del self[path]

    def within(self, folder: str) -> list[dict[str, Any]]:
        """What fsspec says of the files and folders in a folder, in the order of their names."""
        below = f"{folder}/"
        folders = {below + place[len(below) :].partition("/")[0] for place in self._folders if place.startswith(below)}
        found = [{"name": name, "size": 0, "type": "directory"} for name in folders]
        found += [{"name": name, "size": len(self[name]), "type": "file"} for name in self._folders.get(folder, ())]
        return sorted(found, key=_name)


_name = itemgetter("name")


class Bucket:
    """The objects of a store, and who did what to them.

    Attributes:
        objects: Path -> content.
        weather: What goes wrong at present.
        away: Requests before this time are all refused.
        watch: Called with (process, verb, path, content) whenever something changes, before it does. The verb is
            ``remove too`` for all but the first of what a request removes.
        requests: Number of requests.
        once: Uploads in parts, too, may be refused a taken name.
    """

    def __init__(self, world: World) -> None:
        self.world, self.objects, self.weather, self.away = world, _Objects(), CALM, 0.0
        self.versions: dict[str, int] = {}
        self.watch: Callable[[Process | None, str, str, bytes], None] = lambda process, verb, path, content: None
        self.requests = 0
        self.conditional = self.once = True
        self.files = SimStore(self)

    def still(self) -> Bucket:
        """The same objects, for one who looks: asking takes no time, and nothing fails."""
        still = Bucket(self.world)
        still.objects, still.versions = self.objects, self.versions
        still.request = lambda effect: effect()  # type: ignore[method-assign]
        return still

    def put(self, path: str, content: bytes) -> None:
        self.objects[path] = content
        self.versions[path] = self.world.count()

    def _caller(self) -> Process | None:
        return getattr(current(), "process", None)

    def request(self, effect: Callable[[], T]) -> T:
        """Ask the store for something; the caller waits for the answer."""
        process, world, weather = getattr(current(), "process", None), self.world, self.weather
        self.requests += 1
        if process is None:
            return effect()
        chance = world.random.random
        world.pause(world.now + weather.delay_s * (0.5 + chance()))
        if world.now < self.away:
            raise ConnectionError("503 the store is away")
        if weather is CALM:
            return effect()
        fate = chance()
        if fate < weather.refused:
            raise ConnectionError("503 slow down")
        fate -= weather.refused
        if fate < weather.lost:
            effect()
            raise ConnectionError("the connection was closed")
        fate -= weather.lost
        if fate < weather.crash:
            if fate < weather.crash / 2:
                effect()
            process.die()
            raise Crash
        fate -= weather.crash
        if fate < weather.stall:
            process.stall(chance() * weather.stall_s)
            world.pause(world.now)
        return effect()

    def change(self, verb: str, path: str, effect: Callable[[], T]) -> T:
        """Ask it to change something."""

        def watched() -> T:
            self.watch(self._caller(), verb, path, b"")
            return effect()

        return self.request(watched)


class _Writing(io.BytesIO):
    """An object that is uploaded in parts: it is there once it is closed.

    Args:
        once: Its end is refused if there is one of its name by then.
    """

    def __init__(self, bucket: Bucket, path: str, once: bool) -> None:
        super().__init__()
        self._bucket, self._path, self._once = bucket, path, once

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._bucket.request(lambda: self._put(content))

    def _put(self, content: bytes) -> None:
        bucket = self._bucket
        if self._once and bucket.conditional and self._path in bucket.objects:
            raise FileExistsError(self._path)
        bucket.watch(bucket._caller(), "put", self._path, content)
        bucket.put(self._path, content)

    def discard(self) -> None:
        super().close()

    def __del__(self) -> None:
        self.discard()  # what a dead process never ended is no object, and must not be one whenever it is collected


class SimStore(AbstractFileSystem):
    """The fsspec filesystem ``sim://``."""

    protocol = ("sim", "s3")  # S3 takes many deletions in a request
    cachable = False

    def __init__(self, bucket: Bucket, **rest: Any) -> None:
        super().__init__(**rest)
        self.bucket = bucket

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **rest: Any) -> None:
        bucket = self.bucket

        def put() -> None:
            if mode == "create" and bucket.conditional and path in bucket.objects:
                raise FileExistsError(path)
            bucket.watch(bucket._caller(), mode, path, value)
            bucket.put(path, value)

        bucket.request(put)

    def _object(self, path: str) -> bytes:
        try:
            return self.bucket.objects[path]
        except KeyError:
            raise FileNotFoundError(path) from None

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **rest: Any) -> bytes:
        return self.bucket.request(lambda: self._object(path))[start:end]

    def info(self, path: str, **rest: Any) -> dict[str, Any]:
        def head() -> dict[str, Any]:
            size = len(self._object(path))
            return {"name": path, "size": size, "type": "file", "ETag": str(self.bucket.versions[path])}

        return self.bucket.request(head)

    def exists(self, path: str, **rest: Any) -> bool:
        return self.bucket.request(lambda: path in self.bucket.objects)

    def ls(self, path: str, detail: bool = True, **rest: Any) -> list[Any]:
        def listed() -> list[dict[str, Any]]:
            found = self.bucket.objects.within(path)
            if not found:
                raise FileNotFoundError(path)
            return found

        infos = self.bucket.request(listed)
        for _ in range((len(infos) - 1) // PAGE):
            self.bucket.request(lambda: None)
        return infos if detail else [info["name"] for info in infos]

    def find(self, path: str, **rest: Any) -> list[str]:
        return self.bucket.request(
            lambda: sorted(name for name in self.bucket.objects if name == path or name.startswith(f"{path}/"))
        )

    def cp_file(self, path1: str, path2: str, **rest: Any) -> None:
        self.bucket.change("copy", path2, lambda: self.bucket.put(path2, self._object(path1)))

    def rm_file(self, path: str) -> None:
        self.bucket.change("remove", path, lambda: self.bucket.objects.remove(path))

    def rm(self, path: list[str], **rest: Any) -> None:
        def gone() -> None:
            for number, name in enumerate(path):
                self.bucket.watch(self.bucket._caller(), "remove too" if number else "remove", name, b"")
                self.bucket.objects.remove(name)

        self.bucket.request(gone)

    def open(self, path: str, mode: str = "rb", **rest: Any) -> Any:
        if "r" in mode:
            return io.BytesIO(self.bucket.request(lambda: self._object(path)))
        if "x" in mode and not self.bucket.once:
            raise NotImplementedError("exclusive")
        return _Writing(self.bucket, path, "x" in mode)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Stores have no folders."""


fsspec.register_implementation("sim", SimStore, clobber=True)
