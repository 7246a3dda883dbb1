"""Pages of Neuroscope built from their documented structure, and texts to put on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import strategies as st

PREFIX, SUFFIX = 50, 10
NASTY = (
    '"', ", ", '", "', "</script>", "</details>", "\n", "\r\n", "\t", "\\", "\\u0041", "\u0000", "😀", "\ufffd", "Ġ",
    "Ġthe", " the", "'",
    "<h2>Text #3</h2>", "<script>", "<!--", "-->", "<hr>", "]}", '{"tokens": [', " )</script>", "&quot;", "&#0;", "﷽", "\u2028",
)  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A text as it is shown: the first token is BOS."""

    tokens: Sequence[str]
    values: Sequence[float]
    data_index: int = 0
    dataset: str = "The Pile"

    @property
    def peak(self) -> int:
        """The first largest."""
        return max(range(len(self.values)), key=lambda i: self.values[i])


def rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 6) for value in values]


def widget(number: int, tokens: Sequence[str], values: Sequence[float], most: float) -> str:
    props = json.dumps({"tokens": list(tokens), "values": rounded(values), "minValue": -most, "maxValue": most})
    name = f"circuits-vis-{number:06x}-{number * 7919 % 65536:06x}"
    return (
        f'<div id="{name}" style="margin: 15px 0;"/>\n    <script crossorigin type="module">\n'
        f'    import {{ render, ColoredTokens }} from "https://unpkg.com/circuitsvis@1.38.1/dist/cdn/esm.js";\n'
        f'    render(\n      "{name}",\n      ColoredTokens,\n      {props}\n    )\n    </script>'
    )


def section(number: int, text: Shown, most: float) -> str:
    peak = text.peak
    cut = slice(max(0, peak - PREFIX), peak + SUFFIX + 1)
    return "\n".join([
        f"<h2>Text #{number}</h2><h4>Max Range: <b>{most:.4f}</b>. Min Range: <b>{-most:.4f}</b></h4>",
        f"<h4>Max Act: <b>{max(text.values):.4f}</b>. Min Act: <b>{min(text.values):.4f}</b></h4>",
        f"<h4>Data Index: <b>{text.data_index}</b> ({text.dataset})</h4>",
        f"<h4>Max Activating Token Index: <b>{peak}</b></h4>",
        "<details><summary><b style='color: red'>Click toggle to see full text</b>",
        "<h3>Truncated</h3>",
        widget(2 * number, text.tokens[cut], text.values[cut], most),
        "</summary>",
        f"<h3>Full Text #{number}</h3>",
        widget(2 * number + 1, text.tokens, text.values, most),
        "</details>",
    ])  # fmt: skip


def build(
    model: str, layer: int, neuron: int, texts: Sequence[Shown], dataset: str = "The Pile", about: str = "A Model"
) -> bytes:  # fmt: skip
    """A page."""
    most = max((max(text.values) for text in texts), default=0.0)
    head = "\n".join([
        "<div style='font-size:medium;'>",
        f"< <a href='./{neuron - 1}.html'>Prev</a> | ",
        "<a href='../../index.html'>Home</a> | ",
        "<a href='../model.html'>Model</a> | ",
        "<a href='javascript:void(0)' onclick=\"location.href='./' + Math.floor(Math.random() * 64) + '.html'\">Random</a> | ",
        f"<a href='./{neuron + 1}.html'>Next</a> >",
        "</div>",
        f"<h1>Model: {about}</h1>",
        f"<h1>Dataset: {dataset}</h1>",
        f"<h2>Neuron {neuron} in Layer {layer} </h2>",
        "<h2>Load this data into an <a href='https://neelnanda.io/interactive-neuroscope'>Interactive Neuroscope</a></h2>",
        "<h3><a href='https://neelnanda.io/neuroscope-docs'>See Documentation here</a></h3>",
        "<h3>Transformer Lens Loading: <span style='font-family: \"Courier New\"'>"
        f"HookedTransformer.from_pretrained('{model}')</span></h3>",
    ])  # fmt: skip
    body = "\n<hr>\n".join(section(number, text, most) for number, text in enumerate(texts))
    return "\n<hr>\n".join([head, "", body]).encode()


token = st.one_of(st.sampled_from(NASTY), st.text(max_size=6))
value = st.one_of(
    st.sampled_from([0.0, -0.25, 1.5, 1.5, -1e-6]), st.floats(-30, 30, width=32), st.floats(-1e6, 1e6, width=32)
)  # fmt: skip


@st.composite
def texts(draw: st.DrawFn) -> Shown:
    """Any text, BOS first."""
    body = draw(st.lists(st.tuples(token, value), max_size=90))
    first = draw(value)
    return Shown(
        ["<|endoftext|>", *(t for t, _ in body)], rounded([first, *(v for _, v in body)]), draw(st.integers(0, 10**7))
    )
