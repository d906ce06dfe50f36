"""Networks on disk: `save` and `load`, which run no code from a file, and the checkpoints of others.

Built on the fronts.
"""
