"""TransformerLens as the reference for plain models, and its own architecture (SoLU, gated) behind the interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import tl_legacy
from transformer_lens.model_bridge.sources.native import NativeModel

from raylabel.errors import BadInput
from raylabel.models.native import load_native, save_native
from raylabel.models.subject import Subject, load_subject
from tests.models import tiny

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
SITES = ("mlp_post", "resid_pre", "resid_mid", "resid_post", "attn_out")


def native_folder(folder: Path, seed: int = 0, bos: bool = True, **settings: Any) -> Path:
    """A random model of TransformerLens's own architecture, saved in float32 so that nothing is rounded away."""
    config = TransformerBridgeConfig.from_dict(
        {
            "d_model": tiny.WIDTH,
            "n_layers": tiny.LAYERS,
            "n_heads": 4,
            "d_head": 4,
            "d_mlp": tiny.INNER,
            "n_ctx": tiny.POSITIONS,
            "d_vocab": 300,
            "act_fn": "solu_ln",
            "normalization_type": "LN",
            "architecture": "TransformerLensNative",
            **settings,
        }
    )
    model = NativeModel(config)
    tiny.randomise(model, seed)
    save_native(folder, model, tiny.tokenizer(bos=bos), dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def solu_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native_folder(tmp_path_factory.mktemp("native") / "solu")


@pytest.fixture(scope="module")
def solu(solu_folder: Path) -> Subject:
    return load_subject(str(solu_folder), context=16, device="cpu")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_plain_models_agree_with_the_bridge(tmp_path: Path, family: str) -> None:
    folder = tiny.save(family, tmp_path / "m")
    subject = load_subject(str(folder), context=16, device="cpu")
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    ids, layers = tiny.ids(), range(tiny.LAYERS)
    sites = [site for site in SITES if site != "resid_mid" or family != "gpt_neox"]
    wanted = [subject.at(site).hook_name(layer) for site in sites for layer in layers]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids, names_filter=wanted)
    for site in sites:
        acts = subject.at(site).activations(ids, layers)
        for layer in layers:
            torch.testing.assert_close(acts[layer], cache[subject.at(site).hook_name(layer)], **TOLERANCE)


def test_solu_sites_by_hand(solu: Subject, solu_folder: Path) -> None:
    plain = plain_model(solu_folder)
    ids = tiny.ids()
    middle = solu.at("mlp_mid").activations(ids, range(tiny.LAYERS))
    post = solu.activations(ids, range(tiny.LAYERS))
    stream, after = plain.tok_embed(ids) + plain.pos.weight[: ids.shape[1]], []
    for layer, block in enumerate(plain.layers):
        before = stream
        attention = block.attn(F.layer_norm(stream, (tiny.WIDTH,), block.ln1.weight, block.ln1.bias))[0]
        stream = stream + attention
        mid, normed = solu_by_hand(block, stream)
        torch.testing.assert_close(middle[layer], mid, **TOLERANCE)
        torch.testing.assert_close(post[layer], normed, **TOLERANCE)
        torch.testing.assert_close(solu.at("resid_pre").activations(ids, [layer])[layer], before, **TOLERANCE)
        torch.testing.assert_close(solu.at("resid_mid").activations(ids, [layer])[layer], stream, **TOLERANCE)
        torch.testing.assert_close(solu.at("attn_out").activations(ids, [layer])[layer], attention, **TOLERANCE)
        stream = stream + normed @ block.mlp.fc_out.weight.T + block.mlp.fc_out.bias
        after.append(stream)
    assert solu.at("mlp_mid").hook_name(2) == "blocks.2.mlp.hook_mid"
    for layer, acts in solu.at("resid_post").activations(ids, range(tiny.LAYERS)).items():
        torch.testing.assert_close(acts, after[layer], **TOLERANCE)


def test_solu_agrees_with_the_bridge(solu: Subject, solu_folder: Path) -> None:
    bridge = load_native(solu_folder)
    ids = tiny.ids()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    for layer in range(tiny.LAYERS):
        acts = solu.activations(ids, [layer])[layer]
        torch.testing.assert_close(acts, cache[f"blocks.{layer}.mlp.hook_post"], **TOLERANCE)
        acts = solu.at("mlp_mid").activations(ids, [layer])[layer]
        torch.testing.assert_close(acts, cache[f"blocks.{layer}.mlp.ln.hook_in"], **TOLERANCE)


def test_solu_description(solu: Subject) -> None:
    assert (solu.width, solu.d_model, solu.n_layers) == (tiny.INNER, tiny.WIDTH, tiny.LAYERS)
    assert solu.polarities == solu.at("mlp_mid").polarities == (1,)
    assert solu.sister_site() == "mlp_mid" and solu.at("mlp_mid").sister_site() == "mlp_post"
    assert solu.at("resid_pre").sister_site() is None
    assert (solu.prepend_bos, solu.bos_id, solu.max_context) == (True, 1, tiny.POSITIONS)
    with pytest.raises(BadInput, match="positions; use at most 32"):
        load_subject(solu.name, context=tiny.POSITIONS + 1)


