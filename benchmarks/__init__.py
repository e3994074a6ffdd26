"""Speed of the helpers, side by side with what a reader would use instead: `make bench`.

Every module here that has a function ``races`` takes part. It is a package, because Opacus installs one of that name,
which a folder of scripts would lose against.
"""
