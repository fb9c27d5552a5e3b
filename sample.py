"""Ask a trained model for text, or how far beyond its training context it still works.

    python sample.py                               # the newest run: loss and retrieval by length
    python sample.py out/rnope-swa out/rope        # side by side; runs that differ only in seed
                                                   # become one line, mean ± standard deviation
    python sample.py --max_multiple=256 --log_scale --heatmap
    python sample.py --prompt="def main("

Lengths are multiples of the training context T. Every length scores the same target tokens, so a
column differs from the next in nothing but how much context stands before them:
    loss     bits per byte (and perplexity per token) of the last T / 4 tokens of stretches of text
    needle   share of questions answered exactly, all tokens of the answer, greedily; the facts are
             planted at random depths of the text (prepare_data.plant)
    ruler    share of right answers for each of --tasks, RULER's tasks in small, of a model that was
             trained on them; the paper reports qa, and the average over the others
    attention  where the queries that produce the answer look, by kind of layer: shares on the
             first 10 tokens, the fact asked for, the rest of the context, and the question
    cost     tokens per second of prefill and of cached decoding, and the size of the cache
A RUN may also be a folder in Hugging Face's cohere2 format: the released RNoPE-SWA models.
Does NOT include: sampling from several prompts at once, beam search, chat.
"""

import json
import math
import re
import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import prepare_data
from model import GPT, UsageError, check_ranges, flag, sample_token, visible
from train import RESUMABLE, Machine, TrainConfig, load_run, newest_run

TITLES = {  # probe: (numbers shown and their formats, title)
    "loss": ({"bits_per_byte": "{:.3f}", "perplexity": "{:.3g}"},
             "bits per byte of the last T/4 tokens (perplexity per token)"),
    "needle": ({"accuracy": "{:.3f}"}, "questions answered exactly"),
    "ruler": ({"retrieval": "{:.3f}"}, "right answers, average over the retrieval tasks"),
    "attention": ({"needle": "{:.4f}"}, "attention on the fact asked for, of the answer's queries"),
    "cost": ({"decode_tokens_per_second": "{:,.0f}", "prefill_tokens_per_second": "{:,.0f}",
              "kv_mb": "{:,.1f}"},
             "decoded tokens per second (prefilled tokens per second, MB of KV cache)"),
}


@dataclass
class SampleConfig:
    runs: tuple[str, ...] = flag((), "folders of runs; none: the newest in out/", positional=True)
    prompt: str | None = flag(None, "text to continue, instead of probing")
    max_new_tokens: int = flag(500, "tokens to generate", least=1)
    temperature: float = flag(0.8, "of sampling; 0: always the likeliest token", least=0)
    top_k: int = flag(0, "sample among the k likeliest tokens; 0: all", least=0)
    top_p: float = flag(1.0, "sample among the fewest tokens of this probability", above=0, most=1)
    seed: int = flag(1337, "of sampling, and of the planted facts", least=0, most=2**63 - 1)
    probe: str = flag("loss,needle", "what to measure, of " + ",".join(TITLES), each=TITLES)
    tasks: str = flag(",".join(prepare_data.TASKS), "what the ruler probe asks",
                      each=prepare_data.TASKS)
    cost_rows: int = flag(8, "rows at once for the cost probe", least=1)
    max_multiple: int = flag(16, "longest context, as a multiple of the training context", least=1,
                             most=2**24)
    factor: int = flag(2, "from one length to the next", least=2)
    samples: int = flag(32, "rows scored for each number", least=1)
    questions: int = flag(1, "needle: about different facts, at the end of each row", least=1)
    held_out: bool = flag(False, "questions in words, and about keys, that training never sees")
    haystack: str = flag("", "text of the rows: repeat, noise, or a dataset's train; empty: val")
    heatmap: bool = flag(False, "retrieval by length and depth of the fact, too")
    plot: str = flag("", "file of the figure; empty: probe.png in the first run")
    log_scale: bool | None = flag(None, "instead of the run's: see train.py --help")
    window: int | None = flag(None, "instead of the run's")
    rope_theta: float | None = flag(None, "instead of the run's")
    attention: str | None = flag(None, "instead of the run's: auto, mask, blocks, flash, flex")
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = flag("auto", "bfloat16 on CUDA if auto", choices=("auto", "float32", "bfloat16"))

    def __post_init__(self):
        check_ranges(self)
        plot = Path(self.plot or "probe.png")
        if not plot.parent.is_dir() or plot.suffix not in (".png", ".pdf", ".svg"):
            raise UsageError(f"--plot={plot}: name a .png, .pdf or .svg in a folder that exists")


