"""The import graph of the library, drawn from its sources, and the house it has to fit into.

``python -m tests.support.imports`` names what does not fit.

The house is declared in docs/architecture.md, in two fenced blocks. ``floors`` has a line for each floor, the top one
first, with the rooms on it: packages or modules, by their paths. An import goes to a lower floor or stays in its room.
Where a line is split by ``|``, the rooms left and right of it stand in two wings, which know nothing of each other.
``libraries`` says for each heavy library which rooms or modules may import it; ``(late)`` means inside functions only.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("latentmill", "jobs", "pipeline", "stages", "index", "micro")
OUTSIDE = ("tests", "benchmarks")
"""Ours too, and no import of the library's may lead there."""


@dataclass(frozen=True)
class Import:
    """A module imports another.

    Attributes:
        source: Path of the importing file, from the root.
        line: Where, 1-based.
        target: Path of the file that is imported; of a library, its name.
        late: Inside a function, or for type checkers alone: not when `source` is loaded.
        typing: For type checkers alone.
    """

    source: str
    line: int
    target: str
    late: bool = False
    typing: bool = False

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


@dataclass(frozen=True)
class House:
    """The floors of docs/architecture.md.

    Attributes:
        floors: Rooms of each floor, the top one first.
        wings: Room -> number of its wing; rooms that stand across both have none.
        libraries: Library -> room or module -> whether it may be imported at the top of a module there.
    """

    floors: tuple[tuple[str, ...], ...]
    wings: Mapping[str, int]
    libraries: Mapping[str, Mapping[str, bool]]

    @property
    def rooms(self) -> list[str]:
        return [room for floor in self.floors for room in floor]

    def room(self, path: str) -> str | None:
        """The room that a module stands in."""
        return _narrowest(path, self.rooms)

    def floor(self, room: str) -> int:
        """How high a room lies: 0 is the ground floor."""
        return next(height for height, rooms in enumerate(reversed(self.floors)) if room in rooms)

    def allows(self, source: str, target: str) -> bool:
        """Whether one room may import another."""
        if source == target:
            return True
        strangers = {self.wings.get(source), self.wings.get(target)} == {0, 1}
        return self.floor(target) < self.floor(source) and not strangers


