"""Hands numbers to the prose around a notebook's cells, so that they cannot go stale."""

from IPython.display import display

MIME_PREFIX = "application/papermill.record/"


def glue(**texts: str) -> None:
    """Store preformatted texts in the cell's output, for ``{glue:text}`` in a markdown cell.

    The record is the one that ``myst_nb.glue`` writes, which would load all of Sphinx into the kernel.

    Parameters
    ----------
    **texts : str
        Name and text, for example ``share="25 %"``.

    Raises
    ------
    ValueError
        If a text is not a string: how a number is rounded belongs to the cell that made it.
    """
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"glue takes preformatted strings, got {name} = {text!r}")
    for name, text in texts.items():
        record = {"scrapbook": {"name": name, "mime_prefix": MIME_PREFIX}}
        display({f"{MIME_PREFIX}text/plain": repr(text)}, metadata=record, raw=True)
