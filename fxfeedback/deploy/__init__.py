"""A program as an ONNX file: written, finished with names and metadata, and compared with torch before it is kept.

Built on the fronts; used by `fxfeedback.export`. `learner` writes a whole step of learning.
"""
