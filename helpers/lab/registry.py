"""The registry: which chapters the book has, which claims each makes, and how many checks each claim has.

Each chapter has a file, ``helpers/registry/<chapter>.yml``, which ships with the package:

.. code-block:: yaml

    title: The loss is a random variable     # the title of its notebook
    module: the loss of a batch              # what helpers.<chapter> holds
    claims:
      iid_variance:                          # the claim minibatch_loss.iid_variance
        title: Independent losses average out, Var(L̂_m) = σ²/m
        source: "A §1, B §1.1, #3166774"     # document, section and problem, if it has any
        erratum: errata-linearity            # entry of errata.md, if it has any
        checks: 3                            # how often the notebook checks it

Where a chapter stands in the book, and so its number, is said by ``_toc.yml`` alone.
"""

import importlib.resources
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

REGISTRY = importlib.resources.files("helpers") / "registry"
BEYOND = "beyond the sources"


@dataclass(frozen=True)
class RegisteredClaim:
    """A claim as its chapter registers it.

    Parameters
    ----------
    id : str
        ``chapter.slug``.
    title : str
        What it says.
    checks : int
        How often its notebook checks it.
    source : str
        Documents, sections and problems that it comes from.
    erratum : str
        The entry of ``errata.md`` that says what is wrong there; empty if nothing is.
    """

    id: str
    title: str
    checks: int
    source: str = BEYOND
    erratum: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.checks, int) or self.checks < 1:
            raise ValueError(f"the registry must say how many checks {self.id} has, at least 1, got {self.checks!r}")

    @property
    def sources(self) -> list[str]:
        """Its sections and problems, one by one."""
        return [] if self.source == BEYOND else split(self.source)


@dataclass(frozen=True)
class Chapter:
    """A chapter as its file registers it: name, title, what its module holds, and its claims."""

    name: str
    title: str
    module: str
    claims: tuple[RegisteredClaim, ...]


@dataclass(frozen=True)
class Place:
    """Where ``_toc.yml`` puts a chapter: the caption of its part, its number and its page, without suffix."""

    part: str
    number: int
    page: str

    @property
    def chapter(self) -> str:
        """Name of the chapter."""
        return PurePosixPath(self.page).name


def split(source: str) -> list[str]:
    """Return the sections and problems that a source names, separated by commas."""
    return [part for part in re.split(r",\s*", source) if part]


def read_chapters(registry: Traversable = REGISTRY) -> dict[str, Chapter]:
    """Return every registered chapter by its name, sorted by name.

    Parameters
    ----------
    registry : path
        The folder of the chapters' files.

    Raises
    ------
    ValueError
        If a file says more or less than the registry asks for.
    """
    files = sorted((file for file in registry.iterdir() if file.name.endswith(".yml")), key=lambda file: file.name)
    return {chapter.name: chapter for chapter in map(_read, files)}


def read_chapter(name: str, registry: Traversable = REGISTRY) -> Chapter:
    """Return one registered chapter.

    Raises
    ------
    ValueError
        If no file has that name.
    """
    file = registry / f"{name}.yml"
    if not file.is_file():
        raise ValueError(f"a chapter must be one of {', '.join(read_chapters(registry))}, got {name!r}")
    return _read(file)


def places(toc: Path) -> list[Place]:
    """Return where each chapter stands, in reading order: chapters are what numbered parts of ``_toc.yml`` hold."""
    parts = yaml.safe_load(toc.read_text(encoding="utf-8")).get("parts", [])
    pages = [(part["caption"], entry["file"]) for part in parts if part.get("numbered") for entry in part["chapters"]]
    return [Place(part, number, page) for number, (part, page) in enumerate(pages, 1)]


def miscounted(claims: Iterable[RegisteredClaim], checked: Iterable[str]) -> list[str]:
    """Say which claims are not checked as often as they are registered.

    Parameters
    ----------
    claims : iterable of RegisteredClaim
        What is registered.
    checked : iterable of str
        The id of each check.

    Returns
    -------
    list of str
        A sentence for each claim with a check too many or too few; a claim that is not registered has no checks there.
    """
    registered, found = Counter({claim.id: claim.checks for claim in claims}), Counter(checked)
    return [
        f"{id} is checked {_times(found[id])}, but registered with {registered[id] or 'no'} checks"
        for id in dict.fromkeys([*registered, *found])
        if registered[id] != found[id]
    ]


def _times(count: int) -> str:
    return {0: "nowhere", 1: "once"}.get(count, f"{count} times")


def _read(file: Traversable) -> Chapter:
    name = file.name.removesuffix(".yml")
    fields = yaml.safe_load(file.read_text(encoding="utf-8"))
    _require_fields(file.name, fields, wanted={"title", "module", "claims"})
    claims = []
    for slug, claim in fields["claims"].items():
        _require_fields(f"{slug} in {file.name}", claim, wanted={"title", "checks"}, allowed={"source", "erratum"})
        claims.append(RegisteredClaim(f"{name}.{slug}", **claim))
    return Chapter(name, fields["title"], fields["module"], tuple(claims))


def _require_fields(
    what: str, fields: Mapping[str, Any], wanted: set[str], allowed: frozenset[str] = frozenset()
) -> None:
    missing, unknown = wanted - fields.keys(), fields.keys() - wanted - allowed
    if missing or unknown:
        raise ValueError(f"{what} must say {sorted(wanted)}, missing {sorted(missing)}, unknown {sorted(unknown)}")
