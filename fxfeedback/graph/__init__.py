"""What can be asked of a graph: its nodes, their shapes and values, which rectify, and how tensors are laid out.

Built on errors and rules. Nothing here changes a graph but `annotate_shapes`, which writes what it found into it.
"""
