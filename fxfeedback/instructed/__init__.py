"""What makes an instructed BU-TD network of a graph: options, instructions, gates, heads, TD's own parameters, all
graphs of one input size, and the bridge from `loss.backward()` to the learner.

Built on `fxfeedback.td_graph` and `fxfeedback.counter_hebb_pass`; used by `fxfeedback.butd`, which has `to_butd`.
"""
