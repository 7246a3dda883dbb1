"""Plain transformers models: every family's sites against a recomputation by hand and transformers' hidden states."""

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
from tests.models import tiny

SERIAL = [name for name in tiny.FAMILIES if name not in ("gptj", "gpt_neox", "phi")]
PARALLEL = ["gptj", "gpt_neox", "phi"]
GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3"}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: tiny.save(family, root / family) for family in (*tiny.FAMILIES, "gemma3")}


@pytest.fixture(scope="module")
def gpt2(folders: dict[str, Path]) -> Subject:
    return load_subject(str(folders["gpt2"]), context=16, device="cpu")


@pytest.fixture(scope="module", params=[*tiny.FAMILIES, "gemma3"])
def case(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[str, Subject]:
    return request.param, load_subject(str(folders[request.param]), context=16, device="cpu")


def streams(subject: Subject, ids: Tensor) -> tuple[Tensor, ...]:
    """transformers' own hidden states; the last one is after the final norm."""
    return subject.model(ids, output_hidden_states=True, use_cache=False).hidden_states


def test_residual_sites_are_the_hidden_states(case: tuple[str, Subject]) -> None:
    _, subject = case
    ids, layers = tiny.ids(), range(tiny.LAYERS)
    hidden = streams(subject, ids)
    before = subject.at("resid_pre").activations(ids, layers)
    after = subject.at("resid_post").activations(ids, layers)
    for layer in layers:
        torch.testing.assert_close(before[layer], hidden[layer], rtol=0, atol=0)
        if layer < tiny.LAYERS - 1:
            torch.testing.assert_close(after[layer], hidden[layer + 1], rtol=0, atol=0)
    norm = subject.anatomy.trunk.get_submodule(subject.anatomy.family.final_norm)
    torch.testing.assert_close(norm(after[tiny.LAYERS - 1]), hidden[-1], rtol=0, atol=0)


def test_mlp_post_is_the_activation_by_hand(case: tuple[str, Subject]) -> None:
    family, subject = case
    ids = tiny.ids()
    acts = subject.activations(ids, range(tiny.LAYERS))
    stream = subject.at("resid_pre" if family in PARALLEL else "resid_mid").activations(ids, range(tiny.LAYERS))
    for layer, block in enumerate(subject.anatomy.blocks):
        expected = mlp_by_hand(family, block, stream[layer])
        assert acts[layer].shape == (*ids.shape, tiny.INNER) and subject.width == tiny.INNER
        torch.testing.assert_close(acts[layer], expected, **TOLERANCE)


def test_attention_and_mlp_add_up_to_the_stream(case: tuple[str, Subject]) -> None:
    family, subject = case
    ids, layers = tiny.ids(), range(tiny.LAYERS)
    pre, post, added, acts = (
        subject.at(site).activations(ids, layers) for site in ("resid_pre", "resid_post", "attn_out", "mlp_post")
    )
    for layer, block in enumerate(subject.anatomy.blocks):
        written = mlp_output_by_hand(family, block, acts[layer])
        torch.testing.assert_close(pre[layer] + added[layer] + written, post[layer], **TOLERANCE)
        if family not in PARALLEL:
            middle = subject.at("resid_mid").activations(ids, [layer])[layer]
            torch.testing.assert_close(pre[layer] + added[layer], middle, **TOLERANCE)


def test_output_directions_are_the_jacobian_up_to_the_norm(case: tuple[str, Subject]) -> None:
    family, subject = case
    block = subject.anatomy.blocks[1]
    acts = torch.randn(tiny.INNER, generator=torch.Generator().manual_seed(1))
    nothing, one = torch.zeros(tiny.INNER), torch.eye(tiny.INNER)[5]
    directions = subject.output_directions(1)
    assert directions.shape == (tiny.INNER, tiny.WIDTH) and directions.dtype == torch.float32
    if family in {"gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3"}:
        down = block.mlp.down_proj(acts)
        eps = block.post_feedforward_layernorm
        scale = (down.pow(2).mean() + (eps.eps if hasattr(eps, "eps") else eps.variance_epsilon)).sqrt()
        torch.testing.assert_close(acts @ directions / scale, mlp_output_by_hand(family, block, acts), **TOLERANCE)
    else:
        written = mlp_output_by_hand(family, block, one) - mlp_output_by_hand(family, block, nothing)
        torch.testing.assert_close(directions[5], written, **TOLERANCE)
    torch.testing.assert_close(subject.at("attn_out").output_directions(1), torch.eye(tiny.WIDTH))


def test_stopping_early_layers_subset_and_the_lm_head(case: tuple[str, Subject]) -> None:
    _, subject = case
    ids = tiny.ids()
    full = subject.activations(ids, range(tiny.LAYERS))
    ran: list[str] = []
    head = subject.model.get_output_embeddings()
    norm = subject.anatomy.trunk.get_submodule(subject.anatomy.family.final_norm)
    watched = [(head, "head"), (norm, "norm"), (subject.anatomy.blocks[2], "block 2")]
    handles = [module.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for module, name in watched]
    seen: list[int] = []

    def visit(layer: int, acts: Tensor, _residual: Tensor) -> None:
        seen.append(layer)
        torch.testing.assert_close(acts, full[layer], rtol=0, atol=0)

    try:
        subject.run(ids, [1, 0, 1], visit)
        assert ran == []
        subject.run(ids, [2], visit)
        assert ran == ["block 2"]
        for site in ("resid_post", "attn_out"):
            subject.at(site).run(ids, [2], lambda *_: None)
        assert set(ran) == {"block 2"}
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [0, 1, 2]


def test_residual_given_is_the_stream_entering_the_block(case: tuple[str, Subject]) -> None:
    _, subject = case
    ids = tiny.ids()
    hidden = streams(subject, ids)
    for site in ("mlp_post", "resid_pre", "resid_post", "attn_out"):
        subject.at(site).run(
            ids, [0, 2], lambda layer, _, residual: torch.testing.assert_close(residual, hidden[layer], rtol=0, atol=0)
        )


def test_batch_and_right_padding_change_nothing(case: tuple[str, Subject]) -> None:
    _, subject = case
    ids = tiny.ids()
    together = subject.activations(ids, [2])[2]
    alone = torch.cat([subject.activations(row[None], [2])[2] for row in ids])
    torch.testing.assert_close(together, alone, **TOLERANCE)
    for filler in (subject.pad_id, 77):
        padded = torch.cat((ids, torch.full((3, 6), filler)), dim=1)
        longer = subject.activations(padded, [2])[2]
        torch.testing.assert_close(longer[:, : ids.shape[1]], together, **TOLERANCE)


def test_logit_effects_against_brute_force(case: tuple[str, Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    _, subject = case
    monkeypatch.setattr("raylabel.models.sites._VOCABULARY", 64)
    monkeypatch.setattr("raylabel.models.sites._SCORES", 64 * 5)
    generator = torch.Generator().manual_seed(2)
    directions, base = torch.randn(7, tiny.WIDTH, generator=generator), torch.randn(tiny.WIDTH, generator=generator)
    norm = subject.anatomy.trunk.get_submodule(subject.anatomy.family.final_norm)
    weight = subject.model.get_output_embeddings().weight.detach()[: len(subject.tokenizer)]
    with torch.no_grad():
        # The norm's derivative without its division: norm(x) is linear in x as long as its scale is held.
        def held(x: Tensor) -> Tensor:
            centred = x - x.mean(-1, keepdim=True) if "Layer" in type(norm).__name__ else x
            scale = centred.pow(2).mean(-1, keepdim=True).sqrt()
            return norm(x * 1e3) * scale

        brute = (held(base + 0 * directions) + (held(directions) - held(directions * 0 + base))) @ weight.T
        bias = getattr(norm, "bias", None)
        if bias is not None:
            centred = directions - directions.mean(-1, keepdim=True)
            brute = brute - (centred.pow(2).mean(-1, keepdim=True).sqrt() * bias) @ weight.T
    up, up_ids, down, down_ids = subject.logit_effects(directions, 10)
    for values, ids, largest in ((up, up_ids, True), (down, down_ids, False)):
        expected = brute.topk(10, dim=1, largest=largest)
        assert values.dtype == torch.float32 and ids.dtype == torch.int64
        torch.testing.assert_close(values, expected.values, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(brute.gather(1, ids), expected.values, rtol=1e-3, atol=1e-3)
    assert subject.logit_effects(directions, 10_000)[0].shape == (7, len(subject.tokenizer))


def test_description(case: tuple[str, Subject]) -> None:
    family, subject = case
    gated = family in GATED or family == "gemma3"
    assert (subject.n_layers, subject.d_model, subject.width) == (tiny.LAYERS, tiny.WIDTH, tiny.INNER)
    assert subject.polarities == ((1, -1) if gated else (1,))
    assert subject.at("resid_post").polarities == (1, -1) and subject.at("resid_post").width == tiny.WIDTH
    assert subject.at("resid_post").model is subject.model
    assert subject.sister_site() is None and subject.max_context == tiny.POSITIONS
    assert subject.dtype == torch.float32 and subject.device.type == "cpu"
    assert subject.revision is None and subject.special_ids >= {0, 1, 2} and subject.pad_id == 0
    assert (subject.prepend_bos, subject.bos_id) == (True, 1)


def test_hook_names(gpt2: Subject) -> None:
    names = {site: gpt2.at(site).hook_name(3) for site in ("mlp_post", "resid_pre", "resid_mid", "resid_post", "attn_out")}
    assert names == {
        "mlp_post": "blocks.3.mlp.hook_post",
        "resid_pre": "blocks.3.hook_resid_pre",
        "resid_mid": "blocks.3.hook_resid_mid",
        "resid_post": "blocks.3.hook_resid_post",
        "attn_out": "blocks.3.hook_attn_out",
    }


def test_errors_of_the_visitor_pass_and_hooks_go(gpt2: Subject) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gpt2.run(tiny.ids(), [0, 1], fail)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in gpt2.model.modules())
    gpt2.run(tiny.ids(), [1], lambda *_: None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in gpt2.model.modules())
    gpt2.run(tiny.ids(), [], fail)


def test_a_run_inside_a_run(gpt2: Subject, folders: dict[str, Path]) -> None:
    """The end of an inner pass does not end the outer one."""
    other = load_subject(str(folders["llama"]), context=16, device="cpu")
    seen: list[tuple[int, int]] = []
    gpt2.run(tiny.ids(), [0, 2], lambda layer, *_: seen.append((layer, len(other.activations(tiny.ids(), [0])))))
    assert seen == [(0, 1), (2, 1)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folders: dict[str, Path], gpt2: Subject, dtype: str) -> None:
    subject = load_subject(str(folders["gpt2"]), dtype=dtype, context=16, device="cpu")
    acts = subject.activations(tiny.ids(), [1])[1]
    assert acts.dtype == subject.dtype == getattr(torch, dtype)
    assert subject.output_directions(0).dtype == torch.float32
    assert subject.logit_effects(subject.output_directions(0), 3)[0].dtype == torch.float32
    exact = gpt2.activations(tiny.ids(), [1])[1]
    assert (acts.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_sites_that_do_not_exist(folders: dict[str, Path], gpt2: Subject) -> None:
    with pytest.raises(BadInput, match="use mlp_post"):
        gpt2.at("mlp_mid")
    with pytest.raises(BadInput, match="use mlp_post"):
        load_subject(str(folders["gpt2"]), site="mlp_mid", context=16)
    with pytest.raises(BadInput, match="use one of mlp_post"):
        load_subject(str(folders["gpt2"]), site="mlp", context=16)
    for family in PARALLEL:
        with pytest.raises(BadInput, match="use resid_pre"):
            load_subject(str(folders[family]), site="resid_mid", context=16)


def mlp_by_hand(family: str, block: Any, stream: Tensor) -> Tensor:
    """What the MLP's output projection is given, from the stream that the MLP reads."""
    if family in {"gpt2", "gpt_neo", "gptj"}:
        norm = block.ln_1 if family == "gptj" else block.ln_2
        x = F.layer_norm(stream, (tiny.WIDTH,), norm.weight, norm.bias, norm.eps)
        inner = block.mlp.fc_in if family == "gptj" else block.mlp.c_fc
        weight = inner.weight.T if family == "gpt2" else inner.weight
        return F.gelu(x @ weight.T + inner.bias, approximate="tanh")
    if family.startswith("gpt_neox") or family == "phi":
        norm = block.input_layernorm if family == "phi" else block.post_attention_layernorm
        x = F.layer_norm(stream, (tiny.WIDTH,), norm.weight, norm.bias, norm.eps)
        if family == "phi":
            return F.gelu(x @ block.mlp.fc1.weight.T + block.mlp.fc1.bias, approximate="tanh")
        return F.gelu(x @ block.mlp.dense_h_to_4h.weight.T + block.mlp.dense_h_to_4h.bias)
    if family in {"olmo2", "olmo3"}:
        x = stream
    elif family == "olmo":
        x = F.layer_norm(stream, (tiny.WIDTH,))
    else:
        after_norm = family in {"gemma2", "gemma3", "gemma3_text"}
        norm = block.pre_feedforward_layernorm if after_norm else block.post_attention_layernorm
        x = rms_norm(norm, stream, plus_one=family.startswith("gemma"))
    gate, up = x @ block.mlp.gate_proj.weight.T, x @ block.mlp.up_proj.weight.T
    return (F.gelu(gate, approximate="tanh") if family.startswith("gemma") else F.silu(gate)) * up


def mlp_output_by_hand(family: str, block: Any, acts: Tensor) -> Tensor:
    """What the MLP adds to the stream."""
    mlp = block.mlp
    if family == "gpt2":
        return acts @ mlp.c_proj.weight + mlp.c_proj.bias
    if family in {"gpt_neo", "gptj", "phi"} or family.startswith("gpt_neox"):
        names = {"gpt_neo": "c_proj", "gptj": "fc_out", "phi": "fc2"}
        out = getattr(mlp, names.get(family, "dense_4h_to_h"))
        return acts @ out.weight.T + out.bias
    written = acts @ mlp.down_proj.weight.T
    if family in {"gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3"}:
        return rms_norm(block.post_feedforward_layernorm, written, plus_one=family.startswith("gemma"))
    return written


def rms_norm(norm: Any, x: Tensor, plus_one: bool) -> Tensor:
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (norm.weight + (1.0 if plus_one else 0.0))
