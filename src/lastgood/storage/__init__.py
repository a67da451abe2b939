"""Where checkpoints are kept: the contract (:mod:`.base`) and what implements it."""
