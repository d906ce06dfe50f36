"""Pictures of networks: what `fxfeedback.draw` is made of.

read.py        everything that a picture of a model shows:
parts.py           what a picture is of: nodes, arcs, the network
network.py         its nodes and arcs, and what passes and instructions do at each node
arcs.py            its connections and predictions, and which passes compute each node
tasks.py           which units each task's instruction opens
effects.py         what each connection does to an image
boxes.py       nodes in the boxes of their modules, and which boxes are open
rows.py        the rows and columns of what is in a box
plan.py        all of a network that does not depend on which boxes are open: boxes, rows, lanes of arcs
lengths.py     the lengths that pictures and pages share
places.py      where boxes, wires and arcs lie, for a given set of open boxes; places.js is the same for pages
text.py        how wide a text is
svg.py         SVG elements, and lines through points
marks.py       what boxes, wires and arcs look like
picture.py     SVG and PNG
page.py        a page in which modules fold and open, made of page.html, page.css, places.js and page.js

A drawing is made in this order: `draw` checks its arguments, `read_drawing` reads the model and makes the plan, and
`picture` or `page` draws it. Only `draw` is for the rest of the package.
"""
