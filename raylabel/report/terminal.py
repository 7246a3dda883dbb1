"""Tables and units on a terminal, with rich. Tokens and labels are foreign text: never markup, control characters shown."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from raylabel.api import UnitView
from raylabel.report.calibration import Setting
from raylabel.report.summary import KNOWN, Share, exceeds
from raylabel.report.texts import clean
from raylabel.stages.results import visible

PHRASES = 3
SWAPS = 3
SHOWN, BOLD, FAINT, LIGHTEST = 8, 0.3, 0.1, 0.005
"""Words of a concept that are shown, and from which weight on they are bold, not faint, shown at all."""
WIDTH = 120
"""Columns where the output is no terminal."""


def console() -> Console:
    """Where tables go: the terminal as wide as it is, else a fixed width."""
    found = Console()
    return found if found.is_terminal else Console(width=WIDTH)


def marked(tokens: list[str], position: int, window: int = 5) -> Text:
    """The phrase around the MAT, the MAT in bold."""
    a, b = max(0, position - window), position + window + 1
    text = Text(clean("".join(tokens[a:position])))
    text.append(clean(tokens[position]), style="bold reverse")
    text.append(clean("".join(tokens[position + 1 : b])))
    return text


def coloured(row: dict[str, Any]) -> Text:
    """An exemplar's tokens, the stronger the activation the deeper the colour."""
    text = Text()
    peak = max(row["activation"], 1e-30)
    for i, (token, value) in enumerate(zip(row["tokens"], row["activations"], strict=True)):
        depth = min(max((value or 0.0) / peak, 0.0), 1.0)
        style = f"on rgb({int(255 * depth)},{int(120 * depth)},0)" if depth > 0.05 else ""
        text.append(clean(token), style=f"bold {style}" if i == row["position"] else style)
    return text


def number(value: Any, form: str = ".2f") -> str:
    """A number, or a dot for none."""
    return "·" if value is None else format(value, form)


def units_table(rows: list[dict[str, Any]], exemplars: dict[tuple[int, int, int], list[dict[str, Any]]]) -> Table:
    """One line a unit: what was found and how sure it is, with the strongest phrases."""
    sources = sorted({row["label_source"] for row in rows if row["label_source"]})
    table = Table(header_style="bold", show_lines=True, title_justify="left")
    table.title = Text(f"units, most convincing first; labels from: {', '.join(sources) or 'none'}")
    for name, least, fold in (
        ("unit", 7, False), ("label", 18, True), ("kind", 7, False), ("evidence", 8, False), ("q", 5, False),
        ("decoys", 6, False), ("norm.", 5, False), ("phrases", 24, True),
    ):  # fmt: skip
        table.add_column(name, min_width=least, overflow="fold", no_wrap=not fold, ratio=1 if fold else None)
    for row in rows:
        key = (row["layer"], row["neuron"], row["polarity"])
        phrases = [marked(e["tokens"], e["position"]) for e in exemplars.get(key, [])[:PHRASES]]
        table.add_row(
            f"{row['layer']}.{row['neuron']}{' g≤0' if abs(row['polarity']) == 2 else ''}{'' if row['polarity'] > 0 else ' −'}",
            Text(clean(row["label"] or f"({row['status']})")),
            row["kind"] or "·", row["evidence"] or "·", number(row["q_value"], ".3f"), number(row["decoy_rate"], ".0%"),
            number(row["normalised_activation"]), Text("\n").join(phrases),
        )  # fmt: skip
    return table


def unit_card(unit: UnitView) -> RenderableType:
    """Everything about one unit: verdict, exemplars coloured by activation, what each swap did."""
    result, verdict, numbers = unit.result, unit.verification, unit.statistics
    head = Text(f"layer {unit.layer}, neuron {unit.neuron}, polarity {unit.polarity:+d}", style="bold")
    head.append(f"{' (gate ≤ 0)' if abs(unit.polarity) == 2 else ''}   {numbers.get('site', '')}")
    parts: list[RenderableType] = [head]
    if result:
        parts.append(Text(f"label: {clean(result['label'] or '·')}  ({result['label_source'] or result['status']})"))
        if result.get("description"):
            parts.append(Text(clean(result["description"])))
        parts += [_meanings(row) for row in unit.labels if len(row.get("meanings") or []) > 1]
        facts = Table.grid(padding=(0, 2))
        facts.add_row("kind", result["kind"] or "·", "q", number(result["q_value"], ".4f"), "decoys at least as well",
                      number(result["decoy_rate"], ".1%"))  # fmt: skip
        facts.add_row("evidence", result["evidence"] or "·", "normalised", number(result["normalised_activation"]),
                      "verified", str(bool(result["verified"])))  # fmt: skip
        facts.add_row("family similarity", number(result["family_similarity"]), "phrase similarity",
                      number(result["phrase_similarity"]), "retention", number(result["retention"]))  # fmt: skip
        parts.append(facts)
    if verdict:
        parts.append(_causal(verdict))
    if unit.scores:
        parts.append(scores_table(unit.scores))
    if unit.concept:
        parts.append(concept_card(unit.concept))
    if numbers:
        for name, sign in (("logits_up", "raises"), ("logits_down", "lowers")):
            words = ", ".join(repr(p["token"]) for p in (numbers[name] or [])[:8])
            parts.append(Text(f"{sign} {clean(words)}"))
    for row in unit.top():
        parts.append(Text.assemble(f"{row['activation']:8.3f}  ", coloured(row)))
    if unit.variants:
        parts.append(_swaps(unit))
    return Group(*parts)


