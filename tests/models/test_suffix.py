"""Rows of many texts give every token what the plain pass gives it, in every family, and compute no beginning twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from raylabel.models import suffix
from raylabel.models.subject import Subject, load_subject
from raylabel.models.suffix import Forest, Tree, agrees, grow
from tests.models import tiny
from tests.models.test_subject_transformerlens import native_folder

ALONE = {"gpt_neo"}
"""Families whose attention takes no finished mask: every text is a row."""
NATIVE = {
    "solu": {},
    "rotary-grouped": {"positional_embedding_type": "rotary", "n_key_value_heads": 2, "normalization_type": "RMS"},
    "capped": {"attn_scores_soft_cap": 2.0, "act_fn": "gelu"},
    "gated-scaled": {"gated_mlp": True, "act_fn": "silu", "attn_scale": 3.0},
    "attention-only": {"attn_only": True},
}


@pytest.fixture(scope="module", params=[*tiny.FAMILIES, "gemma3", *NATIVE])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("models") / request.param
    if request.param in NATIVE:
        native_folder(folder, **NATIVE[request.param])
        site = "resid_post" if request.param == "attention-only" else "mlp_post"
        return load_subject(str(folder), context=16, device="cpu", site=site)
    return load_subject(str(tiny.save(request.param, folder)), context=16, device="cpu")


def family_texts(seed: int = 0, longest: int = 24, originals: int = 4, variants: int = 12) -> list[list[int]]:
    """Distinct texts: some originals, each with variants that differ from one place on and end somewhere behind it."""
    rng = np.random.default_rng(seed)
    texts: set[tuple[int, ...]] = set()
    for _ in range(originals):
        original = (1, *rng.integers(3, 280, rng.integers(longest // 2, longest)).tolist())
        texts.add(original)
        for _ in range(variants):
            at = int(rng.integers(1, len(original)))
            other = rng.integers(3, 280, rng.integers(1, 4)).tolist()
            varied = (*original[:at], *other, *original[at + 1 :])[: at + int(rng.integers(1, 9))]
            texts.add(varied[:longest])
    return [list(text) for text in sorted(texts, key=lambda text: rng.random())]


def flattened(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([i for text in texts for i in text], np.int32), np.cumsum([0, *map(len, texts)])


def by_tries(subject: Subject, layer: int, texts: list[list[int]], largest: int) -> list[Tensor]:
    """Each text's activations [tokens, width], taken out of rows of several."""
    found: dict[int, Tensor] = {}
    flat, offsets = flattened(texts)
    for forest in grow(flat, offsets, largest):
        rows = np.arange(len(forest.rows) - 1)
        ids, _, tree = forest.batch(rows, subject.pad_id, subject.device)
        acts: list[Tensor] = []
        subject.run(ids, [layer], lambda _layer, a, _resid, acts=acts: acts.append(a.clone()), tree)  # type: ignore[misc]
        for i, row in enumerate(np.repeat(rows, np.diff(forest.owned)).tolist()):
            text = int(forest.order[i])
            found[text] = acts[0][row, forest.nodes[i, : len(texts[text])] - forest.rows[row]]
    return [found[i] for i in range(len(texts))]


