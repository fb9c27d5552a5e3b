"""Ask a trained model for text, or how far beyond its training context it still works.

    python sample.py                          # the newest run: every default probe, by length
    python sample.py out/rnope-swa out/rope   # runs side by side; runs that differ only in their
                                              # seed become one line, mean ± standard deviation
    python sample.py --max_multiple=256 --log_scale --heatmap
    python sample.py --prompt="def main("     # also --prompt=FILE:path, or - for stdin
    python sample.py --show_attention         # where a token looks, in a layer of each kind
    python sample.py --export=FOLDER          # what transformers reads, if the layers are S and N
    python sample.py FOLDER --text=book.txt   # a cohere2 model of transformers, on any text

The probes
    loss       Bits per byte of the last T/4 tokens of each row. T is the training context. A model
               that makes use of a longer context goes down to the right, one that breaks goes up.
    copy       Bits per byte of a passage at the end of each row: "first" as the row stands, "again"
               with a copy of the passage at a random earlier place. The gap is what the model
               retrieves. Models of any size show it.
    needle     Share of questions about facts hidden in the text that are answered exactly: each
               token of the answer is the likeliest one, given those before it. No training row has
               facts or questions of this kind. Small models answer few.
    heatmap    The same, with the fact at fixed depths: 0% is the row's start, 100% its end.
    attention  Where the queries that produce an answer look, with the fact in the middle of the row
               (the paper's part 1), by kind of layer: shares on the first 10 tokens ("begin"), the
               fact ("needle"), the question and the answer so far ("qc") and the rest ("context").
               Entropy is in bits. Means over heads, queries and rows.

How to read them: rows are cut from text that the model was not trained on. The same tokens are
scored at every length, with more or less context before them. What is put into a row stands at the
same share of its length, so farther back in a longer row. Read loss beside the others: a model of
windows alone keeps its loss and retrieves nothing. The numbers are kept in the run's probe.json; a
later call replaces it.

Does NOT include: speed, memory and RULER's tasks (see results/), models of transformers other than
cohere2, chat, beam search.
"""

import json
import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import prepare_data
from model import ModelConfig, UsageError, check, check_ranges, flag, visible, warn
from train import (
    DTYPES,
    RESUMABLE,
    Machine,
    load_run,
    newest_run,
    passage_length,
    plant_passage,
    provenance,
    stream,
    warn_idle,
)

CAPTIONS = {
    "loss": "bits per byte of the last T/4 tokens",
    "copy": "bits per byte of a passage",
    "needle": "share of questions answered exactly",
    "heatmap": "share of questions answered exactly, by depth of the fact",
    "attention": "share of the answer's attention",
}
TOKENS_AT_ONCE = 2**17  # in a batch of rows
LOGITS_AT_ONCE = 2**28
BEGIN = 10  # tokens at a row's beginning, which draw attention whatever they say
PARTS = 32  # of the context, in the curve of attention by position
override = partial(flag, None, "instead of the run's", group="the model, changed for the probes")
text_flag = partial(flag, group="text generation")


@dataclass
class SampleConfig:
    runs: tuple[str, ...] = flag(
        (), "folders of runs, folders or hub ids of cohere2; none: the newest run", positional=True
    )
    probe: str = flag("loss,copy,needle", "some of loss, copy, needle, heatmap, attention")
    max_multiple: int = flag(16, "longest context, in training contexts", least=1)
    factor: int = flag(2, "from one length to the next", least=2)
    samples: int = flag(32, "rows scored for each number", least=1)
    needles: int = flag(4, "facts in a row", least=1, most=10_000)
    digits: int = flag(7, "digits of an answer", least=1, most=18)
    heatmap: bool = flag(False, "add the heatmap probe: needle by depth of the fact")
    text: tuple[str, ...] = flag((), "files, folders or a dataset to cut rows from; none: its val")
    show_attention: bool = flag(False, "where a token looks: the prompt's last, or of a question")
    export: str = flag("", "folder to write model and tokenizer to, for transformers")
    plot: str = flag("", "file of the figure; empty: probe.png in the first run")
    block_size: int | None = override()
    log_scale: bool | None = override()
    attn_scale: float | None = override()
    window: int | None = override()
    rope_theta: float | None = override()
    attention: str | None = override()
    prompt: str | None = text_flag(None, "text to continue; FILE:path reads a file, - stdin")
    max_new_tokens: int = text_flag(500, "tokens to generate", least=1)
    temperature: float = text_flag(0.8, "0: always the likeliest token")
    top_k: int | None = text_flag(None, "sample among the k likeliest tokens", least=1)
    top_p: float | None = text_flag(
        None, "sample among the fewest tokens of this probability", most=1
    )
    seed: int = flag(1337, "seed of sampling and of what is put into rows", most=2**32 - 1)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag("auto", "auto: the run's own", choices=DTYPES)

    def __post_init__(self):
        check_ranges(self)
        names = self.probe.split(",")
        if self.heatmap:
            names.append("heatmap")
        check(set(names) <= PROBES.keys(),
              f"--probe={self.probe}: choose from {', '.join(PROBES)}")
        self.probes = [name for name in PROBES if name in names]
        plot = Path(self.plot or "probe.png")
        check(plot.suffix in (".png", ".pdf", ".svg") and plot.parent.is_dir(),
              f"--plot={plot}: name a .png, .pdf or .svg file in a folder that exists")


