"""Numbers for the prose are stored as Sphinx will look for them."""

import myst_nb
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from helpers.lab import glue


@pytest.fixture(autouse=True, scope="module")
def shell():
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def stored(call):
    with capture_output() as captured:
        call()
    return [(output.data, output.metadata) for output in captured.outputs]


def test_the_record_is_the_one_of_the_library():
    ((data, metadata),) = stored(lambda: glue(share="25 %"))
    ((wanted_data, wanted_metadata),) = stored(lambda: myst_nb.glue("share", "25 %", display=False))
    assert data == wanted_data
    assert metadata["scrapbook"] == wanted_metadata["scrapbook"]


def test_several_texts_are_several_records():
    names = [metadata["scrapbook"]["name"] for _, metadata in stored(lambda: glue(a="1", b="2"))]
    assert names == ["a", "b"]


def test_a_number_is_refused_and_nothing_is_stored():
    def call():
        with pytest.raises(ValueError, match=r"preformatted strings, got b = 0\.25"):
            glue(a="1", b=0.25)

    assert stored(call) == []
