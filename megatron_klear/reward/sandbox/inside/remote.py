"""Two processes that use each other's objects: only plain data travels, everything else stays where it is.

The tests of an assert problem run in one process and the untrusted answer in another. What a function returns arrives
as copied plain data, as an instance of the preamble's class of that name (shared.py), or as a `Remote`, a name for an
object over there. So an object that claims to be equal to everything is equal to nothing here, and ending the process
ends the test.
"""

from __future__ import annotations

import builtins
import json
import operator
import os
import struct
import types
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_klear.reward.sandbox.inside import plain
from megatron_klear.reward.sandbox.inside.shared import MEMBER, OBJECT, RECORD, SharedClasses

_LENGTH = struct.Struct("<Q")
_LONGEST_MESSAGE = 256 * 2**20
_BETWEEN_REMOTES = ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "and_", "or_", "xor")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


class Message(NamedTuple):
    """A request (`kind` is "?"), a result ("=") or an error ("!")."""

    kind: str
    content: Any


class _Sent:
    """The objects of the preamble's classes that a message names, in the order in which they were met."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self._known: set[int] = set()

    def add(self, key: int) -> int:
        if key not in self._known:
            self._known.add(key)
            self.keys.append(key)
        return key


class Peer:
    """One side of the pair.

    Args:
        read_fd, write_fd: pipes from and to the other side.
        shared: classes that both sides have.
        guarded: the other side may use what it was handed, and nothing that lies behind that.
    """

    def __init__(self, read_fd: int, write_fd: int, shared: SharedClasses, *, guarded: bool = False) -> None:
        self._shared, self._guarded = shared, guarded
        self._reader, self._write_fd = os.fdopen(read_fd, "rb"), write_fd
        self._kept: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._remotes: dict[int, Remote] = {}
        self._mirrors: dict[str, type[BaseException]] = {}

    def request(self, operation: str, *operands: Any) -> Any:
        """Have the other side do something and return its result, serving its own requests meanwhile.

        Raises:
            Whatever it raises, as the builtin exception that it derives from.
            EOFError: it has ended.
        """
        sent = _Sent()
        encoded = [self._encode(operand, sent) for operand in operands]
        self._send("?", [operation, encoded, self._states(sent)])
        while True:
            message = self._receive()
            if message.kind == "=":
                result, changed, objects = message.content
                self._take(objects)
                for index, value in changed:
                    _replace(operands[index], self.decode(value))
                return self.decode(result)
            if message.kind == "!":
                raise self._error(*message.content)
            self._serve(*message.content)

    def serve(self) -> None:
        """Do what the other side asks for until it ends."""
        while True:
            try:
                message = self._receive()
            except EOFError:
                return
            self._serve(*message.content)

    def keep(self, value: Any) -> int:
        """The number by which the other side may ask for an object of this one."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._kept)
            self._kept.append(value)
        return self._numbers[id(value)]

    def decode(self, data: Any) -> Any:
        """The value that the other side described."""
        if not isinstance(data, list):
            return data
        kind, content = data
        if kind == "here":
            return self._remotes.setdefault(content, Remote(self, content))
        if kind == "heir":
            number, names = content
            return self._remotes.setdefault(number, _heir(self._shared.descendant(names))(self, number))
        if kind == "there":
            return self._kept[content]
        if kind == "exception":
            return self._mirror(content)
        if kind == "class":
            return self._shared.named(content)
        if kind == OBJECT:
            return self._shared.held(content)
        if kind == RECORD:
            return tuple.__new__(self._shared.named(content[0]), map(self.decode, content[1]))
        if kind == MEMBER:
            return self._shared.member(*content)
        if kind == "dict":
            return {self.decode(key): self.decode(value) for key, value in content}
        if kind in ("bytes", "bytearray"):
            return content.encode("latin-1") if kind == "bytes" else bytearray(content, "latin-1")
        if plain.is_text(kind):
            return plain.from_text(kind, content)
        if kind == "range":
            return range(*content)
        items = (self.decode(item) for item in content)
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}[kind](items)

    def judged(self, owner: Remote, name: str, arguments: tuple[Any, ...]) -> Callable[..., Any] | None:
        """What a method of an answer's object is to be called by, where it is handed one of the tests' own.

        A method of the preamble's class that compares two of its instances is the problem's, not the answer's. None
        where it is no such method.

        Raises:
            TypeError: it is one, and the object is no instance of the class.
        """
        found = self._shared.judge(name, arguments)
        if found is None:
            return None
        kind, method = found
        if not isinstance(owner, kind):
            raise TypeError(f"{name} is of the class {kind.__name__}, and the answer's object is no instance of it")
        return method.__get__(owner, kind)  # type: ignore[no-any-return]

    def _encode(self, value: Any, sent: _Sent) -> Any:
        """JSON of plain data, of a shared class's object by its key, or of one that is kept here by its number."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Remote):
            return ["there", value._number]
        name, form = self._shared.name(type(value)), self._shared.form(type(value))
        if form == OBJECT:
            return [OBJECT, sent.add(self._shared.key(value))]
        if form == RECORD:
            return [RECORD, [name, [self._encode(item, sent) for item in value]]]
        if form == MEMBER:
            return [MEMBER, [name, value.name if value.name in type(value).__members__ else value.value]]
        if isinstance(value, (bytes, bytearray)):
            return [type(value).__name__, value.decode("latin-1")]
        if isinstance(value, (bool, int, float, str)):  # subclasses become plain
            return next(kind(value) for kind in (bool, int, float, str) if isinstance(value, kind))
        if isinstance(value, dict):
            return ["dict", [[self._encode(k, sent), self._encode(v, sent)] for k, v in value.items()]]
        for kind in (list, tuple, set, frozenset, deque):
            if isinstance(value, kind):
                return [kind.__name__, [self._encode(item, sent) for item in value]]
        text = plain.to_text(value)
        if text is not None:
            return list(text)
        if isinstance(value, type) and self._shared.name(value):
            return ["class", self._shared.name(value)]
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["exception", _ancestry(value)]
        if type(value) is range:
            return ["range", [value.start, value.stop, value.step]]
        ancestors = self._shared.ancestors(type(value))
        return ["heir", [self.keep(value), ancestors]] if ancestors else ["here", self.keep(value)]

    def _states(self, sent: _Sent) -> list[Any]:
        """Key, class and attributes of the objects that a message names, and of all that these lead to."""
        states: list[Any] = []
        for key in sent.keys:  # grows meanwhile
            value = self._shared.held(key)
            state = [[name, self._encode(content, sent)] for name, content in self._shared.state(value).items()]
            states.append([key, self._shared.name(type(value)), state])
        return states

    def _take(self, objects: list[Any]) -> None:
        """Have the objects that a message describes, each with its attributes."""
        for key, name, _ in objects:
            self._shared.receive(key, name)
        for key, _, state in objects:
            self._shared.fill(key, {name: self.decode(content) for name, content in state})

    def _serve(self, operation: str, encoded: list[Any], objects: list[Any]) -> None:
        try:
            self._take(objects)
            operands = [self.decode(operand) for operand in encoded]
            if self._guarded:
                _refuse_reach(operation, operands, encoded)
            result = _OPERATIONS[operation](*operands)
            sent = _Sent()
            answer = self._encode(result, sent)
            # Arguments that the call changed in place, so that the caller's own change, too.
            again = [self._encode(operand, sent) for operand in operands] if operation == "call" else encoded
            pairs = enumerate(zip(again, encoded, strict=True))
            changed = [[i, new] for i, (new, old) in pairs if new != old and i > 0]
            for key, _, _ in objects:
                sent.add(key)
            known = {key: [key, name, state] for key, name, state in objects}
            states = [state for state in self._states(sent) if known.get(state[0]) != state]
            self._send("=", [answer, changed, states])
        except BrokenPipeError:
            raise
        except BaseException as error:
            self._send("!", [_ancestry(type(error)), _text(error)])

    def _send(self, kind: str, content: Any) -> None:
        data = json.dumps([kind, content]).encode("ascii")
        data = _LENGTH.pack(len(data)) + data
        while data:
            data = data[os.write(self._write_fd, data) :]

    def _receive(self) -> Message:
        head = self._reader.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise EOFError("the process of the answer has ended")
        (size,) = _LENGTH.unpack(head)
        if size > _LONGEST_MESSAGE:  # the answer can write into its end of the pipe, too
            raise EOFError(f"the process of the answer announced {size} bytes")
        return Message(*json.loads(self._reader.read(size)))

    def _error(self, ancestry: list[str], text: str) -> BaseException:
        kind = self._mirror(ancestry)
        try:
            return kind(text)
        except Exception:  # it wants more arguments
            if self._shared.name(kind):
                return kind.__new__(kind, text)
            return RuntimeError(f"{ancestry[0]}: {text}")  # a builtin, such as UnicodeDecodeError

    def _mirror(self, ancestry: list[str]) -> type[BaseException]:
        """The exception class of this name here: the preamble's, a builtin, or one made for it that derives from it."""
        name = ancestry[0]
        if name not in self._mirrors:
            known = (self._shared.exception(base) or getattr(builtins, base, None) for base in ancestry)
            base = next((k for k in known if isinstance(k, type) and issubclass(k, BaseException)), Exception)
            same = base.__name__ == name or base is self._shared.exception(name)
            self._mirrors[name] = base if same else type(name, (base,), {})
        return self._mirrors[name]