def _meanings(label: dict[str, Any]) -> RenderableType:
    """The meanings of a label with their shares."""
    each = "; ".join(f"{clean(m['label'])} {number(m['share'], '.0%')}" for m in label["meanings"])
    return Text(f"meanings ({clean(label['explainer'])}): {each}")


def _causal(verdict: dict[str, Any]) -> RenderableType:
    """The causal card: what is kept under each kind of substitute, the evidence and the numbers it rests on.

    Columns that the run was written without are shown as nulls.
    """
    table = Table(title="what is kept of the activation when a word gives way to", title_justify="left")
    table.add_column("")
    for name in [*(f"{o}" for o in range(-5, 0)), "MAT word", "all", "context"]:
        table.add_column(name, justify="right")
    for name, kind in (("neighbours", "retention"), ("random words", "retention_random")):
        kept = verdict.get(f"{kind}_by_offset") or [None] * 6
        table.add_row(name, *(number(v) for v in [*kept, verdict.get(kind), verdict.get(f"{kind}_context")]))
    back = verdict.get("drop_context_offset")
    line = Text(f"MAT word costs {_interval(verdict, 'drop_mat')}; ")
    line.append(f"the word {number(None if back is None else -back, 'd')} back costs {_interval(verdict, 'drop_context')}; ")
    line.append(f"neighbours keep {_interval(verdict, 'specificity')} more than random words → ")
    line.append(verdict.get("evidence") or "·", style="bold")
    line.append(f"\nreproduced {number(verdict.get('reproduced'), '.0%')}")
    if verdict.get("promoted"):
        line.append(f"   promoted: {clean(', '.join(verdict['promoted'][:8]))}")
    return Group(table, line)


def concept_card(concept: dict[str, Any]) -> Text:
    """The concept as weighted words, the heavier the bolder, with what the score split says of the best one."""
    if not concept["words"]:
        return Text("concept: too few examples to search for one")
    text = Text("concept: ")
    for word, weight in list(zip(concept["words"], concept["weights"], strict=True))[:SHOWN]:
        if weight < LIGHTEST and text.plain != "concept: ":
            break
        style = "bold" if weight >= BOLD else "dim" if weight < FAINT else ""
        text.append(clean(word), style=style)
        text.append(f" {weight:.2f}  ", style="dim")
    text.append(f"({concept['proposer']}, {concept['evaluations']} evaluations)\n")
    if concept["auroc"] is None:
        text.append("not tested: too few words on the score split")
    else:
        text.append(f"AUROC on the score split {_interval(concept, 'auroc')}, unseen words {number(concept['auroc_unseen'])}, ")
        text.append(f"q {number(concept['q_value'], '.3f')} → ")
    text.append("" if concept["auroc"] is None else "claimed" if concept["claimed"] else "not claimed", style="bold")
    if (concept["known"] or 0) < KNOWN:
        text.append(f"\nthe judge knows {number(concept['known'], '.0%')} of the words it was asked about: out of its depth")
    return text


def concepts_line(found: dict[str, Any]) -> str:
    """One line on a run's concepts and their judge, of `summary.concepts`."""
    line = f"concepts: {found['claimed']} of {found['searched']} claimed"
    line += f"; judge {clean(found['judge'])}: AUROC {found['auroc']:.2f} on {found['pairs']} pairs with known answers"
    if found["deep"]:
        line += f"; out of its depth at {found['deep']} units, most of whose words it does not know"
    return line


def _interval(verdict: dict[str, Any], name: str) -> str:
    low, high = (number(verdict.get(f"{name}_{end}")) for end in ("low", "high"))
    return f"{number(verdict.get(name))} [{low}, {high}]"