def read_house(page: str) -> House:
    """The house that a page declares.

    Raises:
        ValueError: A block is missing, or names a room twice.
    """
    floors: list[tuple[str, ...]] = []
    wings: dict[str, int] = {}
    for line in _block(page, "floors"):
        sides = [side.split() for side in line.split("|")]
        floors.append(tuple(room for side in sides for room in side))
        if len(sides) > 1:
            wings |= {room: number for number, side in enumerate(sides) for room in side}
    rooms = [room for floor in floors for room in floor]
    twice = sorted({room for room in rooms if rooms.count(room) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: on two floors")
    libraries: dict[str, dict[str, bool]] = {}
    for line in _block(page, "libraries"):
        name, _, places = line.partition(":")
        entries = [place.strip() for place in places.split(",") if place.strip()]
        libraries[name.strip()] = {entry.removesuffix("(late)").strip(): "(late)" not in entry for entry in entries}
    return House(tuple(floors), wings, libraries)


def _block(page: str, name: str) -> list[str]:
    found = re.search(rf"^```{name}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no block ```{name}")
    return [line for line in found[1].splitlines() if line.strip()]


def _narrowest(path: str, places: Iterable[str]) -> str | None:
    around = [place for place in places if path == place or path.startswith(f"{place}/")]
    return max(around, key=len, default=None)


def sources(root: Path, packages: Sequence[str] = PACKAGES) -> list[str]:
    """Paths of the library's modules, from the root."""
    return sorted(file.relative_to(root).as_posix() for name in packages for file in (root / name).rglob("*.py"))


def read_imports(root: Path, packages: Sequence[str] = PACKAGES, libraries: Iterable[str] = ()) -> list[Import]:
    """Every import of ours in the sources, wherever it stands, and those of some libraries."""
    files = sources(root, packages)
    modules = {_dotted(path): path for path in files}
    wanted = {*libraries, *OUTSIDE}
    found = []
    for path in files:
        for name, line, late, typing in _statements(ast.parse((root / path).read_text(encoding="utf-8")), path):
            target = _resolve(name, modules)
            library = name[0].partition(".")[0]
            if target is None and library in wanted:
                target = library
            if target is not None and target != path:
                found.append(Import(path, line, target, late, typing))
    return list(dict.fromkeys(found))


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _resolve(name: tuple[str, str | None], modules: Mapping[str, str]) -> str | None:
    """``from a.b import c`` means the module a.b.c if there is one, else a.b."""
    module, member = name
    return modules.get(f"{module}.{member}") or modules.get(module)


def _statements(
    tree: ast.AST, path: str, late: bool = False, typing: bool = False
) -> Iterator[tuple[tuple[str, str | None], int, bool, bool]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (((alias.name, None), node.lineno, late, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level or node.module is None:
                raise ValueError(f"{path}:{node.lineno}: a relative import; name the module in full")
            yield from (((node.module, alias.name), node.lineno, late, typing) for alias in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from _statements(node, path, late or inside or guarded, typing or guarded)


def faults(house: House, imports: Sequence[Import], files: Iterable[str]) -> list[str]:
    """What does not fit the house: a sentence each."""
    files = [file for file in files if not file.endswith("__init__.py") or any(i.source == file for i in imports)]
    rooms = {house.room(file) for file in files}
    said = [f"{file} stands in no room of docs/architecture.md" for file in files if house.room(file) is None]
    said += [f"docs/architecture.md has a room {room}, where nothing is" for room in house.rooms if room not in rooms]
    said += [fault for one in imports if (fault := _fault(house, one))]
    said += ["a circle: " + " -> ".join([*circle, circle[0]]) for circle in circles(imports)]
    return said + heavy_loads(house, imports)


def unused(house: House, imports: Sequence[Import]) -> list[str]:
    """Permissions to import a library that nothing makes use of."""
    used = {(one.target, _narrowest(one.source, house.libraries.get(one.target, ()))) for one in imports}
    pairs = [(library, place) for library, places in house.libraries.items() for place in places]
    return [
        f"docs/architecture.md lets {place} import {library}, and nothing there does"
        for library, place in pairs
        if (library, place) not in used
    ]


def _fault(house: House, one: Import) -> str | None:
    if one.target in house.libraries:
        allowed = house.libraries[one.target]
        place = _narrowest(one.source, allowed)
        if place is None:
            return f"{one}: not there"
        return None if one.late or allowed[place] else f"{one} at its top: only inside functions there"
    if one.target in OUTSIDE:
        return f"{one}: the library knows nothing of it"
    source, target = house.room(one.source), house.room(one.target)
    if source is None or target is None or house.allows(source, target):
        return None
    return f"{one}: {source} may not know {target}"


def circles(imports: Iterable[Import]) -> list[list[str]]:
    """Modules that import each other, directly or around corners: the strongly connected components (Tarjan 1972)."""
    graph: dict[str, list[str]] = {}
    for one in imports:
        graph.setdefault(one.source, []).append(one.target)
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for target in graph.get(module, ()):
            if target not in order:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], order[target])
        if low[module] == order[module]:
            members = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(members) > 1:
                found.append(members)

    for module in graph:
        if module not in order:
            visit(module)
    return found


def heavy_loads(house: House, imports: Sequence[Import]) -> list[str]:
    """Ways on which loading a module of ``latentmill``, ``jobs`` or ``pipeline`` loads a heavy library at once."""
    graph: dict[str, list[str]] = {}
    for one in imports:
        if not one.late:
            graph.setdefault(one.source, []).append(one.target)
    said = []
    for start in sorted(source for source in graph if source.startswith(("latentmill/", "jobs/", "pipeline/"))):
        ways: list[list[str]] = [[start]]
        seen = {start}
        while ways:
            way = ways.pop()
            if way[-1] in house.libraries:
                said.append(f"loading {start} loads {way[-1]}: {' -> '.join(way)}")
            for target in graph.get(way[-1], ()):
                if target not in seen:
                    seen.add(target)
                    ways.append([*way, target])
    return said


def missing(root: Path, packages: Sequence[str] = (*PACKAGES, *OUTSIDE)) -> list[str]:
    """Imports of what none of our modules has. Python says so too, but of benchmarks only once they are run."""
    trees = {path: ast.parse((root / path).read_text(encoding="utf-8")) for path in sources(root, packages)}
    names = {_dotted(path): set(_bound(tree)) for path, tree in trees.items()}

    def there(module: str, name: str | None) -> bool:
        if name is None:
            return module in names or (root / module.replace(".", "/")).is_dir()
        own = names.get(module, set())
        return f"{module}.{name}" in names or name in own or "__getattr__" in own

    return [
        f"{path}:{line} imports {name or module}, which is not there"
        for path, tree in trees.items()
        for (module, name), line, _, _ in _statements(tree, path)
        if module.partition(".")[0] in packages and not there(module, name)
    ]


def _bound(node: ast.AST) -> Iterator[str]:
    """The names that a module has once it is loaded."""
    for part in ast.iter_child_nodes(node):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield part.name
        elif isinstance(part, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in part.names)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id
        elif not isinstance(part, ast.Lambda):
            yield from _bound(part)


def check() -> list[str]:
    """All that does not fit between the sources and the page."""
    house = read_house(PAGE.read_text(encoding="utf-8"))
    imports = read_imports(ROOT, PACKAGES, house.libraries)
    return faults(house, imports, sources(ROOT)) + unused(house, imports) + missing(ROOT)


if __name__ == "__main__":
    print("\n".join(check()) or "everything fits")
