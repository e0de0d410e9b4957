"""``latentmill push``, against a hub on this machine, read back by `datasets` as a reader would."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.commands.cli import app
from jobs.commands.errors import EXIT_USAGE
from jobs.kinds.chain import CHAIN_FILE
from jobs.run import run_job
from jobs.schema.base import RowJob
from pipeline.output.hub import card_for
from tests.support.hub import TOKEN, Hub, Repository, hub_server
from tests.support.in_process import without_ray
from tests.support.toy_job import known

ROWS = 7


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    with hub_server() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("pipeline.output.hub.ANSWER_S", 120)  # however busy the machine is
        yield served


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with known(), pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        return run(tmp_path_factory.mktemp("push"), "out")


@pytest.fixture
def out(finished: Path, tmp_path: Path, toy_job: type[RowJob], in_process: None) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def run(folder: Path, name: str, **settings: Any) -> Path:
    """A finished run of `ROWS` rows, three a shard, with something beside them as a job's ``finish`` leaves it."""
    from pipeline.output.dataset import Output
    from pipeline.output.products import take_stock

    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {n}" if n != 4 else "fail"}) + "\n" for n in range(ROWS)))
    job = {"job": "toy", "input": str(rows), "shard_rows": 3, "max_failed_fraction": 1, **settings}
    run_job(job, output=str(folder / name))
    target = folder / name
    (target / "index").mkdir()
    (target / "index/words.json").write_text('["red"]')
    (target / "index/big.npy").write_bytes(bytes(range(256)) * 40)
    take_stock(Output.open(str(target)), ["index"])
    return target


def push(*words: str) -> Any:
    return CliRunner().invoke(app, ["push", *words])


def sent(hub: Hub) -> list[str]:
    """What the commits named, in order."""
    lines = [line for commit in hub.datasets["ada/stars"].commits for line in commit["lines"]]
    return [line["value"]["path"] for line in lines if line["key"] != "header"]


def test_datasets_reads_from_the_hub_what_the_run_wrote(out: Path, hub: Hub) -> None:
    done = push(str(out), "ada/stars", "--private")
    assert done.exit_code == 0, done.output + done.stderr
    assert TOKEN not in done.output + done.stderr
    repository = hub.datasets["ada/stars"]
    assert repository.private
    assert len(repository.commits) == 1
    files = repository.branches["main"]
    names = {f"data/part-0000{n}-of-00003.parquet" for n in range(3)}
    assert files.keys() == {".gitattributes", "README.md", "index/words.json", "index/big.npy", *names}
    for name in files.keys() - {".gitattributes", "README.md"}:
        assert files[name] == (out / name).read_bytes()
    card = files["README.md"].decode()
    assert 'dataset = load_dataset("ada/stars", split="train")' in card
    assert "/out" not in card
    code = (
        "import json, sys\nfrom datasets import load_dataset\n"
        "rows = load_dataset('ada/stars', split='train', cache_dir=sys.argv[1])\n"
        "print(json.dumps([rows['id'], rows['changed'], rows['vector']], default=list))"
    )
    of_hub = {"ENDPOINT": hub.url, "TOKEN": TOKEN, "HOME": str(out.parent / "home"), "HUB_DISABLE_XET": "1",
              "HUB_OFFLINE": "0", "HUB_DISABLE_TELEMETRY": "1", "DATASETS_OFFLINE": "0"}  # fmt: skip
    environment = {**os.environ, **{f"HF_{name}": value for name, value in of_hub.items()}}
    read = subprocess.run(
        [sys.executable, "-c", code, str(out.parent / "cache")], env=environment, text=True, capture_output=True
    )
    assert read.returncode == 0, read.stderr[-2000:]
    expected = pq.read_table(sorted((out / "data").glob("*.parquet"))).to_pydict()
    assert json.loads(read.stdout) == [expected["id"], expected["changed"], expected["vector"]]
    assert len(expected["id"]) == ROWS


