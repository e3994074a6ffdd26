"""conda users, pip users and CI get the same packages."""

import re
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_constraint_is_one_exact_version_that_installs_anywhere():
    for pin in pins():
        assert re.fullmatch(r"==[^*+]+", str(pin.specifier)), f"{pin} must be an exact version without a local suffix"


def test_torch_is_pinned_once():
    assert [str(pin) for pin in pins() if pin.name == "torch"] == ["torch==2.13.0"]


@pytest.mark.parametrize("requirement", list(chain(PROJECT["dependencies"], *EXTRAS.values())))
def test_every_range_admits_its_constraint(requirement):
    wanted = Requirement(requirement)
    chosen = [pin for pin in pins() if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
    assert chosen, f"{wanted.name} has no line in constraints.txt"
    for pin in chosen:
        (version,) = (specifier.version for specifier in pin.specifier)
        assert wanted.specifier.contains(version, prereleases=True), f"{wanted} does not admit {pin}"


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
    wanted = {canonicalize_name(pin.name): pin for pin in pins() if not pin.marker or pin.marker.evaluate()}
    installed = requirements_of(PROJECT["name"], ("book", "test"))
    del installed[PROJECT["name"]]
    assert len(installed) > 50
    for name, version in installed.items():
        assert name in wanted, f"{name} is installed but has no line in constraints.txt"
        assert wanted[name].specifier.contains(version, prereleases=True), f"{name} {version} is not {wanted[name]}"


def test_environment_yml_installs_this_package_with_all_that_a_reader_needs():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *from_conda, from_pip = environment["dependencies"]
    assert environment["name"] == PROJECT["name"]
    assert from_conda == ["python=3.11", "pip"]
    assert Requirement("python" + PROJECT["requires-python"]).specifier.contains("3.11")
    constraint, editable = from_pip["pip"]
    assert constraint == "--constraint constraints.txt"
    extras = re.fullmatch(r"--editable \.\[(.+)\]", editable)[1].split(",")
    assert set(extras) == EXTRAS.keys() - {"constraints"}
