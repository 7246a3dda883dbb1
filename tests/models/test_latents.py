"""Latents against SAELens's own numbers and against the formula written out; where they read and write in every family."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from raylabel.errors import BadInput
from raylabel.models import latents as latents_module
from raylabel.models import sites
from raylabel.models.latent_files import RELEASES, find, parse_hook
from raylabel.models.latents import open_latents
from raylabel.models.subject import Subject, load_subject
from tests.models import tiny
from tests.models.saes import by_formula, save_sae

DATA = Path(__file__).parent / "data" / "sae_lens"
EXPECTED = load_file(DATA / "expected.safetensors")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "unshifted": {"apply_b_dec_to_input": False},
    "layer-norm": {"normalize_activations": "layer_norm"},
    "rescaled": {"normalize_activations": "constant_norm_rescale"},
    "topk": {"architecture": "topk", "k": 4},
    "topk-norms": {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"architecture": "jumprelu"},
    "jumprelu-layer-norm": {"architecture": "jumprelu", "normalize_activations": "layer_norm"},
    "transcoder": {"architecture": "transcoder"},
    "jumprelu-transcoder": {"architecture": "jumprelu_transcoder"},
}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return lambda family: root / family if (root / family).exists() else tiny.save(family, root / family)


@pytest.fixture(scope="module")
def gpt2(folders: Callable[[str], Path]) -> Subject:
    return load_subject(str(folders("gpt2")), context=16, device="cpu")


def opened(subject: Subject, folder: Path) -> latents_module.Latents:
    return open_latents(str(folder), subject.anatomy)


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.iterdir() if path.is_dir()))
def test_sae_lens_gives_the_same(gpt2: Subject, name: str) -> None:
    units = opened(gpt2, DATA / name)
    found, expected = units.encode(1, EXPECTED["x"]), EXPECTED[f"{name}/acts"]
    assert 0 < (expected > 0).sum() < expected.numel()
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(units.output_directions(1), EXPECTED[f"{name}/directions"], **TOLERANCE)
    transcoder = "transcoder" in name
    assert (units.layers, units.width, units.site) == ((1,), 18, "mlp_in" if transcoder else "resid_pre")
    hook = "blocks.1.mlp.hook_in" if transcoder else "blocks.1.hook_resid_pre"
    assert units.hook_name(1) == f"{hook}.hook_sae_acts_post"


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_gives_the_same(gpt2: Subject, tmp_path: Path, kind: str, seed: int) -> None:
    folder = save_sae(tmp_path / "sae", seed=seed, **KINDS[kind])
    x = torch.randn(12, tiny.WIDTH, generator=torch.Generator().manual_seed(seed + 10)) * (1 + seed)
    np.testing.assert_allclose(opened(gpt2, folder).encode(1, x).numpy(), by_formula(folder, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_else_is_asked_for_changes_no_bit(
    gpt2: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(latents_module, "BLOCK", 64)
    monkeypatch.setattr(latents_module, "CELLS", 1 << 10)
    units = opened(gpt2, save_sae(tmp_path / "sae", d_sae=300, **KINDS[kind]))
    x = torch.randn(3, 7, tiny.WIDTH, generator=torch.Generator().manual_seed(3))
    whole = units.encode(1, x)
    assert whole.shape == (3, 7, 300) and whole.dtype == torch.float32
    for columns in ([5], [299, 0, 64, 63, 64], list(range(300)), []):
        wanted = torch.tensor(columns, dtype=torch.int64)
        # A TopK's pre-activations are cut into pieces of positions where only some are wanted.
        same = torch.allclose if "k" in KINDS[kind] else torch.equal
        assert same(units.encode(1, x, wanted), whole[..., wanted])
        assert torch.equal(units.encode(1, x, wanted), units.encode(1, x, wanted))


def test_ties_and_what_is_not_finite(gpt2: Subject, tmp_path: Path) -> None:
    same = {"W_enc": torch.ones(tiny.WIDTH, 30), "b_enc": torch.zeros(30), "b_dec": torch.zeros(tiny.WIDTH)}
    tied = opened(gpt2, save_sae(tmp_path / "tied", architecture="topk", k=3, weights=same))
    assert torch.equal(tied.encode(1, torch.ones(1, tiny.WIDTH)), torch.full((1, 30), 16.0)), "all that tie are kept"
    for i, settings in enumerate(KINDS.values()):
        units = opened(gpt2, save_sae(tmp_path / str(i), **settings))
        x = torch.zeros(2, tiny.WIDTH) + 0.1
        x[1, 3] = torch.nan
        found = units.encode(1, x)
        assert torch.isfinite(found[0]).all() and found[1].isnan().all(), "a broken model does not look silent"


# Where they read and write


HOOKS = {
    "resid_pre": "blocks.1.hook_resid_pre", "resid_mid": "blocks.1.hook_resid_mid", "resid_post": "blocks.1.hook_resid_post",
    "attn_out": "blocks.1.hook_attn_out", "mlp_post": "blocks.1.mlp.hook_post", "mlp_raw": "blocks.1.mlp.hook_out",
    "mlp_out": "blocks.1.hook_mlp_out", "mlp_in": "blocks.1.mlp.hook_in", "mlp_normed": "blocks.1.ln2.hook_normalized",
}  # fmt: skip
PARALLEL = ("gptj", "gpt_neox", "phi")
NO_NORM_BEFORE = (*PARALLEL, "olmo2", "olmo3")


def latent_subject(folders: Callable[[str], Path], tmp_path: Path, family: str, site: str, **config: Any) -> Subject:
    inner = tiny.INNER if site == "mlp_post" else tiny.WIDTH
    if site in ("mlp_in", "mlp_normed"):
        config = {"architecture": "transcoder", **config}
    folder = save_sae(tmp_path / f"{family}-{site}", HOOKS[site], d_in=inner, **config)
    return load_subject(str(folders(family)), context=16, device="cpu", latents=str(folder))


def exists(family: str, site: str) -> bool:
    return not (family in PARALLEL and site == "resid_mid") and not (family in NO_NORM_BEFORE and site == "mlp_normed")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_hook_in_every_family(folders: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    plain = load_subject(str(folders(family)), context=16, device="cpu")
    ids = tiny.ids()
    for site in HOOKS:
        if not exists(family, site):
            with pytest.raises(BadInput, match=r"subject\.latents: blocks\.1\."):
                latent_subject(folders, tmp_path, family, site)
            continue
        subject = latent_subject(folders, tmp_path, family, site)
        seen = subject.activations(ids, [1])[1]
        assert seen.shape == (*ids.shape, subject.site_width) and subject.width == subject.columns == 30
        if site in sites.HOOK_NAMES:
            assert torch.equal(seen, plain.at(site).activations(ids, [1])[1])
        found = subject.read(1, seen)
        folder = tmp_path / f"{family}-{site}"
        expected = by_formula(folder, seen.reshape(-1, seen.shape[-1])).reshape(found.shape)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)
        assert subject.hook_name(1) == f"{HOOKS[site]}.hook_sae_acts_post" and subject.polarities == (1,)
        assert subject.site_directions(1).shape == (subject.site_width, tiny.WIDTH)
        assert subject.output_directions(1).shape == (30, tiny.WIDTH)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_the_mlp_is_given_and_gives_by_hand(folders: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    plain = load_subject(str(folders(family)), context=16, device="cpu")
    ids, block = tiny.ids(), plain.anatomy.blocks[1]
    read = {
        site: latent_subject(folders, tmp_path, family, site).activations(ids, [1])[1]
        for site in ("mlp_in", "mlp_raw", "mlp_out", "mlp_normed") if exists(family, site)
    }  # fmt: skip
    torch.testing.assert_close(block.mlp(read["mlp_in"]), read["mlp_raw"], rtol=0, atol=0)
    pre, post, added = (plain.at(site).activations(ids, [1])[1] for site in ("resid_pre", "resid_post", "attn_out"))
    torch.testing.assert_close(pre + added + read["mlp_out"], post, rtol=1e-4, atol=1e-5)
    if "mlp_normed" in read:
        norm = block.get_submodule(plain.anatomy.family.middle or "")
        gain = 1.0 if getattr(norm, "weight", None) is None else norm.weight + plain.anatomy.family.gain_offset
        bias = 0.0 if getattr(norm, "bias", None) is None else norm.bias
        torch.testing.assert_close(read["mlp_normed"] * gain + bias, read["mlp_in"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_transformer_lens_reads_the_same_at_the_hooks(folders: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    bridge = TransformerBridge.boot_transformers(str(folders(family)), device="cpu")
    _, cache = bridge.run_with_cache(tiny.ids(), names_filter=list(HOOKS.values()))
    for site, hook in HOOKS.items():
        # The bridge's own normalisation includes the gain; that of the hook's name does not, as in HookedTransformer.
        if site != "mlp_normed":
            seen = latent_subject(folders, tmp_path, family, site).activations(tiny.ids(), [1])[1]
            torch.testing.assert_close(seen, cache[hook], rtol=1e-4, atol=1e-5)


def test_directions_go_through_what_lies_between(folders: Callable[[str], Path], tmp_path: Path) -> None:
    for family, site in (("gpt2", "mlp_post"), ("llama", "mlp_post"), ("gemma2", "mlp_raw"), ("olmo2", "mlp_post")):
        subject = latent_subject(folders, tmp_path, family, site)
        decoder = load_file(tmp_path / f"{family}-{site}" / "sae_weights.safetensors")["W_dec"]
        through = sites.output_directions(subject.anatomy, site, 1)
        torch.testing.assert_close(subject.output_directions(1), decoder @ through)
    gain = subject.anatomy.blocks[1].post_feedforward_layernorm.weight
    across = {"metadata": {"hook_name_out": "blocks.2.mlp.hook_out"}}
    subject = latent_subject(folders, tmp_path, "olmo2", "mlp_in", **across)
    gain = subject.anatomy.blocks[2].post_feedforward_layernorm.weight
    decoder = load_file(tmp_path / "olmo2-mlp_in" / "sae_weights.safetensors")["W_dec"]
    torch.testing.assert_close(subject.output_directions(1), decoder * gain)
    plain = load_subject(str(folders("gpt2")), context=16, device="cpu")
    assert torch.equal(plain.site_directions(1), plain.output_directions(1))


def test_saes_trained_on_centred_models_see_a_centred_stream(folders: Callable[[str], Path], tmp_path: Path) -> None:
    centred = {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}}
    for family, site, matters in (("gpt2", "resid_pre", True), ("gpt2", "mlp_post", False), ("llama", "resid_pre", False)):
        subject = latent_subject(folders, tmp_path, family, site, **centred)
        seen = subject.activations(tiny.ids(), [1])[1]
        given = seen - seen.mean(-1, keepdim=True) if matters else seen
        expected = by_formula(tmp_path / f"{family}-{site}", given.reshape(-1, given.shape[-1]))
        np.testing.assert_allclose(subject.read(1, seen).reshape(expected.shape), expected, rtol=1e-4, atol=1e-4)


def test_everything_is_float32_in_half_precision(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = save_sae(tmp_path / "sae", dtype=torch.bfloat16)
    subject = load_subject(str(folders("gpt2")), context=16, device="cpu", dtype="bfloat16", latents=str(folder))
    seen = subject.activations(tiny.ids(), [1])[1]
    found = subject.read(1, seen)
    assert seen.dtype == torch.bfloat16 and found.dtype == subject.output_directions(1).dtype == torch.float32
    expected = by_formula(folder, seen.reshape(-1, tiny.WIDTH)).reshape(found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_several_layers(folders: Callable[[str], Path], tmp_path: Path) -> None:
    for layer in (2, 0):
        save_sae(tmp_path / f"layer-{layer}", f"blocks.{layer}.hook_resid_post", seed=layer)
    subject = load_subject(str(folders("gpt2")), context=16, device="cpu", latents=str(tmp_path))
    assert (subject.layers, subject.n_layers, subject.site, subject.sister_site()) == ((0, 2), 3, "resid_post", None)
    found: dict[int, Tensor] = {}

    def visit(layer: int, acts: Tensor, _resid: Tensor) -> None:
        found[layer] = subject.read(layer, acts[0, 3]).clone()

    subject.run(tiny.ids(), subject.layers, visit)
    for layer, values in found.items():
        x = subject.activations(tiny.ids(), [layer])[layer][0, 3][None]
        np.testing.assert_allclose(values[None], by_formula(tmp_path / f"layer-{layer}", x), rtol=1e-4, atol=1e-5)
    with pytest.raises(KeyError):
        subject.read(1, torch.zeros(1, tiny.WIDTH))
    plain = subject.at("mlp_post")
    assert plain.latents is None and plain.layers == (0, 1, 2) and plain.width == plain.site_width == tiny.INNER


# Names and files


@pytest.mark.parametrize(
    ("hook", "transcoder", "place"),
    [
        ("blocks.11.hook_resid_pre", False, (11, "resid_pre")),
        ("blocks.0.mlp.hook_post", False, (0, "mlp_post")),
        ("blocks.3.hook_mlp_in", True, (3, "resid_mid")),
        ("blocks.3.ln2.hook_normalized", True, (3, "mlp_normed")),
        ("model.layers.5", False, (5, "resid_post")),
        ("model.language_model.layers.5", False, (5, "resid_post")),
        ("transformer.h.5.mlp", False, (5, "mlp_raw")),
        ("gpt_neox.layers.2.mlp", True, (2, "mlp_in")),
        ("layers.7.mlp", True, (7, "mlp_in")),
        ("blocks.5.attn.hook_z", False, None),
        ("model.layers.5.self_attn", False, None),
        ("blocks.5", False, None),
        ("hook_embed", False, None),
    ],
)
def test_names_of_hooks(hook: str, transcoder: bool, place: tuple[int, str] | None) -> None:
    assert parse_hook(hook, transcoder) == place


NO_FOLDER = "give a folder"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "gated": ({"architecture": "gated"}, "architecture 'gated'; supported are standard"),
    "activation": ({"activation_fn": "tanh-relu"}, "'tanh-relu'; relu and topk"),
    "scaled by an average": ({"normalize_activations": "expected_average_only_in"}, "fold them into the weights with SAELens"),
    "scaled by an average, old": ({"normalize_activations": True}, "fold them into the weights with SAELens"),
    "whitened": ({"normalize_activations": "covariance_whitening"}, "fold them into the weights with SAELens"),
    "one head": ({"metadata": {"hook_head_index": 3}}, "attention heads"),
    "all heads": ({"hook": "blocks.1.attn.hook_z", "reshape_activations": "hook_z"}, r"attention heads \(blocks.1.attn.hook_z\)"),
    "unknown hook": ({"hook": "blocks.1.attn.hook_pattern"}, "reads blocks.1.attn.hook_pattern, which is no site"),
    "no hook": ({"hook": None}, "reads None, which is no site"),
    "SAE of the MLP's input": ({"hook": "blocks.1.mlp.hook_in"}, "only transcoders"),
    "unknown output": ({"architecture": "transcoder", "hook": "blocks.1.mlp.hook_in", "metadata": {"hook_name_out": "x"}},
                       "writes to x, which is no site"),
    "k": ({"architecture": "topk", "k": 31}, "k: 31 for 30 latents"),
    "no k": ({"architecture": "topk"}, "k: None for 30 latents"),
    "no threshold": ({"architecture": "batchtopk"}, r"threshold of .* is missing, not \[30\]"),
    "shape": ({"weights": {"b_enc": torch.zeros(7)}}, r"b_enc of .* is \[7\], not \[30\]"),
    "not a matrix": ({"weights": {"W_dec": torch.zeros(7)}}, "no matrix W_dec"),
    "scaling factor": ({"weights": {"scaling_factor": torch.full((30,), 2.0)}}, "scaling_factor"),
    "other width": ({"d_in": 8}, "8 coordinates at blocks.1.hook_resid_pre, and the model 16; use the model"),
    "other output": ({"d_out": 8}, "has 8 coordinates at blocks.1.hook_resid_pre, and the model 16"),
    "layer": ({"hook": "blocks.3.hook_resid_pre"}, "the model has layers 0 to 2"),
    "site": ({"hook": "blocks.1.mlp.hook_mid", "d_in": tiny.INNER}, "blocks.1.mlp.hook_mid: mlp_mid exists only"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_said_in_one_line(gpt2: Subject, tmp_path: Path, case: str) -> None:
    changes, complaint = BAD[case]
    save_sae(tmp_path / "sae", **changes)
    with pytest.raises(BadInput, match=complaint) as error:
        opened(gpt2, tmp_path / "sae")
    assert str(error.value).startswith("subject.latents: ") and "\n" not in str(error.value)


def test_broken_folders(gpt2: Subject, tmp_path: Path) -> None:
    def refused(complaint: str, name: str | Path = tmp_path / "sae") -> None:
        with pytest.raises(BadInput, match=complaint) as error:
            opened(gpt2, Path(name))
        assert str(error.value).startswith("subject.latents: ") and "\n" not in str(error.value)

    refused("no such folder")
    (tmp_path / "sae").mkdir()
    refused("no cfg.json in")
    save_sae(tmp_path / "sae")
    refused("is a file", tmp_path / "sae" / "cfg.json")
    (tmp_path / "sae" / "sae_weights.safetensors").write_bytes(b"x" * 20)
    refused("is not readable")
    (tmp_path / "sae" / "sae_weights.safetensors").unlink()
    refused("no sae_weights.safetensors")
    for content in ("{", "[1]"):
        (tmp_path / "sae" / "cfg.json").write_text(content)
        refused("cfg.json is no valid JSON|holds no settings")
    save_sae(tmp_path / "many" / "a")
    save_sae(tmp_path / "many" / "b")
    refused("a and b in .* both read blocks.1.hook_resid_pre", tmp_path / "many")
    save_sae(tmp_path / "many" / "b", "blocks.2.hook_resid_pre", d_sae=31)
    refused("30 and 31 latents", tmp_path / "many")
    save_sae(tmp_path / "many" / "b", "blocks.2.hook_resid_post")
    refused("two sites", tmp_path / "many")


def test_a_site_that_contradicts_the_latents(folders: Callable[[str], Path], tmp_path: Path) -> None:
    model, folder = str(folders("llama")), str(save_sae(tmp_path / "sae"))
    with pytest.raises(BadInput, match=r"subject\.site: mlp_post, but the latents in .* leave subject\.site out"):
        load_subject(model, context=16, device="cpu", latents=folder, site="mlp_post")
    assert load_subject(model, context=16, device="cpu", latents=folder, site="resid_pre").site == "resid_pre"
    with pytest.raises(BadInput, match=r"subject\.polarity: latents have no gate"):
        load_subject(model, context=16, device="cpu", latents=folder, quadrants=True)


@pytest.mark.parametrize(
    ("name", "repo", "pattern", "layers"),
    [
        ("gpt2-small-res-jb:blocks.1.hook_resid_pre", RELEASES["gpt2-small-res-jb"][0], "blocks.1.hook_resid_pre", [1]),
        ("gpt2-small-res-jb/blocks.1.hook_resid_pre", RELEASES["gpt2-small-res-jb"][0], "blocks.1.hook_resid_pre", [1]),
        ("gpt2-small-res-jb", RELEASES["gpt2-small-res-jb"][0], "*", [1, 2]),
        ("someone/saes:blocks.*.hook_resid_pre", "someone/saes", "blocks.*.hook_resid_pre", [1, 2]),
        ("someone/saes/blocks.2.hook_resid_pre", "someone/saes", "blocks.2.hook_resid_pre", [2]),
        ("someone/saes", "someone/saes", "*", [1, 2]),
    ],
)
def test_releases_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, repo: str, pattern: str, layers: list[int]
) -> None:
    for layer in (1, 2):
        save_sae(tmp_path / f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_resid_pre")

    def fetch(asked: str, allow_patterns: list[str]) -> str:
        assert asked == repo and {f"{pattern}/cfg.json", f"{pattern}/sae_weights.safetensors"} <= set(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    specs = find(name)
    assert [spec.layer for spec in specs] == layers
    assert all(spec.centred == name.startswith("gpt2") for spec in specs)


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(BadInput, match=r"someone/saes could not be fetched from the hub .*no route.*; give a folder") as error:
        find("someone/saes:x")
    assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match=r"no release of that name is known; give a folder or OWNER/REPO:PATH"):
        find("gpt2-small-res-xy")
    assert json.loads((DATA / "topk" / "cfg.json").read_text())["k"] == 5
