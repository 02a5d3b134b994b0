"""The benchmark at a size that takes seconds on a CPU: what it writes, and its error columns worked out again."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from klear_kernels import linear_policy_loss
from klear_kernels.linear_policy_loss.benchmark import __main__ as command
from klear_kernels.linear_policy_loss.benchmark import contestants as contestants_module
from klear_kernels.linear_policy_loss.benchmark.contestants import PRODUCTS, Contestant, Outcome, contestants
from klear_kernels.linear_policy_loss.benchmark.measurement import measure, quantile
from klear_kernels.linear_policy_loss.benchmark.problem import make_inputs
from klear_kernels.linear_policy_loss.benchmark.report import goals
from klear_kernels.linear_policy_loss.reference import reference_policy_loss

CPU = torch.device("cpu")
SIZE = ["--device", "cpu", "--tokens", "40", "--words", "300", "--hidden-size", "32", "--rounds", "2"]


def make(dtype: torch.dtype = torch.bfloat16, tokens: int = 40, words: int = 300, seed: int = 0) -> Any:
    return make_inputs(tokens, words, 32, dtype=dtype, device=CPU, seed=seed)


def full_float64(inputs: Any, terms: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities and gradients of hidden states and weight, all of them, through all logits."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (inputs.hidden, inputs.weight))
    arguments = (terms.old_logprobs, terms.advantages, terms.policy_weight, terms.lm_weight)
    output = reference_policy_loss(hidden, weight, inputs.labels, *arguments, objective=terms.objective)
    return output.logprobs, *torch.autograd.grad(output.loss, (hidden, weight))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Output and file of one run as a user starts it, on a machine without the other libraries."""
    out = tmp_path_factory.mktemp("benchmark") / "result.json"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = [*SIZE, "--only", "klear torch", "klear triton", "klear cuda", "torch full logits", "QuACK"]
    result = subprocess.run(
        [sys.executable, "-m", "klear_kernels.linear_policy_loss.benchmark", *arguments, "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(out.read_text())


def test_file_says_what_was_measured_on_what(run: tuple[str, dict[str, Any]]) -> None:
    _, result = run
    assert result["device"].startswith("CPU: ")
    assert result["note"].startswith("a CPU run")
    assert result["with_entropy"] is False
    assert result["versions"]["torch"] == torch.__version__
    assert len(result["commit"].split()[0]) == 40
    assert result["date"].endswith("+00:00")
    (size,) = result["sizes"]
    assert (size["tokens"], size["words"], size["hidden_size"], size["dtype"]) == (40, 300, 32, "bfloat16")
    names = {(row["operation"], row["name"]) for row in size["rows"]}
    assert {("logprob", "klear torch"), ("policy", "torch full logits"), ("lm", "QuACK"), ("policy", PRODUCTS)} <= names
    assert ("policy", "QuACK") not in names  # scalar losses only


def test_times_and_rates_fit_together(run: tuple[str, dict[str, Any]]) -> None:
    _, result = run
    (size,) = result["sizes"]
    timed = [row for row in size["rows"] if row["p50_ms"] is not None]
    assert len(timed) == 9  # three of three
    product = 2 * 40 * 300 * 32
    for row in timed:
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        useful = (1 if row["operation"] == "logprob" else 3) * product
        assert row["useful_tflops"] == pytest.approx(useful / (row["p50_ms"] * 1e-3) / 1e12)
        assert row["executed_tflop"] == pytest.approx(row["executed_products"] * product / 1e12)
        (floor,) = (other for other in timed if other["name"] == PRODUCTS and other["operation"] == row["operation"])
        assert row["fraction_of_products"] == pytest.approx(floor["p50_ms"] / row["p50_ms"])


def test_table_has_every_row_and_says_who_is_missing(run: tuple[str, dict[str, Any]]) -> None:
    printed, result = run
    for row in result["sizes"][0]["rows"]:
        assert any(line.startswith(row["name"]) for line in printed.splitlines())
    if importlib.util.find_spec("quack") is None:
        assert "QuACK                         takes no part: not installed (quack)" in printed
    assert "klear triton                  takes no part: it runs on cuda devices, the inputs are on cpu" in printed
    assert "exact logits, rounded once" in printed


def test_error_columns_worked_out_again(run: tuple[str, dict[str, Any]]) -> None:
    _, result = run
    (size,) = result["sizes"]
    inputs, exact, _ = make()
    for operation, terms in (("policy", inputs.terms), ("lm", inputs.lm_terms)):
        logprobs, grad_hidden, grad_weight = full_float64(inputs, terms)
        arguments = (terms.old_logprobs, terms.advantages, terms.policy_weight, terms.lm_weight)
        output = linear_policy_loss(
            inputs.hidden, inputs.weight, inputs.labels, *arguments, objective=terms.objective, backend="torch"
        )
        ours = torch.autograd.grad(output.loss, (inputs.hidden, inputs.weight))
        (row,) = (row for row in size["rows"] if row["operation"] == operation and row["name"] == "klear torch")
        difference = (output.logprobs.double() - logprobs).abs()
        assert row["logprob_error_nats"] == pytest.approx(float(difference.max()), rel=1e-6)
        assert row["logprob_error"] == pytest.approx(float((difference / logprobs.abs()).max()), rel=1e-6)
        for name, mine, want, index in (
            ("grad_hidden_error", ours[0], grad_hidden, exact.rows),
            ("grad_weight_error", ours[1], grad_weight, exact.words),
        ):
            errors = [float((mine[i].double() - want[i]).norm() / want[i].norm()) for i in index.tolist()]
            assert row[name] == pytest.approx(max(errors), rel=1e-6)


def test_exact_results_are_those_of_full_float64_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from klear_kernels.linear_policy_loss.benchmark import problem

    monkeypatch.setattr(problem, "_ROW_BLOCK", 7)  # several blocks, ragged, of either kind
    monkeypatch.setattr(problem, "_WORD_BLOCK", 11)
    inputs, exact, samples = make(tokens=30, words=70, seed=3)
    assert samples == 30
    for operation, terms in (("policy", inputs.terms), ("lm", inputs.lm_terms)):
        logprobs, grad_hidden, grad_weight = full_float64(inputs, terms)
        torch.testing.assert_close(exact.logprobs, logprobs, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(exact.grad_hidden[operation], grad_hidden[exact.rows], rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(exact.grad_weight[operation], grad_weight[exact.words], rtol=1e-9, atol=1e-15)
        for rounded, want in (
            (exact.rounded_hidden[operation], exact.grad_hidden[operation]),
            (exact.rounded_weight[operation], exact.grad_weight[operation]),
        ):
            error = float((rounded - want).norm() / want.norm())
            assert 2.0**-12 < error < 2 * 2.0**-8  # rounded twice, and not more


def test_logits_are_realistic() -> None:
    inputs, exact, _ = make_inputs(512, 8192, 256, dtype=torch.float32, device=CPU, seed=1)
    assert 19 < float(exact.logsumexp.median()) < 21
    probabilities = exact.logprobs.exp()
    assert 0.1 < float((probabilities > 0.9).double().mean()) < 0.7
    assert 0.1 < float((probabilities < 0.1).double().mean()) < 0.7
    ratio = exact.logprobs - inputs.terms.old_logprobs
    assert float(ratio.abs().max()) > 0.25  # beyond the clip range on both sides
    assert float((ratio > 0.25).double().mean()) > 0.05
    assert float((ratio < -0.22).double().mean()) > 0.05


def test_one_that_raises_loses_its_row_and_nothing_else() -> None:
    inputs, exact, _ = make()
    calls: list[int] = []

    def at_once(_: Any) -> Outcome:
        raise RuntimeError("no kernel image\nfor this device")

    def later(_: Any) -> Outcome:
        calls.append(1)
        if len(calls) > 4:
            raise MemoryError("out of memory")
        return Outcome()

    def fine(_: Any) -> Outcome:
        return Outcome(exact.logprobs)

    entered = [
        Contestant(name=name, kind="peer", runs={"logprob": run}, executed_products={"logprob": 1})
        for name, run in (("at once", at_once), ("later", later), ("fine", fine))
    ]
    rows = {row["name"]: row for row in measure(entered, "logprob", inputs, exact, rounds=3, seed=0)}
    assert rows["at once"]["error"] == "RuntimeError: no kernel image"
    assert rows["later"]["error"] == "MemoryError: out of memory"
    assert rows["later"]["p50_ms"] is None
    assert rows["fine"]["error"] is None
    assert rows["fine"]["p50_ms"] > 0
    assert rows["fine"]["logprob_error"] == 0.0
    assert rows["fine"]["fraction_of_products"] is None  # nobody computed the products


def test_results_that_are_not_numbers_count_as_infinitely_wrong() -> None:
    inputs, exact, _ = make()

    def wrong(_: Any) -> Outcome:
        return Outcome(torch.full_like(exact.logprobs, float("nan")), torch.full_like(inputs.hidden, float("nan")))

    entered = [Contestant(name="wrong", kind="peer", runs={"lm": wrong}, executed_products={"lm": 3})]
    (row,) = measure(entered, "lm", inputs, exact, rounds=1, seed=0)
    assert row["logprob_error"] == row["logprob_error_nats"] == row["grad_hidden_error"] == float("inf")


@pytest.mark.parametrize("operation", ["policy", "lm"])
def test_adding_to_main_grad_starts_from_zero_and_leaves_nothing_behind(operation: str) -> None:
    inputs, exact, _ = make()
    entered = [one for one in contestants(CPU, torch.bfloat16) if one.name.startswith("klear torch")]
    returned, in_place = measure(entered, operation, inputs, exact, rounds=2, seed=0)
    assert in_place["name"] == "klear torch main_grad"
    assert in_place["error"] is None
    assert in_place["grad_hidden_error"] == returned["grad_hidden_error"]
    assert in_place["grad_weight_error"] < 1e-5 < returned["grad_weight_error"]  # on a CPU only the result is rounded
    assert not hasattr(inputs.weight, "main_grad")
    assert inputs.weight.grad is None


def test_other_libraries_are_called_as_they_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the parameters of cut-cross-entropy 25.1.1, liger-kernel 0.8.5 and quack-kernels 0.6.5."""
    losses = torch.nn.functional.cross_entropy

    def cut(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high"):
        assert reduction == "none"
        assert filter_eps in ("high", None)
        return losses(e @ c.t(), targets, reduction="none")

    def liger(input, weight, target, bias=None, reduction="mean", accum_dtype=None):
        assert accum_dtype == torch.float32
        return losses(input @ weight.t(), target, reduction=reduction)

    def quack(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True):
        return losses(x @ weight.t(), target, reduction=reduction)

    for module, name, function in (
        ("cut_cross_entropy", "linear_cross_entropy", cut),
        ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", liger),
        ("quack.linear_cross_entropy", "chunked_linear_cross_entropy", quack),
    ):
        stub = types.ModuleType(module)
        setattr(stub, name, function)
        for depth in range(module.count(".")):
            parent = module.rsplit(".", depth + 1)[0]
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
        monkeypatch.setitem(sys.modules, module, stub)
    inputs, exact, _ = make(torch.float32)
    entered = [one for one in contestants(CPU, torch.float32) if one.package]
    assert {one.name for one in entered if one.missing} <= {"F.linear_cross_entropy"}  # older torch does not have it
    seen = set()
    for operation in ("logprob", "policy", "lm"):
        for row in measure(entered, operation, inputs, exact, rounds=1, seed=0):
            if row["missing"] is not None:
                continue
            assert row["error"] is None, row
            seen.add((row["name"], operation))
            if row["logprob_error_nats"] is not None:
                assert row["logprob_error_nats"] < 1e-4
            if operation != "logprob":
                # float32 logits near 20 are off by some units of 2^-20
                assert row["grad_hidden_error"] < 1e-3
                assert row["grad_weight_error"] < 1e-3
    assert {(name, "policy") for name in ("cut-cross-entropy", "cut-cross-entropy unfiltered", "liger-kernel")} <= seen
    assert ("QuACK", "lm") in seen


def test_a_library_that_breaks_on_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(contestants_module.importlib, "import_module", broken)
    (quack,) = (one for one in contestants(CPU, torch.bfloat16) if one.name == "QuACK")
    assert quack.missing == "does not import: OSError: libcuda.so.1: cannot open shared object file"


def test_quantiles_by_hand() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0, 2.0], 0.95) == pytest.approx(1.95)
    assert quantile([7.0], 0.95) == 7.0


def test_goals_by_hand() -> None:
    def row(operation: str, name: str, kind: str, milliseconds: float, **others: Any) -> dict[str, Any]:
        return {
            "operation": operation, "name": name, "kind": kind, "p50_ms": milliseconds,
            "fraction_of_products": 160.0 / milliseconds, "peak_extra_bytes": 2_900_000_000,
            "grad_hidden_error": 3e-3, "grad_weight_error": 8e-3, **others,
        }  # fmt: skip

    size = {
        "rounding": {"policy": {"grad_hidden_error": 2e-3, "grad_weight_error": 4e-3}},
        "rows": [
            row("policy", "klear a", "ours", 176.0),
            row("policy", "klear b", "ours", 200.0),
            row("policy", "klear a main_grad", "ours in place", 170.0, peak_extra_bytes=2_800_000_000),
            row("policy", "peer", "peer", 220.0),
            row("policy", "failed", "peer", 1.0, p50_ms=None),
            row("lm", "klear a", "ours", 180.0),
            row("lm", "scalar", "peer", 171.0),
        ],
    }
    found = {goal["goal"]: (goal["value"], goal["met"]) for goal in goals(size)}
    assert found["policy: time over its products alone"] == (pytest.approx(1.0625), True)
    assert found["policy: transient GB"] == (pytest.approx(2.8), True)
    assert found["policy: speed over the fastest peer"] == (pytest.approx(1.25), True)
    assert found["lm: speed over the fastest peer, scalar-only ones included"] == (pytest.approx(0.95), False)
    assert found["policy: grad_hidden_error over exact logits rounded once"] == (pytest.approx(1.5), True)
    assert found["policy: grad_weight_error over exact logits rounded once"] == (pytest.approx(2.0), False)
    assert not any(goal.startswith("logprob") for goal in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SIZE, "--only", "klear"], "--only: got klear, allowed products alone, klear triton, klear cuda"),
        ([*SIZE, "--profile"], "--profile: needs --device cuda and --only NAME"),
    ],
)
def test_options_that_cannot_work(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_how_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "--device: got cuda, and torch sees no GPU; pass --device cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_small_run_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ["--tokens", "256", "--words", "4096", "--hidden-size", "256", "--rounds", "3", "--out", str(out)]
    assert command.main(arguments) == 0
    (size,) = json.loads(out.read_text())["sizes"]
    ours = [row for row in size["rows"] if row["kind"].startswith("ours") and row["missing"] is None]
    assert {row["name"] for row in ours} >= {"klear torch", "klear torch main_grad"}
    for row in ours:
        assert row["error"] is None, row
        assert row["peak_extra_bytes"] is not None
        exact = size["rounding"][row["operation"]]
        if exact is not None:
            assert row["grad_hidden_error"] <= 1.5 * exact["grad_hidden_error"]
            assert row["grad_weight_error"] <= 1.5 * exact["grad_weight_error"]
