"""What holds for every test."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _no_network():
    """Fail a test that tried to reach another machine and caught the refusal of tests/no_network."""
    refused = getattr(sys.modules.get("sitecustomize"), "refused", [])
    before = len(refused)
    yield
    assert refused[before:] == [], f"the test tried to reach {refused[before:]}"
