import json
import math
import shutil
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import forget_text

import sample
import train
from model import UsageError
from prepare_data import TASKS
from sample import Run, SampleConfig

T = 64  # of the tiny run


def opened(folder, **flags):
    settings = dict(device="cpu", samples=6, max_multiple=4) | flags
    return Run(folder, SampleConfig(**settings), train.Machine("cpu"))


def ask(folder, *flags):
    """sample.main on one or many runs, small enough for a test."""
    folders = folder if isinstance(folder, list) else [folder]
    given = {f.split("=")[0] for f in flags}
    small = [f for f in ("--max_multiple=4", "--samples=4") if f.split("=")[0] not in given]
    sample.main([*map(str, folders), "--device=cpu", *small, *flags])


def numbers(folder):
    return json.loads((folder / "probe.json").read_text())


@pytest.fixture
def own_run(tiny_run, tmp_path):
    """A copy of the tiny run, to write into."""
    return shutil.copytree(tiny_run, tmp_path / "own")


@pytest.fixture
def variant(tiny_run, tmp_path):
    """variant("a/name", train={...}, model={...}): the tiny run with other settings recorded."""

    def make(name, **changes):
        folder = shutil.copytree(tiny_run, tmp_path / name)
        state = torch.load(folder / "ckpt.pt", weights_only=True)
        for part, fields in changes.items():
            state[f"{part}_config"] |= fields
        torch.save(state, folder / "ckpt.pt")
        return folder

    return make


@pytest.fixture
def asked(monkeypatch):
    """The (rows, n) of every call of predict, which answers as it always does."""
    calls, real = [], Run.predict

    def predict(self, rows, n):
        calls.append((np.array(rows), n))
        return real(self, rows, n)

    monkeypatch.setattr(Run, "predict", predict)
    return calls


def answering(monkeypatch, answer):
    """Replace the model by answer(y) -> predicted ids, in place of the likeliest tokens."""

    def predict(self, rows, n):
        y = torch.from_numpy(rows[:, -n:].astype(np.int64))
        yield F.one_hot(answer(y), self.model.config.vocab_size).float(), y

    monkeypatch.setattr(Run, "predict", predict)


def table_rows(text, title):
    """{first cell: other cells} of the Markdown table under the line that starts with title."""
    lines = text[text.index(title) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        first, *rest = (c.strip() for c in line.strip("|").split("|"))
        rows.setdefault(first, []).append(rest)
    return rows


# -- the loss probe --------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [1, 4])
def test_the_loss_probe_is_the_loss_of_the_last_quarter(tiny_run, asked, data, multiple):
    run = opened(tiny_run)
    found = sample.probe_loss(run, multiple * T)
    ((rows, n),) = asked
    assert rows.shape == (6, multiple * T + 1) and n == T // 4
    nats, size = 0.0, 0
    with torch.no_grad():
        for row in rows:
            assert row.tobytes() in data.val.tobytes()
            ids = torch.from_numpy(row.astype(np.int64))[None]
            logits = run.model(ids[:, :-1])[0]
            nats += F.cross_entropy(logits[0, -n:], ids[0, -n:], reduction="sum").item()
            size += sum(len(run.enc.decode_single_token_bytes(t)) if t != run.enc.eot_token else 1
                        for t in row[-n:].tolist())  # fmt: skip
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(nats / (6 * n)), rel=1e-4)


def test_the_loss_probe_scores_the_same_targets_at_every_length(tiny_run, asked):
    run = opened(tiny_run)
    for multiple in (1, 2, 4):
        sample.probe_loss(run, multiple * T)
    (short, n), (middle, _), (long, _) = asked
    assert np.array_equal(short, middle[:, -T - 1 :]) and np.array_equal(short, long[:, -T - 1 :])
    assert len({row.tobytes() for row in short}) == 6  # and they differ from each other


