"""Two adapters in one picture without merging them: OMG lets each draw inside its own box. Writes strategy.png."""

import sys

from loraclr import Region, generate, load_adapter, open_toybox
from loraclr.strategies import Omg, Part

toybox = open_toybox()
pipeline, paths = toybox.load(), toybox.adapter_paths()
parts = [Part(load_adapter(paths[name])) for name in ("rhea", "tomas")]
regions = [Region("a rhea woman in a forest", (0, 0, 1, 0.5)), Region("a tomas man in a forest", (0, 0.5, 1, 1))]
prompt = "a woman on the left and a man on the right in a forest"
(made,) = generate(pipeline, [prompt], seeds=[1], steps=8, size=(64, 128), strategy=Omg(), parts=parts, regions=regions)
print(made.save(sys.argv[1] if len(sys.argv) > 1 else "strategy.png"))
