"""Models whose blocks lie on two devices give what they give on one; run by test_devices.py in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
import torch
from accelerate import infer_auto_device_map
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from raylabel.engine.pipeline import run_pipeline
from raylabel.models.subject import Subject, load_subject
from raylabel.stages import subject as stage_subject
from raylabel.store.rundir import RunDir
from tests.models import elsewhere, tiny
from tests.models.saes import save_sae
from tests.runs import tiny_config, write_corpus

FAMILIES = [*tiny.FAMILIES, "gemma3"]
SITES = ("mlp_post", "resid_pre", "resid_post", "attn_out")


@pytest.fixture(scope="module", autouse=True)
def two_devices() -> Iterator[None]:
    # The double cannot wrap views in inference mode; without it, which attention is taken would depend on the device.
    with pytest.MonkeyPatch.context() as patch, elsewhere.two_devices(), sdpa_kernel(SDPBackend.MATH):
        patch.setattr(torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext())
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return lambda family: root / family if (root / family).exists() else tiny.save(family, root / family)


def scattered(folder: Path, **options: Any) -> Subject:
    """The model as `device_map` would lay it out, by the same rules."""
    subject = load_subject(str(folder), context=16, device="cpu", **options)
    model = subject.model
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    names = {id(module): name for name, module in model.named_modules()}
    first, *_, last = (names[id(block)] for block in subject.anatomy.blocks)
    for share in range(50, 100, 2):
        room: Any = {0: share * size // 100, 1: 2 * size}
        places = infer_auto_device_map(model, max_memory=room, no_split_module_classes=model._no_split_modules)
        if (places.get(first), places.get(last)) == (0, 1):
            break
    elsewhere.scatter(model, {name: f"other:{place}" for name, place in places.items()})
    found = replace(subject, device=next(subject.anatomy.trunk.parameters()).device)
    assert [str(found.layer_device(layer)) for layer in (0, 2)] == ["other:0", "other:1"]
    return found


def test_the_double_refuses_what_devices_refuse() -> None:
    a, b = (torch.arange(6.0).to(f"other:{i}") for i in range(2))
    for wrong in (lambda: a + b, lambda: a[b.long()], lambda: torch.where(a > 1, a, b), lambda: torch.cat([a, b])):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    with pytest.raises(RuntimeError, match="same device"):
        torch.arange(6.0) + a
    assert (a + b.to(a.device)).cpu().tolist() == [0, 2, 4, 6, 8, 10]
    assert a[torch.tensor([1])].device == a.device and float(a[1]) == 1
    with pytest.raises((RuntimeError, TypeError)):
        a.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_every_family(folders: Callable[[str], Path], family: str) -> None:
    plain, split = load_subject(str(folders(family)), context=16, device="cpu"), scattered(folders(family))
    ids, layers = tiny.ids(), range(tiny.LAYERS)
    for site in SITES:
        expected, seen = plain.at(site).activations(ids, layers), dict[int, Tensor]()

        def visit(layer: int, acts: Tensor, resid: Tensor, seen: dict[int, Tensor] = seen) -> None:
            assert acts.device == resid.device == split.layer_device(layer)
            seen[layer] = acts.cpu()

        split.at(site).run(ids, layers, visit)
        for layer in layers:
            assert torch.equal(seen[layer], expected[layer])
    for layer in layers:
        directions = split.output_directions(layer)
        assert torch.equal(directions.cpu(), plain.output_directions(layer))
        effects = zip(split.logit_effects(directions, 5), plain.logit_effects(directions.cpu(), 5), strict=True)
        assert all(torch.equal(a, b) for a, b in effects)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in split.model.modules())


CASES: dict[str, dict[str, Any]] = {
    "stream": {"site": "resid_pre"},
    "quadrants": {"polarity": "quadrants"},
    "transcoder": {"latents": {"architecture": "transcoder", "hook": "blocks.2.mlp.hook_in"}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_whole_run(folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """All stages that hold the subject, with states, decoys, latents and measurements on two devices, as on a CPU."""
    settings = dict(CASES[case])
    latents = settings.get("latents")
    if latents is not None:
        settings["latents"] = str(save_sae(tmp_path / "sae", **latents))
    folder, text = folders("llama"), write_corpus(tmp_path / "text.jsonl", 16)
    sections: dict[str, dict[str, Any]] = {
        "subject": {"neurons": [0, 4], "layers": [2] if latents else [0, 2], **settings}, "identify": {"fdr": 0.9},
        "verify": {"synonyms": 1, "max_variants": 30}, "controls": {"decoys": 3},
        "run": {"stages": ["tokenize", "scan", "identify", "verify", "results"]},
    }  # fmt: skip
    run_pipeline(tiny_config(folder, text, tmp_path / "plain", **sections))
    options = {"latents": settings.get("latents"), "quadrants": case == "quadrants", "site": settings.get("site")}
    split = scattered(folder, **options)
    monkeypatch.setattr(stage_subject, "_open", lambda *_: split)
    run_pipeline(tiny_config(folder, text, tmp_path / "split", **sections))
    a, b = RunDir(str(tmp_path / "plain")), RunDir(str(tmp_path / "split"))
    for one, other in ((a, b), (a.controls, b.controls)):
        exemplars = [run.table("exemplars") for run in (one, other)]
        assert exemplars[0].num_rows
        if one.in_controls:
            # Decoys are mixed by other operations there, and rounded otherwise.
            same(*(table.drop_columns("activations") for table in exemplars))
        else:
            assert exemplars[0].equals(exemplars[1])
        assert one.table("variants").num_rows or one.in_controls
        for name in ("statistics", "variants", "verifications", "results"):
            same(one.table(name), other.table(name))
    assert b.table("failures").num_rows == 0


def same(a: Any, b: Any) -> None:
    """Equal rows, numbers but for rounding."""
    assert a.num_rows == b.num_rows
    for name in a.column_names:
        x, y = (pc.fill_null(t.column(name), 0) if t.schema.field(name).type == "float" else t.column(name) for t in (a, b))
        if a.schema.field(name).type == "float":
            assert x.to_pylist() == pytest.approx(y.to_pylist(), rel=1e-3, abs=1e-4), name
        elif name not in ("logits_up", "logits_down", "retention_by_offset", "retention_random_by_offset"):
            assert x.equals(y), name
