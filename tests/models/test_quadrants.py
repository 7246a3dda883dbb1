"""Units of gated MLPs read apart by the sign of their gate: against the weights, in every gated family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from raylabel.errors import BadInput
from raylabel.models.subject import Subject, load_subject
from raylabel.stages.units import QUADRANTS, column, sign
from tests.models import tiny
from tests.models.saes import save_sae
from tests.models.test_subject import GATED
from tests.models.test_subject_transformerlens import native_folder

CASES = [*sorted(GATED), "gemma3", "native"]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def saved(family: str, folder: Path) -> str:
    if family == "native":
        return str(native_folder(folder, gated_mlp=True, act_fn="silu"))
    return str(tiny.save(family, folder))


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Subject]:
    folder = saved(request.param, tmp_path_factory.mktemp("models") / request.param)
    plain = load_subject(folder, context=16, device="cpu")
    return plain, load_subject(folder, context=16, device="cpu", quadrants=True)


def gate_and_product(subject: Subject, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """The gate before its activation function, and act(gate) * up, from the weights and what the MLP is given."""
    mlp: Any = subject.anatomy.blocks[layer].mlp
    given: list[Tensor] = []
    handle = mlp.register_forward_pre_hook(lambda _, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]),
                                           with_kwargs=True)  # fmt: skip
    subject.run(ids, [layer], lambda *_: None)
    handle.remove()
    weights = dict(mlp.named_parameters())
    names = ("gate.weight", "in.weight") if "gate.weight" in weights else ("gate_proj.weight", "up_proj.weight")
    gate, up = (given[0] @ weights[name].T for name in names)
    gelu = subject.anatomy.kind.startswith("gemma")
    return gate, (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up


def test_four_regimes_by_the_weights(pair: tuple[Subject, Subject]) -> None:
    plain, subject = pair
    ids = tiny.ids()
    assert (subject.width, subject.site_width, subject.columns) == (tiny.INNER, 2 * tiny.INNER, 2 * tiny.INNER)
    assert (plain.width, plain.site_width, plain.columns) == (tiny.INNER,) * 3
    for layer in range(tiny.LAYERS):
        gate, product = gate_and_product(plain, ids, layer)
        seen = subject.activations(ids, [layer])[layer]
        for polarity in QUADRANTS:
            regime = (gate > 0) == (abs(polarity) == 1)
            expected = torch.where(regime & (product * polarity > 0), product.abs(), 0.0)
            for neuron in (0, 7, tiny.INNER - 1):
                at = torch.tensor([column(neuron, polarity, subject.width)])
                found = subject.read(layer, seen, at)[..., 0] * sign(polarity)
                torch.testing.assert_close(found.clamp(min=0), expected[..., neuron], rtol=1e-4, atol=1e-5)
                assert ((found > 0) == (expected[..., neuron] > 0)).all()
        halves = seen.unflatten(-1, (2, tiny.INNER))
        assert torch.equal(halves.sum(-2), plain.activations(ids, [layer])[layer]), "to the bit"
        assert (halves == 0).any(-2).all()


def test_every_layer_of_one_pass_and_rows_of_many_texts(pair: tuple[Subject, Subject]) -> None:
    _, subject = pair
    ids = tiny.ids()
    together = subject.activations(ids, [0, 2])
    assert torch.equal(together[2], subject.activations(ids, [2])[2])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())
    directions = subject.site_directions(1)
    assert torch.equal(directions, torch.cat([subject.output_directions(1)] * 2))
    assert subject.hook_name(1) == "blocks.1.mlp.hook_post"
    assert subject.at("mlp_post").site_width == tiny.INNER and not subject.at("resid_pre").quadrants


def test_a_gate_that_is_not_a_number_is_no_silence(tmp_path: Path) -> None:
    subject = load_subject(saved("llama", tmp_path / "m"), context=16, device="cpu", quadrants=True)
    subject.anatomy.blocks[1].mlp.gate_proj.weight[3] = torch.nan
    seen = subject.activations(tiny.ids(), [1])[1].unflatten(-1, (2, tiny.INNER))
    assert seen.sum(-2)[..., 3].isnan().all() and seen[..., :3].isfinite().all()


def test_what_has_no_quadrants(tmp_path: Path) -> None:
    folder = saved("gpt2", tmp_path / "gpt2")
    with pytest.raises(BadInput, match=r"subject\.polarity: quadrants need a gated MLP, and this model \(gpt2\) has none"):
        load_subject(folder, context=16, device="cpu", quadrants=True)
    folder = saved("llama", tmp_path / "llama")
    with pytest.raises(BadInput, match=r"subject\.polarity: quadrants exist at mlp_post only, not at resid_pre"):
        load_subject(folder, context=16, device="cpu", quadrants=True, site="resid_pre")
    with pytest.raises(BadInput, match=r"subject\.polarity: latents have no gate"):
        load_subject(folder, context=16, device="cpu", quadrants=True, latents=str(save_sae(tmp_path / "sae")))
