"""Random damage to model files: each must be refused in one line, or read and packed.

    python scripts/fuzz_models.py [--count N] [--seed S] [--keep FOLDER]

Half of the inputs are GGUF files (plain ones and PowerInfer's, of several block types), half Hugging Face folders (one
file and shards, with predictors). Damage is done to bytes (flipped, cut, inserted, odd numbers written over the head)
and to meaning (fields, counts, offsets, types, names, JSON values, links, encodings, weights that are not finite).
Each input is read, packed and its tokenizer tried in a child, forked with all imports done, with bounds on memory and
time. Prints how many ended in which way, then one JSON object; the exit code is 1 if a child left a traceback, wrote
more than its line, packed numbers that make no sense, was killed by a signal, or exceeded a bound. `--keep` keeps the
inputs of those. Equal seeds give equal damage.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from fuzzing.gguf_files import damage_gguf, make_gguf
from fuzzing.hf_folders import damage_folder, make_folder
from fuzzing.trial import attempt


def make(rng: random.Random, what: str, folder: Path) -> Path:
    """A damaged file or folder in `folder`; `what` is gguf or folder."""
    if what == "gguf":
        path = folder / "model.gguf"
        path.write_bytes(damage_gguf(rng, make_gguf(rng)))
        return path
    path = folder / "model"
    path.mkdir()
    for name, content in damage_folder(rng, make_folder(rng)).items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        elif content == Path():
            os.mkfifo(path / name)
        else:
            (path / name).symlink_to(content)
    return path


def keep(folder: Path, target: Path) -> None:
    """Copy the folder without its pipes, which copying would wait for."""

    def pipes(within: str, names: list[str]) -> list[str]:
        return [name for name in names if (Path(within) / name).is_fifo()]

    shutil.copytree(folder, target, symlinks=True, ignore=pipes, dirs_exist_ok=True)


def main() -> None:
    """Run as a script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that broke a rule")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    kinds: dict[str, Counter[str]] = {"gguf": Counter(), "folder": Counter()}
    violations = []
    for number in range(options.count):
        rng, what = random.Random(f"{options.seed}/{number}"), ("gguf", "folder")[number % 2]
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            (Path(scratch) / "in").mkdir()
            path = make(rng, what, Path(scratch) / "in")
            outcome = attempt(path, rng.choice(("auto", "auto", "f16", "q8", "q4")), Path(scratch) / "cache")
            kinds[what][outcome.kind] += 1
            if outcome.violation:
                violations.append(
                    {"number": number, "input": what, "outcome": outcome.kind, "said": outcome.said[-2000:]}
                )
                print(f"{number} ({what}): {outcome.kind}\n{outcome.said}", file=sys.stderr)
                if options.keep:
                    keep(path.parent, options.keep / f"{options.seed}-{number}")
    for what, outcomes in kinds.items():
        print(f"{what:7}", ", ".join(f"{count} {kind}" for kind, count in outcomes.most_common()))
    print(json.dumps({"seed": options.seed, "count": options.count, "outcomes": kinds, "violations": violations}))
    sys.exit(1 if violations else 0)


if __name__ == "__main__":
    main()
