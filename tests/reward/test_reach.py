"""An answer that reaches through what a test hands it, into the process that runs the tests, earns nothing."""

from __future__ import annotations

import json

from megatron_klear.reward import AnswerFormat, CodeGraderPool

# It speaks the protocol of sandbox/inside/remote.py itself: from any object of the other side to its class, from there
# to every class there is, to a module's functions, to the pipe that carries the verdict, and out before a test is run.
REACH = r"""
import os, json, struct
size = struct.Struct("<Q")
def receive():
    count, data = size.unpack(os.read(3, 8))[0], b""
    while len(data) < count:
        data += os.read(3, count - len(data))
    return json.loads(data)
def ask(operation, *operands):
    data = json.dumps(["?", [operation, list(operands), []]]).encode()
    os.write(4, size.pack(len(data)) + data)
    kind, content = receive()
    if kind == "!":
        raise Exception(str(content))
    return content[0]
def there(found):
    return ["there", found[1]]
receive()
bases = ask("get", START, "__class__")
mro = ask("get", there(bases), "__mro__")[1]
classes = ask("call", there(ask("get", there(mro[-1]), "__subclasses__")), ["dict", []])[1]
for one in classes:
    try:
        if ask("get", there(one), "__name__") == "_wrap_close":
            break
    except Exception:
        pass
found = ask("get", there(ask("get", there(one), "__init__")), "__globals__")[1]
names = dict((k, v) for k, v in found if isinstance(k, str))
ask("call", there(names["write"]), 5, ["bytes", "passed"], ["dict", []])
ask("call", there(names["_exit"]), 0, ["dict", []])
"""
ASSERT = json.dumps({"kind": "assert", "tests": ["assert add(1, 2) == 3", "assert add(5, 6) == 11"]})
PYTEST = json.dumps({"kind": "pytest", "code": "def test_a():\n    assert add(1, 2) == 3\n"})
KEYED = json.dumps({"kind": "assert", "tests": ["assert best([3, -5], key=lambda x: -x) == -5"]})
GLOBALS = """
def best(values, key):
    key.__globals__["__builtins__"]
    return -5
"""
HONEST = "def best(values, key):\n    return max(values, key=key)\n"


def fenced(program: str) -> str:
    return f"```python\n{program}\n```"


def test_no_object_of_the_tests_leads_further_than_itself() -> None:
    asked = [
        ("assert by the protocol", fenced(REACH.replace("START", '"x"')), ASSERT),
        ("pytest by the protocol", fenced(REACH.replace("START", '"x"')), PYTEST),
        ("through a function's globals", fenced(GLOBALS), KEYED),
        ("a test's function is used as it is meant", fenced(HONEST), KEYED),
    ]
    plain = AnswerFormat(require_think=False)
    with CodeGraderPool(workers=1, sandbox="rlimits", answer_format=plain) as pool:
        outcomes = [grade.outcome for grade in pool.grade_many(asked)]
    assert outcomes == ["wrong", "wrong", "wrong", "correct"]
