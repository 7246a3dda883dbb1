"""Pages of the same unit elsewhere, for models and units that are known there. Nothing is asked of the network."""

from __future__ import annotations

from typing import Any

NEUROSCOPE = {
    **{f"solu-{n}l": f"SoLU_{n}L512W_C4_Code" for n in (1, 2, 3, 4)},
    "solu-6l": "SoLU_6L768W_C4_Code", "solu-8l": "SoLU_8L1024W_C4_Code", "solu-10l": "SoLU_10L1280W_C4_Code",
    "solu-12l": "SoLU_12L1536W_C4_Code", **{f"gelu-{n}l": f"GELU_{n}L512W_C4_Code" for n in (1, 2, 3, 4)},
    "solu-1l-pile": "SoLU_1L_v9_old", "solu-2l-pile": "SoLU_2L_v10_old", "solu-4l-pile": "SoLU_4L_v11_old",
    "solu-6l-pile": "SoLU_6L_v13_old", "solu-8l-pile": "SoLU_8L_v21_old", "solu-10l-pile": "SoLU_10L_v22_old",
    "gpt2-small": "gpt2", "gpt2-medium": "gpt2-medium", "gpt2-large": "gpt2-large", "gpt2-xl": "gpt2-xl",
    "pythia-70m": "pythia-70m", "pythia-160m": "pythia-160m",
}  # fmt: skip
"""Neuroscope's name of a model -> its checkpoint. Pythia-350m is left out: its weights were replaced after the pages."""
NEURONPEDIA = {"gpt2": "gpt2-small", "gpt2-small": "gpt2-small"}
"""Models whose MLP neurons have pages under the bare number of their layer."""
_BY_CHECKPOINT = {checkpoint.casefold(): name for name, checkpoint in NEUROSCOPE.items()}


def links(config: dict[str, Any], facts: dict[str, Any]) -> list[dict[str, str]]:
    """[{name, url}] with {layer} and {neuron} in the url to be filled in; [] where the model is known nowhere.

    Args:
        config: of the run. facts: what it knows of its subject; {} if nothing.
    """
    exemplars, subject = config["exemplars"], config["subject"]
    found = []
    scope, pedia = exemplars["neuroscope"], exemplars["neuronpedia"]
    if exemplars["source"] == "neuroscope" and scope["model"]:
        found.append(("Neuroscope", f"{scope['url'].rstrip('/')}/{scope['model']}/{{layer}}/{{neuron}}.html"))
    elif model := _neuroscope(subject, facts):
        found.append(("Neuroscope", f"https://neuroscope.io/{model}/{{layer}}/{{neuron}}.html"))
    if exemplars["source"] == "neuronpedia" and pedia["model"] and pedia["sources"]:
        base = f"https://www.neuronpedia.org/{pedia['model']}"
        found += [(f"Neuronpedia {source}", f"{base}/{source}/{{neuron}}") for source in pedia["sources"]]
    elif _mlp(subject) and (model := NEURONPEDIA.get(_last(subject["model"]))):
        found.append(("Neuronpedia", f"https://www.neuronpedia.org/{model}/{{layer}}/{{neuron}}"))
    return [{"name": name, "url": url} for name, url in found if url.startswith(("http://", "https://"))]


def _neuroscope(subject: dict[str, Any], facts: dict[str, Any]) -> str | None:
    """Neuroscope's name of a subject read at the site it shows: before SoLU's norm, else after the MLP's function."""
    if subject["latents"] is not None:
        return None
    name = _last(subject["model"])
    model = name if name in NEUROSCOPE else _BY_CHECKPOINT.get(name)
    wanted = ("mlp_mid", "mlp_post") if model and model.startswith("solu") else ("mlp_post",)
    return model if model and facts.get("site", subject["site"]) in wanted else None


def _mlp(subject: dict[str, Any]) -> bool:
    return subject["latents"] is None and subject["site"] == "mlp_post"


def _last(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].casefold()
