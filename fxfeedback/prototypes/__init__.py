"""What a class looks like inside of a network: the mean activation of its pictures at any node, to steer and to
instruct with; in files of ours and in the published ones.

Built on the fronts and on `fxfeedback.storage`; `Prototypes` is the way in.
"""