TOKENS = 2**17  # of the rows that are read at once


def hub_tokenizer(folder):
    """The tokenizer of a Hugging Face folder, as the little of tiktoken.Encoding used here."""
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(folder)
        assert inner.encode("a", add_special_tokens=False)
    except (OSError, ValueError, KeyError, AssertionError):
        raise UsageError(f"{folder} has no tokenizer: it can do --probe=cost only") from None
    return SimpleNamespace(
        name="hub", n_vocab=len(inner), eot_token=inner.eos_token_id,
        decode=partial(inner.decode, skip_special_tokens=True),
        encode_to_numpy=lambda text, **_: np.array(inner.encode(text), dtype=int))


class Run:
    """A trained model with its text and the tokens it is scored on."""

    def __init__(self, folder, cfg, machine):
        changed = {k: v for k in ("log_scale", "window", "rope_theta", "attention")
                   if (v := getattr(cfg, k)) is not None}
        self.folder, self.machine, self.cfg = Path(folder), machine, cfg
        self.train, self.meta = TrainConfig(), None
        about = self.folder / "config.json"
        if about.exists() and b'"model_type"' in about.read_bytes():  # ours has none
            self.model = GPT.from_pretrained(folder, **changed).to(machine.device)
        else:
            self.model, self.train, self.meta = load_run(folder, machine.device, **changed)
        self.T = self.model.config.block_size
        self.kinds = sorted(set(self.model.config.layers))  # of layer: ["N", "S"]

    @cached_property
    def enc(self):
        return prepare_data.encoding(self.meta) if self.meta else hub_tokenizer(self.folder)

    @cached_property
    def data(self):
        if self.meta is None:
            raise UsageError(f"{self.folder} names no text to score: use --prompt or --probe=cost")
        folder = Path(self.train.data_dir) / self.train.dataset
        data = prepare_data.load_data(folder)
        if data.meta["val_sha256"] != self.meta["val_sha256"]:
            raise UsageError(f"{folder} is not the text that {self.folder} was trained on")
        return data

    def text(self, name):
        """Token ids that rows are cut from: val, or what the name of a haystack says."""
        data = self.data
        if name in prepare_data.HAYSTACKS:
            return prepare_data.HAYSTACKS[name](self.enc, 2 * self.T * self.cfg.max_multiple)
        if not name:
            return data.val
        other = prepare_data.load_data(Path(self.train.data_dir) / name)
        if any(other.meta.get(k) != data.meta.get(k) for k in ("tokenizer", "ranks")):
            raise UsageError(f"--haystack={name} has other tokens than {self.folder} learnt from")
        if other.meta["train_sha256"] == data.meta["train_sha256"]:
            raise UsageError(f"--haystack={name}: {self.folder} was trained on that; without the "
                             "flag, the haystack is its validation text")
        return other.train  # none of it was seen in training

    def check(self):
        """UsageError for what the probes cannot ask, before any of them has taken minutes."""
        probes = set(self.cfg.probe.split(","))
        if probes != {"cost"}:
            self.rows(self.T)
        for task in self.cfg.tasks.split(",") if "ruler" in probes else ():
            self.planted(self.T, task=task)
        if "needle" in probes:
            self.planted(self.T)
        if "attention" in probes or self.cfg.heatmap:
            self.planted(self.T, 0.5)

    def rows(self, length, haystack=None):
        """(samples, length + 1) token ids, ending at the same places whatever the length."""
        text = self.text(haystack or self.cfg.haystack)
        longest = self.T * self.cfg.max_multiple + 1
        if longest > len(text):
            raise UsageError(f"the text has {len(text)} tokens, {self.cfg.max_multiple}x asks for "
                             f"{longest}: use --max_multiple={max(1, (len(text) - 1) // self.T)} "
                             "at most")
        first = max(longest, len(text) // 4)
        ends = np.linspace(first, len(text), self.cfg.samples).astype(int)
        return self.data.rows(text, ends - length - 1, length + 1)

    def planted(self, length, depth=None, task="needle", haystack=None):
        """rows, with a task's facts and questions: a list of prepare_data.Planted.

        The same questions at every length. With a depth, one: it is of one fact.
        """
        asked = self.cfg.questions if depth is None else 1
        sizes = max(self.train.needles, asked), self.train.needle_digits, asked
        planted = []
        for i, row in enumerate(self.rows(length, haystack)):
            rng = np.random.default_rng((self.cfg.seed, i))
            drawn = prepare_data.draw_task(self.enc, rng, [task], sizes, self.T, self.cfg.held_out)
            planted.append(prepare_data.plant(row, drawn, rng, depth))
        return planted

    @torch.no_grad()
    def predict(self, rows, n):
        """Logits (B, n, V) and targets (B, n) of the last n tokens of each row, some at a time."""
        some = max(1, TOKENS // rows.shape[1])
        for part in np.array_split(rows, -(-len(rows) // some)):
            x, y = self.machine.put(part[:, :-1], part[:, -n:])
            with self.machine.autocast():
                yield self.model.head(self.model.body(x, last=n)), y


def probe_loss(run, length):
    """Nats on the last T / 4 tokens of each row -> {bits_per_byte, perplexity (per token)}."""
    rows, n, nats = run.rows(length), max(1, run.T // 4), 0.0
    for logits, y in run.predict(rows, n):
        nats += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    targets = rows[:, -n:]
    bits = nats / math.log(2) / prepare_data.token_bytes(run.enc)[targets].sum()
    return dict(bits_per_byte=bits, perplexity=math.exp(nats / targets.size))


def probe_needle(run, length, depth=None):
    """Share of the needle task's answers that are right -> {accuracy}."""
    return dict(accuracy=share_right(run, run.planted(length, depth)))


def share_right(run, planted):
    """Share of answers that are the likeliest token at each of their places."""
    rows, first = np.stack([p.row for p in planted]), min(p.answers[0].start for p in planted)
    found = run.predict(rows, rows.shape[1] - first)
    hits = np.concatenate([(x.argmax(-1) == y).cpu().numpy() for x, y in found])
    exact = [hit[a.start - first : a.stop - first].all()
             for hit, p in zip(hits, planted, strict=True) for a in p.answers]
    return float(np.mean(exact))


def probe_ruler(run, length):
    """Share of right answers, task by task -> {task: share, ..., retrieval: average without qa}.

    `single` is asked in repeated text and in noise too, unless a haystack is given.
    """
    names = run.cfg.tasks.split(",")
    jobs = [(name, name, None) for name in names]
    if "single" in names and not run.cfg.haystack:
        jobs += [(f"single, {haystack}", "single", haystack) for haystack in prepare_data.HAYSTACKS]
    found = {label: share_right(run, run.planted(length, task=name, haystack=haystack))
             for label, name, haystack in jobs}
    retrieval = [share for label, share in found.items() if label != "qa"]
    return found | (dict(retrieval=float(np.mean(retrieval))) if retrieval else {})


SEGMENTS = ("begin", "needle", "context", "qc")  # as in the paper; qc: question and completion
BINS = 32  # of the curve over the context


def probe_attention(run, length):
    """Where the queries that produce the answer look, the fact at 50 % depth -> {layers: [...]}.

    Of each layer: its letter, the mass on each of SEGMENTS, the entropy in bits, and the curve,
    mass in BINS equal parts of the context without its first 10 tokens and its last 3 %. Means
    over heads, answer tokens and rows. Source: arXiv 2501.18795, part 1.
    """
    planted, sums = run.planted(length, 0.5), defaultdict(float)
    n = min(p.answers[0].stop - p.answers[0].start for p in planted)
    segment = np.full((len(planted), length), SEGMENTS.index("context"))
    for where, p in zip(segment, planted, strict=True):
        where[:10] = SEGMENTS.index("begin")
        where[p.asked[0]] = SEGMENTS.index("needle")
        where[p.tail] = SEGMENTS.index("qc")

    def watch(layer, attn, args):
        q, k, _ = attn.qkv(*args[:3])
        q, k = q[:, -n:], k.repeat_interleave(q.size(2) // k.size(2), 2)
        j = torch.arange(length, device=q.device)
        seen = visible(j[-n:, None], j, attn.window, attn.chunked)
        with torch.autocast(q.device.type, enabled=False):
            scores = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) / math.sqrt(q.size(-1))
        p = scores.masked_fill(~seen, -math.inf).softmax(-1)  # (B, H, n, length)
        mass = p.mean((1, 2))
        where = torch.from_numpy(segment[done : done + len(mass)]).to(mass.device)
        shares = [(mass * (where == s)).sum().item() for s in range(len(SEGMENTS))]
        middle = mass[:, 10 : length - length * 3 // 100].sum(0)
        curve = [part.sum().item() for part in middle.tensor_split(BINS)]
        entropy = -(p * p.clamp(min=1e-30).log2()).sum(-1).mean((1, 2)).sum().item()
        sums[layer] += np.array([*shares, entropy, *curve]) / len(planted)

    done = 0
    with ExitStack() as hooks:
        for i, block in enumerate(run.model.blocks):
            hooks.enter_context(block.attn.register_forward_pre_hook(partial(watch, i)))
        for _, y in run.predict(np.stack([p.row for p in planted]), n):
            done += len(y)
    names, found = (*SEGMENTS, "entropy"), zip(run.model.config.layers, sums.values(), strict=True)
    return dict(layers=[dict(zip(names, x.tolist(), strict=False), letter=letter,
                             curve=x[len(names) :].tolist()) for letter, x in found])


@torch.no_grad()
def probe_cost(run, length):
    """What a context costs at inference, for `cost_rows` rows of random tokens at once.

    -> {kv_mb: of the cache, for all rows, prefill_tokens_per_second, decode_tokens_per_second}.
    """
    B, steps, model = run.cfg.cost_rows, 32, run.model
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (B, length))
    (ids,) = run.machine.put(ids)
    with run.machine.autocast():
        caches = model.new_caches(B, length + 2 * steps)
        model.prefill(ids[:, :4096], model.new_caches(B, min(length, 4096)))  # warm up
        began = run.machine.clock()
        x = model.prefill(ids, caches)
        prefilled = run.machine.clock()
        step = model.decoder(caches, length)
        for n in range(2 * steps):
            if n == steps:
                halfway = run.machine.clock()
            x = step(sample_token(model.head(x), temperature=0), length + n)
        ended = run.machine.clock()
    return dict(kv_mb=sum(t.nbytes for c in caches for t in (c.k, c.v)) / 1e6,
                prefill_tokens_per_second=B * length / (prefilled - began),
                decode_tokens_per_second=B * steps / (ended - halfway))


PROBES = dict(loss=probe_loss, needle=probe_needle, ruler=probe_ruler, attention=probe_attention,
              cost=probe_cost)
DEPTHS = [i / 10 for i in range(11)]


def measure(run, cfg):
    """All that is asked of one run: {probe: {multiple: numbers}}, and "heatmap" if asked for."""
    powers = [cfg.factor**i for i in range(cfg.max_multiple.bit_length())]
    multiples = [m for m in powers if m < cfg.max_multiple] + [cfg.max_multiple]
    jobs = [(probe, m, None) for probe in cfg.probe.split(",") for m in multiples]
    jobs += [("heatmap", m, depth) for m in multiples if cfg.heatmap for depth in DEPTHS]
    found, told = defaultdict(dict), time.time()
    for probe, m, depth in tqdm(jobs, run.folder.name, disable=not sys.stderr.isatty()):
        if not sys.stderr.isatty() and time.time() - told > 10:
            print(f"{run.folder}: at {probe} {m}x", file=sys.stderr, flush=True)
            told = time.time()
        if probe == "heatmap":
            found[probe][f"{m},{depth}"] = probe_needle(run, m * run.T, depth)
        else:
            found[probe][m] = PROBES[probe](run, m * run.T)
    about = dict(command=" ".join(sys.argv), settings=asdict(cfg), model=asdict(run.model.config),
                 block_size=run.T, device=run.machine.name, torch=torch.__version__)
    prepare_data.write_atomically(run.folder / "probe.json", json.dumps(about | found, indent=1))
    return dict(found)


# ---- What the user sees -------------------------------------------------------------------------


def number(run, probe, m, name, kind=None):
    """What a probe found at multiple m; attention: the mean over the layers of a kind, or "all"."""
    found = run.found[probe][m]
    if probe != "attention":
        return found.get(name, found.get("qa"))  # no average over retrieval, if qa is all there is
    return np.mean([x[name] for x in found["layers"] if kind in ("all", x["letter"])], 0)


def spread(form, runs, *what):
    """A number of one run, or its mean ± standard deviation over several."""
    values = [number(run, *what) for run in runs]
    mean = form.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(np.std(values, ddof=1))}"


def lines_of(runs):
    """Group runs that differ in nothing but their seed: {label: [run, ...]}, a line each."""
    groups, lines, known = defaultdict(list), {}, Counter()
    for run in runs:
        same = asdict(run.train) | asdict(run.model.config) | dict.fromkeys(["seed", *RESUMABLE])
        # A second stage: of first ones called alike but for the seed, or a number of two digits at
        # most, as in NAME and NAME-2.
        number = rf"[-_]?(?<!\d){run.train.seed}/?$|[-_]\d{{1,2}}/?$|/$"
        same["init_from"] = re.sub(number, "", run.train.init_from)
        same["text"] = run.meta and run.meta["train_sha256"]
        known[str(same), run.train.seed] += 1  # a seed that comes again begins a line of its own
        groups[str(same), known[str(same), run.train.seed]].append(run)
    for group in groups.values():
        first, seeds = group[0].folder, f" ({len(group)} seeds)" if len(group) > 1 else ""
        names = first.name or first.resolve().name, first, first.resolve()
        labels = (f"{name}{seeds}" for name in names)
        lines[next(label for label in labels if label not in lines)] = group
    return lines


def markdown(title, head, rows):
    """A table in Markdown. rows: lists of cells, the first of them the row's name."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join([title, "", *lines])


def table(probe, lines):
    """One row a line, one column a multiple of the training context."""
    (forms, title), rows = TITLES[probe], []
    for label, runs in lines.items():
        rows.append([label, str(runs[0].T)])
        for m in runs[0].found[probe]:
            first, *more = (spread(form, runs, probe, m, name) for name, form in forms.items())
            rows[-1].append(first + (f" ({', '.join(more)})" if more else ""))
    head = ["run", "T", *(f"{m}x" for m in runs[0].found[probe])]
    return markdown(f"{title}, by context length", head, rows)


def attention_table(lines):
    """One row a run, kind of layer and length: the paper's segments, and the entropy."""
    rows = []
    for label, runs in lines.items():
        kinds = runs[0].kinds
        for kind in [*kinds, "all"] if len(kinds) > 1 else kinds:
            for m in runs[0].found["attention"]:
                shares = (spread("{:.4f}", runs, "attention", m, name, kind) for name in SEGMENTS)
                bits = spread("{:.2f}", runs, "attention", m, "entropy", kind)
                rows.append([label, kind, f"{m * runs[0].T:,}", *shares, bits])
    head = ["run", "layers", "tokens", *SEGMENTS, "entropy, bits"]
    title = "where the answer's queries look, needle at 50 % depth (qc: question and completion)"
    return markdown(title, head, rows)


def ruler_table(lines):
    """One row a run and length, one column a task, the average over retrieval last."""
    rows = []
    for label, runs in lines.items():
        for m, found in runs[0].found["ruler"].items():
            shares = (spread("{:.3f}", runs, "ruler", m, task) for task in found)
            rows.append([label, f"{m * runs[0].T:,}", *shares])
    title = "share of right answers by task (retrieval: the average of all but qa)"
    return markdown(title, ["run", "context", *found], rows)


def heatmap_of(runs):
    """(multiples, accuracy): retrieval by depth of the fact (rows) and context length, a mean."""
    cells = [[cell["accuracy"] for cell in run.found["heatmap"].values()] for run in runs]
    multiples = list(dict.fromkeys(cell.split(",")[0] for cell in runs[0].found["heatmap"]))
    return multiples, np.mean(cells, 0).reshape(-1, len(DEPTHS)).T


def heatmap_table(runs, label):
    multiples, grid = heatmap_of(runs)
    named = zip(DEPTHS, grid, strict=True)
    rows = [[f"{depth:.0%}", *(f"{c:.2f}" for c in cells)] for depth, cells in named]
    title = f"{label}: questions answered exactly, by depth of the fact and context length"
    return markdown(title, ["depth", *(f"{m}x" for m in multiples)], rows)


def plain(axis, **labels):
    axis.set(**labels)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False, fontsize=8, ncols=1 + len(axis.lines) // 16)


def draw(lines, cfg, path):
    """The tables as one figure. Needs matplotlib (the plot extra)."""
    from matplotlib.figure import Figure

    probes, maps = cfg.probe.split(","), list(lines.items()) if cfg.heatmap else []
    n = len(probes) + ("attention" in probes) + len(maps)
    columns = min(n, 4)
    rows = -(-n // columns)
    figure = Figure(figsize=(6 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[n:]:
        axis.set_axis_off()
    axes = iter(axes.flat[:n])
    for probe, axis in zip(probes, axes, strict=False):
        key = next(iter(TITLES[probe][0]))
        for label, runs in lines.items():
            x = [m * runs[0].T for m in runs[0].found[probe]]
            for kind in runs[0].kinds if probe == "attention" else [""]:
                y = [[number(run, probe, m, key, kind) for m in run.found[probe]] for run in runs]
                low, mean, high = np.min(y, 0), np.mean(y, 0), np.max(y, 0)
                name = f"{label}, layers {kind}" if kind else label
                (line,) = axis.plot(x, mean, marker="o", linewidth=2, label=name)
                axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)
        for T in {runs[0].T for runs in lines.values()}:
            axis.axvline(T, color="gray", linestyle=":", linewidth=1)
            axis.annotate(" trained to here", (T, 1), xycoords=("data", "axes fraction"),
                          va="top", color="gray", fontsize=8)
        axis.set_xscale("log", base=2)
        x = sorted({m * runs[0].T for runs in lines.values() for m in runs[0].found[probe]})
        axis.set_xticks(x, [f"{v:,}" for v in x], rotation=45, ha="right", fontsize=8)
        axis.set_ylim(bottom=0, top=1.05 if probe in ("needle", "ruler") else None)
        plain(axis, xlabel="context, tokens", title=TITLES[probe][1].split(" (")[0])
    if "attention" in probes:
        axis = next(axes)
        for label, runs in lines.items():
            m = list(runs[0].found["attention"])[-1]
            for kind in runs[0].kinds:
                curve = np.mean([number(run, "attention", m, "curve", kind) for run in runs], 0)
                axis.plot((np.arange(BINS) + 0.5) / BINS, curve, label=f"{label}, layers {kind}")
        axis.set_yscale("log")
        where = f"position in the context, {BINS} parts of it, at {m}x"
        plain(axis, xlabel=where, title="attention by position")
    for (label, runs), axis in zip(maps, axes, strict=True):
        multiples, grid = heatmap_of(runs)
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(multiples)), [f"{m}x" for m in multiples])
        axis.set_yticks(range(len(DEPTHS)), [f"{d:.0%}" for d in DEPTHS])
        axis.set(xlabel="context", ylabel="depth of the fact", title=label)
        figure.colorbar(image, ax=axis, label="retrieved")
    figure.savefig(path, dpi=160)


def write_text(run, cfg):
    """Continue the prompt and print what comes."""
    ids = prepare_data.encode(run.enc, cfg.prompt)  # a hub's tokenizer may open it, with <BOS>
    if not len(ids) and run.enc.eot_token is None:
        raise UsageError(f"{run.folder} has no token that begins a text: give --prompt some text")
    (ids,) = run.machine.put(np.array([ids if len(ids) else [run.enc.eot_token]]))
    top_p = cfg.top_p if cfg.top_p < 1 else None
    generator = torch.Generator(run.machine.device).manual_seed(cfg.seed)
    with run.machine.autocast():
        out = run.model.generate(ids, cfg.max_new_tokens, cfg.temperature, cfg.top_k, top_p,
                                 run.enc.eot_token, generator)
    known = out[0][out[0] < run.enc.n_vocab].tolist()  # the model's vocabulary is padded
    print(run.enc.decode([t for t in known if t != run.enc.eot_token]))


def main(argv):
    cfg = SampleConfig(**prepare_data.parse_flags([SampleConfig], argv, __doc__))
    machine = Machine(cfg.device, cfg.dtype)
    if len({Path(folder).resolve() for folder in cfg.runs}) < len(cfg.runs):
        raise UsageError(f"a run is named twice in {' '.join(cfg.runs)}")
    runs = [Run(folder, cfg, machine) for folder in cfg.runs or [newest_run()]]
    if cfg.prompt is not None:
        for run in runs:
            print(f"{run.folder}:", file=sys.stderr)
            write_text(run, cfg)
        return
    for run in runs:
        run.check()
    for run in runs:
        print(f"{run.folder}: T {run.T}, layers  {run.model.plan()}", flush=True)
        run.found = measure(run, cfg)
    lines = lines_of(runs)
    tables = {"attention": attention_table, "ruler": ruler_table}
    for probe in cfg.probe.split(","):
        print("\n" + tables.get(probe, partial(table, probe))(lines))
    for label, group in lines.items() if cfg.heatmap else ():
        print(f"\n{heatmap_table(group, label)}")
    figure = Path(cfg.plot or runs[0].folder / "probe.png")
    try:
        draw(lines, cfg, figure)
        print(f"\nnumbers in probe.json of each run, figure in {figure}")
    except ImportError:
        print("\nnumbers in probe.json of each run; pip install matplotlib for the figure")


if __name__ == "__main__":
    prepare_data.run_main(main)
