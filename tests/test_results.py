"""The scripts of results/: what they time, what they train, what they ask."""

import json
import shutil
import sys

import bench
import beside
import emergence
import numpy as np
import pytest
import ruler
import tables
import torch
import torch.nn.functional as F

import model
import train
from model import ModelConfig
from sample import Run, new_facts

SMALL = ["--n_layer=4", "--n_head=2", "--n_embd=128", "--block_size=64", "--window=16",
         "--batch_size=4", "--device=cpu"]  # fmt: skip

WRONG = [  # script, what it is to work on, a flag, what must be told
    ("bench", "", "--steps=1", "name presets to time"),
    ("bench", "rope", "--lengths=1k", "give them as in 1024,8192"),
    ("bench", "rope", "--lengths=1024,", "give them as in 1024,8192"),
    ("bench", "rope", "--out=nowhere/x.json", "name a file in a folder that exists"),
    ("bench", "rope", "--paths=flash", "--attention=flash needs an NVIDIA GPU"),
    ("bench", "rope rnope-swa", "--n_layer=2", "never builds 'N'"),
    ("beside", "gpt5", "--steps=1", "name models to compare, of nanogpt"),
    ("beside", "rope nanogpt", "--peers=x", "git clone https://github.com/karpathy/nanoGPT x/"),
    ("beside", "nanochat", "--peers=x", "git clone https://github.com/karpathy/nanochat x/"),
    ("beside", "rope", "--vocab_size=64", "use --vocab_size=320"),
    ("beside", "rope", "--block_size=9999999", "lower --block_size"),
    ("beside", "rope", "--out=.", "--out=. is a folder: name a file"),
    ("ruler", "nowhere", "--digits=2", "there is no nowhere/ckpt.pt"),
    ("ruler", "run-1", "--max_multiple=99", "the text is too short: use --max_multiple="),
    ("ruler", "run-1", "--needles=40", "use fewer --needles or --digits"),
    ("ruler", "run-1", "--samples=0", "--samples=0: it must be 1 or more"),
    ("ruler", "run-1", "--out=.", "--out=. is a folder: name a file"),
]


@pytest.mark.parametrize(("script", "names", "flag", "told"), WRONG)
def test_what_is_wrong_is_told_at_once(
    script, names, flag, told, as_script, folders, data_dir, monkeypatch
):
    monkeypatch.chdir(folders[0].parent)
    flags = dict(bench=SMALL, beside=[*SMALL, "--seconds=1", f"--data={data_dir}/tiny"])
    argv = [*names.split(), *flags.get(script, ["--device=cpu"]), flag]
    status, out, err = as_script(f"{script}.py", argv)
    assert status == 2
    assert told in err
    assert "tokens_per_second" not in out


# ---- bench.py -----------------------------------------------------------------------------------


@pytest.fixture
def bench_rows(tmp_path, capsys):
    def rows(*argv):
        out = tmp_path / "bench.json"
        bench.main([*argv, *SMALL, "--lengths=64,128", "--steps=1", f"--out={out}"])
        rows = json.loads(out.read_text())["rows"]
        assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)
        return rows

    return rows


def test_bench_times_each_preset_at_each_length_on_each_path(bench_rows):
    rows = bench_rows("rope", "swa", "--paths=mask,blocks")
    places = [(T, path) for T in (64, 128) for path in ("mask", "blocks")]
    for place, rope, swa in zip(places, rows[::2], rows[1::2], strict=True):
        for name, row in (("rope", rope), ("swa", swa)):
            assert (row["preset"], row["T"], row["path"]) == (name, *place)
            assert row["rows"] * row["T"] == 4 * 64  # as many tokens a step at every length
            assert row["tokens_per_second"] == pytest.approx(4 * 64 / row["step_ms"] * 1e3)
        ratio = swa["tokens_per_second"] / rope["tokens_per_second"]
        assert swa["tokens_per_second_over_rope"] == pytest.approx(ratio)
        assert swa["flops_allow"] == rope["flops_per_token"] / swa["flops_per_token"] > 1


