"""Runs: the checkpoints of one training under one root, when to save, what to keep, where to resume.

Only ``checkpoint_manager``, ``state`` and ``ranks`` work on tensors; the rest serves the command, which does without
torch, as well.
"""
