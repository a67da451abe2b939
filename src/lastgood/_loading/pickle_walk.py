"""Following a pickle's opcodes without doing what they say, to judge it before torch's restricted unpickler sees it.

The unpickler runs nothing that is not on its list, but a few bytes can make what is on the list take any amount of
memory or time: ``bytearray(10**11)``, a tensor far larger than its storage, a tuple that holds itself twice at each of
fifty levels. So a pickle may build values only in the ways in which ``torch.save`` writes them, out of storages that
the file really holds, and may not multiply what it holds. Calls of what the user has allowed by
``torch.serialization.add_safe_globals`` are the user's choice and are not judged.
"""

import pickle
import struct
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from lastgood._loading.pickle_symbols import (
    PLAIN,
    DictSymbol,
    GlobalSymbol,
    ListSymbol,
    StorageSymbol,
    TupleSymbol,
    UsersSymbol,
)


class Rules(Protocol):
    """What the calls of a pickle make, in symbols; and how a pickle is refused."""

    def unsafe(self, what: str) -> NoReturn:
        """Refuse the pickle for what it would do."""

    def broken(self, what: str) -> NoReturn:
        """Refuse the pickle for what cannot be."""

    def call(self, function: Any, arguments: Any) -> Any:
        """A call of ``function``."""

    def create(self, cls: Any, arguments: Any) -> Any:
        """An object made by ``cls.__new__``."""

    def set_state(self, instance: Any, state: Any) -> None:
        """The setting of an object's attributes."""

    def use_as_key(self, key: Any) -> None:
        """The use of a value as a key of a dict."""


ClaimStorage = Callable[[tuple[Any, ...]], StorageSymbol]
"""The storage behind a persistent id; raises if the file does not hold it."""

_MAX_DEPTH = 200

_SPARE_REPEATS = 100_000
"""So many items of tuples may come again in a pickle of any size."""


class IncompletePickleError(Exception):
    """The data ends before the pickle does."""


def walk_pickle(
    data: bytes | bytearray | memoryview, start: int, rules: Rules, claim_storage: ClaimStorage
) -> tuple[Any, int]:
    """What stands for the value of the pickle that begins at ``start``, and the offset just after it.

    Raises :class:`~lastgood.errors.UnsafeCheckpointError` or :class:`~lastgood.errors.CorruptCheckpointError` for a
    pickle that must not be loaded, :class:`IncompletePickleError` when the data is too short.
    """
    walker = _Walker(data, start, rules, claim_storage)
    try:
        return walker.walk(), walker.position
    except (IndexError, KeyError, ValueError, AttributeError) as error:
        rules.broken(f"its opcodes do not fit together ({error!r})")


class _Walker:
    """The unpickler's stack, marks and memo, filled with symbols."""

    def __init__(
        self, data: bytes | bytearray | memoryview, position: int, rules: Rules, claim_storage: ClaimStorage
    ) -> None:
        self.position = position
        self._data = memoryview(data)
        self._rules = rules
        self._claim_storage = claim_storage
        self._stack: list[Any] = []
        self._outer_stacks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._heaviest = 10 * len(data) + 1000
        self._repeatable = 10 * len(data) + _SPARE_REPEATS

    def walk(self) -> Any:
        handlers = _HANDLERS
        while True:
            code = self._take(1)[0]
            if code == pickle.STOP[0]:
                return self._stack.pop()
            handler = handlers.get(code)
            if handler is None:
                self._rules.unsafe(f"has the opcode {code:#x}, which torch's safe loader does not know")
            handler(self)

    # Reading

    def _take(self, count: int) -> memoryview:
        end = self.position + count
        if end > len(self._data):
            raise IncompletePickleError
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def _take_line(self) -> str:
        # Names are short: a longer line is none.
        line = bytes(self._data[self.position : self.position + 1024]).partition(b"\n")
        if not line[1]:
            if self.position + 1024 > len(self._data):
                raise IncompletePickleError
            raise ValueError("a name without an end")
        self.position += len(line[0]) + 1
        return line[0].decode()

    def _push_number(self, form: struct.Struct) -> None:
        self._stack.append(form.unpack(self._take(form.size))[0])

    # Opcodes, each named after its constant in Python's pickle module

    def _protocol(self) -> None:
        protocol = self._take(1)[0]
        if protocol != 2:
            self._rules.unsafe(f"is of protocol {protocol}, of which torch's safe loader reads only 2")

    def _global(self) -> None:
        module, name = self._take_line(), self._take_line()
        self._stack.append(GlobalSymbol(f"{_RENAMED_MODULES.get(module, module)}.{name}"))

    def _persistent_id(self) -> None:
        identity = self._stack.pop()
        if not isinstance(identity, TupleSymbol):
            self._rules.unsafe("refers to something outside that is not a storage")
        self._stack.append(self._claim_storage(identity.items))

    def _reduce(self) -> None:
        arguments = self._stack.pop()
        self._stack[-1] = self._rules.call(self._stack[-1], arguments)

    def _newobj(self) -> None:
        arguments = self._stack.pop()
        self._stack[-1] = self._rules.create(self._stack[-1], arguments)

    def _build(self) -> None:
        state = self._stack.pop()
        self._rules.set_state(self._stack[-1], state)

    def _mark(self) -> None:
        self._outer_stacks.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._outer_stacks.pop()
        return items

    def _push_tuple(self, items: list[Any]) -> None:
        made = TupleSymbol(items)
        if made.depth > _MAX_DEPTH or made.weight > self._heaviest:
            self._rules.unsafe("nests tuples in each other beyond all measure")
        self._stack.append(made)

    def _tuple(self) -> None:
        self._push_tuple(self._pop_mark())

    def _tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError("a tuple of more than there is")
        items = self._stack[-count:]
        del self._stack[-count:]
        self._push_tuple(items)

    def _append(self) -> None:
        self._add_items([self._stack.pop()])

    def _appends(self) -> None:
        self._add_items(self._pop_mark())

    def _add_items(self, items: list[Any]) -> None:
        found = self._stack[-1]
        if isinstance(found, ListSymbol):
            found.items.extend(items)
        elif not isinstance(found, UsersSymbol):
            raise ValueError("items for what is not a list")

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._add_keys([key, value])

    def _set_items(self) -> None:
        self._add_keys(self._pop_mark())

    def _add_keys(self, keys_and_values: list[Any]) -> None:
        found = self._stack[-1]
        if len(keys_and_values) % 2:
            raise ValueError("a key without a value")
        for key in keys_and_values[::2]:
            self._rules.use_as_key(key)
        if isinstance(found, DictSymbol):
            found.items.extend(keys_and_values)
        elif not isinstance(found, UsersSymbol):
            raise ValueError("keys for what is not a dict")

    def _text(self) -> None:
        size = _U32.unpack(self._take(4))[0]
        self._stack.append(str(self._take(size), "utf-8", "surrogatepass"))

    def _short_text(self) -> None:
        size = self._take(1)[0]
        self._stack.append(str(self._take(size), "utf-8", "surrogateescape"))

    def _long(self) -> None:
        size = self._take(1)[0]
        self._stack.append(int.from_bytes(self._take(size), "little", signed=True))

    def _get(self, form: struct.Struct) -> None:
        found = self._memo[form.unpack(self._take(form.size))[0]]
        if type(found) is TupleSymbol:
            # Whoever walks through the values walks through a tuple each time that it comes, unlike a list or dict.
            self._repeatable -= found.weight
            if self._repeatable < 0:
                self._rules.unsafe("holds the same tuples again and again")
        self._stack.append(found)

    def _put(self, form: struct.Struct) -> None:
        self._memo[form.unpack(self._take(form.size))[0]] = self._stack[-1]


