"""Adapters as files: ``files`` opens and writes them, the other modules turn names into names."""