def test_what_is_there_is_not_sent_again(out: Path, hub: Hub) -> None:
    hub.breaks_after = 2
    stopped = push(str(out), "ada/stars")
    assert (stopped.exit_code, len(hub.puts)) == (EXIT_USAGE, 2)
    assert "Traceback" not in stopped.stderr
    assert hub.datasets["ada/stars"].branches["main"].keys() == {".gitattributes"}  # nothing by halves
    hub.breaks_after = None
    assert push(str(out), "ada/stars").exit_code == 0
    assert len(hub.puts) == len(set(hub.puts)) == 4  # three shards and the array, each once
    again = push(str(out), "ada/stars")
    assert "sent 0 of 6 files, 0.0 of" in again.output
    assert len(hub.puts) == 4
    assert len(hub.datasets["ada/stars"].commits) == 1
    part = out / "data/part-00000-of-00003.parquet"
    assert hub.puts.count(hashlib.sha256(part.read_bytes()).hexdigest()) == 1


@pytest.mark.parametrize("name", ["README.md", "data/part-00000-of-00003.parquet", "index/big.npy", "index/more"])
def test_what_a_link_leads_to_is_not_sent(out: Path, hub: Hub, tmp_path: Path, name: str) -> None:
    """Before: whoever pushed a stranger's folder on published the file of theirs that its card was a link to."""
    away = tmp_path / "away"
    if name == "index/more":
        away.mkdir()
        (away / "key").write_text("private")
    else:
        (out / name).rename(away)
    (out / name).symlink_to(away)
    products = out / "_latentmill/products.json"  # which a stranger writes as well
    told = json.loads(products.read_text())
    listed = [{**one, "checksum": None} for one in told["files"]]
    more = [{"name": "index/more/key", "size": 7, "checksum": None, "version": ""}] if away.is_dir() else []
    products.write_text(json.dumps({**told, "files": [*listed, *more]}))
    refused = push(str(out), "ada/stars")
    assert refused.exit_code == EXIT_USAGE
    assert f"'{name}' is a link to {away}, which lies outside" in refused.stderr
    assert "ada/stars" not in hub.datasets


def test_another_cut_of_the_rows_leaves_none_of_the_first_beside_it(out: Path, hub: Hub) -> None:
    push(str(out), "ada/stars")
    hub.datasets["ada/stars"].branches["main"] |= {"data/notes.txt": b"hers", "LICENSE": b"hers"}
    wide = run(out.parent, "wide", shard_rows=7)
    tried = push(str(wide), "ada/stars", "--dry-run")
    assert tried.output.count("would remove data/part-0000") == 3
    assert len(hub.datasets["ada/stars"].commits) == 1
    done = push(str(wide), "ada/stars")
    assert "removed data/part-00001-of-00003.parquet, which is not of this dataset" in done.output
    files = hub.datasets["ada/stars"].branches["main"]
    assert sorted(name for name in files if name.startswith("data/p")) == ["data/part-00000-of-00001.parquet"]
    assert files["data/notes.txt"] == files["LICENSE"] == b"hers"


def test_a_dry_run_asks_and_changes_nothing(out: Path, hub: Hub) -> None:
    done = push(str(out), "ada/stars", "--dry-run")
    assert done.stdout.startswith("would send 6 of 6 files")
    assert {line.split()[0] for line in hub.asked} == {"GET"}
    assert not hub.datasets


