from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raylabel.words.families import families, stem


def test_stem() -> None:
    assert stem("Running") == stem("runs") == stem("run")
    assert stem("dog's") == stem("dog’s") == stem("Dogs")
    assert [stem(w) for w in ("123", "...", "__", "", "3rd")] == ["123", "...", "__", "", "3rd"]
    assert stem("cat") != stem("dog")


def test_labelled_families() -> None:
    marked = [
        ("Run", 1, 0), ("dog", 2, 1), ("running", 3, 0), ("honk", 7, 2), ("rhinoceros", 7, 2), ("Dogs", 4, 1),
        ("12", 5, 3), ("12", 6, 3), ("honest", 7, 2), ("!", 8, 4), ("honestly", 9, 2),
    ]  # fmt: skip
    assert families([m[1] for m in marked], [m[0] for m in marked]) == [m[2] for m in marked]


SAME = """
walk walks, walk walking, walk walked, jump jumped, play plays, try tries, try tried, carry carrying, stop stopped,
plan planning, swim swimming, make making, hope hoping, bake baked, die dying, lie lying, agree agreed, use using,
write writes, see seeing, love loved, study studying, fix fixes, rush rushes, argue argued, dog dogs, box boxes,
church churches, city cities, hero heroes, glass glasses, story stories, potato potatoes, key keys, horse horses,
wolf wolves, leaf leaves, bus buses, mouse mice, child children, man men, foot feet, run ran, go went, Dog dog,
LONDON London, iPhone IPHONE, McDonald MCDONALD, École école, STRASSE Straße, The THE, Running RUNS, dog dog's,
Anna Anna’s, teachers' teachers, children's children, James James's, Dogs’ dog, Cat's CATS, king's kings,
happy happiness, quick quickly, relate relation, nation national, hope hopeful, hope hopeless, care careful,
care careless, govern government, develop development, electric electrical, electric electricity, active activity,
generous generously, beautiful beautifully, create creation, create creative, modern modernize, real really,
sad sadness, act actor, connect connection, adjust adjustable, predict predictive, kind kindness, manage management,
teach teacher, decide decision, strong strength, rapid rapidly, weak weakness, formal formality, digit digital,
color colors, colour coloured, café cafés, organise organised, analyse analysed, friend friends, friend Friend,
friend friendship, friend friendly, train trains, train trained, tree trees, country countries, party parties,
watch watches, dish dishes, wash washing, boy boys, day days, tax taxes, note noted, noting notes, cry crying,
begin beginning, refer referred, travel travelling, open opens, OPEN opened, employ employment, move movement,
power powerful, danger dangerous, economy economies, poem poems, test tests, test tested, TEST testing, value values,
return returns, import imports, function functions, class classes, index indexes, query queries, object's objects,
user's Users, file files, ask asked, ask asking, house houses, lady ladies, mix mixed, hug hugged, thin thins, bird birds,
YEAR years, name named, name NAME, sea seas, week week's, bright brightly
"""
"""Inflections, plurals, casing, possessives and derived words."""
DIFFERENT = """
universe university, organ organize, new news, policy police, import important, author authority, animal animate,
general generic, arsenal arsenic, past paste, wand wander, hand handle, car care, plan plane, plan plant,
cat category, bar barn, on one, in inn, is island, us use, the then, king kin, wing win, sing single, rat rate,
hop hope, hoping hopping, tap tape, star stare, mat mate, miss mission, pass passion, port portion, secret secretary,
college collage, desert dessert, affect effect, principal principle, stationary stationery, dog cat, red blue,
run walk, horse house, bread broad, ship shop, live love, sun son, night knight, write right, wolf wool, bear beer,
goat coat, 1 2, 10 100, 1990 1991, 3rd 4th, 3rd third, 1 one, 12 1.2, 2 two, v1 v2, 0 O, 007 7, 5s 5, . ;, ! ?, ( ),
-- -, ... ., : ;, $ €, # @, + -, _ __, [ ], * **, Paris parish, China chin, Turkey Turk, Jack jacket, Mark market,
Bill billion, Rome Romeo, May maybe, Will wilt, кот собака, 猫 犬, école cole, self shelf, def define, int into,
str string, len lens, print sprint, return turn, mother father, summer winter, yes no, he she, up down, true false,
get set, list tuple, north south, table cable, price prize, quite quiet, angel angle, loose lose, form from,
trial trail, board bored, 50 50%, 2024 '24, & and,
week month, cup cap, tea ten, gold golf
"""
"""Words that look alike, words that go together, numbers and punctuation."""
APART = """
wolf wolves, leaf leaves, bus buses, mouse mice, child children, man men, foot feet, run ran, go went, hope hopeless,
care careless, create creation, create creative, real really, act actor, teach teacher, decide decision,
strong strength, friend friendship, move movement
"""
"""Of one family, but English inflects them irregularly, or Snowball leaves what their ending is."""
JOINED = """
import important, author authority, animal animate, len lens, universe university, organ organize, past paste
"""
"""Of two families with one stem; the last three only before Snowball 3."""


def pairs(text: str) -> list[tuple[str, str]]:
    found = [entry.split() for entry in text.replace("\n", " ").split(", ")]
    return [(one, other) for one, other in found]


def test_families_of_labelled_pairs() -> None:
    """Nine of ten right, of a list that holds more irregular words than text does, and no error that is not known."""
    same, different = pairs(SAME), pairs(DIFFERENT)
    assert len({*same, *different}) == len(same) + len(different) >= 150
    apart = {pair for pair in same if families([1, 2], pair) != [0, 0]}
    joined = {pair for pair in different if families([1, 2], pair) != [0, 1]}
    assert apart <= set(pairs(APART)) and joined <= set(pairs(JOINED)), (apart, joined)
    assert 1 - len(apart) / len(same) >= 0.85 and 1 - len(joined) / len(different) >= 0.93
    assert 1 - (len(apart) + len(joined)) / (len(same) + len(different)) >= 0.9
    assert set(pairs(APART)) <= set(same) and set(pairs(JOINED)) <= set(different)


def test_one_token_joins_any_words() -> None:
    assert families([7, 7], ["honk", "rhinoceros"]) == [0, 0]


def test_no_words() -> None:
    assert families([], []) == []


WORDS = ["dog", "dogs", "cat", "run", "runs", "hat", "1", "!"]


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(WORDS)), max_size=12))
def test_families_are_the_connected_components(mats: list[tuple[int, str]]) -> None:
    ids, words = [m[0] for m in mats], [m[1] for m in mats]
    found = families(ids, words)
    linked = [[a == b or stem(v) == stem(w) for b, w in mats] for a, v in mats]
    for k in range(len(mats)):
        linked = [[x or (linked[i][k] and linked[k][j]) for j, x in enumerate(row)] for i, row in enumerate(linked)]
    assert [[a == b for b in found] for a in found] == linked
    assert list(dict.fromkeys(found)) == list(range(len(set(found))))
