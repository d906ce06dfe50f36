"""From any model to a graph with names and shapes, for training and evaluation alike, opened into ops that have rules.

`wrapper` is what `add_feedback` and `to_butd` return has in common: how it is called, and which graphs it keeps.
Built on graph; used by every pass.
"""
