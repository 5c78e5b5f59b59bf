"""One picture, two places: what is to be seen in each is told apart by regions. Writes regions.png."""

import sys

from loraclr import Region, generate, load_adapter, open_toybox

toybox = open_toybox()
pipeline = toybox.load()
rhea = load_adapter(toybox.adapter_paths()["rhea"])  # a merged file holds more than one; it is used the same way
regions = [Region("a rhea woman in a forest", (0, 0, 1, 0.5)), Region("a smiling man in a forest", (0, 0.5, 1, 1))]
with pipeline.applied(rhea):
    (made,) = generate(pipeline, ["two people in a forest"], seeds=[1], steps=8, size=(64, 128), regions=regions)
print(made.save(sys.argv[1] if len(sys.argv) > 1 else "regions.png"))