def test_every_family_gives_what_the_plain_pass_gives(subject: Subject, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["subject"]
    assert subject.shares_beginnings == (name not in ALONE)
    texts = family_texts()
    if not subject.shares_beginnings:
        with pytest.raises(ValueError, match="cannot share"):
            by_tries(subject, 0, texts, 48)
        return
    for layer in range(tiny.LAYERS):
        expected = [subject.activations(torch.tensor([text]), [layer])[layer][0] for text in texts]
        scale = float(torch.quantile(torch.cat(expected).abs().flatten(), 0.99))
        for largest in (1, 48, 10**6):
            for given, wanted in zip(by_tries(subject, layer, texts, largest), expected, strict=True):
                assert float((given - wanted).abs().max()) <= 1e-4 * scale
        assert agrees(subject, layer, *flattened(texts))


def test_every_site(subject: Subject) -> None:
    if not subject.shares_beginnings:
        pytest.skip("takes no mask")
    texts = family_texts(1)
    sites = ["resid_pre", "resid_post", "attn_out", *(["resid_mid"] if subject.anatomy.family.middle else [])]
    for site in (*sites, *filter(None, [subject.sister_site()])):
        other = subject.at(site)
        for given, text in zip(by_tries(other, 1, texts, 64), texts, strict=True):
            wanted = other.activations(torch.tensor([text]), [1])[1][0]
            torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("blunder", ["ignores the mask", "ignores the positions"])
def test_a_model_that_cannot_is_found_out(subject: Subject, blunder: str) -> None:
    call = subject.anatomy.call_tree
    if call is None:
        pytest.skip("takes no mask")

    def wrong(ids: Tensor, tree: Tree) -> None:
        if blunder == "ignores the mask":
            call(ids, Tree(tree.positions, torch.ones_like(tree.seen).tril()))
        else:
            call(ids, Tree((torch.arange(ids.shape[1]) % tiny.POSITIONS).expand_as(ids), tree.seen))

    broken = replace(subject, anatomy=replace(subject.anatomy, call_tree=wrong))
    texts = flattened(family_texts(2, originals=1))
    assert agrees(subject, tiny.LAYERS - 1, *texts) and not agrees(broken, tiny.LAYERS - 1, *texts)


def test_half_precision(tmp_path: Path) -> None:
    subject = load_subject(str(tiny.save("llama", tmp_path / "m")), context=16, device="cpu", dtype="bfloat16")
    assert agrees(subject, 1, *flattened(family_texts(3)))


def paths(forest: Forest, lengths: np.ndarray) -> dict[int, list[int]]:
    return {t: forest.ids[forest.nodes[i, : lengths[t]]].tolist() for i, t in enumerate(forest.order.tolist())}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("largest", [1, 30, 60, 10**6])
@pytest.mark.parametrize("cells", [1, 200, 1 << 22])
def test_rows_hold_every_text_and_little_more(
    monkeypatch: pytest.MonkeyPatch, shared: bool, largest: int, cells: int
) -> None:
    monkeypatch.setattr(suffix, "CELLS", cells)
    texts = family_texts(4, originals=9)
    flat, offsets = flattened(texts)
    lengths, found, rows = np.diff(offsets), dict[int, list[int]](), 0
    for forest in grow(flat, offsets, largest, shared):
        found |= paths(forest, lengths)
        sizes = np.diff(forest.rows)
        rows += len(sizes)
        assert (sizes[np.diff(forest.owned) > 1] <= largest).all()
        assert forest.rows[-1] == len(forest.ids) == len(forest.depth) and forest.owned[-1] == len(forest.order)
        # Nodes of a row are distinct beginnings.
        for i, (a, b) in enumerate(zip(forest.rows[:-1], forest.rows[1:], strict=True)):
            mine = [texts[t] for t in forest.order[forest.owned[i] : forest.owned[i + 1]].tolist()]
            assert b - a == len({tuple(text[: p + 1]) for text in mine for p in range(len(text))})
        ids, there, tree = forest.batch(np.arange(len(sizes)), 0, torch.device("cpu"))
        assert there.sum(dim=1).tolist() == sizes.tolist() and (tree is None) == (not shared)
        assert ids[there].tolist() == forest.ids.tolist()
    assert [found[i] for i in range(len(texts))] == texts
    assert rows == len(texts) if not shared or largest == 1 or cells == 1 else rows < len(texts)


def test_a_node_attends_to_its_own_beginning_alone() -> None:
    texts = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6, 7], [1, 2, 3, 4], [1, 2, 3, 8], [9, 9, 9, 9]]
    (forest,) = grow(*flattened(texts), 100)
    assert len(forest.rows) == 4, "one that shares too little starts a row"
    ids, there, tree = forest.batch(np.arange(3), 0, torch.device("cpu"))
    assert tree is not None and tree.positions[0, : int(there[0].sum())].tolist() == [0, 1, 2, 3, 4, 4, 5]
    assert ids[0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    seen = {tuple(ids[0, tree.seen[0, query]].tolist()) for query in range(7)}
    assert seen == {(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 5), (1, 2, 3, 4, 6), (1, 2, 3, 4, 6, 7)}
    filled = tree.seen[1, 4:]
    assert filled[:, 4:].any(dim=1).all() and not filled[:, :4].any() and not tree.seen[1, :4, 4:].any()
    near = tree.bias(torch.float32, window=2)[0, 0] == 0
    assert near.sum(dim=1).max() == 2 and near.diagonal().all()


def test_nothing_gives_nothing() -> None:
    assert list(grow(np.zeros(0, np.int32), np.zeros(1, np.int64), 10)) == []
