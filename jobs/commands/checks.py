"""What `latentmill doctor` looks at: this machine, its packages, what a job names. Loads no weights, leaves nothing."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from jobs.page.amounts import size

if TYPE_CHECKING:
    from jobs.schema.base import Job, RowJob
    from pipeline.storage import Folder

State = Literal["ok", "warn", "fail"]
LEAST_MEMORY, LEAST_DISK, LEAST_SHARED = 4 << 30, 10 << 30, 256 << 20
SKEW_S = 60.0
"""Stores refuse signatures that are 15 minutes off; a minute is on its way there."""


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what to do about it."""

    name: str
    state: State
    found: str
    todo: str = ""


def machine() -> Iterator[Finding]:
    """Without a job: Python, packages, torch and GPUs, memory, disk, the hub."""
    yield _python()
    yield from _packages()
    yield _torch()
    yield from _space()
    yield _hub()


def _python() -> Finding:
    from pipeline.run.versions import versions

    found = f"latentmill {versions().get('latentmill', '(not installed)')}, Python {platform.python_version()}"
    if os.name == "nt":
        return Finding("latentmill", "fail", f"{found}, Windows", "run it under WSL: locks need a POSIX system")
    return Finding("latentmill", "ok", f"{found}, {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    """Whether what is installed is within the ranges that this version was made for."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    from pipeline.run.versions import told, versions

    wrong: list[str] = []
    mend: list[str] = []
    try:
        wanted = [Requirement(text) for text in requires("latentmill") or ()]
    except PackageNotFoundError:
        yield Finding("packages", "warn", "latentmill itself is not installed", "pip install -e . in the checkout")
        return
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(requirement.name)
        except PackageNotFoundError:
            there = "missing"
        if there == "missing" or not requirement.specifier.contains(there, prereleases=True):
            wrong.append(f"{requirement.name} {there} (needs {requirement.specifier})")
            mend.append(f"'{requirement.name}{requirement.specifier}'")
    if wrong:
        yield Finding("packages", "fail", ", ".join(wrong), f"pip install {' '.join(mend)}")
    else:
        others = {name: number for name, number in versions().items() if name != "latentmill"}
        yield Finding("packages", "ok", told(others))
    if "faiss" not in versions():
        todo = "pip install 'latentmill[cpu]', or [gpu]"
        yield Finding("faiss", "warn", "not installed: references can be neither made nor searched", todo)


def _torch() -> Finding:
    import torch

    build = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        each = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
        return Finding("GPU", "ok", f"{build}: " + ", ".join(f"{gpu.name} ({size(gpu.total_memory)})" for gpu in each))
    built_for = torch.version.cuda or torch.version.hip
    if built_for is None:
        nvidia = Path("/proc/driver/nvidia/gpus").is_dir()
        todo = "there is an NVIDIA GPU: install a CUDA build of torch (pytorch.org)" if nvidia else ""
        return Finding("GPU", "warn" if nvidia else "ok", f"none; {build} is a build for CPUs", todo)
    return Finding("GPU", "warn", f"{build} finds none", "look at the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES")


def _space() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    state: State = "ok" if memory.available >= LEAST_MEMORY else "warn"
    todo = "a worker with a full-size model takes 4 GB and more: lower resources.workers" if state == "warn" else ""
    yield Finding(
        "memory", state, f"{size(memory.available)} free of {size(memory.total)}, {os.cpu_count()} CPUs", todo
    )
    for name, place in (("disk", Path.cwd()), ("scratch", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(place).free
        enough = free >= LEAST_DISK
        yield Finding(name, "ok" if enough else "warn", f"{size(free)} free in {place}", "" if enough else "make room")
    shared = Path("/dev/shm")
    if shared.is_dir() and (free := shutil.disk_usage(shared).free) < LEAST_SHARED:
        todo = "Ray keeps objects there: start the container with --shm-size=1g"
        yield Finding("shared memory", "warn", f"{size(free)} free in {shared}", todo)


def _hub() -> Finding:
    from stages.models import hub

    if hub.offline():
        return Finding("hub", "ok", "not asked (HF_HUB_OFFLINE is set); models come from folders and the hub's cache")
    if hub.reachable():
        return Finding("hub", "ok", f"{hub.host()} answers")
    return Finding("hub", "warn", f"{hub.host()} does not answer", "models have to be folders, or in the hub's cache")


def cluster(address: str | None) -> Finding:
    """The Ray that a run would use."""
    from importlib.metadata import version

    from pipeline.run.cluster import ClusterError, resources_of

    if address is None:
        return Finding("Ray", "ok", f"{version('ray')}; each run starts its own ({os.cpu_count()} CPUs)")
    try:
        has = resources_of(address)
    except ClusterError as error:
        return Finding("Ray", "fail", str(error), "start it, or correct --address")
    nodes = sum(name.startswith("node:") and name != "node:__internal_head__" for name in has)
    amounts = [f"{has.get('CPU', 0):g} CPU", f"{has.get('GPU', 0):g} GPU", size(has.get("memory", 0))]
    return Finding("Ray", "ok", f"{address}: {nodes} node{'s' * (nodes != 1)}, {', '.join(amounts)}")


def of_job(job: Job, output: str, address: str | None) -> Iterator[Finding]:
    """What a job, or each step of a chain, needs: room for a worker, its output's store, its input, its models."""
    from contextlib import ExitStack

    from jobs.kinds.chain import Chain
    from jobs.schema.base import RowJob

    steps = list(job.named_steps(output)) if isinstance(job, Chain) else [("", job)]
    with ExitStack() as stack:
        for number, (name, step) in enumerate(steps):
            if isinstance(step, RowJob):
                target = step.output or output
                stack.enter_context(step.access(target))
                earlier = [str(before.output) for _, before in steps[:number]]
                yield from _of_step(f"{name}: " if name else "", step, target, earlier, address)


def _of_step(name: str, step: RowJob, output: str, earlier: list[str], address: str | None) -> Iterator[Finding]:
    from jobs.dry_run import lacking_here, pending
    from pipeline.storage import Folder

    if address is None:
        short = lacking_here(step.resources)
        todo = "lower `resources`, or name a cluster with --address" if short else ""
        found = f"a worker asks for {short}" if short else "a worker fits on this machine"
        yield Finding(f"{name}resources", "fail" if short else "ok", found, todo)
    rights = "look at the address, `storage_options` and rights"
    yield from _tried(f"{name}output", lambda: store(Folder.at(output)), rights)
    if waits := pending(step, earlier):
        yield Finding(f"{name}input", "ok", f"reads {waits}, which an earlier step will write")
        return
    yield from _tried(f"{name}input and models", lambda: _drafted(step, output), "correct it in the job file")


def _tried(name: str, look: Any, todo: str) -> Iterator[Finding]:
    """What it finds; what it raises is a finding too."""
    from pipeline.storage import of_a_client, told_by_a_client

    try:
        for state, found, more in look():
            yield Finding(name, state, found, more)
    except (ValueError, OSError, ImportError) as error:
        lines = [*str(error).splitlines(), *getattr(error, "__notes__", [])]
        yield Finding(name, "fail", " ".join(lines) or type(error).__name__, todo)
    except Exception as error:
        if not of_a_client(error):
            raise
        yield Finding(name, "fail", told_by_a_client(error), todo)


def _drafted(step: RowJob, output: str) -> Iterator[tuple[State, str, str]]:
    """The first rows of the input, and the models' configurations."""
    from jobs.run import run_spec
    from pipeline.run.draft import draft
    from stages.models import hub

    with hub.asked(step):
        drafted = draft(run_spec(step.model_copy(update={"output": output}), output))
    yield "ok", f"{drafted.source.format}, {len(drafted.schema)} columns out", ""
    for role, model in drafted.info.models.items():
        yield "ok", f"{role}: {model.get('path', '')}", ""
    for note in drafted.notes:
        yield "warn", note, ""


def store(folder: Folder) -> Iterator[tuple[State, str, str]]:
    """Whether an output's folder can be written, what its store can do, and how far its clock is off."""
    if folder.local:
        place = next(path for path in (Path(folder.root), *Path(folder.root).parents) if path.is_dir())
        with tempfile.NamedTemporaryFile(dir=place) as probe:
            skew = os.fstat(probe.fileno()).st_mtime - time.time()
        yield "ok", f"{folder.root}: can be written, {size(shutil.disk_usage(place).free)} free", ""
    else:
        name = f"_latentmill/doctor-{uuid4().hex}"
        begun = time.time()
        folder.write(name, b"x")
        try:
            skew = _written(folder.fs.info(folder.path(name))) - (begun + time.time()) / 2
        finally:
            folder.remove(name)
        yield "ok", f"{folder.url}: can be written, read and listed", ""
        if folder.is_exclusive(f"{name}-create"):
            yield "ok", "its store creates a file only if there is none, so one run at a time holds the folder", ""
        else:
            yield ("warn", "its store replaces what should only be created",
                   "start no two runs on this folder, or use a store with conditional writes")  # fmt: skip
    if abs(skew) > SKEW_S:
        where = "ahead of" if skew > 0 else "behind"
        yield "warn", f"the store's clock is {abs(skew):,.0f} s {where} this machine's", "set the clocks (NTP)"


def _written(info: dict[str, Any]) -> float:
    """When a store says that a file was written (Unix time); now, where it says nothing."""
    for key in ("LastModified", "updated", "last_modified", "mtime", "created"):
        value = info.get(key)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, str):
            return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return time.time()
