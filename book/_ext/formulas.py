"""How wide a formula will be, so that lines stay where they are when it is typeset."""

import functools
import html
import logging
import re

from matplotlib import rc_context
from matplotlib.mathtext import MathTextParser

INLINE = re.compile(r'<span class="math ([^>]*)>\\\((.*?)\\\)</span>', re.DOTALL)
# MathJax enlarges its letters, which are those of TeX, until an x is as high as in the text.
SCALE = 1.13
POINTS = 10
LETTER, GROUP = r"[A-Za-z0-9]|\\[a-z]+", r"\{[^{}]*\}"
# What Matplotlib's TeX lacks, and MathJax draws as wide.
ALIKE = [
    (r"\\operatorname\*?", r"\\mathrm"),
    (r"\\text(?:bf|it|rm)?(?=\{)", r"\\mathrm"),
    (r"\\(?:big|Big|bigg|Bigg)[lr]?(?![a-z])", ""),
    (r"\\[td]frac", r"\\frac"),
    (r"\\l[VvA]ert", r"\\Vert"),
    (r"\\lvert|\\rvert", "|"),
    (r"\\mid(?![a-z])", r"\;|\;"),
    (r"\\(?:le|ge)(?![a-z])", r"\\leq"),
    (r"\\ne(?![a-z])", r"\\neq"),
    # Arguments without braces.
    (rf"(\\(?:mathbb|mathcal|sqrt)) *({LETTER})", r"\1{\2}"),
    # TeX puts 5/18 em around a relation, Matplotlib 1/5.
    (r"(=|<|>|\\(?:leq|geq|neq|approx|sim|to|in)(?![a-z]))", r"\1\,"),
    (rf"\\frac *({LETTER}|{GROUP}) *({LETTER}|{GROUP})", r"\\frac{\1}{\2}"),
]
logging.getLogger("matplotlib.mathtext").setLevel(logging.ERROR)


@functools.cache
def width_of(formula):
    """Return the width of an inline formula in em, or None where Matplotlib does not know its commands."""
    for command, other in ALIKE:
        formula = re.sub(command, other, formula)
    with rc_context({"mathtext.fontset": "cm", "font.size": POINTS}):
        try:
            # At 72 dots an inch a dot is a point.
            width = MathTextParser("path").parse(f"${' '.join(formula.split())}$", dpi=72).width
        except ValueError:
            return None
    return SCALE * width / POINTS


def reserve_widths(body):
    """Write into each inline formula of a page how wide it will be."""

    def styled(found):
        width = width_of(html.unescape(found[2]))
        style = "" if width is None else f' style="--width: {width:.2f}em"'
        return f'<span class="math {found[1]}{style}>\\({found[2]}\\)</span>'

    return INLINE.sub(styled, body)
