"""How a state gets into shared memory; :mod:`lastgood.staging` is the way in."""