def _swaps(unit: UnitView) -> RenderableType:
    table = Table(title="swaps", title_justify="left")
    for name in ("word", "offset", "neighbours (share of the activation kept)", "random words"):
        table.add_column(name, overflow="fold")
    grouped: dict[tuple[int, str], dict[str, list[tuple[float, str]]]] = {}
    for v in unit.variants:
        kept = v["activation"] / v["activation_original"] if v["activation_original"] else 0.0
        kinds = grouped.setdefault((v["offset"], v["word"]), {"neighbour": [], "random": []})
        kinds[v["substitute_kind"]].append((kept, v["substitute"]))
    order = sorted(grouped, key=lambda key: (-key[0], -sum(len(v) for v in grouped[key].values()), key[1]))
    for offset, word in order[:12]:
        kinds = grouped[offset, word]
        cells = [
            ", ".join(f"{clean(name)} {kept:.2f}" for kept, name in sorted(set(kinds[kind]), reverse=True)[:SWAPS])
            for kind in ("neighbour", "random")
        ]
        table.add_row(Text(clean(visible(word))), str(offset), Text(cells[0]), Text(cells[1]))
    return table


def audit_table(rows: list[dict[str, Any]]) -> Table:
    """Other people's labels beside the run's own, as given: corrected scores with their intervals, and the lookup table."""
    table = Table(title="labels, worst first: score corrected for other units' labels [95 %]", title_justify="left")
    for name in ("unit", "label", "scorer", "score", "lookup", "n", "our label", "our score"):
        table.add_column(name, overflow="fold")
    for row in rows:
        scores = (
            f"{number(row[name])} [{number(row[low])}, {number(row[high])}]"
            for name, low, high in (("corrected", "low", "high"), ("our_corrected", "our_low", "our_high"))
        )
        own, ours = scores
        table.add_row(
            f"{row['layer']}.{row['neuron']}{'' if row['polarity'] > 0 else ' −'}", Text(clean(row["label"])), row["scorer"],
            Text(own), number(row["lookup"]), str(row["n"]), Text(clean(row["our_label"] or "·")), Text(ours),
        )  # fmt: skip
    return table


def scores_table(rows: list[dict[str, Any]]) -> Table:
    """How well a unit's labels predict where it fires."""
    table = Table(title="labels tested on the score split", title_justify="left")
    for name in ("label of", "scorer", "value", "other labels", "corrected [95 %]", "lookup", "n", "unanswered", "hard [95 %]"):
        table.add_column(name)
    for row in rows:
        spans = (
            Text(f"{number(row[f'corrected{end}'])} [{number(row[f'low{end}'])}, {number(row[f'high{end}'])}]")
            for end in ("", "_hard")
        )
        corrected, hard = spans
        table.add_row(
            Text(clean(row["label_source"])), row["scorer"], number(row["value"]), number(row["shuffled"]), corrected,
            number(row["lookup"]), str(row["n"]), str(row["n_failed"]), hard,
        )  # fmt: skip
        for m in row.get("meanings") or []:
            value = Text(f"{number(m['corrected'])} [{number(m['low'])}, {number(m['high'])}]")
            table.add_row(Text(f"  {clean(m['label'])}"), row["scorer"], "", "", value, "", str(m["n"]), "", "")
    return table


def shares_table(shares: dict[str, tuple[Share, Share]]) -> Table:
    """Units beside decoys, with intervals."""
    table = Table(title="units beside decoys (95 % intervals)", title_justify="left")
    for name in ("", "units", "decoys", "units above decoys"):
        table.add_column(name)
    for name, (units, decoys) in shares.items():
        table.add_row(name, str(units), str(decoys), "yes" if exceeds(units, decoys) else "no")
    return table


def calibration_table(
    found: dict[str, tuple[Share, Share]], concepts: dict[str, tuple[Share, Share | None]] | None = None
) -> Table:
    """Controls by kind and difficulty: how many were flagged and verified, and what became of their concepts."""
    table = Table(title="controls: recall of planted units, false positives of the others (95 % intervals)", title_justify="left")
    more = ("concept claimed", "list recovered") if concepts else ()
    for name in ("control", "flagged", "verified", *more):
        table.add_column(name)
    for name, (flagged, verified) in found.items():
        shown = (concepts or {}).get(name, (None, None)) if more else ()
        table.add_row(name, str(flagged), str(verified), *("·" if share is None else str(share) for share in shown))
    return table


def sweep_table(settings: list[Setting], limit: int = 8) -> Table:
    """The settings at which meaningless controls pass at 5 % at most, best recall first; all where none reach it."""
    reaching = [s for s in settings if s.reaches]
    title = "settings at which at most 5 % of nulls and of decoys are verified" if reaching else "no setting reaches 5 %"
    table = Table(title=title, title_justify="left")
    for name in ("q ≤", "decoy rate ≤", "normalised ≥", "recall of planted", "nulls", "decoys"):
        table.add_column(name)
    for s in (reaching or settings)[:limit]:
        shares = ("·" if share is None else str(share) for share in (s.recall, s.nulls, s.decoys))
        table.add_row(f"{s.q:g}", f"{s.decoy_rate:g}", f"{s.normalised:g}", *shares)
    return table
