"""On which GPUs a model lies, decided with GPUs that are made up, and what transformers makes of the decision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from raylabel.errors import BadInput
from raylabel.models import loading, placement
from raylabel.models.subject import load_subject
from tests.models import tiny
from tests.models.test_subject_transformerlens import native_folder

CUDA, GB = torch.device("cuda"), 10**9


def gpus(monkeypatch: pytest.MonkeyPatch, *free: float) -> None:
    """As many GPUs, with so many GB free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(free))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (int(free[i] * GB), int(free[i] * GB)))


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "gemma3"])
def test_the_size_of_the_weights_is_that_of_the_files(tmp_path: Path, family: str) -> None:
    folder = tiny.save(family, tmp_path / "m")
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in list(file.keys()))
    config = AutoConfig.from_pretrained(folder)
    assert placement.weight_bytes(config, None) == stored
    assert placement.weight_bytes(config, torch.float32) == stored
    assert 2 * placement.weight_bytes(config, torch.bfloat16) == stored


@pytest.mark.parametrize(
    ("free", "wanted", "size", "used"),
    [
        ((80,), None, 70, 0),
        ((80, 80), None, 60, 0),
        ((80, 80), None, 65, 2),
        ((80, 80, 80, 80), None, 250, 4),
        ((80, 80, 80, 80), 2, 10, 2),
        ((80, 80, 80, 80), 3, 200, 3),
        ((80, 80), 1, 70, 0),
        ((80, 80), 0.5, 70, 0),
    ],
)
def test_where_a_model_goes(
    monkeypatch: pytest.MonkeyPatch, free: tuple[float, ...], wanted: float | None, size: float, used: int
) -> None:
    gpus(monkeypatch, *free)
    found = placement.spread(CUDA, wanted, lambda: int(size * GB))
    expected = {"device_map": "balanced", "max_memory": {i: int(free[i] * GB) for i in range(used)}}
    assert found == (expected if used else {})
    for one in ("cpu", "cuda:1"):
        assert placement.spread(torch.device(one), wanted, lambda: int(size * GB)) == {}


def test_what_finds_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 80, 80)
    with pytest.raises(BadInput, match=r"^subject\.gpus_per_worker: 4, but there are 2 GPUs here; use auto$"):
        placement.spread(CUDA, 4, lambda: GB)
    with pytest.raises(BadInput, match=r"^subject\.model: its weights take 170\.0 GB, and 2 GPUs have 160\.0 GB free; use"):
        placement.spread(CUDA, None, lambda: 170 * GB)


def test_how_many_gpus_a_worker_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert [placement.gpus_for(size * GB, 80 * GB) for size in (0, 1, 64, 65, 128, 129, 400)] == [1, 1, 1, 2, 2, 3, 7]
    folder = tiny.save("llama", tmp_path / "m")
    size = placement.weight_bytes(AutoConfig.from_pretrained(folder), None)
    assert loading.gpus_needed(str(folder), None, "auto", False) == 1, "no GPU here"
    gpus(monkeypatch, 1)

    class Small:
        total_memory = size // 2

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Small)
    assert loading.gpus_needed(str(folder), None, "auto", False) == 3
    assert loading.gpus_needed(str(folder), None, "bfloat16", False) == 2
    assert loading.gpus_needed(str(native_folder(tmp_path / "native")), None, "auto", False) == 1
    assert loading.gpus_needed(str(tmp_path / "missing"), None, "auto", False) == 1


def test_transformers_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a map of the CPU, the only device here."""
    folder = str(tiny.save("llama", tmp_path / "m"))
    plain = load_subject(folder, context=16, device="cpu")
    asked: list[Any] = []

    def spread(device: torch.device, wanted: float | None, weights: Any) -> dict[str, Any]:
        asked.append((device.type, wanted, weights()))
        return {"device_map": "balanced", "max_memory": {"cpu": GB}}

    monkeypatch.setattr(placement, "spread", spread)
    placed = load_subject(folder, context=16, device="cpu", gpus=2)
    assert asked == [("cpu", 2, placement.weight_bytes(placed.model.config, torch.float32))]
    assert not placed.model.training
    assert torch.equal(placed.activations(tiny.ids(), [2])[2], plain.activations(tiny.ids(), [2])[2])
    assert placed.layer_device(2) == placed.device == torch.device("cpu")
    with pytest.raises(BadInput, match=r"^subject\.model: 30 of its parameters found no room on the GPUs, model\.embed_tokens"):
        placement.check_spread(placed.model, CUDA)