class Remote:
    """An object of the other process: its attributes, calls, items and iteration are asked for there.

    It is equal to another `Remote` if that process says so, and to nothing else: what a test expects is never shown to
    the answer. Arithmetic works between two of them for the same reason.
    """

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_got_from", None)

    def __getattr__(self, name: str) -> Any:
        found = self._peer.request("get", self, name)
        if isinstance(found, Remote):
            object.__setattr__(found, "_got_from", (self, name))
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.request("set", self, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        judge = self._got_from and self._peer.judged(*self._got_from, (*args, *kwargs.values()))
        if judge:
            return judge(*args, **kwargs)
        return self._peer.request("call", self, *args, kwargs)

    def __getitem__(self, key: Any) -> Any:
        return self._peer.request("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._peer.request("set item", self, key, value)

    def __len__(self) -> int:
        return int(self._peer.request("len", self))

    def __bool__(self) -> bool:
        return bool(self._peer.request("bool", self))

    def __contains__(self, item: object) -> bool:
        raise TypeError("whether the answer's own object holds something is for the answer to say: compare its items")

    def __iter__(self) -> Any:
        iterator = self._peer.request("iter", self)
        return iterator if isinstance(iterator, Remote) else iter(iterator)

    def __next__(self) -> Any:
        return self._peer.request("next", self)

    def __str__(self) -> str:
        return str(self._peer.request("str", self))

    def __repr__(self) -> str:
        return str(self._peer.request("repr", self))

    def __hash__(self) -> int:
        return hash(("remote", self._number))

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, Remote) and bool(self._peer.request("isinstance", instance, self))


def _heir(kind: type) -> type[Remote]:
    """A class for names of objects whose class over there derives from the preamble's: instances of that here, too."""
    return type("Heir", (Remote,), {"__class__": property(lambda self: kind)})


def _between(name: str) -> Callable[[Remote, Any], Any]:
    def operation(self: Remote, other: Any) -> Any:
        return self._peer.request(name, self, other) if isinstance(other, Remote) else NotImplemented

    return operation


for _name in (*_BETWEEN_REMOTES, *_COMPARISONS):
    setattr(Remote, f"__{_name.strip('_')}__", _between(_name))


def _call(called: Any, *arguments: Any) -> Any:
    *args, kwargs = arguments
    return called(*args, **kwargs)


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": _call,
    "get": getattr,
    "set": setattr,
    "item": operator.getitem,
    "set item": operator.setitem,
    "len": len,
    "bool": bool,
    "iter": iter,
    "next": next,
    "str": str,
    "repr": repr,
    "isinstance": isinstance,
    **{name: getattr(operator, name) for name in (*_BETWEEN_REMOTES, *_COMPARISONS)},
}


