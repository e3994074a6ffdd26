"""Figures have few colors: with a palette their files are about a third as large."""

from pathlib import Path

from PIL import Image

COLORS = 256


def shrink_pictures(app, exception):
    """Store each picture of the finished book with a palette, where that is smaller."""
    if exception is not None or app.builder.format != "html":
        return
    for path in sorted((Path(app.outdir) / "_images").glob("*.png")):
        with Image.open(path) as picture:
            if picture.mode == "P":
                continue
            # The octree keeps transparency; dithering would put dots into plain areas.
            small = picture.convert("RGBA").quantize(COLORS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        before = path.read_bytes()
        small.save(path, optimize=True)
        if path.stat().st_size >= len(before):
            path.write_bytes(before)
