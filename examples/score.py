"""LoRAHub with a score of one's own: what a judge sees in pictures finds each adapter's coefficient. Writes score.png."""

import sys

from loraclr import Adapter, generate, merge, open_toybox

toybox = open_toybox()
pipeline, judge, people = toybox.load(), toybox.judge, [toybox.concepts[name] for name in ("rhea", "tomas")]


def score(adapter: Adapter) -> float:  # higher is better: how many traits it is sure to see of whom it sees less
    with pipeline.applied(adapter):
        read = judge.read([made.image for made in generate(pipeline, [f"a {one.name} {one.noun}" for one in people], seeds=[1], steps=4)])
    return float(min(sum(read[it][k, judge.heads[it].index(word)] for it, word in one.attributes.items()) for k, one in enumerate(people)))


found = merge([toybox.adapter_paths()[one.name] for one in people], base=pipeline, method="lorahub", parameters={"budget": 12}, score=score)
with pipeline.applied(found.adapter):
    made = next(generate(pipeline, ["a rhea woman in a forest"], seeds=[1], steps=8, size=(64, 128)))
print(made.save(sys.argv[1] if len(sys.argv) > 1 else "score.png"))
