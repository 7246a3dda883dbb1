"""What a tiny model really does, as pages of Neuroscope."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylabel.models.subject import load_subject
from tests.sources.neuroscope_pages import Shown, build


class Recorded:
    """The pages of a model: its activations on some texts, in half precision's digits.

    `site` and `bos` say how it was read; `page(layer, neuron)` gives a page.
    """

    def __init__(
        self, model: Path | str, texts: Sequence[str], site: str | None = None, bos: str = "always", name: str = "tiny"
    ) -> None:  # fmt: skip
        subject = load_subject(str(model), site=site, bos=bos, device="cpu", dtype="float32", context=24)
        self.name, self.width, self.layers = name, subject.width, list(subject.layers)
        tokenizer = subject.tokenizer.backend_tokenizer
        lead = [subject.bos_id] if bos == "always" else []
        self.texts: list[tuple[list[str], dict[int, np.ndarray]]] = []
        for text in texts:
            ids = [*lead, *tokenizer.encode(text, add_special_tokens=False).ids][:24]
            if len(ids) < 4:
                continue
            strings = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
            acts: dict[int, np.ndarray] = {}

            def visit(layer: int, found: torch.Tensor, _resid: Any, acts: dict[int, np.ndarray] = acts) -> None:
                acts[layer] = found[0].to(torch.bfloat16).float().numpy().copy()

            subject.run(torch.tensor([ids]), self.layers, visit)
            if lead:
                for found in acts.values():
                    # As on the site, BOS is shown; here it never is the maximum.
                    found[0] = np.minimum(found[0], 0)
            self.texts.append((strings, acts))

    def shown(self, layer: int, neuron: int) -> list[Shown]:
        """The texts of a neuron's page."""
        all_ = [Shown(s, [float(v) for v in acts[layer][:, neuron]], i) for i, (s, acts) in enumerate(self.texts)]
        return sorted(all_, key=lambda text: -max(text.values))[:20]

    def page(self, layer: int, neuron: int) -> bytes:
        return build(self.name, layer, neuron, self.shown(layer, neuron))