_RENAMED_MODULES = {
    "__builtin__": "builtins",
    "UserDict": "collections",
    "UserList": "collections",
    "UserString": "collections",
}
"""Python 2's names of modules (protocol 2 uses them) whose contents torch may call."""

_U8 = struct.Struct("<B")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_I32 = struct.Struct("<i")
_DOUBLE = struct.Struct(">d")


def _pushing(make: Callable[[], Any]) -> Callable[[_Walker], None]:
    return lambda walker: walker._stack.append(make())


_HANDLERS: dict[int, Callable[[_Walker], None]] = {
    pickle.PROTO[0]: _Walker._protocol,
    pickle.GLOBAL[0]: _Walker._global,
    pickle.BINPERSID[0]: _Walker._persistent_id,
    pickle.REDUCE[0]: _Walker._reduce,
    pickle.NEWOBJ[0]: _Walker._newobj,
    pickle.BUILD[0]: _Walker._build,
    pickle.MARK[0]: _Walker._mark,
    pickle.TUPLE[0]: _Walker._tuple,
    pickle.TUPLE1[0]: lambda walker: walker._tuple_of(1),
    pickle.TUPLE2[0]: lambda walker: walker._tuple_of(2),
    pickle.TUPLE3[0]: lambda walker: walker._tuple_of(3),
    pickle.APPEND[0]: _Walker._append,
    pickle.APPENDS[0]: _Walker._appends,
    pickle.SETITEM[0]: _Walker._set_item,
    pickle.SETITEMS[0]: _Walker._set_items,
    pickle.NONE[0]: _pushing(lambda: None),
    pickle.NEWTRUE[0]: _pushing(lambda: True),
    pickle.NEWFALSE[0]: _pushing(lambda: False),
    pickle.EMPTY_TUPLE[0]: _pushing(lambda: TupleSymbol(())),
    pickle.EMPTY_LIST[0]: _pushing(ListSymbol),
    pickle.EMPTY_DICT[0]: _pushing(lambda: DictSymbol(has_state=False)),
    pickle.EMPTY_SET[0]: _pushing(lambda: PLAIN),
    pickle.BININT[0]: lambda walker: walker._push_number(_I32),
    pickle.BININT1[0]: lambda walker: walker._push_number(_U8),
    pickle.BININT2[0]: lambda walker: walker._push_number(_U16),
    pickle.BINFLOAT[0]: lambda walker: walker._push_number(_DOUBLE),
    pickle.BINUNICODE[0]: _Walker._text,
    pickle.SHORT_BINSTRING[0]: _Walker._short_text,
    pickle.LONG1[0]: _Walker._long,
    pickle.BINGET[0]: lambda walker: walker._get(_U8),
    pickle.LONG_BINGET[0]: lambda walker: walker._get(_U32),
    pickle.BINPUT[0]: lambda walker: walker._put(_U8),
    pickle.LONG_BINPUT[0]: lambda walker: walker._put(_U32),
}
"""The opcodes that torch's restricted unpickler knows; any other one it refuses."""
