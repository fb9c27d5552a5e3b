"""Batches, evaluation, the optimiser, and runs: what is computed, logged and resumed."""

import json
import math
import os
import re
import shlex
import shutil
import signal
from dataclasses import asdict, fields, replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import same_weights

import train
from model import GPT, ModelConfig, UsageError
from train import Batches, Machine, TrainConfig, load_checkpoint, load_run, stream


def config(**flags):
    return TrainConfig(**dict(batch_size=6) | flags)


def tiny_model(**flags):
    torch.manual_seed(0)
    shape = dict(vocab_size=320, block_size=32, n_layer=4, n_head=2, n_embd=32, window=8)
    return GPT(ModelConfig(**shape | flags))


def weights(folder):
    return load_checkpoint(folder)["model"]


def whole_rows(batch):
    """Inputs and targets (B, T) -> the rows (B, T + 1) that they were cut from, as an array."""
    x, y = batch
    return torch.cat((x, y[:, -1:]), 1).numpy()


def is_text(row, tokens):
    return row.astype(tokens.dtype).tobytes() in tokens.tobytes()


@pytest.fixture
def stopped_run(fit, tmp_path, stop_at):
    """A run of 4 steps, stopped after 2."""
    on = stop_at(1)
    folder = fit(tmp_path / "a stopped run", "--max_iters=4")
    on()
    return folder


def resume(folder, *flags):
    return train.main(["--resume", f"--out_dir={folder}", *flags])


# ---- Batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("repeat_frac", [0.0, 0.5])
def test_a_batch_is_a_function_of_seed_stage_and_number(data, stage, repeat_frac):
    cfg = config(repeat_frac=repeat_frac)
    drawn = Batches(data, cfg, 64, stage)
    x, y = drawn[5]
    again = Batches(data, replace(cfg, max_iters=7, learning_rate=1.0), 64, stage)
    np.random.seed(3)
    again[9]
    assert torch.equal(again[5][0], x)
    assert torch.equal(again[5][1], y)
    other_seed = Batches(data, replace(cfg, seed=1), 64, stage)[5]
    other_stage = Batches(data, cfg, 64, stage + 1)[5]
    for other, _ in (drawn[6], other_seed, other_stage):
        assert not (other == x).all(1).any()


def test_no_stream_of_random_numbers_is_drawn_from_twice():
    drawn = []
    for name in ("batch", "needle", "copy", "loss", "again", "prompt"):
        for count in range(4):
            for numbers in product([0, 1, 1337], repeat=count):  # a zero at the end counts, too
                drawn.append(stream(name, *numbers).random())
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize("repeat_frac", [0.0, 0.5])
def test_targets_are_the_inputs_shifted_by_one(data, repeat_frac):
    x, y = Batches(data, config(repeat_frac=repeat_frac), 64, 0)[0]
    assert x.shape == y.shape == (6, 64)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_without_repeats_rows_are_training_text_word_for_word(data):
    rows = whole_rows(Batches(data, config(batch_size=50, repeat_frac=0.0), 64, 0)[0])
    assert all(is_text(row, data.train) for row in rows)
    repeating = whole_rows(Batches(data, config(batch_size=50), 64, 0)[0])
    assert sum(is_text(row, data.train) for row in repeating) < 10


def test_the_spans_of_a_batch_are_as_long_as_the_flags_say(data):
    def changed(longest):  # tokens of each row, by one span
        cfg = config(batch_size=50, repeat_frac=0.001, shortest_span=1, longest_span=longest)
        rows = whole_rows(Batches(data, cfg, 64, 0)[0])
        plain = whole_rows(Batches(data, replace(cfg, repeat_frac=0.0), 64, 0)[0])
        return (rows != plain).sum(1)

    assert changed(1).max() == 1
    assert 12 < changed(32).max() <= 32


def repeated(T, frac, seed, **flags):
    """For each place of a row, from which place before any copy its token came."""
    row = np.arange(T)
    train.repeat_spans(row, config(repeat_frac=frac, **flags), np.random.default_rng(seed))
    return row


@pytest.mark.parametrize("T", [9, 65, 1025])
def test_a_copied_token_stood_earlier_in_the_row(T):
    for seed in range(200):
        origin = repeated(T, 0.5, seed)
        assert (origin <= np.arange(T)).all()
        assert (origin != np.arange(T)).any()


