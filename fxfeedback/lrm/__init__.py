"""The block of a connection, and how passes are run when they are trained or have no need for gradients.

Built on `fxfeedback.rewrite`; used by `fxfeedback.feedback`, whose `add_feedback` is the way in.
"""
