"""What holds for every test."""

import sys

import pytest
from xdist.scheduler import LoadScopeScheduling


class ByFunction(LoadScopeScheduling):
    """Gives a notebook as a whole to one worker, whose kernel it needs, and test functions one by one.

    So no worker is left alone with a long file at the end, however files grow; notebooks come first.
    """

    def _split_scope(self, nodeid):
        return nodeid.partition("::")[0] if ".ipynb::" in nodeid else nodeid.partition("[")[0]


def pytest_xdist_make_scheduler(config, log):
    return ByFunction(config, log)


@pytest.fixture(autouse=True)
def _no_network():
    """Fail a test that tried to reach another machine and caught the refusal of tests/no_network."""
    refused = getattr(sys.modules.get("sitecustomize"), "refused", [])
    before = len(refused)
    yield
    assert refused[before:] == [], f"the test tried to reach {refused[before:]}"
