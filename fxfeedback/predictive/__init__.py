"""Predictive coding: predictions, what predicts, the steps of the flat graph, and the model that has them.

`prediction.py` is the front. Nothing here knows of connections or instructions.
"""
