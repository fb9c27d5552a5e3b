"""The tables and figures of part1.md to part3.md, ablations.md, hybrids.md and frontier.md.

    python results/tables.py         # print the tables and draw the figures, from the .json files

variants.json holds what `train.py`, `sample.py`, `ruler.py` and `bench.py` found by the commands on
those pages, one number for each seed. Cells are the mean of the seeds (least–most). The first
tables of speed.md and cost.md come from it, too. frontier.json gives frontier.md's figure and
most of its tables.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
from model import LAYERS, PRESETS, ModelConfig
from prepare_data import parse_flags, run_main

HERE = Path(__file__).resolve().parent

SHORT = ("1024", "4096", "16384")
LONG = (*SHORT, "65536")
PAPER = ("rope", "qk-norm", "nope")
MIXED = ("rope", "rnope", "rnope-swa", "rnope-swa-log")
STAGES = ("rope, second stage", "rope, theta 2M, second stage", "rnope-swa, second stage",
          "rnope-swa-log, second stage")
HYBRIDS = ("rope", "rnope-swa", "rnope-swa-log", "swan", "llama4", "exaone4", "smollm3", "olmo3",
           "gemma3", "gpt-oss")
ASKED = (*HYBRIDS, "exaone4, log_scale")
THETAS = ("rope", "rope, theta 1e5", "rope, theta 1e6", "rope, theta 1e7")
ABLATIONS = ("SN", "SSSSSSSN", "window 32", "window 256", "window 512", "2 key/value heads",
             "1 key/value head")
PLAIN = ("rnope-swa", *ABLATIONS, "swan without log_scale", "swa", "plain")
SCALED = ("rnope-swa-log", *[f"{name}, log_scale" for name in ABLATIONS], "swan")
KINDS = (  # caption, probe, number
    ("questions answered", "needle", "answered"),
    ("a passage again, bits per byte", "copy", "again"),
    ("last 256 bytes, bits per byte", "loss", "bits_per_byte"),
)
NUMBERS = {  # captions of frontier.json: probe, number
    "questions answered": ("needle", "answered"),
    "a passage the first time": ("copy", "first"),
    "a passage again": ("copy", "again"),
    "last 256 bytes": ("loss", "bits_per_byte"),
}
COSTS = ("a passage again", "last 256 bytes")
FIGURES = {  # page: lines, probes. Colours go by place: rope comes first and rnope-swa-log second
    "part1": (PAPER, ["needle", "attention"]),
    "part2": (("rope", "rnope-swa-log", "rnope", "rnope-swa"), ["needle", "attention"]),
    "part3": (("rope, theta 2M, second stage", "rnope-swa-log, second stage",
               "rnope-swa, second stage", "rope, second stage"), ["needle", "copy"]),
    "ablations": (("rnope-swa", "SN", "SSSSSSSN", "window 32", "window 512"), ["needle", "copy"]),
    "hybrids": (("rnope-swa", "rnope-swa-log", "swan", "llama4", "exaone4", "olmo3", "gemma3",
                 "gpt-oss", "exaone4, log_scale"), ["needle", "copy"]),
}


def rounded(x, digits):
    """Halves go up, where Python takes 0.125 to 0.12 and 0.375 to 0.38."""
    return f"{x + 1e-9:.{digits}f}"


def cell(seeds, digits=2):
    assert len(seeds) > 1, seeds
    mean, low, high = (rounded(x, digits) for x in (np.mean(seeds), min(seeds), max(seeds)))
    return f"{mean} ({low}–{high})"


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def context_table(caption, rows, lengths):
    """A row a name of rows, {name: cells}, a column a length of context; cells may end early."""
    lines = [[name, *cells, *[""] * (len(lengths) - len(cells))] for name, cells in rows.items()]
    return markdown([caption, *[f"{int(length):,}" for length in lengths]], lines)


def by_length(found, names, lengths, kind):
    caption, probe, number = kind
    rows = {}
    for name in names:
        numbers = found["probes"][name][probe]
        rows[name] = [cell(numbers[length][number]) for length in lengths]
    return context_table(caption, rows, lengths)


def after_training(found, names):
    rows = []
    for name in names:
        numbers = found["train"][name]
        rows.append([name, cell(numbers["validation"], 3), cell(numbers["copy"], 3)])
    return markdown(["bits per byte", "validation", "a passage again"], rows)


def attention(found, names):
    """Where the queries that produce the answer look: a row a model, kind of layer and length."""
    columns = ("begin", "needle", "context", "qc", "entropy")
    rows = []
    for name in names:
        for length, numbers in found["probes"][name]["attention"].items():
            for kind in sorted({key.split()[0] for key in numbers}):
                means = [np.mean(numbers[f"{kind} {column}"]) for column in columns]
                shares = [f"{mean:.4f}" for mean in means[:-1]]
                rows.append([name, kind, f"{int(length):,}", *shares, f"{means[-1]:.2f}"])
    return markdown(["model", "layers", "tokens", *columns], rows)


def ruler(found, names, lengths):
    """The average over RULER's tasks, a row a name."""
    rows = {}
    for name in names:
        scores = found["ruler"][name]
        rows[name] = [cell(scores[x]["average"]) if x in scores else "" for x in lengths]
    return context_table("RULER's tasks, average", rows, lengths)