def test_bench_shows_that_windows_keep_the_cache_small(bench_rows):
    rows = bench_rows("rope", "swa", "--decode", "--rows=2")
    cache = {(row["preset"], row["T"]): row["cache_mb"] for row in rows}
    assert cache["rope", 128] > cache["rope", 64]
    assert cache["swa", 128] == cache["swa", 64] == 4 * 2 * 2 * 16 * 128 * 4 / 1e6
    for speed in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        assert all(row[speed] > 0 for row in rows)


# ---- beside.py ----------------------------------------------------------------------------------

# What beside.py needs of a checkout. Both peers ignore targets of -1, where ours ignores -100.
PEER = """
import torch
class GPTConfig:
    def __init__(self, **sizes):
        self.__dict__.update(sizes)
class GPT(torch.nn.Embedding):
    def __init__(self, config):
        super().__init__(config.vocab_size, config.vocab_size)
    def init_weights(self):
        self.reset_parameters()
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, 1e-8, weight_decay)
    def setup_optimizer(self, matrix_lr, weight_decay, **rates):
        group = dict(params=[*self.parameters()], initial_lr=matrix_lr, kind="muon")
        return torch.optim.AdamW([group], matrix_lr)
    def forward(self, x, y):
        loss = torch.nn.functional.cross_entropy(super().forward(x).mT, y, ignore_index=-1)
        return RESULT
"""


@pytest.fixture
def peers(tmp_path):
    """A folder with both checkouts."""
    results = {"nanoGPT/model.py": "None, loss", "nanochat/nanochat/gpt.py": "loss"}
    for name, result in results.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(PEER.replace("RESULT", result))
    return tmp_path


@pytest.fixture
def compare(peers, tmp_path, capsys):
    """compare(*flags): the rows that beside.py finds for both peers and swa."""

    def rows(*flags):
        out = tmp_path / "new" / "found.json"
        names = ["nanogpt", "nanochat", "swa"]
        beside.main([*names, *SMALL, f"--peers={peers}", f"--out={out}", *flags])
        rows = json.loads(out.read_text())["rows"]
        assert [row["name"] for row in rows] == names
        assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return rows

    return rows


def test_models_are_timed_beside_checkouts_that_stay_apart(compare):
    path = [*sys.path]
    rows = compare("--steps=2")
    assert rows[0]["parameters"] == rows[1]["parameters"] == 320 * 320 != rows[2]["parameters"]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(4 * 64 / row["step_ms"] * 1e3)
    assert (sys.modules["model"], sys.path) == (model, path)


def test_all_are_trained_for_the_time_and_scored(compare, data_dir):
    for row in compare("--seconds=0.3", f"--data={data_dir}/tiny", "--score_rows=8"):
        assert row["seconds"] > 0.29
        assert row["tokens"] == row["steps"] * 4 * 64
        assert row["bits_per_byte"] < 12


@pytest.fixture
def rope(data):
    """(contender, text, config, machine) of a small model."""
    torch.manual_seed(0)
    machine = train.Machine("cpu")
    cfg = beside.BesideConfig(names=("rope",), batch_size=4, score_rows=8)
    config = ModelConfig(pattern="R", vocab_size=320, n_layer=2, n_embd=32, block_size=64)
    return beside.ours(cfg, config, machine), beside.Text(data, 64, machine), cfg, machine


def test_nanogpt_has_a_rate_and_decays_of_its_own(peers):
    """Ours are chosen for Muon, and may change."""
    cfg = beside.BesideConfig(names=("nanogpt",), peers=str(peers), learning_rate=0.5)
    contender = beside.nanogpt(cfg, ModelConfig(vocab_size=320), train.Machine("cpu"))
    batch = [torch.zeros(1, 4, dtype=torch.int64)] * 2
    contender.step(batch, 0.02, 0)  # the end of the warm-up: the peak
    [group] = contender.optimizers[0].param_groups
    assert group["lr"] == pytest.approx(2e-3)
    assert (group["weight_decay"], group["betas"]) == (0.1, (0.9, 0.95))


