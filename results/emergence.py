"""When retrieval emerges: a passage seen again, by training step, one line a window.

    for W in 32 64 128 256 512; do for S in 1 2 3; do
        python train.py --window=$W --seed=$S --max_iters=400 --eval_interval=25 --eval_iters=4 \\
            --out_dir=out/window-$W-$S
    done; done
    python results/emergence.py out/window-*

Reads config.json and log.jsonl of each run. Writes results/emergence.json and emergence.png: the
mean over the seeds of a window, with a band from least to most.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare_data
from model import check

HERE = Path(__file__).resolve().parent
HALF = 0.5  # of what text costs: the step from which on a passage again costs less is told


def read(folders):
    """{window: {seed: [[step, bits per byte of validation, of a passage again], ...]}}."""
    found = defaultdict(dict)
    for folder in map(Path, folders):
        config = json.loads((folder / "config.json").read_text())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        evals = [[x["step"], x["bits_per_byte"], x["copy"]] for x in log if "copy" in x]
        window = config["model"]["window"]
        seed = config["train"]["seed"]
        check(seed not in found[window], f"{folder}: window {window} with seed {seed} comes twice")
        check(evals, f"{folder}: no evaluation in its log.jsonl")
        found[window][seed] = evals
        steps = {tuple(step for step, _, _ in evals) for evals in found[window].values()}
        check(len(steps) == 1, f"{folder}: evaluated at other steps than another of its window")
    return dict(sorted(found.items()))


def first_step_below(evals, share):
    """The first step whose passage again costs less than `share` of the validation text."""
    return next((step for step, bits, again in evals if again < share * bits), None)


def draw(found, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.add_subplot()
    for n, (window, seeds) in enumerate(found.items()):
        steps = [step for step, _, _ in next(iter(seeds.values()))]
        again = np.array([[copy for _, _, copy in evals] for evals in seeds.values()])
        axis.plot(steps, again.mean(0), color=f"C{n}", label=f"window {window}")
        axis.fill_between(steps, again.min(0), again.max(0), color=f"C{n}", alpha=0.2)
    axis.set(title="When does it learn to find a passage that it has seen?", xlabel="training step",
             ylabel="bits per byte of a passage seen again", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    with prepare_data.atomic_path(path) as making:
        figure.savefig(making, dpi=160)


def main(argv):
    check(argv, "name the folders of runs, such as out/window-*")
    found = read(argv)
    for window, seeds in found.items():
        steps = [first_step_below(evals, HALF) for evals in seeds.values()]
        last = np.mean([evals[-1][2] for evals in seeds.values()])
        print(f"window {window}: half the cost of new text from steps {steps}, {last:.3f} at last")
    draw(found, HERE / "emergence.png")
    prepare_data.write_atomically(HERE / "emergence.json", json.dumps(found, indent=1))


if __name__ == "__main__":
    prepare_data.run_main(main)