def test_a_native_folder_decides_about_bos_itself(tmp_path: Path) -> None:
    """The bridge adds a BOS of its own to the tokenizer it is given; what the folder says is what counts."""
    subject = load_subject(str(native_folder(tmp_path / "m", bos=False)), context=16, device="cpu")
    assert subject.prepend_bos is False


def test_native_runs_neither_head_nor_later_blocks(solu: Subject) -> None:
    full = solu.activations(tiny.ids(), range(tiny.LAYERS))
    ran: list[str] = []
    trunk = solu.anatomy.trunk
    watched = {"head": trunk.head, "norm": trunk.ln_out, "block": solu.anatomy.blocks[2]}
    handles = [m.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, m in watched.items()]
    try:
        early = solu.activations(tiny.ids(), [0, 1])
        assert ran == []
        solu.at("resid_post").activations(tiny.ids(), [2])
        assert set(ran) == {"block"}
    finally:
        for handle in handles:
            handle.remove()
    for layer in (0, 1):
        torch.testing.assert_close(early[layer], full[layer], rtol=0, atol=0)


def test_native_batch_and_right_padding(solu: Subject) -> None:
    ids = tiny.ids()
    together = solu.activations(ids, [2])[2]
    alone = torch.cat([solu.activations(row[None], [2])[2] for row in ids])
    padded = solu.activations(torch.cat((ids, torch.full((3, 6), 9)), dim=1), [2])[2]
    torch.testing.assert_close(together, alone, **TOLERANCE)
    torch.testing.assert_close(padded[:, : ids.shape[1]], together, **TOLERANCE)


def test_solu_directions_and_logits(solu: Subject, solu_folder: Path) -> None:
    plain = plain_model(solu_folder)
    mlp = plain.layers[1].mlp
    torch.testing.assert_close(solu.output_directions(1), mlp.fc_out.weight.T, rtol=0, atol=0)
    acts = torch.randn(tiny.INNER, generator=torch.Generator().manual_seed(3))
    written = F.linear(F.layer_norm(acts, (tiny.INNER,), mlp.ln.weight, mlp.ln.bias, 0.0), mlp.fc_out.weight)
    constant = F.linear(mlp.ln.bias, mlp.fc_out.weight)
    directions = solu.at("mlp_mid").output_directions(1)
    torch.testing.assert_close(acts @ directions / acts.std(correction=0), written - constant, **TOLERANCE)

    some = torch.randn(5, tiny.WIDTH, generator=torch.Generator().manual_seed(4))
    brute = ((some - some.mean(1, keepdim=True)) * plain.ln_out.weight) @ plain.head.weight.T
    brute = brute[:, : len(solu.tokenizer)]
    up, up_ids, down, down_ids = solu.logit_effects(some, 4)
    torch.testing.assert_close(up, brute.topk(4).values, **TOLERANCE)
    torch.testing.assert_close(brute.gather(1, down_ids), down, **TOLERANCE)
    assert torch.equal(up_ids, brute.topk(4).indices) and torch.equal(down_ids, (-brute).topk(4).indices)


