"""K-Center greedy selection against a search by definition in float64, and where embeddings come from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.curation_inputs import row
from megatron_klear.curation import embed, k_center
from megatron_klear.curation.k_center import k_center_greedy
from megatron_klear.errors import DataError

RunCuration = Callable[..., Any]


def farthest_first(points: np.ndarray[Any, Any], k: int, first: int) -> tuple[list[int], list[float]]:
    """Gonzalez by definition: all distances to all chosen points, every time."""
    chosen, radii = [first], []
    while True:
        to_chosen = np.linalg.norm(points[:, None] - points[chosen], axis=2).min(axis=1)
        radii.append(float(to_chosen.max()))
        if len(chosen) == k:
            return chosen, radii
        to_chosen[chosen] = -1.0
        chosen.append(int(to_chosen.argmax()))


def unit(points: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(3))
def test_k_center_is_farthest_first(seed: int) -> None:
    points = unit(np.random.default_rng(seed).normal(size=(60, 5)))
    expected, radii = farthest_first(points, 20, first=7)
    told: list[int] = []
    found, radius = k_center_greedy(points, 20, first=7, advance=told.append)
    assert found.tolist() == expected
    assert sum(told) == 20
    # The squared distance is off by a few roundings of 2; its root magnifies that at small radii.
    np.testing.assert_allclose(radius**2, np.square(radii), atol=8 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("k", [1, 2, 99, 100, 101, 250, 300])
def test_any_number_of_choices_is_the_start_of_more(k: int) -> None:
    """Choices are made in parts, of which the last may be shorter, to tell of progress in between."""
    points = unit(np.random.default_rng(1).normal(size=(300, 3)))
    told: list[int] = []
    found, radius = k_center_greedy(points, k, first=5, advance=told.append)
    expected, radii = farthest_first(points, k, first=5)
    assert found.tolist() == expected
    assert sum(told) == k
    np.testing.assert_allclose(radius**2, np.square(radii), atol=8 * np.finfo(np.float64).eps)


@pytest.mark.parametrize("seed", range(12))
def test_every_choice_is_a_farthest_point_also_among_copies_and_ties(seed: int) -> None:
    """By definition in float64, given the choices before: ties may be broken either way, and nothing else differs."""
    rng = np.random.default_rng(seed)
    width = int(rng.choice([2, 5, 64, 384]))
    base = unit(rng.normal(size=(int(rng.integers(20, 120)), width)))
    axes = np.concatenate([np.eye(width), -np.eye(width)])[:30]  # whose distances are exactly equal
    some = np.concatenate([base, axes])
    copies = some[rng.integers(0, len(some), size=len(some))]
    points = np.concatenate([some, copies])[rng.permutation(2 * len(some))]
    found, radius = k_center_greedy(points, len(points), first=3)
    assert sorted(found.tolist()) == list(range(len(points)))
    # A product of unit vectors is off by at most about sqrt(D) roundings of 1, and is doubled; so are two norms.
    rounding = 8 * float(np.finfo(np.float64).eps) * np.sqrt(width)
    nearest = np.full(len(points), np.inf)
    for place, index in enumerate(found):
        if place:
            assert nearest[index] >= nearest.max() - rounding
        nearest = np.minimum(nearest, np.square(points - points[index]).sum(axis=1))
        np.testing.assert_allclose(float(radius[place]) ** 2, nearest.max(), atol=rounding)
    distinct = len({point.tobytes() for point in points})
    assert len({points[i].tobytes() for i in found[:distinct]}) == distinct  # copies come last
    assert (radius[distinct - 1 :] ** 2 <= rounding).all()
    assert radius[distinct - 2] > 0


def test_equal_points_are_never_chosen_twice() -> None:
    points = np.array([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 3)
    found, radius = k_center_greedy(points, 7, first=2)
    assert sorted(found.tolist()) == list(range(7))
    assert found[:2].tolist() == [2, 4]
    assert radius[1:].tolist() == [0.0] * 6


def test_points_that_differ_little_are_told_apart() -> None:
    """Of three points 1e-6 around the first, the farthest is next: a float32 product would find them all equal."""
    angles = np.array([0.0, 1e-6, -3e-6, 2e-6, 1.0])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found, radius = k_center_greedy(points, 3, first=0)
    assert found.tolist() == [0, 4, 2]
    np.testing.assert_allclose(radius[1:], [3e-6, 2e-6], rtol=1e-3)  # 2^-52 against their squares


def clustered(count: int) -> list[dict[str, Any]]:
    """Rows in three tight clusters, in order; ids say which."""
    rng = np.random.default_rng(0)
    centers = np.eye(4)[:3]
    rows = []
    for i in range(count):
        vector = centers[i % 3] + 0.01 * rng.normal(size=4)
        rows.append(row(i, f"prompt number {i}", embedding=vector.tolist()))
    return rows


def test_a_budget_by_domain_covers_the_clusters(run_curation: RunCuration, tmp_path: Path) -> None:
    rows = clustered(30)
    rows.append({**row(90, "print 1", embedding=[1.0, 0, 0, 0]), "domain": "code", "reference": [1]})
    rows.append({**row(91, "no vector"), "embedding": None})
    rows.append({**row(92, "wrong size"), "embedding": [1.0]})
    rows.append({**row(93, "no direction"), "embedding": [0.0] * 4})
    done = run_curation(rows, stages=("select",), selection={"math": 3})
    math = [int(name[1:]) for name in done.ids if name != "r90"]
    assert "r90" in done.ids  # code has no budget
    assert sorted(i % 3 for i in math) == [0, 1, 2]
    assert done.reasons("select") == {"not selected": 27}
    assert [(r["line"], r["reason"][:13]) for r in done.rejects] == [
        (32, "has no embedd"), (33, "its embedding"), (34, "its embedding"),
    ]  # fmt: skip
    assert (done.root / "stages" / "01-select" / "selection.json").is_file()
    # The same vectors from a file, in another order.
    ids, vectors = zip(*[(r["id"], r["embedding"]) for r in rows[:31][::-1]], strict=True)
    np.save(tmp_path / "v.npy", np.array(vectors, np.float64))
    (tmp_path / "v.ids").write_text("\n".join(ids) + "\n")
    for r in rows:
        r.pop("embedding")
    again = run_curation(
        rows[:31], stages=("select",), selection={"math": 3, "embeddings": "file", "path": str(tmp_path / "v.npy")}
    )
    assert again.ids == done.ids


def test_an_encoder_is_run_over_prompts(run_curation: RunCuration, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModel, BertConfig, BertModel, PreTrainedTokenizerFast

    from megatron_klear.config.curation import SelectionSettings
    from megatron_klear.curation.embed import EncoderEmbeddings
    from megatron_klear.curation.reading import parse_row

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "red", "blue", "cat", "dog"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(tmp_path / "e")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path / "e")
    texts = ["red cat", "blue dog dog blue cat", "red"]
    settings = SelectionSettings(embeddings="model", path=str(tmp_path / "e"), batch_prompts=2)
    rows = [parse_row(row(i, text), "f", i) for i, text in enumerate(texts)]
    found = EncoderEmbeddings(settings, "cpu").embed(rows)  # type: ignore[arg-type]
    model = AutoModel.from_pretrained(tmp_path / "e").eval()
    for text, vector in zip(texts, found, strict=True):  # one at a time, so without padding
        ids = torch.tensor([[vocabulary[word] for word in text.split()]])
        with torch.no_grad():
            expected = model(input_ids=ids).last_hidden_state[0].double().mean(dim=0)
        np.testing.assert_allclose(vector, expected.numpy(), atol=2e-6)
    done = run_curation(
        [row(i, text) for i, text in enumerate(texts)], stages=("select",),
        selection={"math": 2, "embeddings": "model", "path": str(tmp_path / "e")},
    )  # fmt: skip
    assert len(done.ids) == 2
    assert json.loads((done.root / "stages" / "01-select" / "selection.json").read_text())["unusable"] == {}


def test_what_an_encoder_made_outlives_a_start_that_ends_before_all_is_chosen(
    run_curation: RunCuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = clustered(30)
    rows += [
        {**row(90 + i, f"print {i}", embedding=[1.0, i, 0, 0]), "domain": "code", "reference": [1]} for i in range(4)
    ]
    rows.append({**row(80, "no vector"), "embedding": None})
    settings: dict[str, Any] = {"stages": ("select",), "selection": {"math": 3, "code": 2}}
    undisturbed = run_curation(rows, **settings)
    kept = undisturbed.ids
    stage = undisturbed.root / "stages" / "01-select"
    rejects = undisturbed.rejects

    embedded: list[str] = []
    embed_column, choose, ends = embed.ColumnEmbeddings.embed, k_center.k_center_greedy, [True]

    def embed_and_note(self: embed.ColumnEmbeddings, some: Any) -> Any:
        embedded.extend(r.row_id for r in some)
        return embed_column(self, some)

    def end_or_choose(points: Any, budget: int, **more: Any) -> Any:
        if budget == 2 and ends.pop():
            raise KeyboardInterrupt
        return choose(points, budget, **more)

    monkeypatch.setattr(embed.ColumnEmbeddings, "embed", embed_and_note)
    monkeypatch.setattr(k_center, "k_center_greedy", end_or_choose)
    shutil.rmtree(undisturbed.root)
    with pytest.raises(KeyboardInterrupt):  # both domains are embedded, one is chosen of
        run_curation(rows, **settings)
    assert sorted(embedded) == sorted(r["id"] for r in rows)
    embedded.clear()
    ends.append(False)
    again = run_curation(rows, **settings)
    assert embedded == []
    assert (again.ids, again.rejects) == (kept, rejects)
    assert [file.name for file in stage.iterdir() if "vectors" in file.name] == []

    # Vectors that are damaged, or of other rows, are not taken over.
    for spoil in (lambda file: file.write_bytes(bytes(file.stat().st_size)), None):
        shutil.rmtree(undisturbed.root)
        ends[:] = [False, True]
        with pytest.raises(KeyboardInterrupt):
            run_curation(rows, **settings)
        embedded.clear()
        if spoil is not None:
            spoil(stage / ".vectors-math.f64")
            again = run_curation(rows, **settings)
            assert sorted(set(embedded)) == sorted(r["id"] for r in rows if r["domain"] == "math")
            assert again.ids == kept
        else:
            run_curation(rows[1:], **settings)
            assert sorted(embedded) == sorted(r["id"] for r in rows[1:])


def test_best_sources_stay(run_curation: RunCuration) -> None:
    rows = [row(i, f"prompt {i}", source=name) for i, name in enumerate(["best", "third", "second", "other", "best"])]
    rows.append({**row(9, "code"), "domain": "code", "reference": [1], "source": "any"})
    done = run_curation(rows, stages=("sources",), sources={"math_ranking": ["best", "second", "third"], "math_top": 2})
    assert done.ids == ["r0", "r2", "r4", "r9"]
    assert done.reasons("sources") == {"source ranked too low": 1, "source not ranked": 1}
    assert next(r for r in done.dropped if r["id"] == "r1")["place"] == 3


@pytest.mark.parametrize("seed", range(4))
def test_sources_are_those_that_a_search_by_hand_finds(run_curation: RunCuration, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = ["", "a", "A", " a", "b", "c", "d"]
    ranking = {domain: list(rng.permutation(names)[: rng.integers(1, 6)]) for domain in ("math", "code")}
    top = {domain: int(rng.integers(1, 8)) for domain in ranking}
    rows = []
    for number in range(60):
        code = {"domain": "code", "reference": [1]} if rng.random() < 0.5 else {}
        rows.append({**row(number, f"prompt {number}", source=str(rng.choice(names))), **code})
    done = run_curation(
        rows,
        stages=("sources",),
        sources={
            "math_ranking": [str(n) for n in ranking["math"]], "math_top": top["math"],
            "code_ranking": [str(n) for n in ranking["code"]], "code_top": top["code"],
        },
    )  # fmt: skip
    assert done.ids == [r["id"] for r in rows if r["source"] in ranking[r["domain"]][: top[r["domain"]]]]


def test_ids_of_a_file_of_vectors_are_its_lines_and_each_is_there_once(tmp_path: Path) -> None:
    from megatron_klear.curation.embed import FileEmbeddings
    from megatron_klear.curation.reading import parse_row

    np.save(tmp_path / "v.npy", np.eye(2))
    (tmp_path / "v.ids").write_text("a\u2028b\n\x0c\n")
    rows = [parse_row({**row(0, "x"), "id": name}, "f", 1) for name in ("\x0c", "a\u2028b", "a")]
    found = FileEmbeddings(tmp_path / "v.npy").embed(rows)  # type: ignore[arg-type]
    assert np.array_equal(np.stack(found[:2]), np.eye(2)[::-1])  # type: ignore[arg-type]
    assert found[2] == "has no vector in the file of selection.path"
    (tmp_path / "v.ids").write_text("a\na\n")
    with pytest.raises(DataError, match="names 'a' more than once"):
        FileEmbeddings(tmp_path / "v.npy")
