"""The probes: what is put into rows, what is scored, and what is told of it."""

import io
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
import sample
import train
from model import UsageError
from sample import Run, SampleConfig

T = 64  # of the tiny run; facts need rows of 4 T


def opened(folder, **flags):
    small = dict(device="cpu", samples=6, max_multiple=4, needles=2, digits=4)
    return Run(folder, SampleConfig(**small | flags))


def ask(runs, *flags):
    """sample.main, small enough for a test. Of a flag given twice the last counts."""
    folders = runs if isinstance(runs, list) else [runs]
    small = ["--device=cpu", "--max_multiple=2", "--samples=3", "--needles=2", "--digits=2"]
    sample.main([*map(str, folders), *small, *flags])


def numbers(folder):
    return json.loads((folder / "probe.json").read_text())


def table_rows(text, title):
    """[[cell, ...], ...] of the Markdown table under the line that starts with title."""
    rows = []
    for line in text[text.index(f"\n{title}") :].splitlines()[3:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


@pytest.fixture
def variant(tiny_run, tmp_path):
    """variant("a/name", train={...}, model={...}): the tiny run with other settings recorded."""

    def make(name, **changes):
        folder = shutil.copytree(tiny_run, tmp_path / name)
        state = torch.load(folder / "ckpt.pt", weights_only=True)
        for part, fields in changes.items():
            state["meta" if part == "meta" else f"{part}_config"] |= fields
        torch.save(state, folder / "ckpt.pt")
        return folder

    return make


@pytest.fixture
def own_run(variant):
    """A copy of the tiny run, to write into."""
    return variant("own")


@pytest.fixture
def asked(monkeypatch):
    """The (rows, n) of every call of predict, which answers as it always does."""
    calls = []
    real = Run.predict

    def predict(self, rows, n):
        calls.append((np.array(rows), n))
        return real(self, rows, n)

    monkeypatch.setattr(Run, "predict", predict)
    return calls


@pytest.fixture
def answering(monkeypatch):
    """answering(answer): answer(targets) are the likeliest tokens, whatever the model says."""

    def replace(answer):
        def predict(self, rows, n):
            targets = torch.from_numpy(rows[:, -n:].astype(np.int64))
            yield F.one_hot(answer(targets), self.enc.n_vocab).float(), targets

        monkeypatch.setattr(Run, "predict", predict)

    return replace


# ---- Rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [sample.probe_loss, sample.probe_copy])
def test_every_length_and_pass_scores_the_same_targets(tiny_run, asked, data, probe):
    run = opened(tiny_run)
    assert run.lengths == [T, 2 * T, 4 * T]
    assert opened(tiny_run, max_multiple=5, factor=3).lengths == [T, 3 * T, 5 * T]
    for length in run.lengths:
        probe(run, length)
        assert asked[-1][0].shape == (6, length + 1)
    rows, n = asked[0]
    assert n == T // 4
    for other, m in asked:
        assert m == n
        assert np.array_equal(other[:, -n:], rows[:, -n:])
    assert len({row.tobytes() for row in rows}) == 6
    assert all(row.tobytes() in data.val.tobytes() for row in rows)
    assert np.array_equal(rows, run.rows(4 * T)[:, -T - 1 :])  # only the context grows


def test_the_copy_stands_earlier_in_the_row_at_the_same_share_of_it(tiny_run, asked, monkeypatch):
    drawn = []
    real = sample.plant_passage
    monkeypatch.setattr(sample, "plant_passage", lambda *x: drawn.append(x[2]) or real(*x))
    run = opened(tiny_run)
    for length in run.lengths:
        sample.probe_copy(run, length)
        rows, n = asked[-1]
        room = length + 1 - 2 * n
        for row, place in zip(rows, drawn[-1], strict=True):
            start = round(place * room)
            assert start + n <= length + 1 - n
            assert np.array_equal(row[start : start + n], row[-n:])
        assert np.array_equal(drawn[-1], drawn[0])
    assert np.ptp(drawn[0]) > 0.2


def test_no_probe_draws_from_a_stream_of_the_training(tiny_run, monkeypatch):
    names = set()
    monkeypatch.setattr(sample, "stream", lambda *x: names.add(x[0]) or train.stream(*x))
    run = opened(tiny_run, samples=1)
    for probe in sample.PROBES.values():
        probe(run, 4 * T)
    assert names == {"copy", "needle"}  # the training has "batch", its evaluation "again"


@pytest.mark.parametrize("length", [T, 4 * T])
def test_the_loss_is_bits_per_byte_of_the_last_quarter(tiny_run, length):
    run = opened(tiny_run)
    nats = 0.0
    for row in run.rows(length).astype(np.int64):
        ids = torch.from_numpy(row)[None]
        with torch.no_grad():
            logits, _ = run.model(ids[:, :-1])
        logits = logits[0, -T // 4 :, : run.enc.n_vocab]
        nats += F.cross_entropy(logits, ids[0, -T // 4 :], reduction="sum").item()
    bits = nats / math.log(2) / (6 * T // 4)  # a byte is a token here
    assert sample.probe_loss(run, length)["bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_how_many_rows_are_read_at_once_changes_nothing(tiny_run, monkeypatch):
    run = opened(tiny_run)
    expected = [probe(run, 4 * T) for probe in sample.PROBES.values()]
    monkeypatch.setattr(sample, "TOKENS_AT_ONCE", 2 * 4 * T + 2)
    assert len(list(run.predict(run.rows(4 * T), 3))) == 3
    for probe, before in zip(sample.PROBES.values(), expected, strict=True):
        after = probe(run, 4 * T)
        for name in before:
            assert after[name] == pytest.approx(before[name], rel=1e-4, abs=1e-6)


def test_ids_that_pad_the_vocabulary_are_never_predicted(tiny_run, monkeypatch, capsys):
    run = opened(tiny_run, prompt="def ", max_new_tokens=20)
    assert run.model.config.vocab_size > run.enc.n_vocab
    head = run.model.head
    monkeypatch.setattr(
        run.model, "head", lambda x: head(x).index_fill(-1, torch.arange(257, 320), 99)
    )
    for logits, _ in run.predict(run.rows(T), 8):
        assert logits.size(-1) == run.enc.n_vocab
    sample.write_text(run, "def ")  # an id without a token could not be decoded
    assert capsys.readouterr().out.startswith("def ")


# ---- Needles ------------------------------------------------------------------------------------


def wrong_at(y, place):
    """Targets y (rows, n) with another token at place. An answer has four digits, a byte each."""
    y = y.clone()
    y[:, place] += 1
    return y


@pytest.mark.parametrize("probe", ["needle", "heatmap"])
@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (lambda y: y, 1),
        (lambda y: y * 0, 0),
        (lambda y: wrong_at(y, -1), 0),
        (lambda y: wrong_at(y, -4), 0),
    ],
    ids=["oracle", "constant", "last digit wrong", "first digit wrong"],
)
def test_an_answer_counts_if_each_of_its_tokens_is_right(tiny_run, answering, probe, answer, score):
    answering(answer)
    run = opened(tiny_run, samples=20)  # enough for each wording, with a space before and without
    found = sample.PROBES[probe](run, 4 * T)
    assert set(found.values()) == {score}
    assert len(found) == (11 if probe == "heatmap" else 1)


def text_of(ids):
    """A character a token."""
    return np.where(ids < 256, ids, 0).astype(np.uint8).tobytes().decode("latin-1")


def test_each_row_asks_for_one_of_its_facts_and_they_never_overlap(tiny_run, monkeypatch):
    run = opened(tiny_run, needles=4, samples=30)
    facts = []
    real = sample.new_facts
    monkeypatch.setattr(sample, "new_facts", lambda *x: facts.append(real(*x)) or facts[-1])
    planted = sample.plant_all(run, 4 * T)
    for plain, (row, n, cuts), parts in zip(run.rows(4 * T), planted, facts, strict=True):
        assert len(row) == 4 * T + 1
        text = text_of(row)
        start, stop, question = cuts
        assert text[-n:].strip().isdigit()
        assert text.count(text[question:]) == 2
        assert text[start:stop].startswith(text[question:])
        assert text[start:stop].endswith("\n")
        text = text[:question]
        assert len(parts) == 4
        for fact in parts:
            whole = text_of(np.concatenate(fact))
            assert text.count(whole) == 1
            text = text.replace(whole, "")
        assert text == text_of(plain)[-len(text) :]  # the rest is as it was
    wordings = {text_of(fact[2]) + text_of(fact[0])[:4] for fact, *_ in facts}
    assert len(wordings) >= 4


def test_questions_and_places_are_the_same_at_every_length(tiny_run):
    run = opened(tiny_run, needles=1)
    short = sample.plant_all(run, 2 * T)
    for (row, n, cuts), (long_row, long_n, long_cuts) in zip(
        short, sample.plant_all(run, 4 * T), strict=True
    ):
        size = len(row) - cuts[2]
        assert n == long_n
        assert np.array_equal(row[-size:], long_row[-size:])
        room = [cuts[2] - cuts[1] + cuts[0], long_cuts[2] - long_cuts[1] + long_cuts[0]]
        assert cuts[0] / room[0] == pytest.approx(long_cuts[0] / room[1], abs=2 / room[0])


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_the_fact_stands_at_the_depth_asked_for(tiny_run, depth):
    run = opened(tiny_run, needles=1)
    for _, _, (start, stop, question) in sample.plant_all(run, 4 * T, depth):
        assert start == int(depth * (question - (stop - start)))


# ---- Attention ----------------------------------------------------------------------------------


def defined(run, length, monkeypatch):
    """Begin, needle, context, qc and entropy of each layer, by attend_mask with one-hot values."""
    found = []
    real = model.attend

    def attend(q, k, v, window, chunked, path):
        S = k.size(2)
        eye = torch.eye(S).expand(1, q.size(1), S, S)
        keys = k.repeat_interleave(q.size(1) // k.size(1), 1)
        p = model.attend_mask(q[:, :, -n:], keys, eye, window, chunked)[0]
        mass = p.mean((0, 1))
        begin, needle, qc = [mass[part].sum().item() for part in parts]
        entropy = -(p * p.clamp(min=1e-30).log2()).sum(-1).mean().item()
        found[-1].append([begin, needle, 1 - begin - needle - qc, qc, entropy])
        return real(q, k, v, window, chunked, path)

    monkeypatch.setattr(model, "attend", attend)
    for row, count, _ in sample.plant_all(run, length, 0.5):
        n = count
        text = text_of(row)
        question = text.rindex("\n")
        start = text.index(text[question:])
        stop = text.index("\n", start + 1) + 1
        parts = [slice(10), slice(start, stop), slice(question, length)]
        found.append([])
        with torch.no_grad():
            run.model(torch.from_numpy(row[None, :-1].astype(np.int64)))
    monkeypatch.setattr(model, "attend", real)
    return np.mean(found, 0)


def test_attention_is_that_of_the_definition(fit, tmp_path, monkeypatch):
    """For every kind of layer, with grouped heads."""
    folder = fit(tmp_path / "run", "--pattern=SCNR", "--max_iters=5", "--n_head=4", "--n_kv_head=2")
    run = opened(folder, samples=3, log_scale=True)
    with torch.no_grad():
        for block in run.model.layers:
            block.self_attn.q_proj.weight *= 20  # far from looking everywhere alike
    expected = defined(run, 4 * T, monkeypatch)
    found = sample.probe_attention(run, 4 * T)
    names = ["begin", "needle", "context", "qc", "entropy"]
    for letter, layer in zip("SCNR", expected, strict=True):
        told = [found[f"{letter} {name}"] for name in names]
        np.testing.assert_allclose(told, layer, rtol=1e-3, atol=1e-5)
    told = [found[f"all {name}"] for name in names]
    np.testing.assert_allclose(told, expected.mean(0), rtol=1e-3, atol=1e-5)


def test_shares_sum_to_1_and_windows_see_neither_beginning_nor_fact(tiny_run):
    run = opened(tiny_run)
    found = sample.probe_attention(run, 4 * T)
    assert not any(block.self_attn._forward_pre_hooks for block in run.model.layers)
    for kind in ("all", "S", "N"):
        shares = [found[f"{kind} {name}"] for name in ("begin", "needle", "context", "qc")]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert len(found[f"{kind} curve"]) == 32
        assert 0 < found[f"{kind} entropy"] < math.log2(4 * T)
    assert found["S begin"] == found["S needle"] == sum(found["S curve"][:24]) == 0
    assert found["S entropy"] < math.log2(16)
    assert found["N needle"] > 0


def test_a_model_that_looks_everywhere_alike_gives_each_part_its_share_of_the_tokens(tiny_run):
    run = opened(tiny_run)
    torch.nn.init.zeros_(run.model.layers[3].self_attn.q_proj.weight)
    found = sample.probe_attention(run, 4 * T)
    planted = sample.plant_all(run, 4 * T, 0.5)
    needle = []
    begin = []
    for _, n, (start, stop, _) in planted:
        seen = np.arange(4 * T - n + 1, 4 * T + 1)  # keys of each of the answer's queries
        begin.append((10 / seen).mean())
        needle.append(((stop - start) / seen).mean())
    assert found["N begin"] == pytest.approx(np.mean(begin), rel=1e-4)
    assert found["N needle"] == pytest.approx(np.mean(needle), rel=1e-4)
    assert max(found["N curve"]) / min(found["N curve"]) < 1.3


# ---- Tables, files and figures ------------------------------------------------------------------


def test_all_probes_give_a_table_each_a_file_and_a_figure(variant, capsys):
    pytest.importorskip("matplotlib")
    wide = variant("wide", model=dict(block_size=256))  # facts have room in it
    plot = wide / "x.svg"
    ask(wide, "--probe=loss,copy,needle,attention", "--heatmap", f"--plot={plot}")
    out = capsys.readouterr().out
    found = numbers(wide)
    for title in sample.CAPTIONS.values():
        assert f"\n{title}, by context in tokens\n" in out
    loss = table_rows(out, "bits per byte of the last")
    assert loss[0] == ["run", "", "256", "512"]
    assert float(loss[2][3]) == pytest.approx(found["loss"]["512"]["bits_per_byte"], abs=1e-3)
    attention = table_rows(out, "share of the answer's attention")
    assert [row[1:3] for row in attention[2:]] == [
        [kind, length] for kind in ("all", "S", "N") for length in ("256", "512")
    ]
    assert set(attention[0][3:]) == {"begin", "needle", "context", "qc", "entropy"}
    assert list(found["heatmap"]["256"]) == [f"{depth}%" for depth in range(0, 101, 10)]
    assert found["settings"]["samples"] == 3
    assert found["model"]["pattern"] == "SSSN"
    assert found["torch"] == torch.__version__
    assert {"command", "device", "git"} <= set(found)
    assert "<svg" in plot.read_text()


def test_labels_of_lines_that_end_together_do_not_touch(variant, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    runs = [opened(variant(name, model=dict(window=size))) for name, size in (("a", 8), ("b", 9))]
    for run in runs:
        run.found["loss"] = {length: dict(bits_per_byte=2.0) for length in run.lengths}
    axis = figure.Figure().add_subplot()
    sample.draw_lines(axis, sample.PANELS[2], sample.lines_of(runs))
    low, high = sorted(text.get_position()[1] for text in axis.texts)
    assert high - low > 0.05


def test_without_matplotlib_the_tables_are_there_all_the_same(own_run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ask(own_run, "--probe=loss")
    out = capsys.readouterr().out
    assert "bits per byte" in out
    assert "pip install matplotlib" in out


def test_runs_that_differ_only_in_their_seed_are_one_line(variant, capsys):
    runs = [variant("one"), variant("two", train=dict(seed=2, out_dir="elsewhere"))]
    runs.append(variant("wider", model=dict(window=8)))
    ask(runs, "--probe=loss")
    rows = table_rows(capsys.readouterr().out, "bits per byte")[2:]
    assert [row[0] for row in rows] == [f"{runs[0]} (2 seeds)", str(runs[2])]
    assert rows[0][2].endswith("± 0.000")
    assert "±" not in rows[1][2]
    runs = [variant(f"{n}", train=dict(seed=n, init_from=f"out/{n}")) for n in (1, 2)]
    assert list(sample.lines_of(list(map(opened, runs)))) == [f"{runs[0]} (2 seeds)"]


@pytest.mark.parametrize(
    "second",
    [
        dict(),  # the same seed
        dict(train=dict(seed=2, init_from="out/one")),  # a second stage
        dict(train=dict(seed=2), meta=dict(train_sha256="another text's")),
        dict(train=dict(seed=2, learning_rate=0.5)),
        dict(train=dict(seed=2), model=dict(block_size=32)),
    ],
)
def test_what_differs_in_more_than_its_seed_has_a_line_of_its_own(variant, second):
    runs = [opened(variant("a/run")), opened(variant("b/run", **second))]
    assert list(sample.lines_of(runs).values()) == [runs[:1], runs[1:]]


# ---- What is told -------------------------------------------------------------------------------


def test_rows_that_score_the_same_tokens_are_told_with_what_would_do(tiny_run, capsys):
    def told(samples):
        run = opened(tiny_run, samples=samples, probe="loss")
        sample.check_runs([run], run.cfg)
        return capsys.readouterr().err

    assert told(3) == ""
    advice = told(9999)
    assert advice.count("\n") == 1
    fit = int(advice.split("--samples=")[1].split()[0])
    assert told(fit) == ""
    assert told(fit + 1)


def test_the_advice_for_max_multiple_works_and_is_the_largest_that_does(own_run, data):
    with pytest.raises(UsageError, match=r"use --max_multiple=\d+ or less") as told:
        ask(own_run, "--max_multiple=99999")
    most = int(str(told.value).split("--max_multiple=")[1].split()[0])
    assert most * T + 1 <= len(data.val) < (most + 1) * T + 1
    ask(own_run, f"--max_multiple={most}", "--factor=9999", "--samples=1", "--probe=loss")


def test_a_flag_without_effect_is_told_once(variant, own_run, capsys):
    rope = variant("rope", model=dict(pattern="R"))
    ask(rope, "--probe=loss", "--log_scale", "--window=8", "--max_multiple=1")
    err = capsys.readouterr().err
    assert err.count("--log_scale changes nothing") == 1
    assert err.count("--window changes nothing") == 1
    ask(own_run, "--probe=loss", "--log_scale", "--max_multiple=1")
    assert "changes nothing" not in capsys.readouterr().err


def test_flags_of_the_model_change_what_is_measured(own_run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # it does not matter here
    found = {}
    changes = ("--window=2", "--log_scale", "--attn_scale=0.5", "--rope_theta=10")
    for flag in ("--seed=1", "--attention=mask", *changes):
        ask(own_run, "--probe=loss", flag)
        found[flag] = [x["bits_per_byte"] for x in numbers(own_run)["loss"].values()]
    plain = found["--seed=1"]
    assert found["--attention=mask"] == pytest.approx(plain, rel=1e-4)
    assert found["--log_scale"][0] == pytest.approx(plain[0], rel=1e-6)  # up to T
    for flag in changes:
        assert found[flag][1] != pytest.approx(plain[1], rel=1e-5)


def test_a_text_may_be_another_dataset(variant, data_dir, tmp_path):
    for name in ("tiny", "other"):
        shutil.copytree(data_dir / "tiny", tmp_path / "data" / name)
    meta = tmp_path / "data" / "other" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | dict(train_sha256="another's")))
    folder = variant("moved", train=dict(data_dir=str(tmp_path / "data")))
    run = opened(folder, text=("other",))
    assert run.rows(T)[0].tobytes() in run.data.train.tobytes()
    with pytest.raises(UsageError, match="was trained on it"):
        opened(folder, text=("tiny",)).rows(T)
    other = json.loads(meta.read_text()) | dict(tokenizer="gpt2")
    meta.write_text(json.dumps(other))
    with pytest.raises(UsageError, match="has other tokens"):
        opened(folder, text=("other",)).rows(T)
    with pytest.raises(UsageError, match="run prepare_data.py --dataset=pg19 --data_dir="):
        opened(folder, text=("pg19",)).rows(T)
    later = variant("later", train=vars(run.train), meta=dict(earlier_texts=["another's"]))
    meta.write_text(json.dumps(other | dict(tokenizer="byte")))
    with pytest.raises(UsageError, match="was trained on it"):  # in a stage before
        opened(later, text=("other",)).rows(T)
    foreign = variant("foreign", meta=dict(val_sha256="another text's"))
    with pytest.raises(UsageError, match="was trained on another"):
        opened(foreign).rows(T)


def test_a_dataset_comes_before_the_folder_that_it_was_made_from(
    variant, data_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_dir / "tiny", tmp_path / "data" / "notes")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("alpha beta " * 99)
    folder = variant("here", train=dict(data_dir=str(tmp_path / "data")))
    with pytest.raises(UsageError, match="was trained on it"):  # or it would be scored on it
        opened(folder, text=("notes",)).rows(T)
    assert "alpha beta" in text_of(opened(folder, text=("./notes/a.txt",)).rows(T)[0])
    made = variant("made", meta=dict(dataset=[str(notes)]))
    with pytest.raises(UsageError, match="was trained on it"):  # the files themselves
        opened(made, text=("./notes", "./notes/a.txt")).rows(T)


def test_the_advice_for_max_multiple_does_for_all_runs(variant, own_run):
    long = variant("long", model=dict(block_size=128))
    with pytest.raises(UsageError) as error:
        ask([own_run, long], "--probe=loss", "--max_multiple=999999")
    advice = str(error.value).split()[-3]
    with pytest.raises(UsageError, match=advice):
        ask(long, "--probe=loss", "--max_multiple=999999")


def test_what_a_reader_of_the_numbers_has_to_know_is_told(variant, capsys):
    early = variant("early", train=dict(max_iters=999))
    short = variant("short", model=dict(block_size=32))
    ask([early, short], "--probe=loss")
    told = capsys.readouterr().err
    assert f"{early} was stopped at step 100 of 999" in told
    assert "runs of different training contexts score different tokens" in told
    ask([short], "--probe=loss")
    assert "different" not in capsys.readouterr().err


def test_what_cannot_be_written_leaves_the_old_files_and_the_tables(own_run, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure").Figure
    ask(own_run, "--probe=loss")
    before = {path: path.read_bytes() for path in own_run.glob("probe.*")}
    assert len(before) == 2

    def full(*paths):
        raise OSError("no space left")

    def half(self, path, **options):
        path.write_bytes(b"half")
        full()

    monkeypatch.setattr("os.replace", full)
    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match="no space left"):  # of the figure, which comes last
        ask(own_run, "--probe=copy")
    told = capsys.readouterr()
    assert "a passage" in told.out and "probe.json (no space left)" in told.err
    assert {path: path.read_bytes() for path in own_run.glob("probe.*")} == before


def test_the_dtype_is_the_run_s_own_unless_asked_for(variant):
    half = variant("half", train=dict(dtype="bfloat16"))
    single = variant("single", train=dict(dtype="float32"))
    assert opened(half).machine.dtype == torch.bfloat16
    assert opened(single).machine.dtype == torch.float32
    assert opened(half, dtype="float32").machine.dtype == torch.float32
    exact = sample.probe_loss(opened(single), T)["bits_per_byte"]
    rounded = sample.probe_loss(opened(half), T)["bits_per_byte"]
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=0.02)


@pytest.mark.parametrize(
    ("capability", "trained", "dtype"),
    [
        ((7, 5), "bfloat16", torch.float32),
        ((7, 5), "float32", torch.float32),
        ((8, 0), "bfloat16", torch.bfloat16),
        ((8, 0), "float32", torch.float32),
    ],
)
def test_an_old_card_computes_in_float32(variant, monkeypatch, capability, trained, dtype):
    loaded = train.load_run(variant("run", train=dict(dtype=trained)))
    monkeypatch.setattr(sample, "load_run", lambda *_, **__: loaded)
    faked = dict(get_device_capability=capability, get_device_name="a card", set_device=None)
    for name, answer in faked.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.ones(1))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    assert opened("run", device="cuda").machine.dtype == dtype
    if capability < (8, 0):
        with pytest.raises(UsageError, match="--dtype=bfloat16"):
            opened("run", device="cuda", dtype="bfloat16")


# ---- Text ---------------------------------------------------------------------------------------


@pytest.fixture
def written(tiny_run, capsys):
    """written(*flags): what sample.py prints to stdout with a prompt."""

    def write(*flags):
        capsys.readouterr()
        sample.main([str(tiny_run), "--device=cpu", "--max_new_tokens=30", *flags])
        return capsys.readouterr().out

    return write


def test_the_text_is_what_the_model_generates(tiny_run, written):
    run = opened(tiny_run)
    ids = torch.tensor([run.enc.encode("def alpha")])
    end = run.enc.eot_token
    out = run.model.generate(ids, 30, temperature=0, stop=end, n_vocab=run.enc.n_vocab)
    expected = run.enc.decode([token for token in out[0].tolist() if token != end])
    assert written("--prompt=def alpha", "--temperature=0") == expected + "\n"


def test_the_seed_decides_what_is_sampled(written):
    texts = [written("--prompt=def ", f"--seed={seed}") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert "endoftext" not in written("--prompt=")
    cold = written("--prompt=def ", "--temperature=0")
    assert cold == written("--prompt=def ", "--top_k=1") == written("--prompt=def ", "--top_p=1e-6")


def test_a_prompt_may_come_from_a_file_or_from_stdin(written, tmp_path, monkeypatch):
    prompt = "x = 'a \"quoted\" word' # \xe9 $HOME\n" * 9  # longer than the training context
    file = tmp_path / "a prompt.txt"
    file.write_text(prompt, encoding="utf-8")
    stdin = io.TextIOWrapper(io.BytesIO(prompt.encode()), "ascii", "strict")
    monkeypatch.setattr(sys, "stdin", stdin)
    texts = [written(f"--prompt={x}", "--seed=3") for x in (prompt, f"FILE:{file}", "-")]
    assert texts[0].startswith(prompt)
    assert texts[0] == texts[1] == texts[2]


def test_a_prompt_measures_nothing_and_needs_no_dataset(variant, capsys):
    folder = variant("moved", train=dict(data_dir="gone"))
    sample.main([str(folder), "--prompt=def ", "--max_new_tokens=3", "--device=cpu"])
    assert not (folder / "probe.json").exists()
    with pytest.raises(UsageError, match="gone"):
        ask(folder)
