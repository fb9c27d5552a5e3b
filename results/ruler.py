"""RULER's retrieval tasks, asked of trained runs by length of context, zero-shot.

    python results/ruler.py out/rnope-swa-log-1 out/rnope-swa-log-2 out/rope-1 \\
        --max_multiple=256 --factor=4 --samples=32 --out=results/ruler.json

RULER (arXiv 2404.06654) hides facts, "the code of KEY is VALUE", in a long text and asks for values
at its end. These models are trained on plain text and follow no instructions. So the wordings are
those of sample.py's needle probe, and a question is the fact once more, which the model completes.
No training row has such facts.

    task              facts hidden                hidden in                   asked for
    ----------------  --------------------------  --------------------------  -----------------
    single-sentences  one                         RULER's sentences, repeated its value
    single-noise      one                         random letters              its value
    single-prose      one                         the run's validation text   its value
    multi-key         --needles, a key for each   validation text             the value of one
    multi-value       --needles, one key for all  validation text             all, as they stand
    multi-query       --needles, a key for each   validation text             all, in no order

Score: the share of answers whose tokens are each the likeliest one, given the true tokens before
it. Row i of a task has the same facts, places and questions at every length.
Does NOT include: RULER's chained variables, word counts and question answering, and its UUIDs.
"""

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare_data
from model import check, flag
from sample import SampleConfig, hide, lines_of, new_facts, open_runs, override, shortest_first
from train import DTYPES, git_revision, stream

SINGLE = ("single-sentences", "single-noise", "single-prose")
TASKS = (*SINGLE, "multi-key", "multi-value", "multi-query")
SENTENCES = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz     ", np.uint8)


