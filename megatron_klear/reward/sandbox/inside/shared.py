"""Classes that a problem's preamble defines: both processes have their own, and instances travel as data.

So a test builds what it expects with classes that no answer can touch, and what an answer returns becomes an instance
of those classes: its attributes are the answer's, its methods are not. Identity is kept, in rings as well: an object
that was sent is known by its key when it comes back.
"""

from __future__ import annotations

import enum
import sys
import types
from collections.abc import Sequence
from typing import Any

# How instances travel: by their attributes, as the items of a named tuple, as the name of a member.
OBJECT, RECORD, MEMBER = "object", "record", "member"

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


class SharedClasses:
    """The preamble's classes on one side, and the objects of theirs that the other side knows.

    Args:
        guarded: the other side is not trusted: its objects get no attribute in place of a method.
    """

    def __init__(self, *, guarded: bool = False) -> None:
        self._guarded = guarded
        self._step = 1 if guarded else -1  # keys of the one side are positive, of the other negative
        self._by_name: dict[str, type] = {}
        self._names: dict[type, str] = {}
        self._keys: dict[int, int] = {}
        self._objects: dict[int, Any] = {}
        self._num_own = 0

    def learn(self, namespace: dict[str, Any]) -> None:
        """Take the classes of a preamble that has run in this namespace; those of the standard library stay out."""
        for name, value in list(namespace.items()):
            if isinstance(value, type) and value.__module__.split(".")[0] not in sys.stdlib_module_names:
                self._by_name[name] = value
                self._names.setdefault(value, name)

    def leave_out(self, names: set[str]) -> None:
        """Take back classes that are the answer's to define."""
        for name in names & self._by_name.keys():
            self._names.pop(self._by_name.pop(name), None)

    def follow(self, names: dict[str, Any]) -> None:
        """Use an answer's own versions of the classes, for the answer."""
        for name in self._by_name:
            value = names.get(name)
            if isinstance(value, type):
                self._by_name[name] = value
                self._names.setdefault(value, name)

    def name(self, kind: type) -> str:
        """The name of a class, or an empty text for one that is not shared."""
        return self._names.get(kind, "")

    def named(self, name: str) -> type:
        """The class of this name.

        Raises:
            TypeError: there is none.
        """
        if name not in self._by_name:
            raise TypeError(f"the preamble defines no class {name}")
        return self._by_name[name]

    def ancestors(self, kind: type) -> list[str]:
        """Names of the shared classes that a class derives from, the nearest first."""
        return [self._names[base] for base in kind.__mro__[1:] if base in self._names]

    def descendant(self, names: list[str]) -> type:
        """A class that derives from all of these."""
        kinds = [self.named(name) for name in names]
        nearest = [k for k in kinds if not any(k is not other and issubclass(other, k) for other in kinds)]
        return nearest[0] if len(nearest) == 1 else types.new_class("Both", tuple(nearest))

    def judge(self, method: str, arguments: Sequence[Any]) -> tuple[type, Any] | None:
        """Of an object among arguments that has a method of this name, as `is_same(self, other)` has: class, method."""
        waiting = list(arguments)
        while waiting:
            value = waiting.pop()
            if type(value) in self._names:
                if _judges(type(value), method):
                    return type(value), _of_class(type(value), method)
            elif isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, (list, tuple, set, frozenset)):
                waiting += value
        return None

    def exception(self, name: str) -> type[BaseException] | None:
        """The preamble's exception class of this name, if it has one."""
        kind = self._by_name.get(name)
        return kind if kind is not None and issubclass(kind, BaseException) else None

    def member(self, name: str, of_member: str | int) -> Any:
        """A member of an enumeration, by its name, or by its value where it has none.

        Raises:
            TypeError, LookupError, ValueError: there is none.
        """
        kind = self.named(name)
        if not issubclass(kind, enum.Enum):
            raise TypeError(f"{name} is no enumeration")
        return kind[of_member] if isinstance(of_member, str) else kind(of_member)

    def form(self, kind: type) -> str:
        """How instances of a class travel; an empty text if as instances of what it derives from, such as list."""
        if kind not in self._names or issubclass(kind, BaseException):
            return ""
        if issubclass(kind, enum.Enum):
            return MEMBER
        if issubclass(kind, tuple):
            return RECORD if hasattr(kind, "_fields") else ""
        return OBJECT if _is_plain(kind) else ""

    def key(self, value: Any) -> int:
        """The number that an object is known by on both sides."""
        if id(value) not in self._keys:
            self._num_own += 1
            self._hold(self._num_own * self._step, value)
        return self._keys[id(value)]

    def held(self, key: int) -> Any:
        """The object of a key that has been sent or received."""
        return self._objects[key]

    def receive(self, key: Any, name: str) -> None:
        """Have an object for a key: the one that has it, or a new one of the class, without attributes yet.

        Raises:
            TypeError: a key that this side has not given, or of an object of another class.
        """
        kind = self.named(name)
        if type(key) is int and key not in self._objects and key * self._step < 0 and self.form(kind) == OBJECT:
            self._hold(key, object.__new__(kind))
        if type(key) is not int or self._by_name.get(self.name(type(self._objects.get(key)))) is not kind:
            raise TypeError(f"no object of {name} has the key {key!r}")

    def state(self, value: Any) -> dict[str, Any]:
        """An object's own attributes."""
        slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
        return slots | dict(getattr(value, "__dict__", {}))

    def fill(self, key: int, state: dict[str, Any]) -> None:
        """Give an object these attributes, and no others."""
        value = self._objects[key]
        for name in self.state(value).keys() - state.keys():
            object.__delattr__(value, name)
        for name, content in state.items():
            if not (self._guarded and _judges(type(value), name)):
                object.__setattr__(value, name, content)

    def _hold(self, key: int, value: Any) -> None:
        self._keys[id(value)] = key
        self._objects[key] = value


def _is_plain(kind: type) -> bool:
    """Whether instances are their attributes and no more: nothing that a class derives from is made in C."""
    for base in kind.__mro__:
        new = base.__new__
        if not base.__flags__ & _HEAP_TYPE or (isinstance(new, types.BuiltinFunctionType) and new.__self__ is base):
            return base is object
    return False


def _slots(kind: type) -> list[str]:
    """The names behind `__slots__` of a class and of what it derives from, as the attributes are called."""
    found = []
    for base in kind.__mro__:
        declared = base.__dict__.get("__slots__", ())
        for name in (declared,) if isinstance(declared, str) else declared:
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def _of_class(kind: type, name: str) -> Any:
    """An attribute as the class has it, not as an instance would; None where it has none."""
    return next((base.__dict__[name] for base in kind.__mro__ if name in base.__dict__), None)


def _judges(kind: type, name: str) -> bool:
    """Whether a class has something to run under this name: a method, a property, or anything of Python's own."""
    found = _of_class(kind, name)
    is_slot = isinstance(found, types.MemberDescriptorType)
    return name.startswith("__") or (not is_slot and (callable(found) or hasattr(type(found), "__get__")))
