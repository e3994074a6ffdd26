"""The device that these tests add stays in the process, so no other test shares it."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    own = [item for item in items if FOLDER in item.path.parents]
    if len(own) < len(items):
        for item in own:
            item.add_marker(pytest.mark.skip(reason="needs a process of its own: pytest tests/any_device"))
