"""What a command line says of the weights that TD reads."""

import argparse

SAME = ("embedding", "head", "gating", "lateral", "td_learning", "td_magnitude", "td_scale", "td_decay", "td_clip")
OF_BUTD = {**{name: name for name in (*SAME, "direct", "instruction_learning")}, "td_weights": "weights"}
"""Argument -> the option of `to_butd` that it is."""


def add_feedback_weights(parser: argparse.ArgumentParser) -> None:
    """What TD reads in place of the weights."""
    add, kinds = parser.add_argument, ["shared", "separate", "sign", "direct"]
    add("--td-weights", choices=kinds, help="what TD reads: the weights (default), its own, their signs, or the error")
    add("--td-learning", choices=["mirror", "fixed", "weight_mirror"], help="of separate weights (default mirror)")
    add("--td-magnitude", choices=["uniform", "batch", "fixed"], help="of signs (default uniform)")
    add("--td-scale", metavar="xavier|kaiming|X", type=scale, help="of magnitudes (default xavier)")
    add("--td-decay", metavar="X", type=float, help="of mirrored weights and the BU weights (default 0)")
    add("--td-clip", metavar="X", type=float, help="the largest value that a layer hands on (default: any)")
    add("--direct", choices=["op", "unit"], help="where the error is broadcast to, of --td-weights direct (default op)")
    add("--instruction-learning", choices=["fixed", "straight-through"], help="of the head (default fixed)")


def scale(text: str) -> str | float:
    """xavier, kaiming or a number"""
    try:
        return text if text in ("xavier", "kaiming") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither xavier nor kaiming nor a number") from None