@pytest.mark.parametrize(
    "settings, by_hand, polarities",
    [
        ({"act_fn": "gelu"}, F.gelu, (1,)),
        ({"act_fn": "relu"}, F.relu, (1,)),
        ({"act_fn": "solu"}, lambda x: x * F.softmax(x, -1), (1,)),
        ({"act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "final_rms": True}, F.silu, (1, -1)),
    ],
)
def test_other_native_activations(tmp_path: Path, settings: Any, by_hand: Any, polarities: tuple[int, ...]) -> None:
    folder = native_folder(tmp_path / "m", **settings)
    subject, plain = load_subject(str(folder), context=16, device="cpu"), plain_model(folder)
    assert subject.polarities == polarities and subject.sister_site() is None
    ids = tiny.ids()
    stream = subject.at("resid_mid").activations(ids, [1])[1]
    block = plain.layers[1]
    x = block.ln2(stream)
    if settings.get("gated_mlp"):
        expected = by_hand(x @ block.mlp.gate.weight.T) * (x @ getattr(block.mlp, "in").weight.T)
        gain, centred = plain.ln_out.weight, 0.0
    else:
        expected = by_hand(x @ block.mlp.fc_in.weight.T + block.mlp.fc_in.bias)
        gain, centred = plain.ln_out.weight, 1.0
    torch.testing.assert_close(subject.activations(ids, [1])[1], expected, **TOLERANCE)
    some = torch.randn(2, tiny.WIDTH, generator=torch.Generator().manual_seed(5))
    brute = ((some - centred * some.mean(1, keepdim=True)) * gain) @ plain.head.weight[: len(subject.tokenizer)].T
    torch.testing.assert_close(subject.logit_effects(some, 3)[0], brute.topk(3).values, **TOLERANCE)
    with pytest.raises(BadInput, match="use mlp_post"):
        subject.at("mlp_mid")


def test_attention_only_models_have_no_mlp_sites(tmp_path: Path) -> None:
    folder = native_folder(tmp_path / "m", attn_only=True, act_fn="gelu")
    with pytest.raises(BadInput, match="use attn_out"):
        load_subject(str(folder), context=16)
    subject = load_subject(str(folder), site="attn_out", context=16)
    assert subject.activations(tiny.ids(), [0, 2])[2].shape == (3, 12, tiny.WIDTH)


@pytest.mark.parametrize(
    "name, official",
    [
        ("solu-8l-pile", "NeelNanda/SoLU_8L_v21_old"),
        ("solu-1l", "NeelNanda/SoLU_1L512W_C4_Code"),
        ("GELU-2L", "NeelNanda/GELU_2L512W_C4_Code"),
        ("NeelNanda/SoLU_2L512W_C4_Code", "NeelNanda/SoLU_2L512W_C4_Code"),
    ],
)
def test_published_models_by_their_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, official: str) -> None:
    """The whole loading path of TransformerLens's published models; only what comes from the network is made here."""
    tiny.tokenizer(bos=False).save_pretrained(tmp_path)
    config = {
        "d_model": 16, "n_layers": 2, "d_mlp": 24, "d_head": 4, "n_heads": 4, "n_ctx": 32, "d_vocab": 300,
        "act_fn": "solu_ln", "attn_only": False, "normalization": "LN", "tokenizer_name": str(tmp_path),
    }  # fmt: skip
    asked: list[str] = []

    def fetch_json(repository: str, _file: str) -> dict[str, Any]:
        asked.append(repository)
        return config

    monkeypatch.setattr(tl_legacy, "_fetch_json", fetch_json)
    monkeypatch.setattr(tl_legacy, "fetch_tl_legacy_state_dict", lambda *_, **__: published_weights(config))
    subject = load_subject(name, context=16, site="mlp_mid", device="cpu")
    assert asked == [official] and subject.name == official
    assert (subject.n_layers, subject.width, subject.prepend_bos) == (2, 24, True)
    weights = published_weights(config)
    stream = subject.at("resid_mid").activations(tiny.ids(), [1])[1]
    x = F.layer_norm(stream, (16,), weights["blocks.1.ln2.w"], weights["blocks.1.ln2.b"])
    x = x @ weights["blocks.1.mlp.W_in"] + weights["blocks.1.mlp.b_in"]
    torch.testing.assert_close(subject.activations(tiny.ids(), [1])[1], x * x.softmax(-1), **TOLERANCE)


def test_published_models_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("solu-2l", "solu-99l", "NeelNanda/no-such-model"):
        with pytest.raises(BadInput) as caught:
            load_subject(name, context=16)
        assert str(caught.value).startswith("subject.model: ") and "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="have no revisions"):
        load_subject("solu-2l", revision="main", context=16)


def plain_model(folder: Path) -> Any:
    """The same weights in the architecture as it is without a bridge around it."""
    model = NativeModel(TransformerBridgeConfig.from_dict(json.loads((folder / "config.json").read_text())))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval().requires_grad_(False)


def solu_by_hand(block: Any, stream: Tensor) -> tuple[Tensor, Tensor]:
    """SoLU before its LayerNorm, and after it."""
    x = F.layer_norm(stream, (tiny.WIDTH,), block.ln2.weight, block.ln2.bias)
    x = x @ block.mlp.fc_in.weight.T + block.mlp.fc_in.bias
    powers = (x - x.max(dim=-1, keepdim=True).values).exp()
    mid = x * powers / powers.sum(dim=-1, keepdim=True)
    centred = mid - mid.mean(dim=-1, keepdim=True)
    normed = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return mid, normed * block.mlp.ln.weight + block.mlp.ln.bias


def published_weights(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random weights under the names of TransformerLens's published checkpoints."""
    generator = torch.Generator().manual_seed(6)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    d, heads, head, mlp, vocabulary = (config[key] for key in ("d_model", "n_heads", "d_head", "d_mlp", "d_vocab"))
    weights = {
        "embed.W_E": draw(vocabulary, d),
        "pos_embed.W_pos": draw(config["n_ctx"], d),
        "ln_final.w": draw(d),
        "ln_final.b": draw(d),
        "unembed.W_U": draw(d, vocabulary),
    }
    for layer in range(config["n_layers"]):
        at = f"blocks.{layer}"
        for norm in ("ln1", "ln2"):
            weights |= {f"{at}.{norm}.w": draw(d), f"{at}.{norm}.b": draw(d)}
        for part in "QKV":
            weights |= {f"{at}.attn.W_{part}": draw(heads, d, head), f"{at}.attn.b_{part}": draw(heads, head)}
        weights |= {f"{at}.attn.W_O": draw(heads, head, d), f"{at}.attn.b_O": draw(d)}
        weights |= {f"{at}.mlp.W_in": draw(d, mlp), f"{at}.mlp.b_in": draw(mlp)}
        weights |= {f"{at}.mlp.ln.w": draw(mlp), f"{at}.mlp.ln.b": draw(mlp)}
        weights |= {f"{at}.mlp.W_out": draw(mlp, d), f"{at}.mlp.b_out": draw(d)}
    return weights
