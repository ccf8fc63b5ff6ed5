"""Speed and memory of inlay beside the incumbent, in one run: ``python -m benchmarks``.

What each figure means is in ``docs/benchmarks.md``.
"""