def ruler_tasks(found, names, length):
    tasks = list(found["ruler"]["rope"]["1024"])[:-1]
    rows = []
    for name in names:
        scores = found["ruler"][name][length]
        rows.append([name, *[rounded(np.mean(scores[task]), 2) for task in tasks]])
    return markdown([f"{int(length):,} tokens", *tasks], rows)


def costs(found, names, T=65536):
    """Bytes of keys and values, and the speed of training, at a context of T tokens."""
    rates = {r["preset"]: r["tokens_per_second"] for r in found["speed"] if r["T"] == T}
    rows = []
    for name in names:
        config = ModelConfig(**PRESETS[name])
        seen = [T if LAYERS[letter][1] == "full" else config.window for letter in config.layers]
        size = 2 * 2 * config.n_embd * sum(seen)  # keys and values, two bytes each
        rate = rates.get(name)
        rate = f"{rate:,.0f}, {rate / rates['rope']:.2f}" if rate else ""
        loss = "as rnope-swa"
        if name != "rnope-swa-log":
            loss = cell(found["train"][name]["validation"], 3)
        rows.append([name, config.layers, loss, f"{size / 1e6:,.0f}", rate])
    head = ["preset", "layers", "validation, bits per byte",
            f"cache of {T:,} tokens, MB (computed)", f"trained tokens/s at {T:,}, over rope"]
    return markdown(head, rows)


def speed(found):
    """Whole training steps of rope and rnope-swa, a row a length of context."""
    rows = []
    for T in sorted({row["T"] for row in found["speed"]}):
        both = {row["preset"]: row for row in found["speed"] if row["T"] == T}
        rope = both["rope"]
        swa = both["rnope-swa"]
        rates = [rope["tokens_per_second"], swa["tokens_per_second"]]
        times = [rates[1] / rates[0], swa["flops_allow"]]
        peak = max(rope["peak_gb"], swa["peak_gb"])
        rows.append([f"{T:,}", *[f"{rate:,.0f}" for rate in rates],
                     *[f"{ratio:.2f}" for ratio in times], f"{peak:.1f}"])
    head = ["tokens of a row", "rope, tokens/s", "rnope-swa", "over rope", "FLOPs allow",
            "peak GB, at most"]
    return markdown(head, rows)


def reading_and_writing(found):
    rope, swa = found["decode"]
    numbers = {
        "cache, MB": "cache_mb",
        "prefill, tokens/s": "prefill_tokens_per_second",
        "decoding, a kernel at a time, tokens/s": "decode_tokens_per_second",
        "decoding as one CUDA graph, tokens/s": "graph_tokens_per_second",
    }
    rows = []
    for title, name in numbers.items():
        ratio = swa[name] / rope[name]
        rows.append([title, f"{rope[name]:,.0f}", f"{swa[name]:,.0f}", f"{ratio:.2f}"])
    return markdown(["", "rope", "rnope-swa", "over rope"], rows)


def tables(found):
    """{page: its tables}."""

    def lengths(names, several):
        return [by_length(found, names, several, kind) for kind in KINDS]

    far = ("1024", "262144")
    to_far = [f"{name} to 262,144" for name in ("rnope-swa", "rnope-swa-log", "swan", "llama4")]
    asked_far = [*to_far, "exaone4, log_scale to 262,144"]
    before = ["rnope-swa to 65,536", "rnope-swa-log to 65,536"]
    return {
        "part1": [after_training(found, PAPER), *lengths(PAPER, SHORT), attention(found, PAPER)],
        "part2": [*lengths(MIXED, SHORT), attention(found, MIXED[1:])],
        "part3": [
            after_training(found, STAGES),
            *lengths(STAGES, LONG),
            by_length(found, before, ("1024", "65536"), KINDS[0]),
            *[by_length(found, THETAS, SHORT, kind) for kind in KINDS[:2]],
            ruler(found, STAGES[1:], ("1024", "8192", "65536")),
        ],
        "ablations": [
            after_training(found, ["rnope-swa", *ABLATIONS, "swan", "swa", "plain"]),
            *[by_length(found, PLAIN, SHORT, kind) for kind in KINDS[:2]],
            *[by_length(found, SCALED, SHORT, kind) for kind in KINDS[:2]],
        ],
        "hybrids": [
            costs(found, HYBRIDS),
            *lengths(ASKED, SHORT),
            by_length(found, asked_far, far, KINDS[0]),
            by_length(found, to_far, far, KINDS[1]),
            ruler(found, HYBRIDS, (*SHORT, "262144")),
            ruler_tasks(found, HYBRIDS, "1024"),
            ruler_tasks(found, HYBRIDS, "16384"),
            ruler_tasks(found, [x for x in HYBRIDS if "262144" in found["ruler"][x]], "262144"),
        ],
        "speed": [speed(found)],
        "cost": [reading_and_writing(found)],
    }


