"""How long a chapter is: the story that is read, and the workbench of code beneath it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FOLDED = {"hide-input", "remove-input", "hide-cell", "remove-cell"}
WORDS_A_MINUTE, LINES_A_MINUTE = 200, 10
EXERCISES = re.compile(r"^#+ .*Exercises", re.MULTILINE)
SECTION = re.compile(r"^## +(.*)", re.MULTILINE)
DROPDOWN = re.compile(r"^(`{3,})\{dropdown\}.*?^\1\s*$", re.MULTILINE | re.DOTALL)
FORMULA_OR_ROLE = re.compile(r"\$[^$]*\$|\{[a-z:]+\}`[^`]*`")
WORD = re.compile(r"[A-Za-z’']{2,}")
FIGURE_FORMS = {"image/png", "application/vnd.plotly.v1+json"}


@dataclass(frozen=True)
class Length:
    """How long a chapter is, its exercises and dropdowns left out.

    Parameters
    ----------
    words, figures : int
        Of the story: words of its text without formulas, and figures.
    visible : dict
        Lines of code that are not folded away, by the title of their section.
    code : int
        All lines of code that a page shows, folded or not.

    Examples
    --------
    >>> text = {"cell_type": "markdown", "source": "## Noise\\n\\nIt is $x$ again.", "metadata": {}}
    >>> code = {"cell_type": "code", "source": "a = 1\\n\\nb = 2", "metadata": {}, "outputs": []}
    >>> folded = code | {"metadata": {"tags": ["hide-input"]}}
    >>> length_of([text, code, folded])
    Length(words=4, figures=0, visible={'Noise': 2}, code=4)
    """

    words: int
    figures: int
    visible: dict[str, int]
    code: int

    @property
    def story(self) -> int:
        """Minutes to read the story, at 200 words a minute and a minute for each figure; in steps of five."""
        return _fives(self.words / WORDS_A_MINUTE + self.figures)

    @property
    def workbench(self) -> int:
        """Minutes to read the story and all of the code, at ten lines a minute; in steps of five."""
        return _fives(self.words / WORDS_A_MINUTE + self.figures + self.code / LINES_A_MINUTE)


def length_of(cells: Sequence[Mapping[str, Any]]) -> Length:
    """Return how long a chapter is.

    Parameters
    ----------
    cells : sequence of mapping
        The cells of its notebook, as JSON gives them.

    Returns
    -------
    Length
    """
    words = figures = code = 0
    visible: dict[str, int] = {}
    for section, cell, source in _story(cells):
        tags = set(cell["metadata"].get("tags", []))
        if cell["cell_type"] == "markdown":
            words += len(WORD.findall(FORMULA_OR_ROLE.sub(" ", DROPDOWN.sub("", source))))
            continue
        figures += any(FIGURE_FORMS & output.get("data", {}).keys() for output in cell["outputs"])
        lines = sum(1 for line in source.splitlines() if line.strip())
        code += 0 if "remove-input" in tags or "remove-cell" in tags else lines
        if not FOLDED & tags:
            visible[section] = visible.get(section, 0) + lines
    return Length(words, figures, visible, code)


def _story(cells: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Yield section, cell and source of what stands outside the exercises."""
    section, in_exercises = "", False
    for cell in cells:
        source = "".join(cell["source"])
        titles = SECTION.findall(source)
        if EXERCISES.search(source):
            in_exercises = True
        elif titles:
            in_exercises = False
        section = titles[-1] if titles else section
        if not in_exercises:
            yield section, cell, source


def _fives(minutes: float) -> int:
    return max(5, 5 * round(minutes / 5))
