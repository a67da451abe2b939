"""The checkpoint process and its trainer's end; :mod:`lastgood.checkpoint_process` is the way in."""