def test_how_many_rows_are_read_at_once_changes_nothing(tiny_run, monkeypatch):
    """Long rows are read a few at a time: here, as many rows as 2**17 tokens hold."""
    run = opened(tiny_run, samples=6)
    rows = np.tile(run.data.val[: 4 * T + 1], (1, 1)).repeat(600, 0)
    rows[::2] = run.data.val[7 : 4 * T + 8]
    parts = list(run.predict(rows, 3))
    assert len(parts) > 1 and sum(len(y) for _, y in parts) == 600
    logits, y = (torch.cat(x) for x in zip(*parts, strict=True))
    assert torch.equal(y, torch.from_numpy(rows[:, -3:].astype(np.int64)))
    for i in (0, 1, 598, 599):
        torch.testing.assert_close(logits[i], logits[i % 2], atol=1e-4, rtol=1e-4)


# -- the needle probe ------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_an_oracle_scores_1_and_a_constant_model_0(tiny_run, monkeypatch, depth):
    for answer, score in [
        (lambda y: y, 1.0),
        (lambda y: torch.zeros_like(y), 0.0),
        (lambda y: torch.cat((y[:, :-1], y[:, -1:] + 1), 1), 0.0),  # all but the last digit
        (lambda y: torch.cat((y[:, :1] + 1, y[:, 1:]), 1), 0.0),  # all but the first
        (lambda y: torch.cat((y[:2], y[2:] + 1)), 2 / 6),
    ]:
        answering(monkeypatch, answer)
        for multiple in (1, 4):
            found = sample.probe_needle(opened(tiny_run), multiple * T, depth)
            assert found == dict(accuracy=pytest.approx(score))


def test_every_question_has_its_fact_in_the_row_and_the_answer_at_its_end(tiny_run, asked):
    run = opened(tiny_run)
    for multiple in (1, 4):
        sample.probe_needle(run, multiple * T)
    for (rows, n), multiple in zip(asked, (1, 4), strict=True):
        assert rows.shape == (6, multiple * T + 1) and n == 7
        for row in rows:
            text, answer = (run.enc.decode(x.tolist()) for x in (row, row[-7:]))
            assert answer.isdigit() and len(answer) == 7 and text.count(answer) == 2
            question = text[text.rindex("\n") :]
            assert text.count(question) == 2 and question.endswith(answer)


