"""What no door takes, however it is traced."""


class Refusal(ValueError):
    """The model does something that a graph must not hold: another way to trace it would be silently different."""
