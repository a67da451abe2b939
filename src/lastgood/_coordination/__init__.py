"""How several ranks commit one checkpoint: they vote, over a store of their own that rank 0 serves.

Nothing here is a collective of the training's process group, but for one exchange of the store's address when a
checkpointer is made (:mod:`.address`).
"""
