"""What setup.py asks for is pinned, in one place, and nothing is named that must not be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def requirements() -> set[str]:
    """Return every distribution named in setup.py's lists, normalised."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg in ("install_requires", "extras_require"):
            texts = [n.value for n in ast.walk(node.value) if isinstance(n, ast.Constant)]
            keys = node.value.keys if isinstance(node.value, ast.Dict) else []
            extras = {key.value for key in keys}
            names |= {normalised(text) for text in texts if text not in extras}
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List):
            names |= {normalised(element.value) for element in node.value.elts}
    return names


def normalised(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[=<>;!~ ]", requirement)[0]).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    texts = [line for line in lines if line and not line.startswith("#")]
    found = dict(line.split("==") for line in texts)
    assert len(found) == len(texts)
    return {normalised(name): version for name, version in found.items()}


def test_every_requirement_is_pinned():
    assert len(requirements()) > 20
    assert requirements() <= set(pins())


def test_no_pin_has_a_local_suffix_and_apex_is_not_a_dependency():
    assert not [version for version in pins().values() if "+" in version]
    assert "apex" not in pins()
    assert "apex" not in requirements()


def test_the_megatron_core_for_both_pythons_is_pinned():
    assert pins()["megatron-core"] == "0.16.1"
    assert '">=3.11,<3.13"' in (ROOT / "setup.py").read_text()


def test_the_kernels_folder_is_not_a_package():
    """A top-level package `kernels` would hide the one of that name which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "klear_kernels" / "__init__.py").exists()


def test_the_shell_scripts_name_no_package_index():
    for path in [ROOT / "tests/run.sh", ROOT / ".ci/run", *ROOT.glob("tools/*.sh"), *ROOT.glob("examples/*.sh")]:
        # An address that a script puts together, such as that of an engine, starts with a variable and names no host.
        assert not re.search(r"--(extra-)?index-url|https?://[^$]", path.read_text()), path
