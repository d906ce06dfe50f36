"""Pictures of networks: what `fxfeedback.draw` is made of.

read.py        everything that a picture of a model shows:
network.py         its nodes and connections, and what passes and instructions do at each node
tasks.py           which units each task's instruction opens
effects.py         what each connection does to an image
boxes.py       nodes in the boxes of their modules, and which boxes are open
rows.py        how the content of a box lies in rows and columns
places.py      boxes, wires and arcs at their places, for the boxes that are open
text.py        how wide a text is
svg.py         SVG elements, and lines through points
marks.py       what boxes, wires and arcs look like
picture.py     SVG and PNG
page.py        a page in which modules fold and open: page.html, page.css, places.js, page.js
"""
