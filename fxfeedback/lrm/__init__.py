"""Long-range modulation: connections and steering as users give them, the block of a connection, how passes are run
with and without gradients, and the model that has all of it.

Built on `fxfeedback.rewrite`; used by `fxfeedback.feedback`, whose `add_feedback` is the way in.
"""