@pytest.mark.parametrize(("shortest", "longest"), [(12, 128), (64, 256)])
def test_one_span_is_copied_whole_from_a_place_that_ends_before_it(shortest, longest):
    flags = dict(shortest_span=shortest, longest_span=longest)
    lengths = []
    distances = []
    for seed in range(2000):
        back = np.arange(1025) - repeated(1025, 1e-9, seed, **flags)
        copied = np.flatnonzero(back)
        length = len(copied)
        assert copied[-1] - copied[0] == length - 1
        assert len(set(back[copied])) == 1
        assert back[copied[0]] >= length
        lengths.append(length)
        distances.append(back[copied[0]])
    assert min(lengths) == shortest
    assert 0.95 * longest < max(lengths) <= longest
    assert np.median(lengths) == pytest.approx((shortest * longest) ** 0.5, rel=0.1)  # log-uniform
    assert min(distances) < 2.5 * shortest
    assert max(distances) > 900


@pytest.mark.parametrize(("T", "longest"), [(65, 32), (20, 10), (2, 1)])
def test_a_span_is_half_of_a_short_row_at_most(T, longest):
    rows = np.stack([repeated(T, 1e-9, seed) for seed in range(500)])
    copied = rows != np.arange(T)
    assert copied.sum(1).max() == longest


def test_the_asked_share_of_a_row_is_copied():
    for frac in (0.1, 0.28):  # the last span goes beyond it: the longer spans are, the farther
        rows = np.stack([repeated(1025, frac, seed, longest_span=64) for seed in range(200)])
        copied = rows != np.arange(1025)
        assert copied.mean() == pytest.approx(frac, abs=0.03)


@pytest.mark.parametrize("T", [1, 2, 3, 5])
def test_the_shortest_rows_can_be_trained_on(fit, tmp_path, T):
    folder = fit(tmp_path / "run", f"--block_size={T}", "--max_iters=2", "--repeat_frac=0.9")
    assert load_checkpoint(folder)["step"] == 2


def test_long_steps_are_interleaved_and_hold_as_many_tokens(data):
    cfg = config(batch_size=8, long_rows=256, long_frac=0.25, gradient_accumulation_steps=2)
    drawn = Batches(data, cfg, 64, 1)
    for n in range(16):
        x, _ = drawn[n]
        assert x.shape == ((2, 256) if n % 8 >= 6 else (8, 64))


