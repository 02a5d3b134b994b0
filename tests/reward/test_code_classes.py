"""Classes of a preamble: tests and answer each have their own, and no answer judges itself by replacing them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from megatron_klear.reward import AnswerFormat, CodeGraderPool

LISTS = """
from typing import *
class ListNode:
    def __init__(self, val=0, next=None):
        self.val = val
        self.next = next
def list_node(values):
    head = None
    for value in reversed(values):
        head = ListNode(value, head)
    return head
def is_same_list(p, q):
    while p and q:
        if p.val != q.val:
            return False
        p, q = p.next, q.next
    return p is None and q is None
"""
REVERSE = "assert is_same_list(Solution().reverse(list_node([1, 2, 3])), list_node([3, 2, 1]))"
IN_PLACE = """
class Solution:
    def reverse(self, head: Optional[ListNode]) -> Optional[ListNode]:
        before = None
        while head:
            head.next, before, head = before, head, head.next
        return before
"""
ANEW = """
class Solution:
    def reverse(self, head):
        found = None
        while head:
            found, head = ListNode(head.val, found), head.next
        return found
"""
OWN_CLASS = "class ListNode:\n    def __init__(self, val=0, next=None):\n        self.val, self.next = val, next\n"

# What is expected is built last: these give back whatever has been built last when it is looked at.
REPLAYS = {
    "the last one built": """
made = []
class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next
        made.append(self)
class Last:
    def __getattr__(self, name):
        return getattr(made[-1], name)
    def __bool__(self):
        return True
class Solution:
    def reverse(self, head):
        return Last()
""",
    "the last one built, by the problem's own name": """
made = []
class ListNode:
    def __init__(self, val=0, next=None):
        self.__dict__.update(val=val, next=next)
        made.append(self)
    def __getattribute__(self, name):
        last = self is trap and name in ('val', 'next')
        return getattr(made[-1], name) if last else object.__getattribute__(self, name)
trap = None
class Solution:
    def reverse(self, head):
        global trap
        trap = ListNode()
        return trap
""",
    "one that is equal to all": """
class ListNode:
    def __init__(self, *a): pass
    val = property(lambda s: s)
    next = None
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return False
class Solution:
    def reverse(self, head):
        return ListNode()
""",
    "other helpers": """
def is_same_list(p, q): return True
def list_node(values): return None
class Solution:
    def reverse(self, head):
        return None
""",
}


@pytest.fixture(scope="module")
def pool() -> Iterator[CodeGraderPool]:
    with CodeGraderPool(workers=1, sandbox="rlimits", answer_format=AnswerFormat(require_think=False)) as made:
        yield made


def reason(pool: CodeGraderPool, answer: str, preamble: str, *tests: str) -> str:
    """Why the answer is wrong; empty where it is right."""
    reference = json.dumps({"kind": "assert", "preamble": preamble, "tests": tests})
    (grade,) = pool.grade_many([("answer", f"```python\n{answer}\n```", reference)])
    assert grade.outcome in ("correct", "wrong", "partial"), grade.reason
    return "" if grade.outcome == "correct" else grade.reason


@pytest.mark.parametrize("answer", [IN_PLACE, ANEW, OWN_CLASS + IN_PLACE, OWN_CLASS + ANEW])
def test_a_list_is_reversed(pool: CodeGraderPool, answer: str) -> None:
    tests = [
        REVERSE,
        "head = list_node([1, 2])\nlast = head.next\nassert Solution().reverse(head).val == 2",
        "assert Solution().reverse(None) is None and isinstance(Solution().reverse(list_node([1])), ListNode)",
        f"def test_a():\n    {REVERSE}",
    ]
    assert reason(pool, answer, LISTS, *tests) == ""


@pytest.mark.parametrize("name", list(REPLAYS))
def test_what_is_expected_is_not_built_by_the_answer(pool: CodeGraderPool, name: str) -> None:
    assert reason(pool, REPLAYS[name], LISTS, REVERSE)
    code = f"def test_a():\n    {REVERSE}\n"
    reference = json.dumps({"kind": "pytest", "preamble": LISTS, "code": code})
    (grade,) = pool.grade_many([("answer", f"```python\n{REPLAYS[name]}\n```", reference)])
    assert grade.outcome == "wrong"


def test_objects_keep_their_identity_on_the_way(pool: CodeGraderPool) -> None:
    tests = [
        "a = list_node([1, 2, 3])\nassert same(a) is a and middle(a) is a.next",
        # Changes of what was handed over are seen, in a ring as well.
        "a = list_node([1, 2])\nb = a.next\nassert close(a) is None\nassert b.next is a and b.val == 2",
        "a = list_node([1, 2])\nclose(a)\nassert close(a) is None and ring_length(a) == 2",
        # One node twice is one node.
        "x = twice()\nassert x[0] is x[1] and x[0].next is x[1]",
        "a, b = list_node([1]), list_node([1])\nassert not is_same(a, b) and is_same(a, a)",
        "kept = keep(list_node([7]))\nassert kept.first().val == 7 and kept.first() is kept.first()",
        "a = list_node([1, 2])\nforget(a)\nassert not hasattr(a, 'next') and a.extra == {'k': [a.val]}",
        "a = list_node([2, 1])\nx = [a, a.next]\nx.sort(key=value_of)\nassert x[1] is a",
        "assert apply(lambda node: node.val + 1, list_node([4])) == 5",
        "assert make(ListNode, 3).val == 3 and type(make(ListNode, 3)) is ListNode",
        "assert depth(list_node(list(range(30000)))) == 30000",
        "assert is_same_list(count(20000), list_node(list(range(20000))))",
    ]
    answer = """
