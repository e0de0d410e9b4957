"""Building blocks of the page: rows are untrusted."""

from __future__ import annotations

import re

import pytest

from jobs.page.html import Exhibit, escape, gallery, measures, picture, shorten, table, tag, words


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=y>', "</td><b>'&"])
def test_text_never_becomes_markup(text: str) -> None:
    for made in (escape(text), table(["prompt"], [[text]]), tag("p", text, title=text)):
        assert text not in made
        assert "<script" not in made
        assert "<img" not in made
        assert "<b>" not in made


def test_markup_is_escaped_once() -> None:
    assert tag("p", tag("b", "a & b")) == "<p><b>a &amp; b</b></p>"


def test_control_characters_and_direction_overrides_are_shown_as_marks() -> None:
    made = escape("a\x00b\u202ec\x1bd")
    assert not {"\x00", "\u202e", "\x1b"} & set(made)
    assert made.startswith("a␀b")


def test_pictures_that_are_none_leave_a_mark() -> None:
    made = gallery([Exhibit(b"junk", "a"), Exhibit(None, "b")])
    assert made.count("no picture") == 2
    from PIL import Image

    assert picture(Image.new("RGB", (2000, 1000))).startswith('<img src="data:image/jpeg;base64,')


def test_long_texts_say_how_long_they_are() -> None:
    assert shorten("x" * 500, 100) == "x" * 100 + " … (500 characters)"
    assert words("short") == "<bdi>short</bdi>"


def test_measures_stand_in_lines_where_they_are_more_than_what_was_measured() -> None:
    page = measures(["euler", "lbo"], {"rows": [5, 5], "psnr": [18.23, 27.7], "latent_mse": [0.0011, 2.4e-7]})
    assert re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", page) == [
        "", "euler", "lbo", "rows", "5", "5", "psnr", "18.2\u202fdB", "27.7\u202fdB",
        "latent mse", "1.1 × 10⁻³", "2.4 × 10⁻⁷",
    ]  # fmt: skip
    turned = measures(["a", "b", "c"], {"psnr": [18.23, None, 20.0]})
    assert re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", turned) == [
        "", "psnr", "a", "18.2\u202fdB", "b", "", "c", "20.0\u202fdB",
    ]  # fmt: skip


def test_a_wide_table_names_its_columns_in_every_cell_so_that_it_can_fold() -> None:
    page = table(["Step", "Job", "<b>", "Time"], [["one", "x", "y", "3 s"]])
    assert 'class="folds"' in page
    assert re.findall(r'data-name="([^"]*)"', page) == ["Job", "&lt;b&gt;", "Time"]
    assert "data-name" not in table(["Step", "Job"], [["one", "x"]])