def test_compiling_leaves_no_trace(rope):
    contender, text, cfg, _ = rope

    def tensors(tree):
        if torch.is_tensor(tree):
            yield tree.clone()
        for part in tree.values() if isinstance(tree, dict) else ():
            yield from tensors(part)

    def state():
        things = [contender.model, *contender.optimizers]
        return [x for thing in things for x in tensors(thing.state_dict())]

    before = state()
    beside.warm_up(contender, text, cfg)
    assert all(a.equal(b) for a, b in zip(before, state(), strict=True))
    contender.step(text.draw(4), 0.5, 0)
    assert not all(map(torch.equal, before, state()))


def test_a_score_is_what_train_py_says_of_the_same_rows(rope, data):
    contender, text, _, machine = rope
    cfg = train.TrainConfig(batch_size=4, eval_iters=2)
    nats, _ = train.estimate_loss(contender.model, data, cfg, 64, machine)
    bits = train.bits_per_byte(nats, data.meta)
    assert text.score(contender.loss, 7, 4) == pytest.approx(bits, rel=1e-5)  # 7: whole batches


def test_rows_are_plain_text_and_targets_are_the_next_tokens(rope, data):
    x, y = rope[1].draw(3)
    assert x[:, 1:].equal(y[:, :-1])
    assert all(row.astype(np.uint16).tobytes() in data.train.tobytes() for row in x.numpy())


def test_training_ends_with_the_time_and_learns(rope, monkeypatch):
    contender, text, cfg, machine = rope
    cfg.seconds = 50.0
    seen = []

    def step(batch, share, n):
        contender.step(batch, share, n)
        seen.append((share, n, contender.optimizers[0].param_groups[0]["lr"]))

    before = text.score(contender.loss, 8, 4)
    # By this clock every step takes half a second, the one that compiles, too.
    monkeypatch.setattr(machine, "clock", lambda: len(seen) / 2)
    found = beside.train_for(contender._replace(step=step), text, cfg, machine)
    shares, steps, rates = zip(*seen[1:], strict=True)
    assert steps == (*range(100),)
    assert shares == pytest.approx([n / 100 for n in range(100)])
    assert [max(rates), rates[-1]] == pytest.approx([cfg.learning_rate, 0], abs=1e-5)
    assert (found["seconds"], found["steps"]) == (50, 100)
    assert found["bits_per_byte"] < 0.8 * before


def test_nanochats_schedules():
    """As in its base_train.py: 40 steps up, then level, and down over the last 65 % of the time."""
    schedule = beside.nanochat_schedule
    assert schedule(0.0, 0) == pytest.approx((1 / 40, 0.85, 1))
    assert schedule(0.2, 200)[:2] == pytest.approx((1, 0.91))
    assert schedule(0.35, 1000)[:2] == pytest.approx((1, 0.97))
    assert schedule(1.0, 2000) == pytest.approx((0.05, 0.90, 0))


# ---- ruler.py -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(fit, tmp_path_factory):
    """Two runs that differ in their seed."""
    root = tmp_path_factory.mktemp("ruler")
    flags = ["--max_iters=1", "--block_size=512", "--eval_iters=1"]
    return [fit(root / f"run-{seed}", *flags, f"--seed={seed}") for seed in (1, 2)]


@pytest.fixture(scope="module")
def run(folders):
    cfg = ruler.RulerConfig(max_multiple=8, samples=5, device="cpu")
    return Run(folders[0], cfg.for_sample())


def always(monkeypatch, answer):
    """Let every model predict answer(targets)."""

    def predict(self, rows, n):
        targets = torch.as_tensor(rows[:, -n:].astype(np.int64))
        yield F.one_hot(answer(targets), self.enc.n_vocab), targets

    monkeypatch.setattr(Run, "predict", predict)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_an_oracle_is_always_right_and_a_constant_never(run, task, monkeypatch):
    always(monkeypatch, lambda targets: targets)
    assert ruler.share_right(run, task, run.T) == 1
    always(monkeypatch, torch.zeros_like)
    assert ruler.share_right(run, task, run.T) == 0


def test_one_wrong_token_spoils_one_answer(run, monkeypatch):
    planted = ruler.plant_all(run, "multi-query", run.T)
    n = max(len(marks) for _, marks in planted)
    wrong = torch.zeros(len(planted), n, dtype=torch.bool)
    for row, (_, marks) in zip(wrong, planted, strict=True):
        row[n - len(marks) + np.flatnonzero(marks == 3)[-1]] = True  # the end of the third
    always(monkeypatch, lambda targets: targets.masked_fill(wrong, 0))
    assert ruler.share_right(run, "multi-query", run.T) == 0.75