def test_a_dry_run_needs_no_login(out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    push(str(out), "ada/stars")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert push(str(out), "ada/stars", "--dry-run").stdout.startswith("would send 0 of 6 files")
    assert push(str(out), "ada/others", "--dry-run").stdout.startswith("would send 6 of 6 files")


def test_an_output_on_a_store_goes_over_this_disk_a_group_at_a_time(
    out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setattr("pipeline.output.hub.GROUP_BYTES", 1)  # one file at a time
    store = fsspec.filesystem("memory")
    store.put(str(out), "/push-test", recursive=True)
    try:
        done = push("memory://push-test", "ada/stars")
    finally:
        store.rm("/push-test", recursive=True)
    assert done.exit_code == 0, done.stderr
    files = hub.datasets["ada/stars"].branches["main"]
    names = [str(path.relative_to(out)) for path in [*out.glob("data/*"), *out.glob("index/*")]]
    assert {name: files[name] for name in names} == {name: (out / name).read_bytes() for name in names}


def test_a_branch_is_made_and_named_in_the_card(out: Path, hub: Hub) -> None:
    push(str(out), "ada/stars", "--revision", "v2")
    branches = hub.datasets["ada/stars"].branches
    assert "README.md" not in branches["main"]
    assert 'load_dataset("ada/stars", revision="v2", split="train")' in branches["v2"]["README.md"].decode()
    assert "sent 0 of 6" in push(str(out), "ada/stars", "--revision", "v2").output


def test_many_files_are_several_commits_the_card_in_the_first(
    out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.output.hub.COMMIT_FILES", 2)
    push(str(out), "ada/stars")
    assert len(hub.datasets["ada/stars"].commits) == 3
    assert sent(hub)[0] == "README.md"
    assert len(sent(hub)) == 6


@pytest.mark.parametrize("words", [["push", "ada/stars"], ["export", "new", "--to", "parquet"], ["diff", "new"]])
def test_a_chain_s_folder_is_not_a_run_s(words: list[str], tmp_path: Path) -> None:
    steps = [{"name": name, "job": "toy", "output": str(tmp_path / name)} for name in ("one", "two")]
    (tmp_path / CHAIN_FILE).write_text(json.dumps({"steps": steps}))
    refused = CliRunner().invoke(app, [words[0], str(tmp_path), *words[1:]])
    assert refused.exit_code == EXIT_USAGE
    assert f"one of its steps, such as {tmp_path / 'two'}" in refused.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("stars", "USER/NAME"),
        ("bob/stars", "your token may not write to bob/stars"),
        ("ada/other", "holds another dataset"),
        ("ada/model", "taken on the hub by something that is no dataset"),
    ],
)
def test_names_that_do_not_serve(out: Path, hub: Hub, name: str, said: str) -> None:
    hub.datasets["ada/other"] = Repository(branches={"main": {"README.md": b"# Mine", "data/train.csv": b"a"}})
    hub.models.add("ada/model")
    refused = push(str(out), name)
    assert (refused.exit_code, said in refused.stderr) == (EXIT_USAGE, True), refused.stderr
    assert refused.stderr.count("\n") == 1 + ("of" in refused.stderr and "MB" in refused.stderr)
    assert hub.datasets["ada/other"].branches["main"]["data/train.csv"] == b"a"


def test_a_public_repository_is_not_taken_for_a_private_one(out: Path, hub: Hub) -> None:
    push(str(out), "ada/stars")
    refused = push(str(out), "ada/stars", "--private")
    assert "on the hub already, and public" in refused.stderr


def test_without_a_token_with_a_wrong_one_and_without_a_hub(
    out: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    wrong = push(str(out), "ada/stars")
    assert "does not know this token" in wrong.stderr
    assert "hf_wrong" not in wrong.stderr
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "not logged in to the hub" in push(str(out), "ada/stars").stderr
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached at http://127.0.0.1:9" in push(str(out), "ada/stars").stderr
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("pipeline.output.hub.ANSWER_S", 0.2)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "cannot be reached at" in push(str(out), "ada/stars").stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "unset HF_HUB_OFFLINE" in push(str(out), "ada/stars").stderr


def test_a_damaged_or_unfinished_output_stays_here(out: Path, hub: Hub) -> None:
    (out / "index/words.json").write_text("[]")
    refused = push(str(out), "ada/stars")
    assert "not pushed, `latentmill verify` says: index/words.json has 2 bytes" in refused.stderr
    (out / "_SUCCESS").unlink()
    refused = push(str(out), "ada/stars")
    assert "(and 1 more)" in refused.stderr
    assert not hub.datasets


def test_cards_speak_of_the_repository() -> None:
    card = (
        'dataset = load_dataset("/a/out", split="train")\n\nlatentmill search /a/out "out of sight"\n'
        'TextInverter.load("/a/out/inverter")\n/a/outer stays'
    )
    told = card_for(card, "ada/stars", None)
    assert 'load_dataset("ada/stars", split="train")\n\nlatentmill search stars "out of sight"' in told
    assert 'load("stars/inverter")\n/a/outer stays' in told
    assert "hf download ada/stars --repo-type dataset --local-dir stars" in told
    store = (
        'dataset = load_dataset("parquet", data_files="s3://b/out/data/part-*.parquet", split="train")\n`s3://b/out`'
    )
    told = card_for(store, "ada/stars", "v1")
    assert told.startswith('dataset = load_dataset("ada/stars", revision="v1", split="train")\n`stars`')
    assert "--revision v1" in told
