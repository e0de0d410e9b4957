"""Prompts for the tests of prompt inversion, and one method on them."""

from stages.ovi.methods import build

PROMPTS = ["photo of a red star", "blue circle", "a striped green ring", "plain small heart", "robot in ice"]


def run(method, context, rows):
    return {row["id"]: row for row in build(method, context)(iter(rows))}