def facts_of(run, i):
    """The facts of row i in bytes: what stands before each value, the value, what follows it."""
    facts = new_facts(run, ruler.stream("ruler", run.cfg.seed, i))
    return [[part.tobytes() for part in fact] for fact in facts]


def as_bytes(ids):
    return ids.astype(np.uint8).tobytes()


@pytest.mark.parametrize("task", ruler.TASKS)
def test_every_answer_can_be_read_from_its_row_and_questions_are_alike(run, task):
    hidden = 1 if task in ruler.SINGLE else 4
    answers = 4 if task in ("multi-value", "multi-query") else 1
    asked = {}  # of row i, at every length
    for length in run.lengths:
        for i, (row, marks) in enumerate(ruler.plant_all(run, task, length)):
            assert len(row) == length + 1
            facts = facts_of(run, i)
            if task == "multi-value":
                facts = [[facts[0][0], *rest] for _, *rest in facts]
            facts = [b"".join(fact) for fact in facts]
            context = as_bytes(row[: -len(marks)])
            assert [context.count(fact) for fact in facts] == [1] * hidden + [0] * (4 - hidden)
            if task == "multi-value":
                facts.sort(key=context.index)
            question = row[-len(marks) :]
            assert as_bytes(question) == b"".join(facts[:answers])
            values = [as_bytes(question[marks == n]) for n in range(1, answers + 1)]
            assert marks.max() == answers
            for value, fact in zip(values, facts[:answers], strict=True):
                assert value in fact
                assert len(value.strip()) == run.cfg.digits
            told = (as_bytes(question), marks.tolist())
            assert asked.setdefault(i, told) == told


def test_facts_are_hidden_in_what_the_task_says(run, data):
    rest = {}
    for task in ruler.SINGLE:
        row, marks = ruler.plant_all(run, task, run.T)[0]
        rest[task] = as_bytes(row[: -len(marks)]).replace(b"".join(facts_of(run, 0)[0]), b"")
    assert rest["single-sentences"] in ruler.SENTENCES.encode() * 9
    assert set(rest["single-noise"]) == set(ruler.LETTERS)
    assert rest["single-prose"] in as_bytes(data.val)


