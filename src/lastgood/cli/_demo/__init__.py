"""The parts of ``lastgood demo``.

``training.py`` is the program that is killed, and the one to read as an example of a training script.
``supervisor.py`` starts and kills it; the other modules say what came of that.
"""
