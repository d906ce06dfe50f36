"""Lengths that the picture and the page share, in pixels; the scripts of the page get them as `plan.lengths`."""

WIDTH, HEIGHT, SITE_HEIGHT = 236.0, 36.0, 62.0  # of a closed box; SITE_HEIGHT of one with gating sites
PASSAGE = 10.0  # the width that a wire takes in a row that it passes through
PORT = WIDTH  # and where it enters or leaves an open box, so that there is room for a name beside it
GAP_X, GAP_Y = 16.0, 17.0  # between boxes
MARGIN, TITLE = 14.0, 20.0  # inside an open box: at its sides, and at its top for its name
INSET = 16.0  # from a box's corner to the nearest wire
LANE, BEND, SPREAD = 22.0, 8.0, 9.0  # between arcs; the radius of their bends; between arcs that end at the same box
NUMBER_AT = (0.5, 0.45, 0.55, 0.4, 0.6, 0.3, 0.7, 0.2, 0.8)  # where along an arc its number may stand, best first
DISC = 10.0  # around an arc's number
LATERAL = 96.0  # between BU and TD
STUB = 14.0  # what is drawn of a lateral connection at either end, if boxes lie in its way
PAD = 8  # between a box's edge and its text
BAR = 80  # a task's bar at a share of 100 %

ALL = {name: value for name, value in list(globals().items()) if name.isupper()}
"""Every length by its name."""
