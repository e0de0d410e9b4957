"""The prompts and the table of `latentmill compbench`."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.commands.compbench import compare, interval, read_prompts, read_scores, tabulate


def test_real_prompt_files_are_read_by_category(tmp_path):
    (tmp_path / "color_val.txt").write_text("a red car and a blue book\n\na green bench\n")
    (tmp_path / "spatial_val.txt").write_text("a cat left of a dog\tleft\n")
    (tmp_path / "color_train.txt").write_text("not this\n")
    found = list(read_prompts(tmp_path, None))
    assert [(row["id"], row["category"], row["prompt"]) for row in found] == [
        ("color-0", "color", "a red car and a blue book"),
        ("color-1", "color", "a green bench"),
        ("spatial-0", "spatial", "a cat left of a dog"),
    ]
    assert len(list(read_prompts(tmp_path, 1))) == 2
    miniature = list(read_prompts(None, 2))
    assert len(miniature) == 12
    assert miniature[0]["objects"]
    assert [row["category"] for row in read_prompts(tmp_path, None, ["spatial"])] == ["spatial"]
    assert [row["id"] for row in read_prompts(None, 1, ["never", "rare"])] == ["never-000", "rare-000"]
    with pytest.raises(ValueError, match="no category 'colour', there are color, spatial"):
        list(read_prompts(tmp_path, None, ["colour"]))
    with pytest.raises(ValueError, match="no prompt set 'color'"):
        list(read_prompts(None, None, ["color"]))
    with pytest.raises(ValueError, match="no prompt files"):
        list(read_prompts(tmp_path / "empty", None))


def test_the_table_gives_means_and_intervals():
    mean, half = interval([0.0, 1.0, 1.0, 0.0])
    assert (mean, half) == (0.5, pytest.approx(1.959964 * np.std([0, 1, 1, 0], ddof=1) / 2))
    scores = {
        ("ovi", "colour", "bound"): {"a": 1.0, "b": 0.5},
        ("ovi", "shape", "bound"): {"c": 0.0},
        ("near", "colour", "bound"): {"a": 0.75, "b": 0.25},
        ("near", "shape", "bound"): {"c": 1.0},
        ("near", "shape", "clip_score"): {"c": 9.0},
    }
    text = tabulate(scores, {"ovi": {"clip_score": 31.0, "passes": None}, "near": {"clip_score": 30.0}})
    assert f"| ovi | 0.750 ± 0.490 | 0.000 ± 0.000 | 0.500 ± {1.959964 * 0.5 / 3**0.5:.3f} | 31 |" in text
    differences = compare(scores)
    half = 1.959964 * np.std([0.25, 0.25, -1.0], ddof=1) / 3**0.5
    assert f"| ovi |  | {-0.5 / 3:+.3f} ± {half:.3f} |" in differences
    sure = compare({("a", "c", "bound"): {"p": 1.0, "q": 0.9}, ("b", "c", "bound"): {"p": 0.5, "q": 0.4, "r": 0.0}})
    assert "| a |  | **+0.500 ± 0.000** |" in sure


def test_draws_of_a_prompt_are_averaged_before_the_interval(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [
        {"id": f"set/p{p}/{d}/ovi", "draw": str(d), "method": "ovi", "category": "c", "bound": value, "success": None}
        for p, d, value in [(0, 0, 1.0), (0, 1, 0.0), (1, 0, 1.0), (1, 1, None)]
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "part-0.parquet")
    assert read_scores(tmp_path) == {("ovi", "c", "bound"): {"set/p0": 0.5, "set/p1": 1.0}}