def same(a): return a
def middle(a): return a.next
def close(a):
    b = a
    while b.next and b.next is not a: b = b.next
    b.next = a
def ring_length(a):
    n, b = 1, a.next
    while b is not a: n, b = n + 1, b.next
    return n
def twice():
    a = ListNode(1)
    a.next = a
    return [a, a]
def is_same(a, b): return a is b
class keep:
    def __init__(self, a): self.a = a
    def first(self): return self.a
def forget(a):
    del a.next
    a.extra = {'k': [a.val]}
def value_of(a): return a.val
def apply(f, a): return f(a)
def make(kind, v): return kind(v)
def depth(a):
    n = 0
    while a: n, a = n + 1, a.next
    return n
def count(n):
    a = None
    for i in reversed(range(n)): a = ListNode(i, a)
    return a
"""
    assert reason(pool, answer, LISTS, *tests) == ""


KINDS = """
import enum
from abc import ABC, abstractmethod
from collections import namedtuple
from dataclasses import dataclass, field
from typing import NamedTuple

@dataclass(frozen=True)
class Point:
    x: int
    y: int = 0
    def shifted(self, by):
        return Point(self.x + by, self.y)

class Slots:
    __slots__ = ("a", "__b")
    def __init__(self, a):
        self.a, self.__b = a, a + 1
    def b(self):
        return self.__b

class Colour(enum.Enum):
    RED = 1
    BLUE = 2

class Mode(enum.IntFlag):
    READ = 1
    WRITE = 2

Pair = namedtuple("Pair", "left right")

class Typed(NamedTuple):
    name: str
    points: list

class Full(ValueError):
    def __init__(self, size, what):
        super().__init__(f"{what} of {size}")

class Stack(list):
    pass

class Shape(ABC):
    @abstractmethod
    def area(self): ...
    def doubled(self):
        return 2 * self.area()

class Named:
    name = "none"
"""


def test_kinds_of_classes(pool: CodeGraderPool) -> None:
    tests = [
        "assert move(Point(1, 2)) == Point(2, 2) and move(Point(1)).shifted(1).x == 3",
        "assert {move(Point(1)), Point(2)} == {Point(2)}",
        "s = Slots(1)\nassert grow(s) is s and s.a == 2 and s.b() == 2",
        "assert other(Colour.RED) is Colour.BLUE and other(Colour.BLUE) is Colour.RED",
        "assert both(Mode.READ) == Mode.READ | Mode.WRITE",
        "p = swap(Pair(1, [2]))\nassert p == Pair([2], 1) and p.left == [2] and isinstance(p, Pair)",
        "t = typed()\nassert t == Typed('a', [Point(1)]) and t.points[0].x == 1",
        "import pytest\nwith pytest.raises(Full, match='stack of 3'):\n    fill(3)",
        "try:\n    fill(2)\n    assert False\nexcept Full as error:\n    assert str(error) == 'stack of 2'",
        "assert push(Stack([1])) == [1, 2]",
        "c = Square(3)\nassert isinstance(c, Shape) and isinstance(c, Named) and c.area() == 9 and c.doubled() == 18",
        "assert c_name() == 'square' and Square(1).name == 'square'",
    ]
    answer = """
def move(p): return p.shifted(1)
def grow(s):
    s.a += 1
    return s
def other(c): return Colour.BLUE if c is Colour.RED else Colour.RED
def both(m): return m | Mode.WRITE
def swap(p): return Pair(p.right, p.left)
def typed(): return Typed('a', [Point(1)])
def fill(n): raise Full(n, 'stack')
def push(s):
    s.append(2)
    return s
