"""The composite challenge: two images of different classes in one, a third class that is absent, and how well a
network with connections names the one it is steered to.

Built on `fxfeedback.prototypes`; everything public is an attribute of this module.
"""

from fxfeedback.composites.steerability import Row, steerability, table
from fxfeedback.composites.triplets import KINDS, Triplet, TripletDataset, cut_mix, overlay, side_by_side

__all__ = [
    "KINDS",
    "Row",
    "Triplet",
    "TripletDataset",
    "cut_mix",
    "overlay",
    "side_by_side",
    "steerability",
    "table",
]
