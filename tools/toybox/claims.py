"""What the paper claims, what is found here, and whether that is the same, by rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean

from results import TABLE
from rows import OWN, Known, difference, header, lost, mean_of, number, spread

from loraclr.evaluate import Estimate

YES, NO, OPEN, OUT = "reproduced", "**not reproduced**", "undecided", "not testable here"
PAPER, FUSION, ORTHOGONAL = "LoRACLR, paper", "MoS (gradient fusion)", "Orthogonal Adaptation"
USUAL = "12 concepts, absolute margin 0.5, lambda 0.001"  # the published setting
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

    def present(self, name: str) -> list[float]:
        """The share of people who are where they were asked for, by number of people."""
        return [float(one["present"]) for one in self.figures["scenes"][name]["rows"]]


Found = tuple[str, str]  # what is found, and the verdict


def says(holds: bool) -> str:
    return YES if holds else NO


def verdict(found: Estimate, at_least: float) -> str:
    """Whether an interval says that something is at least so much."""
    return YES if found.low >= at_least else NO if found.high < at_least else OPEN


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
        return told, YES if apart.low > 0 else NO if apart.high < 0 else OPEN

    return check


def averaging(evidence: Evidence) -> Found:
    found = evidence.lost("DB-LoRA (FedAvg)", "identity")
    return f"{spread(found, signed=True)}; published -.585", says(found.high < -0.2)


def fast(evidence: Evidence) -> Found:
    ours, theirs = (evidence.table[name]["merge_seconds"] for name in (PAPER, FUSION))
    return f"{ours:.0f} s of a core, gradient fusion {theirs:.0f} s", says(ours < theirs)


def scales(evidence: Evidence) -> Found:
    known, twelve = evidence.figures["counts"], evidence.lost(PAPER, "identity").mean
    rows = [row for name, row in known.items() if name.startswith("2 concepts") and row["method"] == "loraclr-reference:paper"]
    two = mean(lost(row, known["alone, edlora"], "identity", row["concepts"]) for row in rows)
    return f"to each alone: {two:+.3f} with two, {twelve:+.3f} with twelve", says(twelve >= two + ENOUGH)


def margin(evidence: Evidence) -> Found:
    """Whether the published setting is as good as the best, and anything at all depends on it."""
    grid = {name: mean_of(row, "identity") for name, row in evidence.figures["margins"].items() if name.startswith("12 concepts")}
    best, usual = max(grid, key=lambda name: grid[name].mean), grid[USUAL]
    told = f"{spread(usual)}; best {best.removeprefix('12 concepts, ')} {spread(grid[best])}"
    matters = grid[best].mean - min(one.mean for one in grid.values()) > -ENOUGH
    return told, says(matters and usual.high >= grid[best].mean)


def in_scenes(evidence: Evidence) -> Found:
    others = [f"{name}, regions" for name in (ORTHOGONAL, FUSION, "P+")]
    best = max(others, key=lambda name: mean(evidence.present(name)))
    ours, theirs = mean(evidence.present(f"{PAPER}, regions")), mean(evidence.present(best))
    return f"present {number(ours)}; {best.removesuffix(', regions')} {number(theirs)}", says(ours > theirs)


def beside_omg(evidence: Evidence) -> Found:
    ours, theirs = evidence.present(f"{PAPER}, regions")[0], evidence.present("OMG, own adapters")[0]
    return f"of two people present {number(ours)}; OMG {number(theirs)}", says(ours > theirs)


def alike(kind: str) -> Callable[[Evidence], Found]:
    def check(evidence: Evidence) -> Found:
        own, ours = (mean(evidence.figures["mixture"][name]["groups"][kind]["image"]) for name in (OWN, PAPER))
        return f"image alignment {number(ours)}; own adapters {number(own)}", says(ours >= own + ENOUGH)

    return check


def depends(evidence: Evidence) -> Found:
    """Better inputs, better merges; with the fully trained ones of Table 1."""
    pairs = [("loraclr (ours)", evidence.table), *((name, known) for known in [evidence.figures["inputs"]] for name in known)]
    rows = [(known[f"alone, {known[name]['recipe']}"], known[name]) for name, known in pairs if known[name]["recipe"].endswith("edlora")]
    found = sorted((mean_of(alone, "identity").mean, mean_of(row, "identity").mean) for alone, row in rows if row["kind"] == "merged")
    told = "; ".join(f"alone {number(alone)}, merged {number(merged)}" for alone, merged in found)
    return told, says([merged for _, merged in found] == sorted(merged for _, merged in found))


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