_INNER = (
    types.ModuleType, types.FrameType, types.CodeType, types.TracebackType, types.GeneratorType, types.CoroutineType,
    types.AsyncGeneratorType,
)  # fmt: skip
"""What has attributes without underscores that lead into the interpreter."""


def _refuse_reach(operation: str, operands: list[Any], encoded: list[Any]) -> None:
    """Let an answer use what a test handed to it, and nothing that lies behind it.

    From any object `__class__` and what follows lead to everything in the process, the verdict's pipe included.

    Raises:
        PermissionError: the object is none of the tests', or the attribute not a public one.
    """
    first = encoded[0] if encoded else None
    if not (isinstance(first, list) and first[:1] == ["there"]):
        raise PermissionError("not an object of the tests")
    if operation in ("get", "set") and (
        isinstance(operands[0], _INNER) or type(operands[1]) is not str or operands[1].startswith("_")
    ):
        raise PermissionError("not a public attribute")


def _replace(old: Any, new: Any) -> None:
    """Give a container of this side the content that the other side's copy has by now."""
    if isinstance(old, (list, bytearray)):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)
    elif isinstance(old, deque):
        old.clear()
        old.extend(new)


def _ancestry(kind: type) -> list[str]:
    return [base.__name__ for base in kind.__mro__ if base is not object]


def _text(error: BaseException) -> str:
    try:
        return str(error)[:500]
    except Exception:
        return ""