def test_ruler_can_ask_a_run_with_its_scales_changed(folders):
    cfg = ruler.RulerConfig(runs=(str(folders[0]),), log_scale=True, attn_scale=0.1, device="cpu")
    [run] = ruler.open_runs(cfg.for_sample())
    assert run.changed == dict(log_scale=True, attn_scale=0.1)
    assert run.model.query_scale(torch.tensor([run.T - 1, 8 * run.T]))[1] > 1
    assert run.model.query_scale(torch.tensor([run.T // 2])) == 1


def test_ruler_writes_its_table_and_numbers(folders, tmp_path, capsys, monkeypatch):
    real = ruler.share_right  # 0 for models that have learnt nothing

    def share_right(run, task, length):
        return real(run, task, length) + run.train.seed * len(task) / length

    monkeypatch.setattr(ruler, "share_right", share_right)
    out = tmp_path / "new" / "ruler.json"
    folders = [str(folder) for folder in folders]
    flags = ["--max_multiple=4", "--samples=2", "--device=cpu", f"--out={out}"]
    ruler.main([*folders, *flags])
    found = json.loads(out.read_text())
    assert found.keys() >= {"command", "device", "torch", "revision", "settings"}
    head, _, *rows, _, size = capsys.readouterr().out.splitlines()[2:]
    names = [*ruler.TASKS, "average"]
    assert head == f"| run | context | {' | '.join(names)} |"
    for length, row in zip((512, 2048), rows, strict=True):
        scores = [found["runs"][folder][str(length)] for folder in folders]
        assert scores[0]["average"] == np.mean([scores[0][task] for task in ruler.TASKS])
        cells = [f"{folders[0]} (2 seeds)", f"{length:,}"]
        for name in names:
            y = [score[name] for score in scores]
            cells.append(f"{np.mean(y):.3f} ± {np.std(y, ddof=1):.3f}")
        assert row == f"| {' | '.join(cells)} |"
    net, _, _ = train.load_run(folders[0])
    held = sum(cache.k.nbytes + cache.v.nbytes for cache in net.new_caches(1, 2048))
    assert found["cache_bytes"] == dict.fromkeys(folders, held)
    assert f"{held / 1e6:,.1f} MB" in size


# ---- tables.py ----------------------------------------------------------------------------------


def test_the_pages_have_the_tables_that_the_json_files_give():
    variants, found = (json.loads((tables.HERE / f"{name}.json").read_text())
                       for name in ("variants", "frontier"))
    pages = tables.tables(variants) | dict(frontier=tables.frontier(found))
    for page, its in pages.items():
        text = (tables.HERE / f"{page}.md").read_text()
        for table in its:
            assert table in text, f"results/{page}.md lacks what results/tables.py prints:\n{table}"


def test_the_comparisons_have_three_seeds_each():
    variants = json.loads((tables.HERE / "variants.json").read_text())
    trained = [found[key] for found in variants["train"].values() for key in ("validation", "copy")]
    by_length = [*variants["ruler"].values()]
    for probes in variants["probes"].values():
        by_length += [found for name, found in probes.items() if name != "attention"]
    asked = [seeds for lengths in by_length for numbers in lengths.values()
             for seeds in numbers.values()]
    assert len(asked) > 800 and {len(seeds) for seeds in trained + asked} == {3}


def test_a_cell_is_the_mean_of_the_seeds_and_their_range():
    assert tables.cell([0.5, 0.25, 0.75]) == "0.50 (0.25–0.75)"
    assert tables.cell([0.125, 0.375, 0.625]) == "0.38 (0.13–0.63)"  # halves go up


def test_the_lines_of_the_headline_figure_are_those_of_frontier_json():
    lines = tables.frontier_lines(json.loads((tables.HERE / "frontier.json").read_text()))
    assert lines.keys() == {"hybrid (3 seeds)", "hybrid, second stage (3 seeds)", "rope (2 seeds)"}
    runs = lines["rope (2 seeds)"]
    assert [run.lengths for run in runs] == [[1024, 4096, 16384]] * 2
    assert [run.found["needle"][16384]["answered"] for run in runs] == [0, 0]
    assert runs[1].found["copy"][4096] == dict(again=2.549, first=2.615)


def test_the_figures_are_drawn_from_the_numbers(tmp_path, monkeypatch, capsys):
    for name in ("variants", "frontier"):
        shutil.copy(tables.HERE / f"{name}.json", tmp_path)
    monkeypatch.setattr(tables, "HERE", tmp_path)
    tables.main([])
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {*tables.FIGURES, "frontier"}
    assert "| rnope-swa-log |" in capsys.readouterr().out


# ---- emergence.py -------------------------------------------------------------------------------


def logged(folder, seed, steps):
    """A run of window 8, as emergence.py reads it: evaluated at these steps."""
    folder.mkdir()
    config = dict(model=dict(window=8), train=dict(seed=seed))
    (folder / "config.json").write_text(json.dumps(config))
    lines = [dict(step=step, bits_per_byte=2.0, copy=20 / step) for step in steps]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(folder)


@pytest.mark.parametrize(("steps", "told"), [
    ([10, 20, 40], None), ([10, 20], "at other steps"), ([], "no evaluation"),
])
def test_runs_that_cannot_be_one_line_leave_the_figure_as_it_is(
    tmp_path, monkeypatch, capsys, steps, told
):
    monkeypatch.setattr(emergence, "HERE", tmp_path)
    folders = [logged(tmp_path / "a", 1, [10, 20, 40]), logged(tmp_path / "b", 2, steps)]
    if told:
        with pytest.raises(model.UsageError, match=told):
            emergence.main(folders)
    else:
        emergence.main(folders)
        assert "from steps [40, 40], 0.500 at last" in capsys.readouterr().out
        assert json.loads((tmp_path / "emergence.json").read_text())["8"]["2"][0] == [10, 2.0, 2.0]
    written = {path.name for path in tmp_path.glob("emergence.*")}
    assert written == (set() if told else {"emergence.json", "emergence.png"})
