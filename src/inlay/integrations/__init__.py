"""The edge of the library: what talks to transformers, files of examples and other people's tools.

Nothing else in ``inlay`` imports from here, so a script that only adapts a model never pays for it.
"""
