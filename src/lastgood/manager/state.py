"""Between what a training holds and what a checkpoint holds: objects with ``state_dict``, tensors, plain values."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from lastgood._loading.targets import TensorsLike
from lastgood.errors import ConfigError, MissingKeysError, TargetMismatchError, listed
from lastgood.format.nodes import join_path, list_position
from lastgood.sharding.dtensors import dtensor_class, is_dtensor


def state_dict_of(state: dict[str, Any]) -> dict[str, Any]:
    """``state`` with the ``state_dict()`` of every object in it that has one, in nested dicts, lists and tuples too."""
    return _replaced(state, lambda value: value.state_dict(), "", [])  # type: ignore[no-any-return]


def is_stateful(value: Any) -> bool:
    """Whether it is an object that gives its state by ``state_dict()`` and takes it by ``load_state_dict()``."""
    return not isinstance(value, type) and all(
        callable(getattr(value, name, None)) for name in ("state_dict", "load_state_dict")
    )


def _replaced(value: Any, replace: Callable[[Any], Any], path: str, outer: list[Any]) -> Any:
    """Containers that hold no such object stay the very same: what is shared in them stays shared."""
    if is_stateful(value):
        return replace(value)
    if not isinstance(value, (dict, list, tuple)):
        return value
    if any(value is container for container in outer):
        raise ConfigError(f"the state holds itself at the key {path!r}; a checkpoint of it would never end")
    outer = [*outer, value]
    changed = {}
    for key, place, item in _items(value, path):
        new = _replaced(item, replace, place, outer)
        if new is not item:
            changed[key] = new
    if not changed:
        return value
    if isinstance(value, dict):
        return {key: changed.get(key, item) for key, item in value.items()}
    items = [changed.get(number, item) for number, item in enumerate(value)]
    return items if isinstance(value, list) else tuple(items)


def _items(value: Any, path: str) -> Iterator[tuple[Any, str, Any]]:
    """The keys (or positions) of a container, their key paths, and what stands there."""
    if isinstance(value, dict):
        yield from ((key, join_path(path, key), item) for key, item in value.items())
    else:
        yield from ((number, join_path(path, list_position(number)), item) for number, item in enumerate(value))


class StateTarget:
    """What is to be loaded into a training's state: first read into :attr:`target`, then put in place.

    Tensors are read in place, and so are the parameters and buffers of modules. Everything else is newly made, and
    given to ``load_state_dict`` of the object or put into its dict or list.
    """

    def __init__(self, state: dict[str, Any], *, is_untouched: bool = True) -> None:
        """``is_untouched``: no load into this state has failed half-way before."""
        _replaced(state, lambda value: value, "", [])  # refuses a state that holds itself
        self._state = state
        self._so_far = (
            "Nothing has been changed."
            if is_untouched
            else "A damaged checkpoint that was tried before may have filled tensors of the state in part."
        )
        self._modules: list[str] = []
        self.target: dict[str, Any] = self._target(state, "")

    def _target(self, value: Any, path: str) -> Any:
        if isinstance(value, torch.nn.Module):
            self._modules.append(path)
            return value.state_dict()
        if isinstance(value, torch.Tensor):
            return value
        if is_stateful(value) and dtensor_class() is not None:
            return _spread_target(value)
        # None stands for: as it was saved.
        if not isinstance(value, (dict, list, tuple)) or not (path == "" or _holds_targets(value)):
            return None
        if isinstance(value, dict):
            return {key: self._target(item, place) for key, place, item in _items(value, path)}
        items = [self._target(item, place) for _, place, item in _items(value, path)]
        return items if isinstance(value, list) else tuple(items)

    def check_keys(self, missing: list[str], unread: list[str]) -> None:
        """For a strict load, before anything is changed: raise if checkpoint and state do not have the same keys.

        What the state does not name at all is left in the checkpoint; a module has to be the one that was saved.
        """
        if missing:
            raise MissingKeysError(
                f"the checkpoint does not hold what the state asks for: {listed(missing)}. {self._so_far} "
                "Take these out of the state, or pass strict=False to leave them as they are.",
                missing_keys=tuple(missing),
            )
        unexpected = [key for key in unread if any(key.startswith(f"{module}.") for module in self._modules)]
        if unexpected:
            raise TargetMismatchError(
                f"the checkpoint holds tensors that the module does not have: {listed(unexpected)}. "
                f"{self._so_far} Is it another model? strict=False leaves them out.",
                tensor=unexpected[0],
            )

    def put(self, loaded: dict[str, Any], missing: list[str], *, strict: bool) -> None:
        """Give every object its part of what was read; what is missing stays as it is."""
        self._put(self._state, loaded, "", frozenset(missing), strict)

    def _put(self, current: Any, loaded: Any, path: str, missing: frozenset[str], strict: bool) -> Any:
        """What belongs where ``current`` stands now: the same object, if it could take up what was loaded."""
        if path in missing:
            return current
        if is_stateful(current):
            _load_into(current, loaded, path, strict=strict)
            return current
        if isinstance(current, torch.Tensor):
            return current  # filled when it was read
        if isinstance(current, (dict, list, tuple)) and (path == "" or _holds_targets(current)):
            return self._put_items(current, loaded, path, missing, strict)
        if type(current) is type(loaded) and isinstance(current, (dict, list)):
            # Others may hold the same container.
            current.clear()
            current.update(loaded) if isinstance(current, dict) else current.extend(loaded)
            return current
        return loaded

    def _put_items(self, current: Any, loaded: Any, path: str, missing: frozenset[str], strict: bool) -> Any:
        results = {}
        for key, place, item in list(_items(current, path)):
            new = self._put(item, loaded[key] if place not in missing else None, place, missing, strict)
            if new is not item:
                results[key] = new
        if isinstance(current, tuple):
            return tuple([results.get(number, item) for number, item in enumerate(current)]) if results else current
        for key, new in results.items():
            current[key] = new
        return current


def _spread_target(value: Any) -> Any:
    """The target for an object whose state may hold tensors that are spread over ranks.

    These have to be filled in place, or made anew in the same way: as whole ones they may not fit into memory.
    """
    if isinstance(value, torch.optim.Optimizer):
        parameters = [parameter for group in value.param_groups for parameter in group["params"]]
        if not any(map(is_dtensor, parameters)):
            return None
        # Numbered as in the state dict of an optimizer, which has no state to be filled before its first step.
        return {"state": TensorsLike(dict(enumerate(parameters))), "param_groups": None}
    state = value.state_dict()
    return _only_spread(state) if any(True for _ in _spread_in(state)) else None


def _spread_in(value: Any) -> Iterator[Any]:
    if is_dtensor(value):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for _, _, item in _items(value, ""):
            yield from _spread_in(item)


def _only_spread(value: Any) -> Any:
    """Dicts with the spread tensors in them, and None for everything else."""
    if is_dtensor(value):
        return value
    if isinstance(value, dict):
        return {key: _only_spread(item) for key, item in value.items()}
    return None


def _holds_targets(value: Any) -> bool:
    """Whether there is something in a container that loads in place."""
    if isinstance(value, torch.Tensor) or is_stateful(value):
        return True
    if isinstance(value, (dict, list, tuple)):
        return any(_holds_targets(item) for _, _, item in _items(value, ""))
    return False


def _load_into(value: Any, loaded: Any, path: str, *, strict: bool) -> None:
    try:
        if isinstance(value, torch.nn.Module):
            value.load_state_dict(loaded, strict=strict)
        else:
            value.load_state_dict(loaded)
    except Exception as error:
        error.add_note(
            f"This was the load_state_dict of the {type(value).__name__} at the key {path!r}; the objects before it "
            "have been restored, those after it have not."
        )
        raise
