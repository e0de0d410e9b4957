"""Models with random weights that tests of several rooms look at."""

from __future__ import annotations

import pytest

from tests.support.concepts import opened
from tests.support.tiny_stable_diffusion import build


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("sd"), "sd")


@pytest.fixture(scope="session")
def model(folder):
    return opened(folder)


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    return opened(build(tmp_path_factory.mktemp("sdxl"), "sdxl"))
