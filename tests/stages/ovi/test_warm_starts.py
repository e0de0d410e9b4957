"""Tokens to start from."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.ovi.settings import OVI
from stages.ovi.warm_starts import WarmStarts
from tests.support.prompt_methods import PROMPTS, run


def test_warm_starts_take_the_tokens_of_the_nearest_prompt(context, rows, tmp_path):
    (tmp_path / "data").mkdir()
    tokens = np.arange(2 * 4 * 32, dtype=np.float32).reshape(2, -1)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(tokens.ravel()), 4 * 32)
    table = {"prompt": [PROMPTS[3], PROMPTS[1]], "tokens": flat, "status": ["ok", "ok"]}
    pq.write_table(pa.table(table), tmp_path / "data" / "part-00000-of-00001.parquet")
    starts = WarmStarts.open(str(tmp_path), (4, 32), context.text)
    got = {row["id"]: row["start"] for row in starts(rows, 3)}
    np.testing.assert_array_equal(got["p1"].ravel(), tokens[1])
    np.testing.assert_array_equal(got["p3"].ravel(), tokens[0])
    run(OVI(steps=2, warm_start=str(tmp_path)), context, rows)
    with pytest.raises(ValueError, match="3 x 32"):
        run(OVI(steps=2, tokens=3, warm_start=str(tmp_path)), context, rows)
