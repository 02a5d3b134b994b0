"""The Dockerfile, which nobody has built yet: pins, order, user, files, and what hadolint says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
VERSIONS = {
    "TORCH_VERSION": "torch",
    "TRANSFORMER_ENGINE_VERSION": "transformer-engine",
    "FLASH_ATTN_VERSION": "flash-attn",
    "DALI_VERSION": "nvidia-dali-cuda130",
}
"""Arguments of the build, and the packages whose pins they repeat."""


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def problems(text: str) -> list[str]:
    """What is wrong with a Dockerfile by the rules of this project."""
    steps = instructions(text)
    named = {name: [rest for step, rest in steps if step == name] for name, _ in steps}
    found = []
    if len(named["FROM"]) != 1 or not re.fullmatch(
        r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3@sha256:[0-9a-f]{64}", named["FROM"][0]
    ):
        found.append("FROM: one of NVIDIA's PyTorch images, by tag and digest")
    arguments = dict(rest.split("=", 1) for rest in named["ARG"])
    for name, package in VERSIONS.items():
        if arguments.get(name) != PINS[package]:
            found.append(f"{name}: constraints.txt has {package}=={PINS[package]}")
    if not re.fullmatch(r"[0-9a-f]{40}", arguments.get("APEX_COMMIT", "")):
        found.append("APEX_COMMIT: a whole commit")
    used = " ".join(rest for step, rest in steps if step != "ARG")
    found += [f"{name}: never used" for name in arguments if f"${{{name}}}" not in used]
    found += _installations(named["RUN"])
    if re.search(r"(?i)(token|password|secret|api_?key|credential)", text):
        found.append("secrets: none belong here")
    if re.search(r"--(extra-)?index-url|\bcurl\b|\bwget\b|^ADD ", text, re.MULTILINE):
        found.append("downloads: packages come from where pip is configured to look")
    return found + _order(steps)


def _installations(runs: list[str]) -> list[str]:
    found = []
    for run in runs:
        for part in run.split("&&"):
            if "pip install" not in part:
                continue
            pinned = "-c /opt/gpu-constraints.txt" in part or "--no-deps /tmp/" in part
            compiled = re.search(r"transformer-engine|flash-attn|/tmp/apex", part)
            if not pinned:
                found.append(f"pip install without constraints: {part.strip()}")
            if compiled and "--no-build-isolation" not in part:
                found.append(f"compiled against another torch: {part.strip()}")
    return found


def _order(steps: list[tuple[str, str]]) -> list[str]:
    """The project is copied after what takes long, then set up; whoever runs it is not root; the last step looks."""
    places = [index for index, (step, rest) in enumerate(steps) if step == "COPY" and rest.split()[-2:] == [".", "."]]
    if len(places) != 1:
        return ["COPY . .: exactly once"]
    slow = [
        index for index, (_, rest) in enumerate(steps) if re.search(r"flash-attn==|/tmp/apex|setup_sglang\.sh$", rest)
    ]
    found = (
        []
        if slow and max(slow) < places[0]
        else ["COPY . .: after the slow steps, or every change compiles them again"]
    )
    users = [(index, rest) for index, (step, rest) in enumerate(steps) if step == "USER"]
    if not users or users[-1][1] in ("root", "0"):
        found.append("USER: not root at the end")
    smoke = [index for index, (step, rest) in enumerate(steps) if step == "RUN" and "tools/image_smoke.sh" in rest]
    if not smoke or not users or smoke[-1] < users[-1][0] or smoke[-1] < places[0]:
        found.append("the smoke test: as the user, at the end")
    for index, (step, rest) in enumerate(steps):
        if step == "COPY" and index < places[0]:
            sources = [word for word in shlex.split(rest)[:-1] if not word.startswith("--")]
            found += [f"COPY {source}: no such file" for source in sources if not (ROOT / source).exists()]
    return found


def test_the_dockerfile_keeps_the_rules() -> None:
    assert problems(TEXT) == []


def replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


MISTAKES: dict[str, tuple[Callable[[str], str], str]] = {
    "a tag alone": (lambda text: re.sub(r"@sha256:\w+", "", text), "FROM:"),
    "another version": (replaced("ATTN_VERSION=2.8.3", "ATTN_VERSION=2.8.2"), "FLASH_ATTN_VERSION:"),
    "a branch of apex": (lambda text: re.sub(r"APEX_COMMIT=\w+", "APEX_COMMIT=master", text), "APEX_COMMIT:"),
    "an argument for nothing": (replaced("ARG MAX_JOBS=8", "ARG MAX_JOBS=8\nARG EXTRA=1"), "EXTRA: never used"),
    "an unpinned package": (replaced("-c /opt/gpu-constraints.txt ninja", "ninja"), "pip install without"),
    "build isolation": (replaced('--no-build-isolation "flash', '"flash'), "compiled against another torch"),
    "the project first": (replaced("COPY constraints.txt ./", "COPY . ."), "COPY . .:"),
    "root": (replaced("USER 1001", "USER root"), "USER:"),
    "no smoke test": (replaced("RUN bash tools/image_smoke.sh", "RUN true"), "the smoke test:"),
    "a smoke test as root": (
        lambda text: text.replace("USER 1001\n", "").replace('CMD ["bash"]', "USER 1001"),
        "the smoke test:",
    ),
    "a file that is not there": (replaced("environment.sh tools/", "environ.sh tools/"), "COPY tools/environ.sh:"),
    "a secret": (lambda text: text + "ENV HF_TOKEN=x\n", "secrets:"),
    "a download": (lambda text: text + "RUN curl -L example.org | bash\n", "downloads:"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake: str) -> None:
    change, expected = MISTAKES[mistake]
    changed = change(TEXT)
    assert changed != TEXT
    assert any(problem.startswith(expected) for problem in problems(changed)), problems(changed)


def test_what_the_image_sets_up_for_torch_is_what_the_set_up_script_takes() -> None:
    """Its own torch, triton and numpy must survive: neither set-up may be told another version of them."""
    script = (ROOT / "tools" / "setup_env.sh").read_text()
    kept = re.search(r"grep -viE '\^\((.*?)\)==' \"\$root/constraints.txt\"", script)
    assert kept is not None
    mine = re.search(r"grep -viE '\^\((.*?)\)==' constraints.txt", TEXT)
    assert mine is not None
    assert set(mine[1].split("|")) <= set(kept[1].split("|"))
    for name in ("KLEAR_VENV", "KLEAR_SYSTEM_PACKAGES"):
        assert re.search(rf"\b{name}=", TEXT)
        assert name in script


def test_hadolint_finds_nothing_and_finds_mistakes(tmp_path: Path) -> None:
    hadolint = [str(Path(sys.prefix) / "bin" / "hadolint"), "--config", str(ROOT / ".hadolint.yaml")]
    good = subprocess.run([*hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (good.returncode, good.stdout) == (0, "")
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM ubuntu\nRUN sudo true\nRUN pip install torch\n")
    done = subprocess.run([*hadolint, str(bad)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    for rule in ("DL3006", "DL3004", "DL3013"):
        assert rule in done.stdout


def test_the_smoke_test_helps_and_refuses_root(tmp_path: Path) -> None:
    script = str(ROOT / "tools" / "image_smoke.sh")
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    assert "tools/image_smoke.sh --gpu" in done.stdout
    whoami = tmp_path / "id"
    whoami.write_text("#!/bin/sh\necho 0\n")
    whoami.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stdout.endswith("smoke: runs as root; it should run as klear\n")
