"""Whether a judge beats chance: words in sentences, with what they are and what they are not.

Every word is asked about with its own concept (yes) and with another word's (no), and every concept is as often right as
wrong: a judge that only likes some words or some concepts stays at chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import rankdata

from raylabel.errors import BadInput

_ONE_SIDED = 1.6449

_KNOWN = """
cat | animal | The cat slept on the warm stones.
salmon | fish | They grilled a salmon for dinner.
oak | tree | An old oak stood beside the road.
green | color | She painted the door green last week.
Paris | city | He moved to Paris in the spring.
seven | number | There were seven boxes on the table.
hammer | tool | He put the hammer back in the box.
doctor | job | The doctor wrote a long letter.
Monday | day | The shop is closed on Monday.
piano | music | She plays the piano every evening.
bread | food | We bought bread and a little salt.
shirt | clothing | His shirt was torn at the sleeve.
uncle | family | My uncle lives near the river.
rain | weather | The rain did not stop for hours.
knee | body | He hurt his knee on the stairs.
train | vehicle | The train was late again today.
France | country | They drove through France in July.
gold | metal | The ring was made of gold.
angry | emotion | The angry crowd left the hall.
football | sport | The children play football after school.
coffee | drink | A cup of coffee stood on the desk.
Tuesday | time | We meet again on Tuesday afternoon.
kitchen | room | The kitchen smelled of onions.
soldier | war | A soldier guarded the old bridge.
Python | programming | The script was written in Python.
church | religion | The church stands on a small hill.
euro | money | The ticket costs one euro.
rose | flower | He gave her a red rose.
sparrow | bird | A sparrow landed on the roof.
judge | law | The judge read the sentence aloud.
chair | furniture | The chair had only three legs.
apple | fruit | She cut the apple into four pieces.
"""
_ROWS = [tuple(part.strip() for part in line.split("|")) for line in _KNOWN.strip().splitlines()]
# Far enough down the list that no word is also what the other row's concept says.
_SHIFT = 11

PAIRS: list[tuple[str, str, str, bool]] = [
    (word, text, concept, concept == own)
    for i, (word, own, text) in enumerate(_ROWS)
    for concept in (own, _ROWS[(i + _SHIFT) % len(_ROWS)][1])
]
"""(word, text, concept, whether the answer is yes)."""


@dataclass(frozen=True)
class Check:
    """How a judge answers pairs whose answer is known."""

    auroc: float
    low: float
    """One-sided 95 % lower bound, by the normal approximation of Mann and Whitney's test: above 0.5 just if it rejects."""
    n: int

    @property
    def serves(self) -> bool:
        return self.low > 0.5

    def require(self, name: str) -> None:
        if not self.serves:
            raise BadInput(
                f"optimize.judge: {name} cannot serve: it tells yes from no on {self.n} pairs with known answers no better "
                f"than chance (AUROC {self.auroc:.2f}, at least {self.low:.2f}); use another judge"
            )


def auroc_bound(scores: Sequence[float], truths: Sequence[bool]) -> tuple[float, float]:
    """(AUROC, its one-sided 95 % lower bound by the variance under chance); (0.5, 0) where one class is empty."""
    positive = sum(truths)
    negative = len(truths) - positive
    if not positive or not negative:
        return 0.5, 0.0
    ranks = rankdata(scores)
    above = sum(rank for rank, truth in zip(ranks, truths, strict=True) if truth) - positive * (positive + 1) / 2
    auroc = float(above) / (positive * negative)
    return auroc, auroc - _ONE_SIDED * math.sqrt((positive + negative + 1) / (12 * positive * negative))
