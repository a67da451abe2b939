"""What ``lastgood doctor`` is made of: looking (``facts``), and what to make of it (``findings``, ``checkpoints``)."""
