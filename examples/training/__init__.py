"""The training room that the training scripts share: data by number, the loop, checkpoints, results.

- flags.py: the command line, and the files of settings in `examples/configs`
- data.py: which samples a step sees, and what is random in them, as a function of numbers alone
- schedules.py: the learning rate as a function of the epochs done
- loop.py: the training itself, on one process or on many, that goes on exactly where it was stopped
- checkpoints.py: what it needs for that, in one file
- results.py: the log, the curves, the table over several seeds
"""