def by_line(rows):
    """Rows of frontier.json -> {line: {caption: values}}, values[length][seed]."""
    numbers = defaultdict(dict)
    for row in rows:
        line, caption = row["name"].split(": ")
        numbers[line][caption] = row["values"]
    return numbers


def drawn(found):
    """The lines of the figure, as `by_line` gives them."""
    return by_line(found["rows"] + found["not_in_the_readme"])


def short_cells(values):
    """Cells of values[length][seed], without a range where there is one seed."""
    return [cell(seeds) if len(seeds) > 1 else rounded(*seeds, 2) for seeds in values]


def cost_columns(lengths):
    return [f"{caption}, {length:,}" for caption in COSTS for length in lengths]


def first_and_last(lines, lengths):
    """A row a line, its costs in the shortest and the longest context."""
    rows = []
    for name, numbers in lines.items():
        values = [numbers[caption][n] for caption in COSTS for n in (0, -1)]
        rows.append([name, *short_cells(values)])
    return markdown(["", *cost_columns([lengths[0], lengths[-1]])], rows)


def at_a_million(found, names):
    """What second stages find at 1,048,576 tokens: answers by seed, the costs' means."""
    lengths = (1024, 2**20)
    rows = []
    for name in names:
        seeds = found["how"][name]["million"]
        answers = [f"{seed['needle'][str(2**20)]['answered'] * seed['questions']:.0f} of "
                   f"{seed['questions']}" for seed in seeds]
        costs = [rounded(np.mean([seed[probe][str(length)][number] for seed in seeds]), 2)
                 for probe, number in map(NUMBERS.get, COSTS) for length in lengths]
        rows.append([name, ", ".join(answers), *costs])
    head = ["", f"questions answered at {2**20:,}, by seed", *cost_columns(lengths)]
    return markdown(head, rows)


def frontier(found):
    """The tables of frontier.json: of a line, then of what it is compared with."""
    lengths = found["lengths"]
    lines = drawn(found)
    made = []
    for numbers in lines.values():
        rows = {caption: short_cells(numbers[caption]) for caption in NUMBERS}
        made.append(context_table("", rows, lengths))
    stages = [{line: lines[line]} | by_line(found[stage]) for line, stage in
              (("hybrid", "first_stages"), ("hybrid, second stage", "second_stages"))]
    caption = "questions answered"
    for compared in stages:
        answered = {name: short_cells(numbers[caption]) for name, numbers in compared.items()}
        made.append(context_table(caption, answered, lengths))
        made.append(first_and_last(compared, lengths))
    return [*made, at_a_million(found, stages[1])]


def as_run(found, name, seed):
    """What one seed found, as `sample.draw` takes it."""
    probes = {}
    for probe, by_context in found["probes"][name].items():
        probes[probe] = {
            int(length): {key: seeds[seed] for key, seeds in numbers.items()}
            for length, numbers in by_context.items()
        }
    lengths = sorted(next(iter(probes.values())))
    return SimpleNamespace(found=probes, T=lengths[0], lengths=lengths)


def frontier_lines(found):
    """The runs of frontier.json, as `sample.draw` takes them."""
    lines = {}
    for line, numbers in drawn(found).items():
        answered = numbers["questions answered"]
        lengths = found["lengths"][: len(answered)]
        runs = [SimpleNamespace(found=defaultdict(lambda: defaultdict(dict)), lengths=lengths,
                                T=lengths[0]) for _ in answered[0]]
        lines[line] = runs
        for caption, (probe, number) in NUMBERS.items():
            for length, values in zip(lengths, numbers[caption], strict=True):
                for run, value in zip(runs, values, strict=True):
                    run.found[probe][length][number] = value
    names = {f"{line} ({len(runs)} seed{'s' * (len(runs) > 1)})": runs
             for line, runs in lines.items()}
    return dict(sorted(names.items(), reverse=True))  # rope first


def main(argv):
    parse_flags({}, argv, __doc__)
    found = json.loads((HERE / "variants.json").read_text())
    of_frontier = json.loads((HERE / "frontier.json").read_text())
    for page, its in (tables(found) | dict(frontier=frontier(of_frontier))).items():
        print(f"{page}.md", *its, sep="\n\n", end="\n\n")
    for page, (names, probes) in FIGURES.items():
        lines = {name: [as_run(found, name, seed) for seed in range(3)] for name in names}
        sample.draw(lines, SimpleNamespace(probes=probes), HERE / f"{page}.png")
    probes = ["needle", "copy"]
    sample.draw(frontier_lines(of_frontier), SimpleNamespace(probes=probes), HERE / "frontier.png")


if __name__ == "__main__":
    run_main(main)
