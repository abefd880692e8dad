"""Device code: one file an op (`pointwise.py`, `depthwise.py`, ...), with the variants of it that ship.

Every module whose name does not start with an underscore is an op and has `variants()`, which yields `Variant`s; the
build discovers them. Nothing here knows of torch or of the launcher.
"""
