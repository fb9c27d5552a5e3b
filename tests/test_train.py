import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, forget_text

import prepare_data
import train
from model import GPT, ModelConfig, UsageError
from train import TrainConfig, load_checkpoint, load_run, make_batch


def config(**flags):
    return TrainConfig(**dict(batch_size=6, needle_frac=0.0, needles=1) | flags)


def tiny_model(**flags):
    shape = dict(vocab_size=448, block_size=32, n_layer=4, n_head=2, n_embd=32, window=8)
    torch.manual_seed(0)
    return GPT(ModelConfig(**shape | flags))


def weights(folder):
    return load_checkpoint(folder)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step): the process gets a SIGTERM while that step is being computed."""
    real = train.learning_rate

    def at(step):
        def learning_rate(now, cfg):
            if now == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(now, cfg)

        monkeypatch.setattr(train, "learning_rate", learning_rate)
        return lambda: monkeypatch.setattr(train, "learning_rate", real)

    return at


def as_script(monkeypatch, capfd, argv):
    """(exit status, stdout, stderr) of `python train.py ARGV`, in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    status = 0
    try:
        prepare_data.run_main(train.main)
    except SystemExit as e:
        status = e.code
    return status, *capfd.readouterr()


# -- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("needle_frac", [0.0, 0.5, 1.0])
def test_a_batch_is_a_pure_function_of_seed_step_and_micro_batch(data, needle_frac):
    cfg = config(needle_frac=needle_frac)
    x, y = make_batch(data, cfg, 64, 3, 1)
    np.random.seed(5)
    make_batch(data, cfg, 64, 9, 9)
    assert np.array_equal(make_batch(data, cfg, 64, 3, 1)[0], x)
    for other, step, micro in [(cfg, 4, 1), (cfg, 3, 2), (replace(cfg, seed=1), 3, 1)]:
        assert not np.array_equal(make_batch(data, other, 64, step, micro)[0], x)


def test_other_processes_open_the_text_and_are_not_sent_it(data):
    sent = pickle.dumps(data)
    assert len(sent) < 500
    opened = pickle.loads(sent)
    assert np.array_equal(opened.train, data.train) and opened.meta == data.meta


def test_batches_made_ahead_come_in_order(data):
    cfg, steps, micros = config(batch_size=3), range(4, 10), range(1, 5, 2)
    jobs = [(step, micro) for step in steps for micro in micros]
    ahead = train.prefetch(data, cfg, 64, steps, micros)
    for job, (x, y) in zip(jobs, ahead, strict=True):
        x_here, y_here = make_batch(data, cfg, 64, *job)
        assert np.array_equal(x, x_here) and np.array_equal(y, y_here)


@pytest.mark.parametrize("needle_frac", [0.0, 1.0])
def test_targets_are_the_inputs_shifted_by_one(data, needle_frac):
    x, y = make_batch(data, config(needle_frac=needle_frac), 64, 0, 0)
    assert x.shape == y.shape == (6, 64)
    assert np.array_equal(x[:, 1:], y[:, :-1])


def test_rows_are_training_text_word_for_word(data):
    text = data.train.tobytes()
    x, y = make_batch(data, config(batch_size=50), 64, 0, 0)
    for row in np.concatenate((x, y[:, -1:]), 1):
        assert row.astype(data.train.dtype).tobytes() in text


def test_the_asked_share_of_rows_ends_in_question_and_answer(data):
    x, y = make_batch(data, config(batch_size=400, needle_frac=0.25), 64, 0, 0)
    rows = [data.enc.decode(row.tolist()) for row in np.concatenate((x[:, :1], y), 1)]
    asked = [(row, re.search(r"(\n.+)(\d{7})$", row)) for row in rows]
    asked = [(row, m) for row, m in asked if m and m[2] != "1234567"]  # that is in the text
    assert 70 < len(asked) < 130
    assert all(row.count(m[0]) == 2 for row, m in asked)  # the fact, and the end


def test_a_context_too_short_for_the_facts_is_one_clear_error(fit, tmp_path):
    with pytest.raises(UsageError, match="cannot hold"):
        fit(tmp_path / "run", "--block_size=16", "--needle_frac=1", "--max_iters=2")


def test_evaluation_uses_the_same_rows_every_time(data):
    seen, machine = [], train.Machine("cpu")

    class Spy(torch.nn.Module):
        def forward(self, x, y):
            seen.append((x, y))
            return None, x.float().mean()

    a = train.evaluate(Spy(), data, config(eval_iters=3), 32, machine)
    before, seen[:] = list(seen), []
    b = train.evaluate(Spy(), data, config(eval_iters=3, seed=99), 32, machine)
    assert a == b and len(seen) == len(before) == 3
    for (x, y), (x2, y2) in zip(seen, before, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2) and torch.equal(x[:, 1:], y[:, :-1])
    text = data.val.tobytes()
    assert all(r.numpy().astype(data.val.dtype).tobytes() in text for x, _ in seen for r in x)


def test_evaluation_is_the_mean_over_rows_however_they_are_split(data):
    model, machine = tiny_model(), train.Machine("cpu")
    a = train.evaluate(model, data, config(batch_size=6, eval_iters=2), 32, machine)
    b = train.evaluate(model, data, config(batch_size=4, eval_iters=3), 32, machine)
    c = train.evaluate(model, data, config(batch_size=12, eval_iters=1), 32, machine)
    assert a == pytest.approx(b, rel=1e-5) and a == pytest.approx(c, rel=1e-5)


