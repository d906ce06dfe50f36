"""What `fxfeedback.export` and `fxfeedback.export_learner` wrote, in ONNX Runtime and without torch.

session = fxfeedback.runtime.Session("model.onnx")
logits = session(images, task=[0, 1, 1])
learner = fxfeedback.runtime.Learner("learner.onnx")
loss = learner.step(images, labels, task=tasks, lr=0.05)

Built on errors, version, files, checksums and file_facts only.
"""

from fxfeedback.checksums import checksum
from fxfeedback.runtime.learner import Learner
from fxfeedback.runtime.session import Session

__all__ = ["Learner", "Session", "checksum"]
