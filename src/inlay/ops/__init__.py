"""Fast paths for matrix layers, each beside a readable ``reference()`` of the same signature.

They know tensors only: no layers, adapters or configs.
"""
