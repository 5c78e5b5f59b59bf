"""What the paper claims, what is found here, and whether that is the same, by rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from entries import TABLE
from rows import OWN, Known, difference, differences, group_values, header, mean_of, number, present, present_apart, spread

from loraclr.evaluate import Estimate, paired

YES, NO, OPEN, OUT = "reproduced", "**not reproduced**", "undecided", "not testable here"
PAPER, FUSION, ORTHOGONAL = "LoRACLR, paper", "MoS (gradient fusion)", "Orthogonal Adaptation"
USUAL = "12 concepts, absolute margin 0.5, lambda 0.001"  # the published setting
NO_CONTRAST = "12 concepts, no contrast"
REFERENCE = "loraclr-reference:paper"
ENOUGH = -0.03  # a difference of means that still counts as kept


@dataclass(frozen=True)
class Evidence:
    """Table 1, and the figures that are there, by name."""

    table: Known
    figures: Mapping[str, Known]

    def lost(self, name: str, measure: str) -> Estimate:
        """Of a merge to its adapters alone."""
        row = self.table[name]
        return difference(row, self.table[f"alone, {row['recipe']}"], measure)

    def merged(self, name: str, measure: str) -> float:
        return mean_of(self.table[name], measure).mean


Found = tuple[str, str]  # what is found, and the verdict


def verdict(found: Estimate, at_least: float) -> str:
    """Whether an interval says that something is at least so much."""
    return YES if found.low >= at_least else NO if found.high < at_least else OPEN


def more(found: Estimate) -> str:
    """Whether a difference is above zero."""
    return YES if found.low > 0 else NO if found.high < 0 else OPEN


def kept(name: str, measure: str, published: str, at_least: float = ENOUGH) -> Callable[[Evidence], Found]:
    def check(evidence: Evidence) -> Found:
        found = evidence.lost(name, measure)
        return f"{spread(found, signed=True)}; published {published}", verdict(found, at_least)

    return check


def highest(measure: str) -> Callable[[Evidence], Found]:
    def check(evidence: Evidence) -> Found:
        others = [name for name in evidence.table if name in TABLE and TABLE[name].paper and name != PAPER]
        best = max(others, key=lambda name: evidence.merged(name, measure))
        apart = difference(evidence.table[PAPER], evidence.table[best], measure)
        means = f"{number(evidence.merged(PAPER, measure))}; {best} {number(evidence.merged(best, measure))}"
        told = f"{means}, apart {spread(apart, signed=True)}"
        return told, more(apart)

    return check


def averaging(evidence: Evidence) -> Found:
    found = evidence.lost("DB-LoRA (FedAvg)", "identity")
    return f"{spread(found, signed=True)}; published -.585", YES if found.high < -0.2 else NO if found.low > -0.2 else OPEN


def fast(evidence: Evidence) -> Found:
    ours, theirs = (evidence.table[name]["merge_seconds"] for name in (PAPER, FUSION))
    return f"{ours:.0f} s of a core, gradient fusion {theirs:.0f} s", YES if ours <= theirs / 3 else NO


def scales(evidence: Evidence) -> Found:
    """The first two of every order, with ten more and without."""
    pairs = [row for name, row in evidence.figures["counts"].items() if name.startswith("2 concepts") and row["method"] == REFERENCE]
    found = differences([(evidence.table[PAPER], row, row["concepts"]) for row in pairs], "identity")
    return f"of the same people, twelve against two in the model: {spread(found, signed=True)}", verdict(found, ENOUGH)


def margin(evidence: Evidence) -> Found:
    """Whether the published setting gains anything at all over none, and whether another is better."""
    grid = {name: row for name, row in evidence.figures["margins"].items() if name.startswith("12 concepts")}
    best = max((name for name in grid if name != NO_CONTRAST), key=lambda name: mean_of(grid[name], "identity").mean)
    gained, better = difference(grid[USUAL], grid[NO_CONTRAST], "identity"), difference(grid[best], grid[USUAL], "identity")
    told = f"{spread(gained, signed=True)} to no contrast; best {best.removeprefix('12 concepts, ')}, {spread(better, signed=True)} to it"
    return told, NO if better.low > 0 else more(gained) if gained.high >= -ENOUGH else NO


def in_scenes(evidence: Evidence) -> Found:
    known = evidence.figures["scenes"]
    others = [f"{name}, regions" for name in (ORTHOGONAL, FUSION, "P+")]
    best = max(others, key=lambda name: present(known[name]).mean)
    ours, theirs = known[f"{PAPER}, regions"], known[best]
    apart = present_apart(ours, theirs)
    means = f"present {number(present(ours).mean)}; {best.removesuffix(', regions')} {number(present(theirs).mean)}"
    return f"{means}, apart {spread(apart, signed=True)}", more(apart)


def beside_omg(evidence: Evidence) -> Found:
    ours, theirs = (evidence.figures["scenes"][name] for name in (f"{PAPER}, regions", "OMG, own adapters"))
    apart = present_apart(ours, theirs, alike=True)
    told = f"present {number(present(ours, alike=True).mean)}; OMG {number(present(theirs, alike=True).mean)}"
    return f"{told}, apart {spread(apart, signed=True)}", more(apart)


def alike(kind: str) -> Callable[[Evidence], Found]:
    def check(evidence: Evidence) -> Found:
        (own, factors), (ours, _) = (group_values(evidence.figures["mixture"][name], kind, "image") for name in (OWN, PAPER))
        apart = paired(ours, own, factors=factors)
        return f"image alignment, to the own adapters: {spread(apart, signed=True)}", verdict(apart, ENOUGH)

    return check


def depends(evidence: Evidence) -> Found:
    """Merges of fully trained adapters against those of adapters trained for a quarter of the steps."""
    found = difference(evidence.table["loraclr (ours), 1 round"], evidence.figures["inputs"]["quarter of the steps, edlora"], "identity")
    return f"identity, all against a quarter of the steps: {spread(found, signed=True)}", more(found)


def unasked(evidence: Evidence) -> Found:
    return "nobody was asked; `loraclr study` is how to", OUT


CLAIMS: tuple[tuple[str, str, Callable[[Evidence], Found]], ...] = (
    ("merging costs LoRACLR no identity", "Table 1", kept(PAPER, "identity", "+.029")),
    ("nor image alignment", "Table 1", kept(PAPER, "image", "+.010")),
    ("nor text alignment", "Table 1", kept(PAPER, "text", "-.003")),
    ("its merge has the highest identity of all", "Table 1", highest("identity")),
    ("and the highest image alignment", "Table 1", highest("image")),
    ("averaged DreamBooth LoRAs lose the people", "Table 1", averaging),
    ("gradient fusion of ED-LoRAs keeps them", "Table 1", kept(FUSION, "identity", "-.011", -0.05)),
    ("Orthogonal Adaptation keeps them", "Table 1", kept(ORTHOGONAL, "identity", "+.005", -0.05)),
    ("it takes files as they are, mixed kinds too", "3.2", kept(f"{PAPER}, mixed inputs", "identity", "none")),
    ("merging takes a third of Mix-of-Show's time", "4.2", fast),
    ("identity stays as concepts are added", "Fig. 5", scales),
    ("margins of .25 to .5 and a lambda of .001 are best", "Fig. 8", margin),
    ("scenes of two to six people are better than the others'", "Fig. 4, 11-13", in_scenes),
    ("two of a kind are better than OMG's", "Fig. 10", beside_omg),
    ("animals, objects and monuments merge as well", "Fig. 7", alike("things")),
    ("people in a merged style", "Fig. 6", alike("people in a style")),
    ("what comes out depends on what goes in", "5", depends),
    ("people prefer it: 3.42 against 2.41", "Table 2", unasked),
)


def claims(evidence: Evidence) -> str:
    """One line a claim; where rows or figures are missing, it says so."""
    lines = header("the paper says", "where", "found here", "verdict")
    for told, where, check in CLAIMS:
        try:
            found, judged = check(evidence)
        except KeyError as missing:
            found, judged = f"{missing.args[0]} is not drawn yet", "open"
        lines.append(f"| {told} | {where} | {found} | {judged} |")
    return "\n".join(lines)