class Run:
    """A trained model and the text that it is scored on.

    folder: of a run of train.py, or a folder or hub id that `GPT.from_pretrained` reads.
    """

    def __init__(self, folder, cfg):
        self.cfg = cfg
        self.folder = Path(folder)
        self.out = self.folder if self.folder.is_dir() else Path("out", folder)
        known = ModelConfig.__annotations__
        changed = {name: x for name, x in vars(cfg).items() if name in known and x is not None}
        self.machine = Machine(cfg.device, cfg.dtype)
        try:
            self.model, self.train, self.meta = load_run(folder, self.machine.device, **changed)
            if cfg.dtype == "auto" and self.machine.has_bfloat16:
                self.machine.dtype = getattr(torch, self.train.dtype)
            if self.model.dtype != self.machine.dtype:
                self.model.float()  # as autocast expects its weights
        except torch.OutOfMemoryError:
            raise UsageError(f"{folder} is too large for {self.machine.name}: add --device=cpu, or "
                             "use a larger card") from None
        self.changed = changed
        warn_idle(changed, self.model.config)
        self.enc = prepare_data.encoding(self.meta["tokenizer"])
        self.begin = getattr(self.enc, "first", [])  # the token that its rows begin with, if any
        size = self.model.config.vocab_size
        check(self.enc.n_vocab <= size, f"the tokenizer of {folder} has {self.enc.n_vocab} tokens, "
              f"its embedding {size}: remove the tokens that were added")
        self.T = self.model.config.block_size
        # In tokens: T, factor * T, factor**2 * T, ..., max_multiple * T.
        self.lengths = sorted({self.T * min(cfg.factor**k, cfg.max_multiple) for k in range(64)})
        self.found = defaultdict(dict)  # probe: {length: {name: number}}

    @cached_property
    def data(self):
        """What rows are cut from: the run's own dataset, or what --text names."""
        data_dir = self.train.data_dir
        if not self.cfg.text:
            own = self.meta.get("val_sha256")
            check(own, f"{self.folder} is no run of train.py: name a text with --text")
            data = prepare_data.load_data(Path(data_dir, self.train.dataset))
            check(data.meta["val_sha256"] == own, f"{self.folder} was trained on another "
                  f"{data.folder}: make that one again, or name a text with --text")
            return data
        name, *others = self.cfg.text
        folder = Path(data_dir, name)
        if not folder.exists() and name not in prepare_data.KNOWN:
            folder = Path(name)
        prepared = name in prepare_data.KNOWN or (folder / "train.bin").exists()
        if others or not prepared:
            paths = {str(Path(path).resolve()) for path in self.cfg.text}
            check(not paths & set(self.meta.get("dataset", [])),
                  f"--text={name}: {self.folder} was trained on it")
            return prepare_data.encode_files(self.cfg.text, self.enc, data_dir)
        data = prepare_data.load_data(folder)
        fits = data.meta["tokenizer"] == self.meta["tokenizer"]
        seen = [*self.meta.get("earlier_texts", []), self.meta.get("train_sha256")]
        check(fits and data.meta["train_sha256"] not in seen,
              f"--text={name}: {self.folder} has other tokens, or was trained on it")
        return data

    @property
    def text(self):
        """Token ids that the model was not trained on."""
        return self.data.train if self.cfg.text else self.data.val

    @cached_property
    def ends(self):
        """Where the rows end in the text, at every length. UsageError if there are none."""
        check(self.T >= 4, f"--block_size={self.T}: a quarter of it is scored, so use 4 or more")
        size = len(self.text)
        most = (size - 1) // self.T
        check(most, "the text is shorter than a row: name a longer one with --text, or use a "
              "smaller --block_size")
        check(self.cfg.max_multiple <= most,
              f"the text is too short: use --max_multiple={most} or less")
        # The longest context fits, and other lengths seldom move the first end.
        first = max(self.lengths[-1] + 1, size // 4)
        return np.linspace(first, size, self.cfg.samples).astype(int)

    def rows(self, length):
        """(samples, length + 1) token ids."""
        return self.data.rows(self.text, self.ends - length - 1, length + 1)

    @torch.no_grad()
    def predict(self, rows, n):
        """Yield logits (B, m, vocabulary) and targets (B, m), which cover the last n tokens."""
        rows = np.array(rows)
        rows[:, : len(self.begin)] = self.begin
        n_vocab = self.enc.n_vocab
        size = min(TOKENS_AT_ONCE // rows.shape[1], LOGITS_AT_ONCE // (n * n_vocab))
        m = LOGITS_AT_ONCE // n_vocab  # of a single row whose logits are too many
        for batch in self.machine.to_device(rows).split(max(1, size)):
            with self.machine.autocast():
                x = self.model.hidden(batch[:, :-1], first=batch.size(1) - 1 - n)
            for some, targets in zip(x.split(m, 1), batch[:, -n:].split(m, 1), strict=True):
                with self.machine.autocast():
                    logits = self.model.head(some)
                # The model's vocabulary is padded: ids from n_vocab on stand for nothing.
                yield logits[..., :n_vocab], targets


# ---- The probes: each gives numbers by name, for a run and a length of context ------------------


def bits_of_last(run, rows, n):
    """Bits per byte of the last n tokens of each row."""
    nats = 0.0
    for logits, targets in run.predict(rows, n):
        nats += cross_entropy(logits.mT, targets, reduction="sum").item()
    size = prepare_data.count_bytes(run.enc, rows[:, -n:])
    return nats / math.log(2) / size


def probe_loss(run, length):
    return dict(bits_per_byte=bits_of_last(run, run.rows(length), run.T // 4))


def probe_copy(run, length):
    rows = run.rows(length)
    n = passage_length(run.T)
    first = bits_of_last(run, rows, n)
    plant_passage(rows, n, stream("copy", run.cfg.seed).random(len(rows)))
    return dict(again=bits_of_last(run, rows, n), first=first)


WORDINGS = (  # before the answer | the answer | after it
    "\nThe secret code of {key} is| {value}|.\n",
    "\n# {key}:| {value}|\n",
    "\n{key} =| {value}|\n",
    '\n    "{key}":| {value}|,\n',
    "\nset_{key}(|{value}|)\n",
    "\nYou can call {key} at| {value}|, they said.\n",
)


def new_facts(run, rng):
    """Facts in one wording: of each, the token ids before its answer, of it, and after it."""
    wording = rng.choice(WORDINGS)
    facts = {}  # by key, so that none comes twice
    while len(facts) < run.cfg.needles:
        key = "".join(rng.choice(list(kind)) for kind in ["bdfgklmnprstvz", "aeiou"] * 3)
        value = f"{rng.integers(10**run.cfg.digits):0{run.cfg.digits}}"
        parts = wording.format(key=key, value=value).split("|")
        # Part by part, so that fact and question are cut into the same tokens.
        facts[key] = [prepare_data.encode(run.enc, part) for part in parts]
    return list(facts.values())


def hide(text, facts, depths, begin):
    """Put facts, arrays of ids, into text at these shares of it: (ids, their places in text).

    The first `begin` tokens of the text stay in front of them.
    """
    places = begin + (depths * (len(text) - begin)).astype(int)
    sizes = [len(fact) for fact in facts]
    return np.insert(text, places.repeat(sizes), np.concatenate(facts)), places


def plant(run, row, i, depth=None):
    """Row i with facts in its text, a question at its end, and the answer.

        text fact text FACT text fact fact text | question answer

    depth: where the FACT that is asked for stands, 0 .. 1; None: at random like the others.
    Returns ids (tokens of the row,), tokens of the answer, and three places in ids: where the FACT
    begins and ends, and where the question begins.
    """
    rng = stream("needle", run.cfg.seed, i)
    facts = new_facts(run, rng)
    depths = rng.random(len(facts))  # shares of the room: alike at every length
    if depth is not None:
        depths[0] = depth
    question = np.concatenate(facts[0][:2])
    wholes = [np.concatenate(fact) for fact in facts]
    sizes = np.array([len(whole) for whole in wholes])
    needed = sizes.sum() + len(question)
    check(needed <= len(row), f"{run.folder}: facts and question take {needed} tokens, a row at "
          f"1x has {len(row)}: use fewer --needles or --digits, or --probe=loss,copy")
    text, places = hide(row[needed:], wholes, depths, len(run.begin))
    start = places[0] + sizes[places < places[0]].sum()
    cuts = [start, start + sizes[0], len(text)]
    return np.concatenate([text, question]), len(facts[0][1]), cuts


def plant_all(run, length, depth=None):
    return [plant(run, row, i, depth) for i, row in enumerate(run.rows(length))]


def probe_needle(run, length, depth=None):
    right = 0
    for row, n, _ in plant_all(run, length, depth):
        [(logits, targets)] = run.predict(row[None], n)
        right += logits.argmax(-1).equal(targets)
    return dict(answered=right / run.cfg.samples)


def probe_heatmap(run, length):
    return {f"{depth}%": probe_needle(run, length, depth / 100)["answered"]
            for depth in range(0, 101, 10)}


def watch_attention(run, row, n, see):
    """Call see(letter, weights) for each layer: (H, n, S), of a row's last n queries on its S keys.

    Only these queries' weights are computed: memory is linear in the row. Returns what run.predict
    yields.
    """

    def watch(layer, inputs, where):
        q, k, _ = layer.qkv(*inputs, where["rotation"], where["query_scale"])
        q = q[0, :, -n:].float()
        k = k[0].float().repeat_interleave(len(q) // k.size(1), 0)
        j = torch.arange(k.size(1), device=k.device)
        seen = visible(j[-n:, None], j, layer.window, layer.chunked)
        with torch.autocast(k.device.type, enabled=False):  # or the scores are rounded again
            scores = q @ k.mT / math.sqrt(layer.head_dim)
        see(layer.letter, scores.masked_fill(~seen, -math.inf).softmax(-1))

    hooks = [block.self_attn.register_forward_pre_hook(watch, with_kwargs=True)
             for block in run.model.layers]
    predicted = list(run.predict(row[None], n))
    for hook in hooks:
        hook.remove()
    return predicted


def attention_numbers(weights, cuts):
    """Of attention weights (H, n, S), means over heads and queries, by name. cuts: see plant."""
    mass = weights.mean((0, 1)).cpu().numpy()
    begin, before, needle, after, qc = [part.sum() for part in np.split(mass, [BEGIN, *cuts])]
    entropy = torch.special.entr(weights).sum(-1).mean().item() / math.log(2)
    parts = np.array_split(mass[BEGIN : len(mass) * 97 // 100], PARTS)
    curve = [part.sum() for part in parts]
    return dict(
        begin=begin, needle=needle, context=before + after, qc=qc, entropy=entropy, curve=curve
    )


def probe_attention(run, length):
    numbers = defaultdict(list)
    for row, n, cuts in plant_all(run, length, depth=0.5):

        def see(letter, weights, cuts=cuts):
            for name, number in attention_numbers(weights, cuts).items():
                numbers[f"all {name}"].append(number)
                numbers[f"{letter} {name}"].append(number)

        watch_attention(run, row, n, see)
    return {name: np.mean(each, 0).tolist() for name, each in numbers.items()}


PROBES = dict(
    loss=probe_loss,
    copy=probe_copy,
    needle=probe_needle,
    heatmap=probe_heatmap,
    attention=probe_attention,
)


# ---- Measuring ----------------------------------------------------------------------------------


def open_runs(cfg):
    """The runs that cfg names, or the newest one."""
    folders = cfg.runs or [newest_run()]
    check(len({Path(folder).resolve() for folder in folders}) == len(folders),
          f"a run is named twice in {' '.join(cfg.runs)}")
    return [Run(folder, cfg) for folder in folders]


def shortest_first(runs):
    """The run whose text has the least room refuses first: what it advises does for all."""
    return sorted(runs, key=lambda run: len(run.text) / run.T)


def check_runs(runs, cfg):
    """Refuse what cannot be measured before minutes go into what can; tell of overlap."""
    for run in shortest_first(runs):
        run.rows(run.T)
    if len({run.T for run in runs}) > 1:
        warn("runs of different training contexts score different tokens: compare along a line")
    for run in runs:
        if set(cfg.probes) - {"loss", "copy"}:
            plant_all(run, run.T)
        step = run.meta["step"]
        wanted = run.train.max_iters
        if step < wanted:
            warn(f"{run.folder} was stopped at step {step} of {wanted}")
        n = run.T // 4
        room = len(run.text) - run.ends[0]
        if room < n * (cfg.samples - 1):
            warn(f"{run.folder}: the text is short, so that rows score some tokens twice: use "
                 f"--samples={room // n + 1} or fewer, or a smaller --max_multiple")


def measure(run):
    """Fill run.found and write it to probe.json in the run's folder."""
    for probe in run.cfg.probes:
        bar = tqdm(run.lengths, f"{run.folder} {probe}", disable=None)
        if bar.disable:  # there is no terminal to show it on
            warn(f"{run.folder}: {probe}")
        for length in bar:
            run.found[probe][length] = PROBES[probe](run, length)
    about = provenance(run.machine, settings=vars(run.cfg), model=vars(run.model.config))
    found = json.dumps(about | run.found, indent=1)
    try:
        prepare_data.write_atomically(run.out / "probe.json", found)
    except OSError as error:
        warn(f"could not write {run.out}/probe.json ({error}): its numbers are in the tables alone")


def lines_of(runs):
    """Group runs that differ in their seed only -> {label: [run, ...]}."""
    groups = defaultdict(list)
    for run in runs:
        same = vars(run.train) | dict.fromkeys([*RESUMABLE, "seed"])
        # Second stages start from first ones whose names differ in a number at their end.
        same["init_from"] = run.train.init_from.rstrip("0123456789/")
        key = f"{same} {run.model.config} {run.meta.get('train_sha256')} {run.meta['step']}"
        while run.train.seed in [other.train.seed for other in groups[key]]:
            key += " again"  # a seed that comes twice begins a line of its own
        groups[key].append(run)
    lines = {}
    for group in groups.values():
        label = f"{group[0].folder} ({len(group)} seeds)"
        lines[label.removesuffix(" (1 seeds)")] = group
    return lines


def series(probe, lines):
    """Yield what was found, number by number, as (n, label, kind, name, lengths, y).

    n and label are of the line, kind is of the layers or "", y is (runs, lengths), in "curve"
    (runs, lengths, PARTS).
    """
    for n, (label, runs) in enumerate(lines.items()):
        for key in runs[0].found[probe][runs[0].T]:
            kind, _, name = key.rpartition(" ")
            y = [[found[key] for found in run.found[probe].values()] for run in runs]
            yield n, label, kind, name, runs[0].lengths, np.array(y)


def table(probe, lines):
    """Markdown: a column a length; of attention, a row a length and kind of layer."""
    rows = defaultdict(dict)  # {first cells: {column: cell}}
    for _, label, kind, name, lengths, y in series(probe, lines):
        if name == "curve":
            continue
        for length, each in zip(lengths, y.T, strict=True):
            spread = f" ± {each.std(ddof=1):.3f}" if len(each) > 1 else ""  # over seeds
            tokens = f"{length:9,}"  # so wide, they sort as numbers do
            row = (label, kind, tokens) if kind else (label, name)
            rows[row][name if kind else tokens] = f"{each.mean():.3f}{spread}"
    columns = sorted(set().union(*rows.values()))
    head = ["run", *[""] * (len(row) - 1), *columns]
    body = [[*row, *(cells.get(column, "") for column in columns)] for row, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


# ---- The figure ---------------------------------------------------------------------------------

PANELS = (  # probe, the numbers that are drawn, title
    ("needle", ["answered"], "Does it find a fact that it was told once?"),
    ("copy", ["again", "first"], "What does a passage cost again? (dashed: the first time)"),
    ("loss", ["bits_per_byte"], "Does a longer context still help?"),
    ("attention", ["needle"], "How much does the answer look at the fact?"),
    ("attention", ["curve"], "Where in the longest context does it look? (dotted: the fact)"),
)


def draw_lines(axis, panel, lines):
    """A line for each of `lines` and each kind of layer; a band from least to most over seeds."""
    probe, shown, title = panel
    ends = []
    for n, label, kind, name, x, y in series(probe, lines):
        if kind == "all" or name not in shown:
            continue
        if name == "curve":
            x = (np.arange(PARTS) + 0.5) / PARTS * 97  # the last 3 % are left out
            y = y[:, -1]
        axis.axvline(50 if name == "curve" else x[0], color="gray", linestyle=":")
        style = "--" if name == "first" else "o-" if kind in ("", "N") else "s:"
        axis.plot(x, y.mean(0), style, color=f"C{n}", clip_on=False)
        axis.fill_between(x, y.min(0), y.max(0), color=f"C{n}", alpha=0.2)
        if name != "first":
            ends.append((y[:, -1].mean(), x[-1], f"   {label} {kind}", f"C{n}"))
    top = 1 if probe == "needle" else None
    axis.set(title=title, xlabel="place in the context, %", ylabel=CAPTIONS[probe], ylim=(0, top))
    axis.spines[["top", "right"]].set_visible(False)
    if shown != ["curve"]:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.tick_params("x", rotation=30)
        axis.set_xlabel("context, tokens (dotted: in training)")
    # Names that would run into each other, or into the axis, are moved apart.
    ends.sort()
    heights = np.array([y for y, *_ in ends]) / axis.get_ylim()[1]
    for _ in range(100):
        overlap = (0.06 - np.diff(heights)).clip(0)
        heights[1:] += overlap / 2
        heights[:-1] -= overlap / 2
        heights = heights.clip(0.03)
    for height, (_, x, name, color) in zip(heights, ends, strict=True):
        axis.text(x, height, name, color=color, va="center", transform=axis.get_xaxis_transform())


def draw_map(axis, label, runs):
    *_, depths, lengths, grids = zip(*series("heatmap", {label: runs}), strict=True)
    image = axis.imshow([y.mean(0) for y in grids], vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(lengths[0])), [f"{x:,}" for x in lengths[0]])
    axis.set_yticks(range(len(depths)), depths)
    axis.set(title=label, xlabel="context, tokens", ylabel="depth of the fact")
    axis.figure.colorbar(image, label="share of questions")


def draw(lines, cfg, path):
    """The tables as one figure of two columns, the heat maps last."""
    from matplotlib.figure import Figure

    panels = [(draw_lines, panel, lines) for panel in PANELS if panel[0] in cfg.probes]
    if "heatmap" in cfg.probes:
        panels += [(draw_map, *line) for line in lines.items()]
    height = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(13, 4.5 * height), layout="constrained")
    for n, (draw_panel, *what) in enumerate(panels, 1):
        draw_panel(figure.add_subplot(height, 2, n), *what)
    with prepare_data.atomic_path(path) as making:
        figure.savefig(making, dpi=160)


# ---- The command --------------------------------------------------------------------------------


def read_prompt(prompt):
    if prompt == "-":
        return sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    if prompt.startswith("FILE:"):
        return Path(prompt.removeprefix("FILE:")).read_text("utf-8", "surrogateescape")
    return prompt


def encode_prompt(run, prompt):
    ids = [*run.begin, *prepare_data.encode(run.enc, prompt)]
    return np.array(ids or [run.enc.eot_token])


def write_text(run, prompt):
    """Print the prompt and what follows it."""
    cfg = run.cfg
    end = run.enc.eot_token
    idx = run.machine.to_device(encode_prompt(run, prompt)[None])
    torch.manual_seed(cfg.seed)
    with run.machine.autocast():
        out = run.model.generate(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p,
                                 stop=end, n_vocab=run.enc.n_vocab)
    print(run.enc.decode(out[out != end].tolist()))


def show_attention(run, prompt):
    """Print where a prompt's last token looks most: of each kind of layer, the one surest of it.

    Means over heads. prompt None: a row with facts in it, a question and its answer's first token,
    unless the answer is that token.
    """
    truth = ""
    if prompt is None:
        row, n, _ = plant_all(run, run.lengths[-1], depth=0.5)[0]
        ids, rest = np.split(row, [len(row) - n + (n > 1)])
        truth = f" (right: {run.enc.decode(rest.tolist())!r})"
    else:
        ids = encode_prompt(run, prompt)
    surest = {}  # shares of attention by kind of layer

    def see(letter, weights):
        shares = weights.mean((0, 1))
        if letter not in surest or shares.max() > surest[letter].max():
            surest[letter] = shares

    def words(start, stop):
        return run.enc.decode(ids[max(0, start) : stop].tolist()).replace("\n", "⏎")

    # A target is added to the row, which is not looked at.
    [(logits, _)] = watch_attention(run, np.append(ids, run.enc.eot_token), 1, see)
    last = len(ids) - 1
    told = run.enc.decode([logits.argmax().item()])
    print(f"after …{words(last - 60, last + 1)} the model expects {told!r}{truth}")
    for letter, shares in surest.items():
        print(f"\n{letter} layer, shares of attention")
        seen = shares.count_nonzero()
        for place in shares.argsort(descending=True)[: min(10, seen)].tolist():
            around = f"{words(place - 30, place)}[{words(place, place + 1)}]"
            after = words(place + 1, place + 12)
            print(f"{shares[place]:7.2%}  {last - place:9,} tokens back  …{around}{after}…")


def export(run):
    """Write a folder that transformers reads, with the tokenizer."""
    folder = run.cfg.export
    check(len(run.cfg.runs) < 2, "--export writes one run: name one")
    sharper = run.model.config.log_scale or run.model.config.attn_scale
    check(not sharper, "cohere2 has no log_scale and no attn_scale: add --no-log_scale "
          "--attn_scale=0, though it finds less far beyond its training context then")
    check(not Path(folder).exists(), f"--export={folder} exists: name a new folder")
    # Rows that pad the embedding stand for no token: transformers would generate them.
    run.model.config.vocab_size = run.enc.n_vocab
    weight = run.model.embed_tokens.weight
    weight.data = weight.data[: run.enc.n_vocab]
    with prepare_data.atomic_path(folder) as making:
        run.model.save_pretrained(making, prepare_data.pretrained_tokenizer(run.enc))
    print(f"{folder} is what AutoModelForCausalLM and AutoTokenizer read")


def compare(runs, cfg):
    """Ask the probes of the runs. What is found goes to files, into tables and a figure."""
    check_runs(runs, cfg)
    for run in runs:
        print(f"{run.folder}: trained at {run.T:,} tokens, layers  {run.model.plan()}", flush=True)
        if run.changed:
            print(f"changed for the probes: {run.changed}")
        measure(run)
    lines = lines_of(runs)
    for probe in cfg.probes:
        print(f"\n{CAPTIONS[probe]}, by context in tokens\n\n{table(probe, lines)}")
    path = cfg.plot or runs[0].out / "probe.png"
    try:
        draw(lines, cfg, path)
        print(f"\nnumbers in probe.json of each run, figure in {path}")
    except ImportError:
        print("\nnumbers in probe.json of each run; pip install matplotlib for the figure")


def main(argv):
    cfg = SampleConfig(**prepare_data.parse_flags({"probes": SampleConfig}, argv, __doc__))
    runs = open_runs(cfg)
    if cfg.export:
        export(runs[0])
    elif cfg.show_attention or cfg.prompt is not None:
        prompt = cfg.prompt and read_prompt(cfg.prompt)
        answer = show_attention if cfg.show_attention else write_text
        for run in runs:
            print(f"{run.folder}:", file=sys.stderr, flush=True)
            answer(run, prompt)
    else:
        compare(runs, cfg)


if __name__ == "__main__":
    prepare_data.run_main(main)