@dataclass
class RulerConfig:
    runs: tuple[str, ...] = flag((), "folders of runs; none: the newest in out/", positional=True)
    max_multiple: int = flag(16, "longest context, in training contexts", least=1)
    factor: int = flag(4, "from one length to the next", least=2)
    samples: int = flag(32, "rows of each task and length", least=1)
    needles: int = flag(4, "facts in a row of the multi tasks", least=1)
    digits: int = flag(7, "of a value", least=1)
    log_scale: bool | None = override()
    attn_scale: float | None = override()
    seed: int = flag(1337, "of the facts and their places", most=2**32 - 1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag("auto", "auto: the run's own", choices=DTYPES)
    out: str = flag("", "file for the numbers, as JSON; empty: none")

    def for_sample(self):
        """The same as a SampleConfig, which also checks the ranges."""
        flags = asdict(self)
        del flags["out"]
        return SampleConfig(**flags)


# ---- Rows with questions ------------------------------------------------------------------------


def choose_facts(task, facts):
    """(facts to hide, facts to ask for) of a task. A fact: ids before its value, of it, after."""
    if task in SINGLE:
        facts = facts[:1]
    if task == "multi-value":
        before = facts[0][0]
        facts = [(before, value, after) for _, value, after in facts]
    if task in ("multi-value", "multi-query"):
        return facts, facts
    return facts, facts[:1]


def fill(run, task, prose, rng):
    """Token ids to hide facts in, as many as prose has."""
    if task == "single-sentences":
        text = SENTENCES
    elif task == "single-noise":
        count = 4 * len(prose)  # a token may stand for several letters
        text = LETTERS[rng.integers(len(LETTERS), size=count)].tobytes().decode()
    else:
        return prose
    return np.resize(prepare_data.encode(run.enc, text), len(prose))


def plant(run, task, prose, i):
    """Row i of a task: (token ids, as many as prose has; marks of the last of them).

    Each token of the question, at the row's end, has a mark: the number of the answer that it is a
    token of, from 1 on, or 0.
    """
    rng = stream("ruler", run.cfg.seed, i)
    facts, asked = choose_facts(task, new_facts(run, rng))
    depths = rng.random(run.cfg.needles)[: len(facts)]  # shares of the room: alike at every length
    if task == "multi-value":
        depths.sort()  # its values are asked for as they stand
    question = []
    marks = []
    for number, (before, value, after) in enumerate(asked, 1):
        question += [before, value, after]
        marks += [0] * len(before) + [number] * len(value) + [0] * len(after)
    facts = [np.concatenate(fact) for fact in facts]
    needed = sum(map(len, facts)) + len(marks)
    check(
        needed <= len(prose),
        f"{run.folder}: the facts and questions of {task} take {needed} tokens, a row at 1x has "
        f"{len(prose)}: use fewer --needles or --digits",
    )
    text, _ = hide(fill(run, task, prose, rng)[needed:], facts, depths, len(run.begin))
    return np.concatenate([text, *question]), np.array(marks)


def plant_all(run, task, length):
    rows = enumerate(run.rows(length))
    return [plant(run, task, row, i) for i, row in rows]


def share_right(run, task, length):
    """Share of answers that are the likeliest token at each of their places."""
    planted = plant_all(run, task, length)
    rows = np.stack([row for row, _ in planted])
    longest = max(len(marks) for _, marks in planted)
    batches = run.predict(rows, longest)
    hits = torch.cat([logits.argmax(-1) == targets for logits, targets in batches])
    right = []
    for hit, (_, marks) in zip(hits.cpu().numpy(), planted, strict=True):
        hit = hit[-len(marks) :]
        right += [hit[marks == number].all() for number in range(1, marks.max() + 1)]
    return float(np.mean(right))


# ---- What is told of the runs -------------------------------------------------------------------


def cache_bytes(run):
    """Bytes of the keys and values of one row of the longest context, as model.py caches them."""
    config = run.model.config
    longest = run.lengths[-1]
    windows = [block.self_attn.window or longest for block in run.model.layers]
    tokens = sum(min(window, longest) for window in windows)
    return 2 * tokens * config.n_kv_head * config.head_dim * run.machine.dtype.itemsize


def table(lines):
    """Markdown: a row a line and length, a column a task; mean ± standard deviation of seeds."""
    names = [*TASKS, "average"]
    rows = [["run", "context", *names], ["---"] * (len(names) + 2)]
    for label, runs in lines.items():
        for length in runs[0].lengths:
            row = [label, f"{length:,}"]
            for name in names:
                scores = [run.found["ruler"][length][name] for run in runs]
                spread = f" ± {np.std(scores, ddof=1):.3f}" if len(runs) > 1 else ""
                row.append(f"{np.mean(scores):.3f}{spread}")
            rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_json(runs, cfg):
    about = dict(
        command=shlex.join(sys.argv),
        device=runs[0].machine.name,
        torch=torch.__version__,
        revision=git_revision(),
        settings=asdict(cfg),
        cache_bytes={str(run.folder): cache_bytes(run) for run in runs},
        runs={str(run.folder): run.found["ruler"] for run in runs},
    )
    prepare_data.write_atomically(cfg.out, json.dumps(about, indent=1))


# ---- The command --------------------------------------------------------------------------------


def check_room(runs, cfg):
    """Refuse what cannot be asked before minutes go into what can."""
    for run in shortest_first(runs):
        for task in TASKS:
            plant_all(run, task, run.T)
    if cfg.out:
        check(not Path(cfg.out).is_dir(), f"--out={cfg.out} is a folder: name a file")
        Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)


def main(argv):
    cfg = RulerConfig(**prepare_data.parse_flags({"ruler": RulerConfig}, argv, __doc__))
    runs = open_runs(cfg.for_sample())
    check_room(runs, cfg)
    jobs = [(run, length) for run in runs for length in run.lengths]
    for run, length in tqdm(jobs, "asking", disable=None):  # None: on a terminal only
        scores = {task: share_right(run, task, length) for task in TASKS}
        run.found["ruler"][length] = scores | dict(average=float(np.mean([*scores.values()])))
        if cfg.out:
            write_json(runs, cfg)
    lines = lines_of(runs)
    print(f"share of answers that are exactly right\n\n{table(lines)}\n")
    for label, (run, *_) in lines.items():
        size = cache_bytes(run) / 1e6
        print(f"{label}: {size:,.1f} MB of keys and values for {run.lengths[-1]:,} tokens")


if __name__ == "__main__":
    prepare_data.run_main(main)
