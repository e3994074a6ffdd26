"""What is installed is what constraints.txt says; a wheel of the package needs no repository."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import book_promises

ROOT = Path(__file__).parents[1]


def requirements_of(name, extras):
    """All installed distributions that a distribution needs, direct or not, with their versions."""
    found, waiting = {}, [(name, extras)]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in found:
            continue
        distribution = metadata.distribution(name)
        found[name, extras] = distribution.version
        for text in distribution.requires or []:
            needed = Requirement(text)
            marked = [needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)] if needed.marker else [True]
            if any(marked):
                waiting.append((canonicalize_name(needed.name), tuple(sorted(needed.extras))))
    return {name: version for (name, _), version in found.items()}


def test_what_is_installed_is_what_the_constraints_say():
    pins = [pin for pin in book_promises.constraints(ROOT) if not pin.marker or pin.marker.evaluate()]
    wanted = {canonicalize_name(pin.name): pin for pin in pins}
    project = book_promises.project(ROOT)["name"]
    installed = requirements_of(project, ("book", "pretrained", "test"))
    del installed[project]
    assert len(installed) > 50
    for name, version in installed.items():
        assert name in wanted, f"{name} is installed but has no line in constraints.txt"
        assert wanted[name].specifier.contains(version, prereleases=True), f"{name} {version} is not {wanted[name]}"


# What a reader runs after `pip install git+…`: the first lines check every claim as often as the registry says.
IN_AN_EMPTY_FOLDER = """
import pathlib
import helpers.lab
from helpers.lab import ChapterTable, exact
from helpers.lab.registry import read_chapter
for claim in read_chapter("minibatch_loss").claims:
    for number in range(claim.checks):
        exact(claim.id, 1.0, 1.0, case=str(number))
print(ChapterTable("minibatch_loss"))
print(pathlib.Path(helpers.lab.__file__).parents[2])
"""


def test_a_wheel_shows_a_chapters_table_in_an_empty_folder(tmp_path):
    source, wheels, site, empty = (tmp_path / name for name in ("source", "wheels", "site", "empty"))
    empty.mkdir()
    source.mkdir()
    shutil.copytree(ROOT / "helpers", source / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels, source], check=True)
    (wheel,) = wheels.glob("*.whl")
    shutil.unpack_archive(wheel, site, format="zip")

    run = subprocess.run(
        [sys.executable, "-c", IN_AN_EMPTY_FOLDER],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "minibatch_loss.unbiased" in run.stdout
    assert "For independent losses Var(L̂_m) = σ²/m" in run.stdout
    assert run.stdout.splitlines()[-1] == str(site)
