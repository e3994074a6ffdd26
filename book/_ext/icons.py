"""Keeps, of Font Awesome, only the icons that the book shows.

The theme's style sheet names 1,900 icons and its font draws them all: 250 kB that
each page would load for some fifteen.
"""

import re

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont

ICON_RULE = re.compile(r'((?:\.fa-[\w-]+:before,?)+)\{content:"\\[0-9a-f]+"\}')
NAME = re.compile(r"fa-[\w-]+")
# As an escape or as the character itself, in the fonts' private range.
CODE_POINT = re.compile(r'"\\([0-9a-f]{1,5})"')
CHARACTER = re.compile("[\ue000-\uf8ff]")
WEB_FONT = re.compile(r'(fa-[\w-]+)\.woff2\) format\("woff2"\)')


def trim_icons(static):
    """Drop unused icons from the style sheet and the fonts of a built book.

    Parameters
    ----------
    static : Path
        The ``_static`` folder of the finished book.
    """
    used = _names_in(static.parent)
    sheet = static / "styles" / "pydata-sphinx-theme.css"
    css = ICON_RULE.sub(
        lambda rule: rule[0] if used & set(NAME.findall(rule[1])) else "",
        sheet.read_text(encoding="utf-8"),
    )
    others = [x for x in static.rglob("*.css") if x != sheet]
    sheets = "".join([css, *(x.read_text(encoding="utf-8") for x in others)])
    shown = {int(x, 16) for x in CODE_POINT.findall(sheets)}
    shown |= {ord(x) for x in CHARACTER.findall(sheets)}
    for font in (static / "vendor" / "fontawesome" / "webfonts").glob("*.ttf"):
        _write_subset(font, shown)
    sheet.write_text(WEB_FONT.sub(r'\1.woff) format("woff")', css), encoding="utf-8")


def _names_in(folder):
    # Scripts put icons into pages as well.
    return {
        name
        for ending in ("*.html", "_static/*.js", "_static/scripts/*.js")
        for file in folder.rglob(ending)
        for name in NAME.findall(file.read_text(encoding="utf-8"))
    }


def _write_subset(path, code_points):
    # WOFF, since WOFF 2 would need a compressor that nothing else here needs.
    options = Options(flavor="woff", notdef_outline=True)
    with TTFont(path) as font:
        subsetter = Subsetter(options)
        subsetter.populate(unicodes=code_points)
        subsetter.subset(font)
        font.flavor = "woff"
        font.save(path.with_suffix(".woff"))
