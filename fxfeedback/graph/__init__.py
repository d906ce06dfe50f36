"""What can be asked of a graph: what passes said of its nodes, shapes, operands, effects, signs, channels, layouts.

Built on errors and rules, and used by every pass. Two things here change a graph: `annotate_shapes`, which says of each
node what it makes, and `unpack_tuples`, which gives each tensor of a tuple a node of its own.
"""