class Square(Shape, Named):
    name = 'square'
    def __init__(self, a): self.a = a
    def area(self): return self.a ** 2
def c_name(): return Square(1).name
"""
    assert reason(pool, answer, KINDS, *tests) == ""
    wrong = "def move(p):\n    p = Point(5)\n    object.__setattr__(p, '__eq__', lambda s, o: True)\n    return p\n"
    assert reason(pool, wrong, KINDS, tests[0])


METHODS = """
class Money:
    def __init__(self, cents):
        self.cents = cents
    def __eq__(self, other):
        return isinstance(other, Money) and self.cents == other.cents
    def is_worth(self, other):
        return self.cents == other.cents
    @property
    def text(self):
        return f"{self.cents / 100:.2f}"
    @staticmethod
    def parse(text):
        return Money(int(text))
"""


def test_methods_are_the_problems(pool: CodeGraderPool) -> None:
    """An answer's object has attributes of its own, and neither methods nor properties in place of the class's."""
    tests = ["assert pay(5).is_worth(Money(5))", "assert pay(5) == Money(5)", "assert pay(5).text == '0.05'"]
    assert reason(pool, "def pay(n): return Money(n)", METHODS, *tests) == ""
    shadows = "def pay(n):\n    m = Money(0)\n    m.__dict__.update(is_worth=lambda o: True, text='0.05', cents=[1])\n"
    assert "passed 0 of 3" in reason(pool, shadows + "    return m", METHODS, *tests)
    redefined = (
        "class Money:\n    def __init__(self, c): self.cents = 0\n    def __eq__(self, o): return True\n"
        "    def is_worth(self, o): return True\n    text = '0.05'\ndef pay(n): return Money(n)"
    )
    assert "passed 0 of 3" in reason(pool, redefined, METHODS, *tests)
    # Of another class altogether, or of one that derives from the problem's.
    for base in ("", "(Money)"):
        mine = f"class Mine{base}:\n    def __init__(self, n): self.cents = 0\n    def is_worth(self, o): return True\n"
        assert "passed 0 of 2" in reason(pool, mine + "def pay(n): return Mine(n)", METHODS, *tests[:2])
    right = "class Mine(Money):\n    def extra(self, o): return self.cents + o.cents\ndef pay(n): return Mine(n)"
    assert reason(pool, right, METHODS, *tests, "assert pay(5).extra(Money(1)) == 6") == ""


def test_a_class_without_bodies_is_for_the_answer_to_write(pool: CodeGraderPool) -> None:
    declared = (
        "class Solution:\n    def twice(self, n):\n        '''Twice n.'''\n"
        "class Box:\n    def __init__(self, n): self.n = n\n    def get(self): raise NotImplementedError\n"
        "def half(n):\n    pass\n"
    )
    tests = ["assert Solution().twice(2) == 4", "assert Box(1).get() == 1", "assert half(4) == 2"]
    answer = (
        "class Solution:\n    def twice(self, n): return 2 * n\n"
        "class Box:\n    def __init__(self, n): self.n = n\n    def get(self): return self.n\n"
        "def half(n): return n // 2\n"
    )
    assert reason(pool, answer, declared, *tests) == ""
    assert "passed 0 of 3" in reason(pool, "x = 1", declared, *tests)


# Speaks the protocol: its result names an object that it was never handed, or that a test holds under another class.
FORGED = """
import json, os, struct
size = struct.Struct("<Q")
def reverse(head):
    objects = OBJECTS
    data = json.dumps(["=", [["object", KEY], [], objects]]).encode()
    os.write(4, size.pack(len(data)) + data)
    os.read(3, 1 << 16)
"""


@pytest.mark.parametrize(
    ("key", "objects"),
    [
        (5, []),
        (5, [[5, "ListNode", [["val", 3], ["next", None]]]]),
        (-1, [[-1, "Missing", []]]),
        (-1, [[-1, "ListNode", [["__class__", 3]]]]),
        (-1, [[-1, "ListNode", [[5, 3]]]]),
        (True, [[True, "ListNode", []]]),
        ("x", [["x", "ListNode", []]]),
        (-1, [[-1, "Colour", []]]),
        (1, [[1, "Colour", []]]),
    ],
)
def test_forged_objects_are_no_objects(pool: CodeGraderPool, key: object, objects: object) -> None:
    forged = FORGED.replace("KEY", repr(key)).replace("OBJECTS", repr(objects))
    preamble = LISTS + "import enum\nclass Colour(enum.Enum):\n    RED = 1\n"
    assert reason(pool, forged, preamble, "assert is_same_list(reverse(list_node([1, 2, 3])), list_node([3, 2, 1]))")
