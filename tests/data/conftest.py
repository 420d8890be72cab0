"""Tokenizers made in memory, by the chat templates they have."""

from typing import Any

import pytest
from data.chat import PICKY, PLAIN, REWRITING, WITH_TOOLS, build


@pytest.fixture(scope="session")
def plain() -> Any:
    """A chat template without tools."""
    return build(PLAIN)


@pytest.fixture(scope="session")
def native() -> Any:
    """A chat template that takes tools."""
    return build(WITH_TOOLS)


@pytest.fixture(scope="session")
def rewriting() -> Any:
    """A chat template whose context is no prefix of the whole."""
    return build(REWRITING)


@pytest.fixture(scope="session")
def bare() -> Any:
    """No chat template at all."""
    return build(None)


@pytest.fixture(scope="session")
def picky() -> Any:
    """A chat template that takes tools and refuses a word."""
    return build(PICKY)
