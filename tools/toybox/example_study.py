"""An example of a user study: `python example_study.py STUDY [--work WORK]`, the four methods of the paper's Table 2 on the toybox.

Its pictures are those of the table's rows, as `results.py` left them in WORK; it asks forty questions, nobody has answered any.
Serve it with `loraclr study serve STUDY`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from results import SPLIT, slug

from loraclr.toybox import open_toybox
from loraclr.web.study import Study, create

METHODS = ("loraclr (ours)", "Orthogonal Adaptation", "MoS (gradient fusion)", "P+")
SHOWN = 4  # references beside each picture
NOTE = "An example with drawn people. Nobody has answered it so far."


def example(folder: Path, work: Path) -> Study:
    """Raises SystemExit if a method's row was not drawn there."""
    pictures = {method: work / slug(method) / "pictures" / "row" for method in METHODS}
    lacking = [method for method, where in pictures.items() if not where.is_dir()]
    if lacking:
        raise SystemExit(f"{work} has no pictures of {', '.join(lacking)}; results.py draws them")
    box = open_toybox()
    with tempfile.TemporaryDirectory() as references:
        for name in box.names(SPLIT):
            place = Path(references) / name
            place.mkdir()
            for number, image in enumerate(box.references(name)[:SHOWN]):
                image.save(place / f"{number}.png")
        return create(folder, references=Path(references), methods=pictures, questions=40, note=NOTE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/results"))
    arguments = parser.parse_args()
    study = example(arguments.study, arguments.work)
    print(f"{arguments.study}: {len(study.questions)} questions about {len(study.methods)} methods; loraclr study serve {arguments.study}")


if __name__ == "__main__":
    main()