@pytest.mark.parametrize("step", [0, 3])
def test_ranks_share_the_micro_batches_of_one_process(data, step):
    cfg = config(gradient_accumulation_steps=4, max_iters=5)
    drawn = Batches(data, cfg, 32, 0)

    def loaded(rank, world):
        machine = SimpleNamespace(rank=rank, world=world, cuda=False)
        return [x for x, _ in drawn.load(step, machine)]

    alone = loaded(0, 1)
    ranks = [loaded(0, 2), loaded(1, 2)]
    assert len(alone) == len(ranks[0]) + len(ranks[1]) == (5 - step) * 4
    for n, x in enumerate(alone):
        assert torch.equal(x, drawn[step * 4 + n][0])
        assert torch.equal(x, ranks[n % 2][n // 2])


# ---- Evaluation ---------------------------------------------------------------------------------


class Spy(torch.nn.Module):
    """A model that keeps what it is asked: of whole rows, and of the ends of rows."""

    def __init__(self):
        super().__init__()
        self.model = tiny_model()
        self.whole = []
        self.ends = []

    def forward(self, x, y):
        kept = self.whole if (y != -100).all() else self.ends
        kept.append((x, y))
        return self.model(x, y)

    def loss(self, rows, n):
        """Mean nats of the last n tokens of rows, an array (B, T + 1)."""
        rows = torch.from_numpy(rows)
        logits, _ = self.model(rows[:, :-1])
        return F.cross_entropy(logits[:, -n:].mT, rows[:, -n:]).item()


def evaluate(data, model=None, machine=None, **flags):
    """(loss, copy) of 12 rows of 32 tokens, unless the flags say otherwise."""
    cfg = TrainConfig(**dict(batch_size=6, eval_iters=2) | flags)
    model = model or tiny_model()
    machine = machine or Machine("cpu")
    return train.estimate_loss(model, data, cfg, 32, machine)


def test_evaluation_does_not_depend_on_how_its_rows_are_split(data):
    expected = evaluate(data)
    assert evaluate(data, seed=99) == expected
    for rows, batches in ((5, 3), (4, 3), (12, 1), (1, 12)):
        found = evaluate(data, batch_size=rows, eval_iters=batches)
        same_rows = rows * batches == 12
        assert same_rows == (found == pytest.approx(expected, rel=1e-5))


@pytest.mark.parametrize("world", [2, 5, 16])
def test_evaluation_is_shared_by_the_ranks_whatever_their_number(data, world):
    total = np.zeros(2)
    for rank in range(world):
        machine = Machine("cpu")
        machine.rank = rank
        machine.world = world
        machine.all_reduce = lambda tensor, *op: tensor
        total += evaluate(data, machine=machine)
    assert list(total) == pytest.approx(evaluate(data), rel=1e-5)


def test_validation_loss_is_that_of_whole_rows_of_validation_text(data):
    spy = Spy()
    loss, _ = evaluate(data, spy)
    rows = np.concatenate([whole_rows(batch) for batch in spy.whole])
    assert len(np.unique(rows, axis=0)) == len(rows) == 12
    assert all(is_text(row, data.val) for row in rows)
    assert loss == pytest.approx(spy.loss(rows, 32), rel=1e-5)


def test_copy_is_the_loss_of_a_passage_that_stands_in_the_row_a_second_time(data):
    spy = Spy()
    _, copy = evaluate(data, spy)
    n = train.passage_length(32)
    plain = np.concatenate([whole_rows(batch) for batch in spy.whole])
    rows = np.concatenate([whole_rows(batch) for batch in spy.ends])
    for _, y in spy.ends:
        assert (y[:, :-n] == -100).all()
        assert (y[:, -n:] != -100).all()
    starts = set()
    for row, text in zip(rows, plain, strict=True):
        passage = text[-n:]
        start = (row != text).argmax()  # the first token that the passage replaced
        while not (row[start : start + n] == passage).all():
            start -= 1
        text[start : start + n] = passage
        assert (row == text).all()
        assert start + n <= len(row) - n
        starts.add(start)
    assert len(starts) > 4
    assert copy == pytest.approx(spy.loss(rows, n), rel=1e-5)


def test_a_passage_is_planted_anywhere_from_the_row_s_start_to_right_before_it():
    rows = np.arange(3 * 20).reshape(3, 20)
    plain = rows.copy()
    train.plant_passage(rows, 5, [0.0, 0.5, 1.0])
    for row, text, start in zip(rows, plain, (0, 5, 10), strict=True):
        text[start : start + 5] = text[-5:]
        assert (row == text).all()


def test_the_passage_is_a_quarter_of_a_row_and_160_tokens_at_most():
    assert train.passage_length(64) == 16
    assert train.passage_length(1024) == train.passage_length(65536) == 160


# ---- Optimisation -------------------------------------------------------------------------------


def test_the_schedule_warms_up_and_ends_at_min_lr():
    cfg = config(learning_rate=1.0, min_lr=0.2, warmup_iters=10, max_iters=110)
    lr = [train.learning_rate(step, cfg) for step in range(111)]
    assert lr[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert lr[10] == pytest.approx(1.0)
    assert lr[60] == pytest.approx(0.6)
    assert lr[110] == pytest.approx(0.2)
    assert lr[10:] == sorted(lr[10:], reverse=True)
    assert train.learning_rate(110, replace(cfg, min_lr=0.0)) == pytest.approx(0.0)
    assert train.learning_rate(0, replace(cfg, warmup_iters=0)) == pytest.approx(1.0)


def test_batched_muon_takes_the_steps_of_torchs_muon():
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8), (8, 24), (4, 24)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    batched = train.BatchedMuon(ours, 0.1, 0.3)
    single = torch.optim.Muon(theirs, 0.1, 0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        before = [p.detach().clone() for p in ours]
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        batched.step()
        single.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            moved = (b - old).norm()
            assert moved > 0.1
            assert (a - b).norm() < 0.03 * moved  # torch's computes in bfloat16


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_norm_rate_multiplies_the_rate_of_the_norms_alone(fit, tmp_path, optimizer):
    """AdamW's first step is one rate long, whatever the gradient, where nothing decays."""
    moved = {}
    for factor in (1, 10):
        flags = ["--max_iters=1", "--warmup_iters=0", f"--optimizer={optimizer}", "--grad_clip=0",
                 "--weight_decay=0", "--learning_rate=1e-3", f"--norm_rate={factor}"]
        folder = fit(tmp_path / f"run-{factor}", *flags)
        moved[factor] = load_run(folder)[0].state_dict()
    for name, weight in moved[1].items():
        other = moved[10][name]
        if weight.dim() == 1:
            torch.testing.assert_close(other - 1, 10 * (weight - 1), rtol=1e-2, atol=1e-6)
        else:
            assert other.equal(weight), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_weight_is_optimised_once_and_decay_is_on_matrices_only(optimizer):
    model = tiny_model(qk_norm=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = train.make_optimizers(model, config(optimizer=optimizer, weight_decay=0.5))
    optimised = []
    for one in optimizers:
        for group in one.param_groups:
            group["lr"] = 0.1
            optimised += group["params"]
    assert len(optimised) == len(set(optimised)) == len(before)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for one in optimizers:
        one.step()
    for name, p in model.named_parameters():
        shrunk = 1 - 0.1 * 0.5 if p.dim() == 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * shrunk, msg=name)


@pytest.fixture
def plain_descent(monkeypatch):
    """Plain gradient descent: the weights tell the gradient as it is."""

    def optimizers(model, cfg):
        return [torch.optim.SGD(model.parameters(), lr=0.0)]

    monkeypatch.setattr(train, "make_optimizers", optimizers)


STEP = ["--max_iters=1", "--warmup_iters=0", "--learning_rate=1"]


def test_accumulated_micro_batches_are_one_bigger_batch(
    fit, data, tmp_path, plain_descent, monkeypatch
):
    x, y = Batches(data, config(batch_size=8), 64, 0)[0]

    def part(batches, n):
        size = 8 // batches.cfg.gradient_accumulation_steps
        return x[n * size : (n + 1) * size], y[n * size : (n + 1) * size]

    monkeypatch.setattr(Batches, "__getitem__", part)
    one = fit(tmp_path / "one", *STEP, "--batch_size=8")
    four = fit(tmp_path / "four", *STEP, "--batch_size=2", "--gradient_accumulation_steps=4")
    start = fit(tmp_path / "start", *STEP, "--learning_rate=0", "--batch_size=8")
    for key, weight in weights(one).items():
        torch.testing.assert_close(weights(four)[key], weight, atol=1e-6, rtol=1e-5)
        assert not torch.equal(weights(start)[key], weight)


@pytest.mark.parametrize("clip", [1e-3, 1e-2])
def test_the_gradient_is_clipped_to_its_norm(fit, tmp_path, plain_descent, clip):
    start = weights(fit(tmp_path / "start", *STEP, "--learning_rate=0"))
    end = weights(fit(tmp_path / "end", *STEP, f"--grad_clip={clip}"))
    moved = torch.stack([(end[key] - start[key]).norm() for key in start])
    assert moved.norm().item() == pytest.approx(clip, rel=1e-2)


# ---- A run --------------------------------------------------------------------------------------


def test_the_loss_falls_and_the_log_tells_it(tiny_run, records):
    loss = records(tiny_run)
    val = records(tiny_run, "val_loss")[100]
    assert list(loss) == list(range(1, 101))
    assert loss[1] == pytest.approx(math.log(320), rel=0.05)  # 257 ids, padded up to a 64
    assert np.mean(list(loss.values())[-10:]) < loss[1] - 2
    assert val < loss[1] - 2
    rates = list(records(tiny_run, "tokens_per_second").values())
    assert rates[0] is None  # the first step compiles
    assert min(rates[1:]) > 0


def test_the_log_tells_what_evaluation_found(tiny_run, records, data):
    model, cfg, meta = load_run(tiny_run)
    loss, copy = train.estimate_loss(model, data, cfg, 64, Machine("cpu"))
    tokens_per_byte = len(data.val) / meta["val_bytes"]
    expected = dict(
        val_loss=loss,
        bits_per_byte=loss / math.log(2) * tokens_per_byte,
        copy=copy / math.log(2) * tokens_per_byte,
    )
    for key, value in expected.items():
        assert records(tiny_run, key) == {100: pytest.approx(value, rel=1e-6)}


def test_a_run_folder_tells_how_it_was_made(tiny_run, data):
    about = json.loads((tiny_run / "config.json").read_text())
    model, cfg, meta = load_run(tiny_run)
    assert about["train"] == asdict(cfg)
    assert about["model"] == asdict(model.config)
    assert about["train"]["learning_rate"] == 1e-2
    assert "3 N nope full" in about["layers"]
    assert about["parameters"] == model.num_params()
    assert {"git", "torch", "device", "command", "processes"} <= set(about)
    assert meta == data.meta | dict(step=100)
    assert not model.training
    other, _, _ = load_run(tiny_run, window=3, log_scale=True)
    assert other.config == replace(model.config, window=3, log_scale=True)


NO_DEFAULTS = """
vocab_size=300 block_size=65 n_layer=3 n_head=4 n_kv_head=2 n_embd=16 ffn_dim=24
pattern=RNC window=9 rope_theta=5000.0 rope_theta_full=20000.0 qk_norm=True
log_scale=True attn_scale=0.2 logit_scale=0.5 norm_eps=1e-06 attention=mask

preset=rnope scale=gpu repeat_frac=0.3 shortest_span=5 longest_span=60 long_rows=130
long_frac=0.3 batch_size=4
gradient_accumulation_steps=2 max_iters=2 optimizer=adamw learning_rate=0.003
min_lr=0.002 norm_rate=2.0 warmup_iters=1 weight_decay=0.4 beta1=0.8 beta2=0.9 grad_clip=0.7 seed=5
eval_interval=2 eval_iters=1 log_interval=2 device=cpu dtype=bfloat16 compile=False
"""


def test_a_checkpoint_restores_every_config_field(fit, tmp_path):
    told = NO_DEFAULTS.split()
    folder = fit(tmp_path / "run", *[f"--{flag}" for flag in told])
    model, cfg, _ = load_run(folder)
    found = asdict(model.config) | asdict(cfg)
    assert found.pop("out_dir") == str(folder)
    for name in ("dataset", "data_dir", "init_from", "resume"):  # of the tests, or told elsewhere
        found.pop(name)
    assert sorted(f"{name}={value}" for name, value in found.items()) == sorted(told)
    defaults = asdict(ModelConfig()) | asdict(TrainConfig())
    assert not [name for name, value in found.items() if value == defaults[name]]


# ---- Stopping and going on ----------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--optimizer=muon"], ["--optimizer=adamw", "--dtype=bfloat16"]])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    fit, tmp_path, records, stop_at, flags, capsys
):
    flags = ["--max_iters=10", "--gradient_accumulation_steps=2", *flags]
    whole = fit(tmp_path / "whole", *flags)
    on = stop_at(4)
    parts = fit(tmp_path / "my parts", *flags)
    on()
    assert load_checkpoint(parts)["step"] == 5  # the step at hand is finished
    told = re.search(r"stopped at step 5: (.*) goes on", capsys.readouterr().out)[1]
    command = shlex.split(told)
    assert command[:2] == ["python", "train.py"]
    assert train.main(command[2:]) == parts
    assert records(parts) == records(whole)
    assert list(records(parts)) == list(range(1, 11))
    assert records(parts, "val_loss")[10] == records(whole, "val_loss")[10]
    assert same_weights(whole, parts)


def test_resuming_refuses_each_flag_that_would_change_what_is_computed(stopped_run):
    flags = {f.name: f.default for kind in (TrainConfig, ModelConfig) for f in fields(kind)}
    for name in set(flags) - train.RESUMABLE - {"init_from"}:
        given = dict(resume=True, out_dir=str(stopped_run)) | {name: flags[name]}
        with pytest.raises(UsageError, match=f"--{name} cannot change with --resume") as error:
            train.train(given)
        assert f"--init_from={shlex.quote(str(stopped_run))}" in str(error.value)
    assert load_checkpoint(stopped_run)["step"] == 2


def test_resuming_takes_the_flags_that_change_nothing(fit, stopped_run, tmp_path, data_dir):
    moved = tmp_path / "moved"
    stopped_run.rename(moved)
    resume(moved, "--device=cpu", f"--data_dir={data_dir}", "--no-compile", "--eval_interval=3",
           "--eval_iters=1", "--log_interval=2")  # fmt: skip
    state = load_checkpoint(moved)
    assert state["step"] == 4
    assert state["train_config"].eval_interval == 3
    assert state["train_config"].out_dir == str(moved)
    assert same_weights(moved, fit(tmp_path / "whole", "--max_iters=4"))


def test_a_run_resumes_where_its_kernel_of_attention_is_missing(stopped_run):
    state = torch.load(stopped_run / "ckpt.pt", weights_only=True)
    state["model_config"]["attention"] = "flash"
    torch.save(state, stopped_run / "ckpt.pt")
    with pytest.raises(UsageError, match="--attention=flash needs .*: use --attention=auto"):
        resume(stopped_run)
    resume(stopped_run, "--attention=auto")
    assert load_checkpoint(stopped_run)["step"] == 4


def test_resuming_without_a_folder_takes_the_newest_run(stopped_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no run in out"):
        train.main(["--resume"])
    old = shutil.copytree(stopped_run, tmp_path / "out" / "z-old")
    new = shutil.copytree(stopped_run, tmp_path / "out" / "a-new")
    os.utime(old / "ckpt.pt", (1, 1))
    assert train.newest_run(tmp_path / "out") == new
    train.main(["--resume"])
    assert load_checkpoint(new)["step"] == 4
    assert load_checkpoint(old)["step"] == 2


def test_resuming_on_another_text_is_refused(stopped_run):
    state = torch.load(stopped_run / "ckpt.pt", weights_only=True)
    state["meta"]["train_sha256"] = "0" * 64
    torch.save(state, stopped_run / "ckpt.pt")
    with pytest.raises(UsageError, match="tiny is not the text"):
        resume(stopped_run)


def test_handlers_of_signals_are_put_back(stopped_run):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ---- Folders ------------------------------------------------------------------------------------


def test_a_new_run_does_not_overwrite_an_old_one(fit, tiny_run):
    before = {file: file.read_bytes() for file in tiny_run.iterdir()}
    with pytest.raises(UsageError, match="holds a run or a model: name another --out_dir"):
        fit(tiny_run, "--max_iters=1")
    assert before == {file: file.read_bytes() for file in tiny_run.iterdir()}


def test_default_folders_are_numbered(tiny_flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*tiny_flags(""), "--max_iters=1", "--preset=swa"]
    assert [str(train.main(flags)) for _ in range(3)] == ["out/swa", "out/swa-2", "out/swa-3"]
    assert str(train.main([*flags, "--pattern=SW"])) == "out/SW"  # no preset's name


# ---- The second stage ---------------------------------------------------------------------------


def test_a_second_stage_keeps_text_and_model_and_counts_on(fit, tiny_run, tmp_path, capsys):
    first = load_run(tiny_run)
    spans = ["--repeat_frac=0.3", "--shortest_span=5", "--longest_span=9"]
    long = [f"--init_from={tiny_run}", "--long_rows=256", "--max_iters=4"]
    one = fit(tmp_path / "one", *long, *spans)
    out = capsys.readouterr().out
    assert "first step of 64-token rows" in out
    assert "first step of 256-token rows" in out
    assert load_run(one)[0].config == first[0].config
    argv = [f"--init_from={one}", "--max_iters=1", f"--out_dir={tmp_path / 'two'}"]
    two = train.main([*argv, "--device=cpu"])
    stages = [load_checkpoint(folder)["stage"] for folder in (tiny_run, one, two)]
    assert stages == [0, 1, 2]
    state = torch.load(two / "ckpt.pt", weights_only=True)
    torch.save(state | dict(step=0), two / "ckpt.pt")
    train.main(["--resume", f"--out_dir={two}"])  # it is remembered by a resumed run, too
    texts = [load_checkpoint(folder)["meta"]["earlier_texts"] for folder in (one, two)]
    assert texts == [[first[2]["train_sha256"]], [first[2]["train_sha256"]] * 2]
    model, cfg, _ = load_run(two)
    assert model.config == first[0].config
    assert (cfg.dataset, cfg.preset) == ("tiny", "rnope-swa")
    assert (cfg.repeat_frac, cfg.shortest_span, cfg.longest_span) == (0.3, 5, 9)


def test_a_second_stage_starts_from_the_weights(fit, tiny_run, tmp_path):
    flags = [f"--init_from={tiny_run}", "--max_iters=1", "--learning_rate=0", "--repeat_frac=0.1"]
    folder = fit(tmp_path / "run", *flags, "--block_size=256", "--log_scale")
    assert same_weights(folder, tiny_run)
    model, cfg, _ = load_run(folder)
    expected = replace(load_run(tiny_run)[0].config, block_size=256, log_scale=True)
    assert model.config == expected
    assert cfg.repeat_frac == 0.1


@pytest.mark.parametrize("flag", ["--n_embd=64", "--n_layer=5", "--n_kv_head=2"])
def test_a_second_stage_refuses_other_shapes(fit, tiny_run, tmp_path, flag):
    with pytest.raises(UsageError, match="do not fit"):
        fit(tmp_path / "run", f"--init_from={tiny_run}", flag)
    assert not (tmp_path / "run").exists()


def test_a_second_stage_keeps_the_preset(tiny_run, tmp_path, tiny_flags):
    """It never says one preset and trains the layers of another."""
    flags = [*tiny_flags(tmp_path / "run"), f"--init_from={tiny_run}"]
    with pytest.raises(UsageError, match="is rnope-swa and stays so"):
        train.main([*flags, "--preset=rope"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.json", "log.jsonl"])
def test_a_run_that_saved_nothing_is_not_taken_over(tiny_flags, tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match="holds a run or a model: name another --out_dir"):
        train.main(tiny_flags(tmp_path))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}"]


def test_a_torch_built_for_a_gpu_runs_where_there_is_none(monkeypatch):
    def current(check_available=False):  # as torch 2.11 answers there
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    assert Machine().device == torch.device("cpu")


def test_a_short_training_split_is_told(data, tmp_path, monkeypatch):
    short = data._replace(train=data.train[:64])
    monkeypatch.setattr(train.prepare_data, "load_data", lambda folder: short)
    with pytest.raises(UsageError, match="64 training tokens: too few for --block_size=64"):
        train.open_dataset(config(dataset="tiny"), 64, Machine("cpu"))


def test_the_share_that_is_told_is_that_of_the_rows(data):
    for frac in (0.0, 0.28, 0.5):
        rows = np.stack([repeated(65, frac, seed) for seed in range(300)])
        share = (rows != np.arange(65)).mean()
        assert train.repeated_share(64, config(repeat_frac=frac)) == pytest.approx(share, abs=0.06)


def test_as_a_library_names_are_checked_and_paths_are_taken(tiny_flags, data_dir, tmp_path):
    with pytest.raises(UsageError, match="max_iter: not a flag of train.py"):
        train.train(dict(max_iter=7))
    with pytest.raises(UsageError, match="--preset=foo: choose from"):
        train.train(dict(preset="foo", device="cpu"))
    given = dict(n_layer=4, n_head=2, n_embd=32, block_size=64, window=16, max_iters=1)
    given |= dict(dataset="tiny", device="cpu", eval_iters=1, batch_size=2)
    folder, _ = train.train(given | dict(data_dir=data_dir, out_dir=tmp_path / "run"))
    assert load_run(folder)[1].data_dir == str(data_dir)


# ---- Flags and machines -------------------------------------------------------------------------


def test_micro_batches_must_be_shared_evenly():
    with pytest.raises(UsageError, match="--gradient_accumulation_steps=6: .* multiple of 4"):
        train.check_rows(config(gradient_accumulation_steps=6), 64, 4)


def test_help_lists_every_flag_with_its_default_in_groups(as_script):
    _, out, _ = as_script("train.py", ["--help"])
    groups = dict(re.findall(r"(?m)^([a-z]+):\n((?:  .*\n)+)", out))
    for group, name in (
        ("model", "pattern"),
        ("model", "preset"),
        ("training", "learning_rate"),
        ("data", "repeat_frac"),
        ("output", "log_interval"),
    ):
        assert f"  --{name} " in groups[group]
    flags = " ".join(out.split()).split(" --")
    told = {flag.split()[0]: flag for flag in flags}
    for field in (*fields(TrainConfig), *fields(ModelConfig)):
        switch = isinstance(field.default, bool)
        text = told[f"no-{field.name}" if switch else field.name]
        assert field.default == "" or f"(default: {field.default})" in text


@pytest.mark.parametrize(
    ("given", "pattern", "n_embd", "rope_theta"),
    [
        (dict(), "SSSN", 128, 1e4),
        (dict(preset="llama4"), "CCCN", 128, 5e5),
        (dict(preset="llama4", rope_theta=7.0, n_embd=64), "CCCN", 64, 7.0),
    ],
)
def test_flags_beat_the_preset_which_beats_the_scale(given, pattern, n_embd, rope_theta):
    cfg, model = train.make_configs(dict(scale="cpu") | given)
    assert model.pattern == pattern
    assert model.n_embd == n_embd
    assert model.rope_theta == rope_theta
    assert cfg.scale == "cpu"


@pytest.mark.parametrize(
    ("given", "pattern", "told"),
    [
        (dict(log_scale=True), "R", "--log_scale changes nothing: pattern R has no layer N"),
        (dict(attn_scale=0.1), "S", "--attn_scale changes nothing"),
        (dict(window=8), "RN", "--window changes nothing: pattern RN has no layer S or W or C"),
        (dict(rope_theta=5.0), "NW", "--rope_theta changes nothing"),
        (dict(rope_theta_full=5.0), "SN", "--rope_theta_full changes nothing"),
        (dict(window=8, log_scale=True, rope_theta=5.0), "SN", ""),
        (dict(rope_theta_full=5.0, qk_norm=True), "R", ""),
        (dict(qk_norm=True), "N", ""),
        (dict(window=8), "C", ""),
    ],
)
def test_a_flag_that_changes_nothing_is_told(capsys, given, pattern, told):
    train.warn_idle(given, ModelConfig(pattern=pattern))
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == bool(told)


@pytest.fixture
def graphics_card(monkeypatch):
    """graphics_card(capability): this machine seems to have one."""

    def plug_in(capability):
        faked = dict(get_device_capability=capability, get_device_name="a card", set_device=None)
        for name, answer in faked.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.ones(1))
        monkeypatch.setattr(torch, "compile", lambda model, **_: "compiled")
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
        cuda = torch.device("cuda")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: cuda)

    return plug_in


def test_a_card_before_ampere_computes_in_float32_uncompiled(graphics_card):
    model = tiny_model()
    graphics_card((7, 5))
    machine = Machine()
    assert machine.device == torch.device("cuda", 0)
    assert machine.dtype == torch.float32
    assert train.compile_model(model, config(), machine) is model
    with pytest.raises(UsageError, match="--dtype=bfloat16: a card has none, drop the flag"):
        Machine(dtype="bfloat16")


def test_a_card_from_ampere_on_computes_in_bfloat16_compiled(graphics_card):
    model = tiny_model()
    graphics_card((8, 0))
    machine = Machine()
    assert machine.dtype == torch.bfloat16
    assert Machine(dtype="float32").dtype == torch.float32
    assert train.compile_model(model, config(), machine) == "compiled"
    assert train.compile_model(model, config(compile=False), machine) is model


@pytest.mark.parametrize(
    ("name", "dtype", "told"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", True),
        ("NVIDIA H100 80GB HBM3", "float32", False),
        ("NVIDIA H100 PCIe", "bfloat16", False),
        ("cpu", "bfloat16", False),
    ],
)
def test_the_share_of_peak_is_told_for_known_cards_in_bfloat16(
    fit, tmp_path, monkeypatch, capsys, records, name, dtype, told
):
    class Card(Machine):
        def __init__(self, *where):
            super().__init__(*where)
            self.name = name

    monkeypatch.setattr(train, "Machine", Card)
    monkeypatch.setitem(train.PEAK_FLOPS, "NVIDIA H100 80GB HBM3", 1e9)
    folder = fit(tmp_path / "run", "--max_iters=2", "--log_interval=2", f"--dtype={dtype}")
    shares = re.findall(r"mfu (\d+)%", capsys.readouterr().out)
    assert bool(shares) == told
    if told:
        flops = load_run(folder)[0].flops_per_token(64)
        expected = records(folder, "tokens_per_second")[2] * flops / 1e9
        assert int(shares[0]) == pytest.approx(100 * expected, abs=1)
