"""Pictures of the finished book have palettes, and look as they did."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from helpers.lab import figures

SOURCE = Path(__file__).parents[1] / "book/_ext/pictures.py"
spec = importlib.util.spec_from_file_location("pictures", SOURCE)
pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictures)


@pytest.fixture
def picture(tmp_path):
    """A figure like those of the book, in the folder of a finished one."""
    path = tmp_path / "_images" / "figure.png"
    path.parent.mkdir()
    fig, ax = figures.axes()
    x = np.linspace(0, 6, 200)
    for shift in range(8):
        ax.plot(x, np.sin(x + shift), color=[figures.THEORY, figures.SIMULATION][shift % 2], label=f"{shift}")
    ax.legend()
    fig.savefig(path)
    plt.close(fig)
    return path


def finish(path, exception=None):
    app = SimpleNamespace(builder=SimpleNamespace(format="html"), outdir=str(path.parents[1]))
    pictures.shrink_pictures(app, exception)


def colors_of(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGBA"), dtype=int)  # (height, width, 4)


def test_a_picture_is_less_than_half_as_large_and_looks_the_same(picture):
    size, before = picture.stat().st_size, colors_of(picture)
    finish(picture)
    after = colors_of(picture)
    assert picture.stat().st_size < size / 2
    assert after.shape == before.shape
    # Of 255 levels: of what lies on the page, color times cover.
    shown = [colors[..., :3] * colors[..., 3:] / 255 for colors in (before, after)]
    assert np.abs(shown[0] - shown[1]).mean() < 1
    assert (after[before[..., 3] == 0, 3] == 0).all()


def test_a_picture_is_shrunk_once_and_only_in_a_finished_book(picture):
    whole = picture.read_bytes()
    finish(picture, exception=RuntimeError())
    assert picture.read_bytes() == whole
    finish(picture)
    small = picture.read_bytes()
    finish(picture)
    assert picture.read_bytes() == small != whole
