"""What is installed, directly or not, is what constraints.txt says."""

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
    installed = requirements_of(project, ("book", "test"))
    del installed[project]
    assert len(installed) > 50
    for name, version in installed.items():
        assert name in wanted, f"{name} is installed but has no line in constraints.txt"
        assert wanted[name].specifier.contains(version, prereleases=True), f"{name} {version} is not {wanted[name]}"