@pytest.mark.parametrize("depth, place", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_a_fact_stands_at_the_depth_asked_for(tiny_run, asked, depth, place):
    run = opened(tiny_run)
    sample.probe_needle(run, 4 * T, depth)
    ((rows, _),) = asked
    for row in rows:
        text = run.enc.decode(row.tolist())
        fact = text.index(text[-7:]) / text.rindex("\n")  # a question is one line, the last
        assert fact == pytest.approx(place, abs=0.15)


def test_every_answer_of_a_row_is_scored(variant, monkeypatch):
    """Two questions a row: a model that knows the last answer only has half of them right."""
    answering(monkeypatch, lambda y: torch.cat((y[:, :-7] + 1, y[:, -7:]), 1))
    run = opened(variant("wide", model=dict(block_size=256)), questions=2)
    assert sample.probe_needle(run, 512) == dict(accuracy=0.5)
    tails = {tuple(p.row[p.tail].tolist()) for p in run.planted(512)}
    assert len(tails) == 6 and all(len(p.answers) == 2 for p in run.planted(512))
    assert all(len(p.answers) == 1 for p in run.planted(512, depth=0.5))  # depth is of one fact


def test_held_out_questions_and_other_haystacks_change_the_rows(variant, data_dir, tmp_path):
    for name in ("tiny", "other"):
        shutil.copytree(data_dir / "tiny", tmp_path / "data" / name)
    meta = tmp_path / "data" / "other" / "meta.json"
    changed = json.loads(meta.read_text()) | dict(train_sha256="another text's")
    meta.write_text(json.dumps(changed))
    where = dict(data_dir=str(tmp_path / "data"))
    tiny_run = variant("wide", model=dict(block_size=256), train=where)
    plain = opened(tiny_run)
    assert not np.array_equal(plain.planted(4 * T)[0].row,
                              opened(tiny_run, held_out=True).planted(4 * T)[0].row)
    said = plain.enc.decode(opened(tiny_run, haystack="repeat").rows(2 * T)[0].tolist())
    assert "The sky is blue" in said
    noise = opened(tiny_run, haystack="noise").rows(4 * T)
    assert noise.shape == (6, 4 * T + 1) and len(np.unique(noise)) > 200
    other = opened(tiny_run, haystack="other")
    assert other.rows(T)[0].tobytes() in other.data.train.tobytes()
    with pytest.raises(UsageError, match="was trained on that"):
        opened(tiny_run, haystack="tiny").rows(T)
    with pytest.raises(UsageError, match="no dataset folder"):
        opened(tiny_run, haystack="nowhere").rows(T)


# -- the ruler probe -------------------------------------------------------------------------------


def test_the_ruler_probe_has_a_column_a_task_and_an_average_over_retrieval(variant, monkeypatch):
    wide = variant("wide", model=dict(block_size=1024))
    columns = [*TASKS, "single, repeat", "single, noise", "retrieval"]
    for answer, score in [(lambda y: y, 1.0), (lambda y: torch.zeros_like(y), 0.0)]:
        answering(monkeypatch, answer)
        found = sample.probe_ruler(opened(wide, max_multiple=1, samples=2), 1024)
        assert list(found) == columns and set(found.values()) == {score}
    found = sample.probe_ruler(opened(wide, tasks="qa", max_multiple=1), 1024)
    assert list(found) == ["qa"]


def test_a_run_that_never_saw_a_question_may_be_asked(variant):
    silent = variant("silent", train=dict(needle_frac=0.0), model=dict(block_size=256))
    found = sample.probe_ruler(opened(silent, tasks="words", samples=2), 256)
    assert set(found) == {"words", "retrieval"}


def test_questions_and_answers_are_not_in_the_average_over_retrieval(tiny_run, monkeypatch):
    scores = dict(single=0.25, qa=0.75)
    monkeypatch.setattr(sample, "share_right", lambda run, planted: scores[planted])
    monkeypatch.setattr(Run, "planted", lambda self, length, task, haystack: task)
    found = sample.probe_ruler(opened(tiny_run, tasks="single,qa", haystack="noise"), T)
    assert found == dict(single=0.25, qa=0.75, retrieval=0.25)


def test_the_ruler_table_is_length_by_task(own_run, capsys):
    ask(own_run, "--probe=ruler", "--tasks=single", "--max_multiple=16", "--factor=16",
        "--samples=2", "--haystack=repeat")  # fmt: skip
    rows = table_rows(capsys.readouterr().out, "share of right answers by task")
    assert rows["run"] == [["context", "single", "retrieval"]]
    assert [row[0] for row in rows["own"]] == ["64", "1,024"]


# -- the attention probe ---------------------------------------------------------------------------


def test_attention_shares_sum_to_1_and_stay_inside_the_window(tiny_run):
    run = opened(tiny_run)
    for multiple in (1, 4):
        layers = sample.probe_attention(run, multiple * T)["layers"]
        assert [layer["letter"] for layer in layers] == list("SSSN")
        for layer in layers:
            assert sum(layer[s] for s in sample.SEGMENTS) == pytest.approx(1, abs=1e-4)
            reach = 16 if layer["letter"] == "S" else multiple * T
            assert 0 < layer["entropy"] <= math.log2(reach)
            assert len(layer["curve"]) == sample.BINS
        for layer in layers[:3]:  # begin and needle are out of a window's sight
            assert layer["begin"] == layer["needle"] == 0 and layer["qc"] > 0.1
        assert min(layers[3][s] for s in sample.SEGMENTS) > 0


def test_attention_is_that_of_the_definition(fit, tmp_path, monkeypatch):
    """Every kind of layer, grouped heads, rows read two at a time: softmax by hand, row by row."""
    folder = fit(tmp_path / "run", "--pattern=SCNR", "--max_iters=30", "--learning_rate=1e-2",
                 "--n_head=4", "--n_kv_head=2")  # fmt: skip
    run = opened(folder, samples=5)
    planted, layers = run.planted(4 * T, 0.5), []
    with torch.no_grad():
        for block in run.model.blocks:
            with torch.no_grad():
                for w in (block.attn.wq, block.attn.wk):
                    w.weight *= 4  # far from the mean of the values
        for row in planted:
            x = run.model.wte(torch.from_numpy(row.row[:-1].astype(np.int64))[None])
            rotations, scale = run.model.positions(4 * T)
            where = np.array(["context"] * 4 * T)
            where[:10], where[row.asked[0]], where[row.tail] = "begin", "needle", "qc"
            found = []
            for block in run.model.blocks:
                rotation, attn = rotations.get(block.attn.theta), block.attn
                q, k, _ = attn.qkv(block.ln(x), rotation, scale)
                each = []
                for head in range(4):
                    for i in range(4 * T - 7, 4 * T):
                        j = torch.arange(i + 1)
                        if attn.chunked:
                            j = j[j // 16 == i // 16]
                        elif attn.window:
                            j = j[i - j < 16]
                        p = (k[0, j, head // 2] @ q[0, i, head] / q.size(-1) ** 0.5).softmax(0)
                        shares = [p[where[j.numpy()] == s].sum() for s in sample.SEGMENTS]
                        each.append([*shares, -(p * p.log2()).nansum()])
                found.append(np.mean(each, 0))
                x = block(x, rotation, scale)
            layers.append(found)
    monkeypatch.setattr(sample, "TOKENS", 2 * 4 * T + 1)
    got = sample.probe_attention(run, 4 * T)["layers"]
    assert [layer["letter"] for layer in got] == list("SCNR")
    for layer, want in zip(got, np.mean(layers, 0), strict=True):
        told = [layer[name] for name in (*sample.SEGMENTS, "entropy")]
        np.testing.assert_allclose(told, want, rtol=1e-3, atol=1e-5)


def test_every_probe_can_be_drawn_together(variant):
    wide = variant("wide", model=dict(block_size=1024))
    for flags in (["--probe=loss,needle,ruler,attention,cost", "--heatmap"],
                  ["--probe=ruler", "--tasks=qa"]):  # fmt: skip
        (wide / "probe.png").unlink(missing_ok=True)
        ask(wide, *flags, "--max_multiple=1", "--samples=1", "--cost_rows=1")
        assert (wide / "probe.png").stat().st_size > 10_000


def test_attention_of_a_model_that_looks_everywhere_alike_is_the_share_of_the_tokens(tiny_run):
    """With queries of zero every key weighs the same, so the shares are known."""
    run = opened(tiny_run)
    for block in run.model.blocks:
        torch.nn.init.zeros_(block.attn.wq.weight)
    found = sample.probe_attention(run, 4 * T)["layers"][3]
    planted, n = run.planted(4 * T, 0.5), 7
    seen = np.arange(4 * T - n + 1, 4 * T + 1)  # keys that each of the answer's queries sees
    tail = np.array([p.tail.stop - p.tail.start for p in planted])
    needle = np.array([p.asked[0].stop - p.asked[0].start for p in planted])
    assert found["begin"] == pytest.approx((10 / seen).mean(), rel=1e-4)
    assert found["needle"] == pytest.approx((needle[:, None] / seen).mean(), rel=1e-4)
    in_tail = [(seen - (4 * T + 1 - t)) / seen for t in tail]
    assert found["qc"] == pytest.approx(np.mean(in_tail), rel=1e-4)
    assert found["entropy"] == pytest.approx(np.log2(seen).mean(), rel=1e-4)


def test_the_attention_table_has_a_line_for_each_kind_of_layer(own_run, capsys):
    ask(own_run, "--probe=attention", "--factor=4")
    rows = table_rows(capsys.readouterr().out, "where the answer's queries look")["own"]
    assert [row[:2] for row in rows] == [[k, t] for k in ("N", "S", "all") for t in ("64", "256")]
    found = numbers(own_run)["attention"]["4"]["layers"]
    assert rows[1][2:] == [f"{found[3][s]:.4f}" for s in sample.SEGMENTS] + [
        f"{found[3]['entropy']:.2f}"
    ]
    mean = np.mean([layer["needle"] for layer in found])
    assert rows[5][3] == f"{mean:.4f}"


def test_the_needle_probe_scores_the_same_targets_at_every_length(tiny_run, asked):
    run = opened(tiny_run)
    for multiple in (1, 2, 4):
        sample.probe_needle(run, multiple * T)
    (short, n), (middle, _), (long, _) = asked
    assert np.array_equal(short[:, -n:], middle[:, -n:])
    assert np.array_equal(short[:, -n:], long[:, -n:])


def test_the_planted_facts_depend_on_the_seed_alone(tiny_run, asked):
    for seed in (1, 1, 2):
        sample.probe_needle(opened(tiny_run, seed=seed), T)
    a, b, c = (rows for rows, _ in asked)
    assert np.array_equal(a, b) and not np.array_equal(a[:, -7:], c[:, -7:])


def test_answers_of_different_lengths_are_scored_whole(tiny_run, monkeypatch):
    real, calls = sample.prepare_data.draw_task, []

    def draw_task(*args):
        task = real(*args)
        calls.append(task)
        ((question, answer),) = task.turns
        return task._replace(turns=[(question, answer[: 5 if len(calls) % 2 == 0 else 7])])

    def five_right(y):
        return torch.cat((y[:, :-5] + 1, y[:, -5:]), 1)

    monkeypatch.setattr(sample.prepare_data, "draw_task", draw_task)
    answering(monkeypatch, five_right)
    assert sample.probe_needle(opened(tiny_run), T) == dict(accuracy=0.5)


# -- the cost probe --------------------------------------------------------------------------------


def test_the_cost_probe_tells_speeds_and_the_bytes_of_the_cache(own_run, variant, capsys):
    full = variant("full", model=dict(pattern="R"))
    ask([own_run, full], "--probe=cost", "--cost_rows=2", "--max_multiple=2")
    found = numbers(own_run)["cost"], numbers(full)["cost"]
    assert list(found[0]) == ["1", "2"]
    for x in (*found[0].values(), *found[1].values()):
        assert x["prefill_tokens_per_second"] > 0 and x["decode_tokens_per_second"] > 0
    grown = [(f["2"]["kv_mb"] - f["1"]["kv_mb"]) * 1e6 for f in found]
    a_key = 2 * 2 * 16 * 4  # rows, k and v, one head of 16 channels, fp32
    assert grown == [pytest.approx(T * a_key), pytest.approx(4 * T * a_key)]  # 1 layer of 4 grows
    rows = table_rows(capsys.readouterr().out, "decoded tokens per second")
    assert f"{found[1]['2']['kv_mb']:,.1f}" in rows["full"][0][-1]


# -- what comes out --------------------------------------------------------------------------------


def test_the_tables_show_what_probe_json_holds(own_run, capsys):
    ask(own_run)
    out, found = capsys.readouterr().out, numbers(own_run)
    assert f"{own_run}: T 64, layers  0 S rope window=16" in out
    assert list(found["loss"]) == list(found["needle"]) == ["1", "2", "4"]
    (cells,) = table_rows(out, "bits per byte")["own"]
    want = [f"{x['bits_per_byte']:.3f} ({x['perplexity']:.3g})" for x in found["loss"].values()]
    assert cells == ["64", *want]
    (cells,) = table_rows(out, "questions answered exactly")["own"]
    assert cells == ["64", *(f"{x['accuracy']:.3f}" for x in found["needle"].values())]
    assert table_rows(out, "bits per byte")["run"] == [["T", "1x", "2x", "4x"]]


def test_probe_json_says_how_it_was_measured(own_run):
    ask(own_run, "--window=8", "--probe=loss", "--seed=3")
    found = numbers(own_run)
    assert "needle" not in found and found["block_size"] == 64 and found["device"] == "cpu"
    assert found["model"] == asdict(opened(own_run, window=8).model.config)
    assert found["settings"]["samples"] == 4 and found["settings"]["seed"] == 3
    assert found["torch"] == torch.__version__ and "command" in found


def test_probing_twice_gives_the_same_numbers(own_run):
    ask(own_run)
    first = numbers(own_run)
    ask(own_run)
    assert numbers(own_run) == first


def test_runs_side_by_side_get_a_line_each(own_run, variant, capsys):
    other = variant("other", model=dict(window=4))
    ask([own_run, other], "--probe=loss")
    rows = table_rows(capsys.readouterr().out, "bits per byte")
    assert list(rows) == ["run", "---", "own", "other"] and rows["own"] != rows["other"]
    assert numbers(own_run)["loss"] != numbers(other)["loss"]


def test_seeds_become_one_line_of_mean_and_standard_deviation(fit, own_run, tmp_path, capsys):
    flags = ["--max_iters=60", "--learning_rate=1e-2", "--min_lr=1e-3"]
    second = fit(tmp_path / "second", *flags, "--seed=2")
    capsys.readouterr()
    ask([own_run, second], "--probe=loss")
    rows = table_rows(capsys.readouterr().out, "bits per byte")
    (cells,) = rows["own (2 seeds)"]
    assert set(rows) == {"run", "---", "own (2 seeds)"}
    for cell, m in zip(cells[1:], ("1", "2", "4"), strict=True):
        x = [numbers(run)["loss"][m]["bits_per_byte"] for run in (own_run, second)]
        assert x[0] != x[1]
        assert cell.startswith(f"{np.mean(x):.3f} ± {abs(x[0] - x[1]) / math.sqrt(2):.3f} (")


def test_runs_called_alike_keep_a_line_each(own_run, tmp_path, capsys, monkeypatch):
    shutil.copytree(own_run, tmp_path / "a" / "own")
    monkeypatch.chdir(tmp_path / "a")
    ask([own_run, "own"], "--probe=loss", "--max_multiple=1")
    labels = set(table_rows(capsys.readouterr().out, "bits per byte")) - {"run", "---"}
    assert labels == {"own", str(tmp_path / "a" / "own")}


def test_runs_on_different_texts_are_no_seeds(variant, capsys, monkeypatch):
    runs = [variant(f"s{s}", train=dict(seed=s)) for s in (1, 2)]
    groups = [Run(folder, SampleConfig(probe="cost"), train.Machine("cpu")) for folder in runs]
    assert list(sample.lines_of(groups)) == ["s1 (2 seeds)"]
    groups[1].meta = groups[1].meta | dict(train_sha256="another")
    assert list(sample.lines_of(groups)) == ["s1", "s2"]


def test_first_stages_that_differ_in_more_than_a_seeds_number_are_told_apart(variant):
    runs = [variant(f"long-{s}", train=dict(seed=s, init_from=f"out/{name}"))
            for s, name in enumerate(("SN-400", "SN-800"))]
    groups = [Run(folder, SampleConfig(), train.Machine("cpu")) for folder in runs]
    assert list(sample.lines_of(groups)) == ["long-0", "long-1"]


def test_a_heatmap_asks_one_question_however_many_are_asked_elsewhere(variant):
    ask(variant("one"), "--probe=loss", "--heatmap", "--questions=9", "--max_multiple=1")


def test_what_cannot_be_asked_is_told_before_anything_is_measured(variant, monkeypatch):
    monkeypatch.setitem(sample.PROBES, "loss", lambda *_: 1 / 0)
    with pytest.raises(UsageError, match="cannot hold the facts"):
        ask(variant("one"), "--probe=loss,ruler", "--tasks=multikey")


def test_the_figure_tells_of_each_run_where_its_training_ended(variant, monkeypatch):
    from matplotlib.axes import Axes

    told, real = [], Axes.axvline
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **k: (told.append(x), real(self, x, **k)))
    runs = [variant("short", model=dict(block_size=32)), variant("long")]
    ask(runs, "--probe=loss", "--max_multiple=2")
    assert sorted(told) == [32, 64]


def test_a_run_named_twice_is_no_second_seed(own_run):
    with pytest.raises(UsageError, match="named twice"):
        ask([own_run, f"{own_run}/"], "--probe=loss")


def test_a_second_stage_is_no_seed_of_the_first(variant, capsys):
    runs = [variant("one"), variant("two", train=dict(init_from="out/one", seed=2))]
    ask(runs, "--probe=loss", "--max_multiple=1")
    assert set(table_rows(capsys.readouterr().out, "bits per byte")) == {"run", "---", "one", "two"}


@pytest.mark.parametrize("first", [("short-1", "short-2"), ("short", "short-2"),
                                   ("short1337", "short1338/")])
def test_second_stages_of_seeds_are_seeds_however_they_were_numbered(variant, capsys, first):
    runs = [variant(f"long-{n}", train=dict(seed=1337 + n, init_from=f"out/{name}"))
            for n, name in enumerate(first)]
    ask(runs, "--probe=loss", "--max_multiple=1")
    assert "long-0 (2 seeds)" in table_rows(capsys.readouterr().out, "bits per byte")


def test_second_stages_of_different_first_ones_are_no_seeds(variant, capsys):
    runs = [variant(f"{name}-long", train=dict(seed=s, init_from=f"out/{name}-{s}"))
            for s, name in enumerate(("muon", "adamw"))]
    ask(runs, "--probe=loss", "--max_multiple=1")
    assert {"muon-long", "adamw-long"} < set(table_rows(capsys.readouterr().out, "bits per byte"))


def test_a_seed_that_comes_twice_is_no_second_seed(variant, capsys):
    ask([variant("one"), variant("again")], "--probe=loss", "--max_multiple=1")
    assert {"one", "again"} < set(table_rows(capsys.readouterr().out, "bits per byte"))


def test_runs_of_one_name_in_two_places_both_get_a_line(variant, capsys):
    runs = [variant("a/rope", model=dict(window=4)), variant("b/rope", model=dict(window=8))]
    ask(runs, "--probe=loss", "--max_multiple=1")
    rows = table_rows(capsys.readouterr().out, "bits per byte")
    assert sum(len(cells) for cells in rows.values()) == 2 + 2  # the head, the rule and both runs


def test_overrides_change_the_model_that_is_measured(own_run):
    found = {}
    for flag in ("--seed=1", "--window=2", "--log_scale", "--rope_theta=10", "--attention=mask"):
        ask(own_run, "--probe=loss", flag)
        found[flag] = [x["bits_per_byte"] for x in numbers(own_run)["loss"].values()]
    plain = found["--seed=1"]
    assert found["--attention=mask"] == pytest.approx(plain, rel=1e-4)
    assert all(a != pytest.approx(b, rel=1e-4) for a, b in zip(found["--window=2"], plain,
                                                              strict=True))  # fmt: skip
    assert found["--rope_theta=10"][0] != plain[0]
    assert found["--log_scale"][0] == plain[0]  # the identity inside the training length
    assert found["--log_scale"][2] != plain[2]


def test_a_heatmap_has_a_row_a_depth_and_a_column_a_length(own_run, capsys, monkeypatch):
    answering(monkeypatch, lambda y: y)
    ask(own_run, "--probe=needle", "--heatmap", "--max_multiple=2", "--samples=2")
    rows = table_rows(capsys.readouterr().out, "own: questions answered exactly, by depth")
    assert rows.pop("depth") == [["1x", "2x"]] and rows.pop("---") == [["---", "---"]]
    assert rows == {f"{d}%": [["1.00", "1.00"]] for d in range(0, 101, 10)}
    assert len(numbers(own_run)["heatmap"]) == 22


def test_text_too_short_for_the_longest_context_names_max_multiple(own_run, data):
    with pytest.raises(UsageError, match=r"--max_multiple=\d") as e:
        ask(own_run, "--max_multiple=1024")
    works = int(str(e.value).split("--max_multiple=")[1].split()[0])
    ask(own_run, f"--max_multiple={works}", "--probe=loss", "--samples=1")
    assert 2 * works * T + 1 > len(data.val)  # and it is the longest that does


def test_the_advice_for_text_of_a_round_length_works(own_run):
    run = opened(own_run, max_multiple=16)
    run.data = run.data._replace(val=run.data.val[: 8 * T])
    with pytest.raises(UsageError, match="--max_multiple=7"):
        run.rows(T)


def test_a_figure_is_drawn(own_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    ask(own_run, "--max_multiple=2", "--samples=2")
    assert (own_run / "probe.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert str(own_run / "probe.png") in capsys.readouterr().out
    ask(own_run, "--max_multiple=1", "--samples=2", f"--plot={tmp_path / 'x.svg'}", "--heatmap")
    assert "<svg" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize("name", ["nowhere/x.png", "x.nonsense"])
def test_a_figure_that_cannot_be_written_is_a_clear_error(own_run, tmp_path, name):
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="x\\."):
        ask(own_run, "--probe=loss", "--max_multiple=1", f"--plot={tmp_path / name}")


def test_without_matplotlib_the_tables_are_there_all_the_same(own_run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ask(own_run, "--probe=loss", "--max_multiple=1")
    out = capsys.readouterr().out
    assert "bits per byte" in out and "pip install matplotlib" in out
    assert not (own_run / "probe.png").exists()


# -- text ------------------------------------------------------------------------------------------


def text_of(capsys, folder, *flags):
    capsys.readouterr()
    sample.main([str(folder), "--device=cpu", "--max_new_tokens=40", *flags])
    return capsys.readouterr().out


def test_a_prompt_is_continued_and_the_seed_decides_how(tiny_run, capsys):
    a, b, c = (text_of(capsys, tiny_run, "--prompt=def ", f"--seed={s}") for s in (1, 1, 2))
    assert a == b != c and a.startswith("def ") and len(a) > 20
    cold = [text_of(capsys, tiny_run, "--prompt=def ", "--temperature=0", f"--seed={s}")
            for s in (1, 2)]  # fmt: skip
    assert cold[0] == cold[1] == text_of(capsys, tiny_run, "--prompt=def ", "--top_k=1")
    assert cold[0] == text_of(capsys, tiny_run, "--prompt=def ", "--top_p=1e-6")


def test_the_text_is_what_the_model_generates(tiny_run, capsys):
    run = opened(tiny_run)
    ids = torch.tensor([run.enc.encode("def alpha")])
    want = run.model.generate(ids, 40, temperature=0, stop=run.enc.eot_token)[0].tolist()
    want = [t for t in want if t < run.enc.eot_token]
    got = text_of(capsys, tiny_run, "--prompt=def alpha", "--temperature=0")
    assert got == run.enc.decode(want) + "\n"


def test_an_empty_prompt_starts_a_document(tiny_run, capsys):
    assert "endoftext" not in text_of(capsys, tiny_run, "--prompt=")


def test_a_prompt_longer_than_the_training_context_is_read_whole(tiny_run, capsys):
    prompt = "def alpha_1(beta):\n    return gamma + 7\n" * 20
    assert text_of(capsys, tiny_run, f"--prompt={prompt}").startswith(prompt)


def test_prompting_measures_nothing(own_run, capsys):
    text_of(capsys, own_run, "--prompt=def ")
    assert not (own_run / "probe.json").exists()


# -- mistakes --------------------------------------------------------------------------------------


def test_without_a_name_the_newest_run_is_asked(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no run in out"):
        sample.main([])
    shutil.copytree(tiny_run, tmp_path / "out" / "here")
    sample.main(["--device=cpu", "--probe=loss", "--max_multiple=1", "--samples=2"])
    assert "| here | 64 |" in capsys.readouterr().out


def test_another_text_than_the_run_was_trained_on_is_refused(own_run):
    forget_text(own_run, val_sha256="0" * 64)
    with pytest.raises(UsageError, match="not the text"):
        ask(own_run)


def test_a_dataset_that_is_gone_is_a_clear_error_but_text_still_comes(variant, tmp_path, capsys):
    run = variant("moved", train=dict(data_dir=str(tmp_path / "gone")))
    with pytest.raises(UsageError, match="gone"):
        ask(run)
    assert text_of(capsys, run, "--prompt=def ").startswith("def ")
