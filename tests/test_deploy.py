"""The files that people start clusters from, as far as they can be checked without one."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.schema import reading
from pipeline.run.meters import COUNTERS, GAUGES

ROOT = Path(__file__).parent.parent
SCHEMA = ROOT / "tests/support/rayjob_schema.yaml"


@pytest.fixture
def kuberay() -> dict[str, Any]:
    """Kind -> object of deploy/kuberay.yaml."""
    return {document["kind"]: document for document in yaml.safe_load_all((ROOT / "deploy/kuberay.yaml").read_text())}


def check(rayjob: dict[str, Any]) -> None:
    schema = yaml.safe_load(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(rayjob, schema)


def groups(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_rayjob_is_what_kuberay_takes(kuberay: dict[str, Any]) -> None:
    check(kuberay["RayJob"])


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        ("backoffLimit", "3"),
        ("backOffLimit", 3),
        ("rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("rayClusterSpec.headGroupSpec.replicas", 1),
        ("rayClusterSpec.authOptions.mode", "on"),
        ("rayClusterSpec.headGroupSpec.template.spec.containers", []),
    ],
)
def test_mistakes_in_a_rayjob_are_found(kuberay: dict[str, Any], where: str, wrong: object) -> None:
    place = kuberay["RayJob"]["spec"]
    *way, last = where.split(".")
    for name in way:
        place = place[name]
    place[last] = wrong
    with pytest.raises(jsonschema.ValidationError):
        check(kuberay["RayJob"])


def test_the_rayjob_runs_the_job_of_its_config_map_and_resumes(kuberay: dict[str, Any]) -> None:
    rayjob, config = kuberay["RayJob"], kuberay["ConfigMap"]
    (text,) = config["data"].values()
    job = reading.load(yaml.safe_load(text))
    head, *workers = (group["template"]["spec"] for group in groups(rayjob))
    (volume,) = head["volumes"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    (mount,) = head["containers"][0]["volumeMounts"]
    (name,) = config["data"]
    assert rayjob["spec"]["entrypoint"] == f"latentmill run-job {mount['mountPath']}/{name} --address auto"
    assert "://" in str(job.output), "the pods have no disk in common"
    assert rayjob["spec"]["backoffLimit"] > 0
    worker = workers[0]["containers"][0]["resources"]["limits"]
    assert job.resources.cpus <= float(worker["cpu"])
    assert job.resources.gpus <= float(worker["nvidia.com/gpu"])
    assert job.resources.workers.max <= rayjob["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]


def test_pods_share_version_image_and_token(kuberay: dict[str, Any]) -> None:
    cluster = kuberay["RayJob"]["spec"]["rayClusterSpec"]
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert cluster["authOptions"] == {"mode": "token"}
    assert len({group["template"]["spec"]["containers"][0]["image"] for group in groups(kuberay["RayJob"])}) == 1
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", " ", text)
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_the_image_copies_what_is_there_and_what_the_build_may_see() -> None:
    seen = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert all((ROOT / name).exists() for name in seen)
    copied = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    assert set(copied) - {"."} <= seen
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.rstrip("*") for pattern in packages} <= seen


def test_the_image_is_nobodys_root_and_holds_the_tested_versions() -> None:
    words = instructions()
    assert [rest for word, rest in words if word == "USER"][-1].isdigit(), "by number: runAsNonRoot reads no passwd"
    runs = " ".join(rest for word, rest in words if word == "RUN")
    assert "--constraints /src/constraints.txt" in runs
    (settings,) = [rest for word, rest in words if word == "ENV" and "PIP_" in rest]
    assert "UV_COMPILE_BYTECODE=1" in settings, "its user cannot write any, and Ray gives its helpers 15 s to start"
    (torch,) = re.findall(r"torch==\S+", runs)
    assert f"{torch}\n" in (ROOT / "constraints.txt").read_text()
    kinds = re.search(r'case "\$DEVICE" in(.*?)esac', runs)
    assert kinds is not None
    assert re.findall(r"(\w+)\) index", kinds[1]) == ["cpu", "gpu"]


def test_sources_come_after_what_takes_long() -> None:
    words = instructions()
    sources = words.index(("COPY", ". /src"))
    after = [rest for word, rest in words[sources:] if word == "RUN"]
    assert all("--no-deps /src" in rest for rest in after)


@pytest.fixture
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "deploy/grafana.json").read_text())
    return loaded


def queries(dashboard: dict[str, Any]) -> list[str]:
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return asked + [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]


def test_the_dashboard_asks_for_what_the_code_counts_and_for_all_of_it(dashboard: dict[str, Any]) -> None:
    exported = {f"ray_latentmill_{name}_total" for name in COUNTERS} | {f"ray_latentmill_{name}" for name in GAUGES}
    assert {name for query in queries(dashboard) for name in re.findall(r"ray_\w+", query)} == exported
    labels = {"output"} | {by for _, by in COUNTERS.values() if by}
    grouped = {name for query in queries(dashboard) for group in re.findall(r"by \(([^)]*)\)", query)
               for name in group.split(", ")}  # fmt: skip
    assert grouped == labels


def test_queries_are_balanced_and_panels_lie_side_by_side(dashboard: dict[str, Any]) -> None:
    for query in queries(dashboard):
        assert all(query.count(a) == query.count(b) for a, b in ("()", "[]", "{}"))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_dashboard_has_the_shape_that_grafana_imports(dashboard: dict[str, Any]) -> None:
    source = {"type": "object", "required": ["type", "uid"], "properties": {"type": {"const": "prometheus"}}}
    target = {"type": "object", "required": ["refId", "expr", "datasource"], "properties": {"datasource": source}}
    panel = {
        "type": "object",
        "required": ["id", "title", "type", "gridPos", "datasource", "targets", "fieldConfig", "options"],
        "properties": {
            "id": {"type": "integer"}, "title": {"type": "string"}, "type": {"enum": ["stat", "timeseries"]},
            "datasource": source, "targets": {"type": "array", "minItems": 1, "items": target},
            "gridPos": {"type": "object", "required": ["x", "y", "w", "h"]},
            "fieldConfig": {"type": "object", "required": ["defaults", "overrides"]},
        },
    }  # fmt: skip
    whole = {
        "type": "object",
        "required": ["uid", "title", "schemaVersion", "panels", "templating", "time"],
        "properties": {
            "schemaVersion": {"type": "integer", "minimum": 36},
            "panels": {"type": "array", "items": panel},
            "templating": {"type": "object", "required": ["list"]},
        },
    }
    jsonschema.validate(dashboard, whole)
    for item in dashboard["panels"]:
        refs = [target["refId"] for target in item["targets"]]
        assert len(set(refs)) == len(refs)
