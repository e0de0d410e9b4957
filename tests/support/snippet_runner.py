"""Runs blocks of Python, given as JSON on stdin: ``python -P tests/support/snippet_runner.py alone|ours``.

`ours`: those of stdin, with this project, and its jobs without Ray. `alone`: for each line the blocks in it, in a fork
that refuses to import this project. The libraries that blocks begin with take longer to import than blocks to run: the
process that forks has them.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

OURS = frozenset({"latentmill", "jobs", "pipeline", "stages", "index", "micro", "tests", "benchmarks"})


class Refused:
    """Finds nothing of ours."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"a snippet that claims to need nothing of ours needs {name}")


def run(snippets: list[tuple[str, str]]) -> int:
    """Each in its folder; the exit code."""
    for number, (code, folder) in enumerate(snippets):
        os.chdir(folder)
        try:
            exec(compile(code, f"snippet {number}", "exec"), {"__name__": "snippet"})
        except BaseException:
            print("-----", code, traceback.format_exc(), sep="\n", flush=True)
            return 1
    return 0


def alone() -> None:
    """Of each line, a file for what the blocks print, and the blocks; the exit code is printed."""
    sys.meta_path.insert(0, Refused)  # type: ignore[arg-type]
    import datasets  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from diffusers import DiffusionPipeline  # noqa: F401

    for line in sys.stdin:
        told, snippets = json.loads(line)
        child = os.fork()
        if not child:
            with open(told, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = run(snippets)
            sys.stdout.flush()
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "alone":
        alone()
    else:
        import pytest

        from tests.support.in_process import without_ray

        without_ray(pytest.MonkeyPatch())
        sys.exit(run(json.load(sys.stdin)))