# -- optimisation ----------------------------------------------------------------------------------


def test_the_schedule_warms_up_and_ends_at_min_lr():
    cfg = config(learning_rate=1.0, min_lr=0.1, warmup_iters=10, max_iters=110)
    lr = [train.learning_rate(s, cfg) for s in range(111)]
    assert lr[0] == pytest.approx(0.1) and lr[4] == pytest.approx(0.5)
    assert lr[9] == lr[10] == pytest.approx(1.0)
    assert lr[60] == pytest.approx(0.55)  # half the cosine
    assert lr[110] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(lr[10:], lr[11:], strict=False))
    assert train.learning_rate(0, replace(cfg, warmup_iters=0)) == pytest.approx(1.0)


def test_batched_muon_takes_the_steps_of_torchs_muon():
    torch.manual_seed(0)
    shapes = [(8, 8), (24, 8), (8, 24), (8, 8), (8, 24), (4, 24)]
    ours = [torch.randn(shape, requires_grad=True) for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    batched = train.BatchedMuon(ours, 0.1, 0.3)
    single = torch.optim.Muon(theirs, 0.1, 0.3, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        before = [p.detach().clone() for p in ours]
        batched.step()
        single.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            moved = (b - old).norm()
            assert (a - b).norm() < 0.03 * moved  # torch's computes in bfloat16
            assert moved > 0.1
    assert batched.state_dict()["state"].keys() == single.state_dict()["state"].keys()


def test_muon_computes_in_float32_on_a_cpu():
    """In bfloat16, processors without instructions for it took 4 times as long over a step."""
    torch.manual_seed(0)
    p, grad = torch.zeros(16, 24, requires_grad=True), torch.randn(16, 24)
    muon = train.BatchedMuon([p], 1.0, 0.0)
    a, b, c = muon.param_groups[0]["ns_coefficients"]
    p.grad = grad.clone()
    muon.step()
    x = grad.double() / grad.double().norm()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    exact = -0.2 * 24**0.5 * x
    assert (p - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_decay_is_on_matrices_only_and_every_weight_is_optimised_once(optimizer):
    model = tiny_model(qk_norm=True)
    seen = []
    for opt in train.make_optimizers(model, config(optimizer=optimizer, weight_decay=0.3)):
        for group in opt.param_groups:
            for p in group["params"]:
                seen.append(p)
                assert group["weight_decay"] == (0.3 if p.dim() == 2 else 0), p.shape
    assert len(seen) == len({id(p) for p in seen}) == len(list(model.parameters()))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_decay_alone_shrinks_matrices_and_leaves_norms(optimizer):
    model, lr, decay = tiny_model(), 0.1, 0.5
    before = {k: v.clone() for k, v in model.named_parameters()}
    for opt in train.make_optimizers(model, config(optimizer=optimizer, weight_decay=decay)):
        for group in opt.param_groups:
            group["lr"] = lr
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        opt.step()
    for k, p in model.named_parameters():
        torch.testing.assert_close(p, before[k] * (1 - lr * decay if p.dim() == 2 else 1), msg=k)


def sgd_step(batches, clip=0.0):
    """One step of plain gradient descent, so that the weights tell the gradient as it is."""
    model, machine = tiny_model(), train.Machine("cpu")
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    loss = train.optimise(model, [opt], batches, 1.0, config(grad_clip=clip), machine)
    return loss.item(), model.state_dict()


def test_two_micro_batches_are_one_of_twice_the_size(data):
    x, y = (torch.from_numpy(a.astype(np.int64)) for a in make_batch(data, config(), 32, 0, 0))
    loss, one = sgd_step([(x, y)])
    split_loss, two = sgd_step([(x[:3], y[:3]), (x[3:], y[3:])])
    assert loss == pytest.approx(split_loss, rel=1e-6)
    for k in one:
        torch.testing.assert_close(one[k], two[k], atol=1e-6, rtol=1e-5)
    assert not same(one, sgd_step([(x[:3], y[:3])])[1])


def test_the_gradient_is_clipped_to_its_norm(data):
    x, y = (torch.from_numpy(a.astype(np.int64)) for a in make_batch(data, config(), 32, 0, 0))
    start = tiny_model().state_dict()
    for clip in (1e-3, 1e-2):
        _, moved = sgd_step([(x, y)], clip)
        norm = math.sqrt(sum((moved[k] - start[k]).pow(2).sum().item() for k in start))
        assert norm == pytest.approx(clip, rel=1e-2)


# -- a run -----------------------------------------------------------------------------------------


def test_the_loss_falls(tiny_run, records):
    loss, val = records(tiny_run), records(tiny_run, "val_loss")
    assert list(loss) == list(range(1, 61)) and list(val) == [60]
    assert loss[1] == pytest.approx(math.log(448), rel=0.05)  # 400 ids padded up to a 64
    assert np.mean([loss[s] for s in range(51, 61)]) < loss[1] - 2
    assert val[60] < loss[1] - 2


def test_bits_per_byte_are_nats_per_token_converted(tiny_run, records, data):
    val, bpb = records(tiny_run, "val_loss")[60], records(tiny_run, "bits_per_byte")[60]
    tokens, size = len(data.val), data.meta["val_bytes"]
    assert bpb == pytest.approx(val / math.log(2) * tokens / size)


def test_a_run_folder_tells_how_it_was_made(tiny_run, data):
    about = json.loads((tiny_run / "config.json").read_text())
    assert load_run(tiny_run)[2] == data.meta
    assert about["train"]["learning_rate"] == 1e-2 and about["train"]["preset"] == "rnope-swa"
    assert about["model"]["pattern"] == "SSSN" and "3 N nope full" in about["layers"]
    assert about["parameters"] == load_run(tiny_run)[0].num_params()
    assert {"git", "torch", "device", "command"} <= set(about)


def test_checkpoint_restores_every_config_field(fit, tmp_path):
    """Every field set to something that is not its default."""
    model_flags = dict(
        vocab_size=512, block_size=130, n_layer=2, n_head=4, n_kv_head=2, n_embd=48, ffn_dim=96,
        pattern="WR", window=9, rope_theta=500.0, rope_theta_full=3e4, qk_norm=True, log_scale=True,
        attn_scale=0.2, logit_scale=0.5, norm_eps=1e-4, attention="mask",
    )  # fmt: skip
    train_flags = dict(
        preset="rnope", scale="gpu", batch_size=4, gradient_accumulation_steps=2, max_iters=2,
        needle_frac=0.3, tasks="single", needles=2, needle_digits=5, needle_questions=2,
        long_rows=260, long_frac=0.3, optimizer="adamw", learning_rate=3e-3,
        min_lr=2e-3, warmup_iters=1, weight_decay=0.2, beta1=0.8, beta2=0.9, grad_clip=0.7,
        eval_interval=2, eval_iters=1, log_interval=2, seed=5, device="cpu", dtype="float32",
        compile=False,
    )  # fmt: skip
    flags = [
        (f"--{k}" if v else f"--no-{k}") if isinstance(v, bool) else f"--{k}={v}"
        for k, v in (model_flags | train_flags).items()
    ]
    folder = fit(tmp_path / "run", *flags)
    state = load_checkpoint(folder)
    assert model_flags.keys() == {f.name for f in fields(ModelConfig)}
    assert asdict(state["model_config"]) == model_flags
    saved = asdict(state["train_config"])
    assert {k: saved[k] for k in train_flags} == train_flags
    elsewhere = {"dataset", "data_dir", "out_dir", "init_from", "resume", "bench", "bench_lengths",
                 "bench_paths"}  # fmt: skip
    assert train_flags.keys() | elsewhere == {f.name for f in fields(TrainConfig)}
    model, cfg, _ = load_run(folder)
    assert asdict(model.config) == model_flags and cfg == state["train_config"]
    assert model.config == ModelConfig(**asdict(model.config))


def test_a_run_read_back_is_the_model_that_was_saved(tiny_run):
    model, cfg, meta = load_run(tiny_run)
    assert same(model.state_dict(), weights(tiny_run)) and not model.training
    assert cfg.seed == 1 and meta["tokenizer"] == "bpe"
    assert load_run(tiny_run, window=3, log_scale=True)[0].config == replace(
        model.config, window=3, log_scale=True
    )


# -- stopping and going on -------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    fit, tmp_path, records, stop_at, optimizer, capsys
):
    flags = ["--max_iters=10", "--needle_frac=0.5", f"--optimizer={optimizer}"]
    flags += ["--gradient_accumulation_steps=2", "--block_size=64"]
    whole = fit(tmp_path / "whole", *flags)
    on = stop_at(4)
    parts = fit(tmp_path / "parts", *flags)
    assert load_checkpoint(parts)["step"] == 5  # the step at hand is finished
    assert f"--resume --out_dir={parts}" in capsys.readouterr().out
    on()
    assert train.main(["--resume", f"--out_dir={parts}"]) == parts
    a, b = records(whole), records(parts)
    assert list(a) == list(range(1, 11))
    assert {s: a[s] for s in b} == b and set(b) >= set(range(6, 11))  # bit for bit
    assert records(whole, "val_loss") == records(parts, "val_loss")
    assert same(weights(whole), weights(parts))


def test_a_resumed_log_has_every_step_once(fit, tmp_path, records, stop_at):
    on = stop_at(4)
    folder = fit(tmp_path / "run", "--max_iters=8", "--needle_frac=0", "--eval_interval=3")
    on()
    train.main(["--resume", f"--out_dir={folder}"])
    steps = [json.loads(x)["step"] for x in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]


def test_a_resumed_log_drops_the_steps_that_are_done_again(fit, tmp_path, records, monkeypatch):
    """Killed without a word at step 5, the last save being of step 3."""

    def killed(step, cfg, real=train.learning_rate):
        if step == 5:
            raise MemoryError
        return real(step, cfg)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train, "learning_rate", killed)
        fit(tmp_path / "run", "--max_iters=8", "--needle_frac=0", "--eval_interval=3")
    assert list(records(tmp_path / "run")) == [1, 2, 3, 4, 5]
    train.main(["--resume", f"--out_dir={tmp_path / 'run'}"])
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    steps = [x["step"] for x in map(json.loads, lines) if "loss" in x]
    assert steps[-5:] == [4, 5, 6, 7, 8] and len(set(steps)) == len(steps)
    whole = fit(tmp_path / "whole", "--max_iters=8", "--needle_frac=0", "--eval_interval=3")
    assert same(weights(whole), weights(tmp_path / "run"))


@pytest.fixture
def stopped_run(fit, tmp_path, stop_at):
    on = stop_at(1)
    folder = fit(tmp_path / "stopped", "--max_iters=4", "--needle_frac=0")
    on()
    return folder


@pytest.mark.parametrize(
    "flag", ["--learning_rate=0.5", "--window=3", "--seed=7", "--preset=rope", "--batch_size=8",
             "--n_kv_head=2", "--ffn_dim=32"]  # fmt: skip
)
def test_resuming_with_a_contradicting_flag_names_it(stopped_run, flag):
    with pytest.raises(UsageError, match=flag):
        train.main(["--resume", f"--out_dir={stopped_run}", flag])
    assert load_checkpoint(stopped_run)["step"] == 2


def test_resuming_with_the_same_command_goes_on(fit, stopped_run):
    chosen = "--scale=auto", "--dtype=auto", "--ffn_dim=0"
    fit(stopped_run, "--max_iters=4", "--needle_frac=0", *chosen, "--resume")
    assert load_checkpoint(stopped_run)["step"] == 4


def test_resuming_without_a_folder_takes_the_newest_run(stopped_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no run in out"):
        train.main(["--resume"])
    old = shutil.copytree(stopped_run, tmp_path / "out" / "z-old")
    os.utime(old / "ckpt.pt", (1, 1))
    new = shutil.copytree(stopped_run, tmp_path / "out" / "a-new")
    assert train.newest_run(tmp_path / "out") == new
    train.main(["--resume"])
    assert load_checkpoint(new)["step"] == 4 and load_checkpoint(old)["step"] == 2


def test_a_log_that_was_cut_off_does_not_stop_a_resume(stopped_run):
    """What a machine that went down in the middle of a write leaves behind."""
    with (stopped_run / "log.jsonl").open("a") as f:
        f.write('{"step": 3, "lo')
    train.main(["--resume", f"--out_dir={stopped_run}"])
    assert load_checkpoint(stopped_run)["step"] == 4


def test_resuming_on_another_text_is_refused(stopped_run):
    forget_text(stopped_run, train_sha256="0" * 64)
    with pytest.raises(UsageError, match="text"):
        train.main(["--resume", f"--out_dir={stopped_run}"])


def test_two_runs_do_not_share_a_folder(fit, tmp_path):
    (tmp_path / "run").mkdir()
    lock = prepare_data.claim(tmp_path / "run", "busy")
    with pytest.raises(UsageError, match="another process trains in .*run: name another"):
        fit(tmp_path / "run", "--max_iters=1")
    os.close(lock)
    assert not list((tmp_path / "run").iterdir())
    fit(tmp_path / "run", "--max_iters=1")


def test_after_a_run_an_interrupt_interrupts_again(fit, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit(tmp_path / "run", "--max_iters=1", "--needle_frac=0")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# -- stage two -------------------------------------------------------------------------------------


def test_long_steps_are_interleaved_and_hold_as_many_tokens(data):
    cfg = config(batch_size=8, long_rows=256, long_frac=0.25, needle_frac=0.0)
    shapes = [make_batch(data, cfg, 64, step, 0)[0].shape for step in range(12)]
    assert shapes == [(8, 64), (8, 64), (8, 64), (2, 256)] * 3
    assert not any(make_batch(data, config(), 64, s, 0)[0].shape != (6, 64) for s in range(4))


def test_a_long_row_asks_as_often_per_token_as_the_short_ones(data):
    """256 tokens, questions in half of the 64-token rows: two facts and two questions expected."""
    cfg = config(batch_size=400, long_rows=256, long_frac=1.0, needle_frac=0.5)
    x, y = make_batch(data, cfg, 64, 0, 0)
    rows = [data.enc.decode(row.tolist()) for row in np.concatenate((x[:, :1], y), 1)]
    numbers = [re.findall(r"\d{7}", row.replace("1234567", "")) for row in rows]
    assert x.shape == (100, 256)
    assert 170 < sum(len(set(n)) for n in numbers) < 230
    assert all(sorted(n) == sorted(2 * list(set(n))) for n in numbers)  # each told, and asked for


def test_a_second_stage_draws_batches_of_its_own(data):
    first, second = config(), config(init_from="out/first", long_rows=256)
    step = next(s for s in range(9) if train.step_shape(s, second, 64) == (6, 64))
    again, anew = (make_batch(data, cfg, 64, step, 0)[0] for cfg in (first, second))
    assert again.shape == anew.shape and not (again == anew).all(1).any()


def test_a_row_asks_once_for_the_word_that_is_most_often(data):
    cfg = config(batch_size=28, long_rows=1792, long_frac=1.0, needle_frac=1.0, tasks="words")
    _, y = make_batch(data, cfg, 448, 0, 0)
    rows = [data.enc.decode(row.tolist()) for row in y]
    assert [row.count("Most often: ") for row in rows] == [1] * 7


def test_planted_rows_hold_every_task_asked_for(data):
    cfg = config(batch_size=60, needle_frac=1.0, tasks="single,words,qa")
    x, y = make_batch(data, cfg, 448, 0, 0)
    rows = [data.enc.decode(row.tolist()) for row in np.concatenate((x[:, :1], y), 1)]
    words = sum("Most often: " in row for row in rows)
    people = sum(bool(re.search(r"\n[WH].*\? [A-Za-z]+\.$", row)) for row in rows)
    assert 8 < words < 32 and 8 < people < 32 and words + people < 55


def test_a_second_stage_trains_on_both_lengths(fit, tiny_run, tmp_path, capsys):
    fit(tmp_path / "run", f"--init_from={tiny_run}", "--long_rows=256", "--max_iters=4",
        "--eval_iters=1")  # fmt: skip
    out = capsys.readouterr().out
    assert "first step of 64-token rows" in out and "first step of 256-token rows" in out
    model, cfg, _ = load_run(tmp_path / "run")
    assert model.config.block_size == 64 and cfg.long_rows == 256  # 1x is what it was


def test_the_share_of_peak_counts_the_flops_of_long_steps_too(fit, tiny_run, tmp_path, monkeypatch):
    told, real = [], train.Log

    def log(path, step, cfg, machine, tokens, flops):
        told.append(flops)
        return real(path, step, cfg, machine, tokens, flops)

    monkeypatch.setattr(train, "Log", log)
    for n, flags in enumerate([[], ["--long_rows=256", "--long_frac=0.25"]]):
        fit(tmp_path / str(n), f"--init_from={tiny_run}", "--max_iters=1", *flags)
    short, long = (load_run(tiny_run)[0].flops_per_token(n) for n in (64, 256))
    assert told == [short, pytest.approx(0.75 * short + 0.25 * long)] and long > short


def test_text_too_short_for_long_rows_is_refused(fit, tmp_path):
    with pytest.raises(UsageError, match="too few for --long_rows=65536"):
        fit(tmp_path / "run", "--batch_size=1024", "--long_rows=65536")


def test_text_too_short_is_told_with_the_flag_that_mends_it(data, monkeypatch):
    enough, short = (data._replace(val=data.val[:n]) for n in (33, 32))  # 32, and one to predict
    monkeypatch.setattr(prepare_data, "load_data", lambda folder: enough)
    assert train.open_dataset(config(long_rows=64), 32) is enough
    monkeypatch.setattr(prepare_data, "load_data", lambda folder: short)
    with pytest.raises(UsageError, match="val.bin has 32 tokens: too few for --block_size=32"):
        train.open_dataset(config(long_rows=64), 32)
    short = data._replace(train=data.train[:64])
    with pytest.raises(UsageError, match="train.bin has 64 tokens: too few for --long_rows=64"):
        train.open_dataset(config(long_rows=64), 32)
    with pytest.raises(UsageError, match="train.bin has 64 tokens: too few for --block_size=64"):
        train.open_dataset(config(long_rows=64), 64)


def test_no_rank_goes_on_before_all_have_chosen_their_folder(data_dir, monkeypatch):
    said = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(train.dist, "barrier", lambda: said.append("barrier"))
    monkeypatch.setattr(train, "choose_out_dir", lambda *_: said.append("folder"))
    train.begin(dict(dataset="tiny", data_dir=str(data_dir), gradient_accumulation_steps=2,
                     needle_frac=0, scale="cpu"))  # fmt: skip
    assert said == ["folder", "barrier"]


def test_questions_that_can_never_fit_are_refused_before_a_folder_is_made(fit, tmp_path):
    with pytest.raises(UsageError, match="cannot hold the facts and questions of words: 1"):
        fit(tmp_path / "run", "--tasks=needle,words")
    assert not (tmp_path / "run").exists()


def test_what_is_said_to_fit_can_always_be_drawn(data):
    asking = config(tasks="multikey,words", needle_frac=0.5).asking()
    with pytest.raises(UsageError, match="multikey") as e:
        prepare_data.check_room(data.enc, *asking, 100)
    room = int(re.search(r"(\d+) would do", str(e.value))[1])
    prepare_data.check_room(data.enc, *asking, room)
    for seed in range(500):
        prepare_data.draw_task(data.enc, np.random.default_rng(seed), *asking, room)


def test_wordings_too_long_for_a_row_are_drawn_again(data):
    """70 tokens hold two facts and questions in some wordings only."""
    cfg = config(batch_size=100, needle_frac=1.0, needles=2, needle_questions=2, needle_digits=4)
    x, y = make_batch(data, cfg, 70, 0, 0)
    rows = [data.enc.decode(row.tolist()) for row in np.concatenate((x[:, :1], y), 1)]
    assert all(re.search(r"\d{4}$", row) for row in rows)


def test_a_run_of_another_version_is_not_resumed_but_may_be_built_upon(fit, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "old")
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    del state["train_config"]["needle_questions"]
    torch.save(state, folder / "ckpt.pt")
    before = (folder / "ckpt.pt").read_bytes()
    with pytest.raises(UsageError, match="does not say needle_questions.*--init_from"):
        train.main(["--resume", f"--out_dir={folder}", "--device=cpu"])
    assert (folder / "ckpt.pt").read_bytes() == before
    fit(tmp_path / "two", f"--init_from={folder}", "--max_iters=1")


def test_a_path_that_the_device_lacks_is_refused_before_a_folder_is_made(fit, tmp_path):
    with pytest.raises(UsageError, match="--attention=flash needs CUDA"):
        fit(tmp_path / "run", "--attention=flash")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ["--long_rows=100", "--long_rows=192", "--long_rows=1048576"])
def test_long_rows_that_do_not_fill_a_batch_are_refused(fit, tmp_path, flag):
    with pytest.raises(UsageError, match="multiple of the 64 tokens"):
        fit(tmp_path / "run", flag)
    assert not (tmp_path / "run").exists()


def test_stage_two_starts_from_the_weights_at_a_longer_context(fit, tiny_run, tmp_path, records):
    flags = ["--max_iters=1", "--learning_rate=1e-30", "--min_lr=0", "--weight_decay=0"]
    folder = train.main([*flags, f"--init_from={tiny_run}", f"--out_dir={tmp_path / 'long'}",
                         f"--data_dir={load_run(tiny_run)[1].data_dir}", "--block_size=256",
                         "--batch_size=2", "--device=cpu", "--needle_frac=0", "--log_scale",
                         "--eval_iters=1", "--log_interval=1"])  # fmt: skip
    first, second = load_run(tiny_run)[0], load_run(folder)[0]
    assert second.config == replace(first.config, block_size=256, log_scale=True)
    for k, v in first.state_dict().items():
        torch.testing.assert_close(second.state_dict()[k], v, msg=k)
    assert records(folder)[1] < math.log(448) - 1.5
    assert load_run(folder)[1].dataset == "tiny"


@pytest.mark.parametrize(
    "flag", ["--n_embd=64", "--n_layer=5", "--n_kv_head=2", "--vocab_size=512"]
)
def test_stage_two_refuses_other_shapes(fit, tiny_run, tmp_path, flag):
    with pytest.raises(UsageError, match="do not fit"):
        train.main([f"--init_from={tiny_run}", flag, f"--out_dir={tmp_path / 'run'}",
                    f"--data_dir={load_run(tiny_run)[1].data_dir}", "--device=cpu"])  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_stage_two_with_another_preset_uses_it_or_refuses(tiny_run, tmp_path):
    try:
        folder = train.main([f"--init_from={tiny_run}", "--preset=rope", "--max_iters=1",
                             f"--data_dir={load_run(tiny_run)[1].data_dir}", "--device=cpu",
                             f"--out_dir={tmp_path / 'run'}", "--eval_iters=1",
                             "--needle_frac=0"])  # fmt: skip
    except UsageError:
        return
    model, cfg, _ = load_run(folder)
    assert (cfg.preset, model.config.pattern) in [("rope", "R"), ("rnope-swa", "SSSN")]


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_not_overwritten(fit, tiny_run):
    before = (tiny_run / "ckpt.pt").read_bytes(), (tiny_run / "log.jsonl").read_bytes()
    with pytest.raises(UsageError, match="(?s)holds a run.*--resume.*--out_dir"):
        fit(tiny_run, "--max_iters=1")
    assert before == ((tiny_run / "ckpt.pt").read_bytes(), (tiny_run / "log.jsonl").read_bytes())


def test_default_folders_are_numbered(tmp_path, monkeypatch, data_dir):
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, f"--data_dir={data_dir}", "--dataset=tiny", "--max_iters=1", "--needle_frac=0",
             "--preset=swa"]  # fmt: skip
    assert [str(train.main(flags)) for _ in range(3)] == ["out/swa", "out/swa-2", "out/swa-3"]
    assert train.newest_run().name == "swa-3"
    (tmp_path / "out" / "swa" / "config.json").unlink()  # its checkpoint is still somebody's
    assert str(train.main(flags)) == "out/swa-4"
    assert str(train.main([*flags[:-1], "--pattern=SW"])) == "out/SW"  # not a preset's name


def test_a_missing_dataset_and_one_too_short_are_clear_errors(fit, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="(?s)no dataset folder.*prepare_data.py"):
        fit(tmp_path / "run", "--dataset=nowhere")
    with pytest.raises(UsageError, match="--block_size=1000000"):
        fit(tmp_path / "run", "--block_size=1000000")
    with pytest.raises(UsageError, match="--vocab_size"):
        fit(tmp_path / "run", "--vocab_size=100")
    assert not (tmp_path / "run").exists()


# -- checkpoints that are none ---------------------------------------------------------------------


def nanogpt(path):
    torch.save(dict(model={}, optimizer={}, model_args={}, iter_num=0, config={}), path)


def of_another_version(path):
    state = torch.load(path, weights_only=True)
    state["model_config"]["dropout"] = 0.1
    torch.save(state, path)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


DAMAGE = {
    "empty": lambda p: p.write_bytes(b""),
    "text": lambda p: p.write_text("hello"),
    "truncated": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "a list": lambda p: torch.save([1, 2], p),
    "nanoGPT's": nanogpt,
    "another version's": of_another_version,
    "a program": lambda p: torch.save(dict(model=Evil()), p),
    "missing": lambda p: p.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_one_clear_error(
    tiny_run, tmp_path, damage, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(tiny_run, tmp_path / "broken")
    DAMAGE[damage](folder / "ckpt.pt")
    for argv in (["--resume", f"--out_dir={folder}"], [f"--init_from={folder}"]):
        status, _, err = as_script(monkeypatch, capfd, [*argv, "--device=cpu"])
        assert status == 2 and err.count("\n") == 1 and "ckpt.pt" in err, err
    with pytest.raises(UsageError, match=r"ckpt\.pt"):
        load_run(folder)
    assert not (tmp_path / "executed").exists()


def test_a_failed_save_leaves_the_checkpoint_before_whole(tiny_run, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = (folder / "ckpt.pt").read_bytes()

    def full(state, path):
        path.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UsageError, match="(?s)No space left.*--resume"):
        train.save_checkpoint(folder, tiny_model(), [], config(), {}, 1, 0.0)
    assert (folder / "ckpt.pt").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in tiny_run.iterdir())


# -- a loss that is lost ---------------------------------------------------------------------------


@pytest.fixture
def blow_up(monkeypatch):
    """blow_up(step): that step's learning rate ruins the weights."""

    def at(step, real=train.learning_rate):
        monkeypatch.setattr(
            train, "learning_rate", lambda now, cfg: 1e38 if now >= step else real(now, cfg)
        )

    return at


def test_a_nan_loss_stops_names_the_step_and_keeps_the_last_good_checkpoint(
    fit, tmp_path, blow_up
):
    blow_up(4)  # the fifth step; the loss of the sixth is the first to show it
    with pytest.raises(UsageError, match=r"(?s)nan at step 6.*checkpoint.*--learning_rate"):
        fit(tmp_path / "run", "--max_iters=9", "--eval_interval=3", "--needle_frac=0")
    assert load_checkpoint(tmp_path / "run")["step"] == 3
    assert all(v.isfinite().all() for v in weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    "log_interval, eval_interval",
    [
        pytest.param(1, 5, id="the evaluation is first to see it"),
        pytest.param(100, 3, id="between two lines of the log"),
    ],
)
def test_ruined_weights_are_never_saved(fit, tmp_path, blow_up, log_interval, eval_interval):
    blow_up(4)
    with pytest.raises(UsageError, match="--learning_rate"):
        fit(tmp_path / "run", "--max_iters=9", f"--eval_interval={eval_interval}",
            f"--log_interval={log_interval}", "--needle_frac=0")  # fmt: skip
    saved = (tmp_path / "run" / "ckpt.pt").exists()
    assert not saved or load_checkpoint(tmp_path / "run")["step"] <= 4


def test_ruined_weights_are_not_saved_by_an_interrupt_either(fit, tmp_path, monkeypatch):
    def learning_rate(step, cfg):
        if step == 4:  # whose loss is finite still
            os.kill(os.getpid(), signal.SIGTERM)
        return 1e38 if step == 4 else 1e-3

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    with pytest.raises(UsageError, match="loss is nan at step 5"):
        fit(tmp_path / "run", "--max_iters=9", "--eval_interval=3", "--needle_frac=0")
    assert load_checkpoint(tmp_path / "run")["step"] == 3


# -- the command line ------------------------------------------------------------------------------


def test_help_tells_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--help"])
    told = capsys.readouterr().out
    assert e.value.code == 0
    for f in (*fields(TrainConfig), *fields(ModelConfig)):
        assert f"--{f.name}" in told
    assert "1337" in told and "--no-qk_norm" in told


def test_flags_beat_the_preset_which_beats_the_scale():
    settle = train.settle
    _, model = settle(dict(scale="cpu"))
    assert (model.pattern, model.n_embd, model.rope_theta) == ("SSSN", 128, 1e4)
    _, model = settle(dict(scale="cpu", preset="llama4"))
    assert (model.pattern, model.n_embd, model.rope_theta) == ("CCCN", 128, 5e5)
    cfg, model = settle(dict(scale="gpu", preset="llama4", rope_theta=7.0, n_embd=64, seed=3))
    assert (model.pattern, model.n_embd, model.rope_theta) == ("CCCN", 64, 7.0)
    assert cfg.seed == 3 and cfg.scale == "gpu"


# -- many processes, and speed ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(fit, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("out") / "one", *SHARED)


SHARED = ["--gradient_accumulation_steps=4", "--max_iters=4", "--needle_frac=0.5", "--batch_size=2",
          "--eval_interval=2"]  # fmt: skip


@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_equal_one_on_the_same_global_batch(
    one_process, tmp_path, data_dir, records, processes
):
    folder = tmp_path / "many"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", str(ROOT / "train.py"), *TINY, *SHARED,
               f"--data_dir={data_dir}", "--dataset=tiny", f"--out_dir={folder}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for key in ("loss", "val_loss"):
        a, b = records(one_process, key), records(folder, key)
        assert list(a) == list(b) and list(a.values()) == pytest.approx(list(b.values()), rel=1e-3)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert len(lines) == 4 + 2  # one process writes, the others are silent
    assert f"{processes} x cpu" in done.stdout and done.stdout.count("layers  0 S") == 1


def test_micro_batches_that_cannot_be_shared_are_an_error(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "barrier", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="(?s)--gradient_accumulation_steps=6.*multiple of 4"):
        fit(tmp_path / "run", "--gradient_accumulation_steps=6")


BENCH = ["--n_layer=4", "--n_head=2", "--n_embd=16", "--vocab_size=64", "--window=8",
         "--block_size=64", "--batch_size=2", "--device=cpu"]  # fmt: skip


@pytest.fixture
def fast_clock(monkeypatch):
    """The bench times for some seconds: let them pass faster."""
    real = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: 100 * real())


def bench_table(text):
    lines = [[c.strip() for c in x.split("|")[1:-1]] for x in text.splitlines() if x[:1] == "|"]
    return [dict(zip(lines[0], x, strict=True)) for x in lines[2:]]


def test_the_bench_prints_speed_beside_what_flops_allow(fast_clock, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--bench=rope,rnope-swa", "--bench_lengths=64,128", *BENCH])
    rows = bench_table(capsys.readouterr().out)
    assert {"T", "preset", "tok/s", "MFU", "x rope", "FLOPs allow"} <= set(rows[0])
    assert [(r["T"], r["preset"]) for r in rows] == [
        ("64", "rope"), ("64", "rnope-swa"), ("128", "rope"), ("128", "rnope-swa")
    ]  # fmt: skip
    shape = dict(vocab_size=64, n_layer=4, n_head=2, n_embd=16, window=8)
    for full, hybrid in (rows[:2], rows[2:]):
        speeds = [float(r["tok/s"].replace(",", "")) for r in (full, hybrid)]
        ratio = speeds[1] / speeds[0]
        rounded = 0.005 + ratio * sum(0.5 / speed for speed in speeds)  # all three are, in print
        assert float(hybrid["x rope"]) == pytest.approx(ratio, abs=max(0.01, rounded))
        flops = [GPT(ModelConfig(**shape, pattern=p)).flops_per_token(int(full["T"]))
                 for p in ("R", "SSSN")]  # fmt: skip
        assert float(full["x rope"]) == float(full["FLOPs allow"]) == 1
        assert float(hybrid["FLOPs allow"]) == pytest.approx(flops[0] / flops[1], abs=0.006)
    assert not list(tmp_path.iterdir())  # nothing was trained


def test_the_bench_refuses_an_unknown_preset_before_it_times_anything(fast_clock, capsys):
    with pytest.raises(UsageError, match="roep"):
        train.main(["--bench=rope,roep", *BENCH])
    assert not bench_table(capsys.readouterr().out)


def test_the_bench_times_rope_first_for_the_others_to_be_compared(fast_clock, capsys):
    train.main(["--bench=swa,rope", *BENCH])
    rows = bench_table(capsys.readouterr().out)
    assert [row["preset"] for row in rows] == ["rope", "swa"] and float(rows[1]["x rope"]) > 0


def test_the_bench_refuses_a_path_that_is_not_to_be_had_before_it_times_anything(capsys):
    with pytest.raises(UsageError, match="--attention=flash"):
        train.main(["--bench=rope", "--bench_paths=blocks,flash", *BENCH])
    assert not capsys.readouterr().out


def test_the_bench_keeps_what_it_has_timed(fast_clock, tmp_path, monkeypatch):
    real = train.time_steps

    def once(*args):
        monkeypatch.setattr(train, "time_steps", lambda *_: 1 / 0)
        return real(*args)

    monkeypatch.setattr(train, "time_steps", once)
    with pytest.raises(ZeroDivisionError):
        train.main(["--bench=rope,swa", *BENCH, f"--out_dir={tmp_path / 'bench'}"])
    rows = json.loads((tmp_path / "bench" / "bench.partial.json").read_text())["rows"]
    assert [row["preset"] for row in rows] == ["rope"]
    assert os.listdir(tmp_path / "bench") == ["bench.partial.json"]
    monkeypatch.setattr(train, "time_steps", real)
    train.main(["--bench=rope", *BENCH, f"--out_dir={tmp_path / 'bench'}"])
    assert os.listdir(tmp_path / "bench") == ["bench.json"]


def test_the_bench_is_for_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_, **__: None)
    with pytest.raises(UsageError, match="without torchrun"):
        train.main(["--bench=rope", *BENCH])


def test_a_rate_is_only_given_for_whole_steps_that_were_timed(fit, tmp_path, records):
    folder = fit(tmp_path / "run", "--max_iters=3", "--needle_frac=0", "--log_interval=1")
    first, *later = records(folder, "tokens_per_second").values()
    assert first is None and min(later) > 0


def test_resuming_keeps_the_dtype_that_was_asked_for(fit, stop_at, tmp_path, records):
    """In bf16 and stopped half way: the rest is bf16 too, and the losses those of a whole run."""
    flags = ["--max_iters=4", "--dtype=bfloat16", "--needle_frac=0"]
    whole = records(fit(tmp_path / "whole", *flags))
    again = stop_at(1)
    fit(tmp_path / "half", *flags)
    again()
    train.main(["--resume", f"--out_dir={tmp_path / 'half'}"])
    assert records(tmp_path / "half") == whole
    assert load_checkpoint(tmp_path / "half")["train_config"].dtype == "bfloat16"


def test_stage_two_keeps_the_task_of_stage_one(fit, tmp_path):
    first = fit(tmp_path / "one", "--max_iters=1", "--needle_digits=3", "--needle_frac=0.5",
                "--needles=2", "--needle_questions=1", "--tasks=needle,single",
                "--block_size=256")  # fmt: skip
    argv = [f"--init_from={first}", "--max_iters=1", f"--out_dir={tmp_path / 'two'}"]
    cfg = load_checkpoint(train.main([*argv, "--device=cpu"]))["train_config"]
    assert (cfg.needles, cfg.needle_digits, cfg.needle_frac) == (2, 3, 0.5)
    assert (cfg.needle_questions, cfg.tasks) == (1, "needle,single")
