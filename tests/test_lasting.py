"""A run survives what happens to processes: kill -9, signals, a dead peer, a full disk, time."""

import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, TORCHRUN, same_weights, starting

import prepare_data
import train
from model import UsageError
from train import load_checkpoint, load_run

KILLS = int(os.environ.get("KILLS", 2))  # KILLS=30 is the full loop
SOAK = int(os.environ.get("SOAK", 400))  # steps; SOAK=20000 is the full one
ENDLESS = "--max_iters=1000000"

# The batches are made by a process of their own, as for a GPU.
WORKER = """
import multiprocessing, prepare_data, sys, train
multiprocessing.set_start_method(sys.argv.pop(1))
plain = train.DataLoader
train.DataLoader = lambda *given, **rules: plain(*given, **rules | dict(num_workers=1))
prepare_data.run_main(train.main)
"""


def wait_for(file, *runs):
    """Until the file exists, while the runs go on."""
    while not file.exists():
        for run in runs:
            assert run.poll() is None, run.communicate()[1]
        time.sleep(0.02)


# ---- Kills and signals --------------------------------------------------------------------------


def test_a_run_killed_at_any_moment_goes_on_from_a_whole_checkpoint(
    fit, start, tiny_flags, tmp_path, records
):
    flags = [f"--max_iters={80 * KILLS + 20}", "--eval_interval=5"]
    whole = fit(tmp_path / "whole", *flags)
    killed = tmp_path / "killed"
    moments = random.Random(0)
    argv = [*tiny_flags(killed), *flags]
    for _ in range(KILLS):
        begun = time.time()
        run = start(*argv)
        while not (killed / "ckpt.pt").exists() or (killed / "ckpt.pt").stat().st_mtime < begun:
            assert run.poll() is None, run.communicate()[1]
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))
        run.kill()
        assert run.wait(20) == -signal.SIGKILL  # it was alive until then
        argv = ["--resume", f"--out_dir={killed}"]
    train.main(argv)
    assert records(killed) == records(whole)
    assert records(killed, "copy") == records(whole, "copy")
    assert same_weights(killed, whole)


@pytest.mark.parametrize(
    ("number", "program", "first"),
    [
        (signal.SIGTERM, [ROOT / "train.py"], []),
        (signal.SIGINT, ["-c", WORKER], ["fork"]),
    ],
    ids=["SIGTERM", "SIGINT, beside a worker"],
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    start, tiny_flags, tmp_path, number, program, first
):
    folder = tmp_path / "run"
    run = start(*first, *tiny_flags(folder), ENDLESS, "--eval_interval=10", program=program)
    wait_for(folder / "ckpt.pt", run)
    os.killpg(run.pid, number)  # the worker gets it, too, as from a terminal
    out, err = run.communicate(timeout=30)
    assert run.returncode == 128 + number
    assert err == ""
    step = load_checkpoint(folder)["step"]
    assert f"stopped at step {step}: python train.py --resume --out_dir={folder} goes on" in out


def test_a_signal_at_any_line_of_the_loop_saves_the_steps_that_were_done(fit, tmp_path, capsys):
    def stopped_at(count):
        """(step told, step saved), where the signal came at that line of those executed."""
        seen = 0

        def line(frame, event, argument):
            nonlocal seen
            seen += event == "line"
            if event == "line" and seen == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return line

        def call(frame, event, argument):
            return line if frame.f_code is train.train_loop.__code__ else None

        folder = tmp_path / str(count)
        before = sys.gettrace()
        sys.settrace(call)
        try:
            fit(folder, "--max_iters=4", "--eval_iters=1", "--optimizer=adamw")
        finally:
            sys.settrace(before)
        told = re.search(r"stopped at step (\d+):", capsys.readouterr().out)
        assert told, f"line {count} is beyond the loop"
        saved = load_checkpoint(folder)["step"] if (folder / "ckpt.pt").exists() else None
        return int(told[1]), saved

    stops = {count: stopped_at(count) for count in range(1, 61)}  # a step has about 25 lines
    lost = {count: (told, saved) for count, (told, saved) in stops.items() if told != saved}
    assert not lost, f"line: (step told, step saved) {lost}"


def test_a_run_that_hears_a_signal_in_its_last_step_is_done(fit, tmp_path, monkeypatch, capsys):
    def learning_rate(step, cfg):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1e-3

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    fit(tmp_path / "run", "--max_iters=4")  # a SystemExit would say that it was stopped
    assert load_checkpoint(tmp_path / "run")["step"] == 4
    assert "done in" in capsys.readouterr().out


def test_under_torchrun_a_signal_stops_all_ranks_at_one_step(start, tiny_flags, tmp_path):
    folder = tmp_path / "run"
    flags = [ENDLESS, "--gradient_accumulation_steps=2", "--log_interval=1000000"]
    program = [*TORCHRUN, ROOT / "train.py"]
    run = start(*tiny_flags(folder), *flags, program=program)
    wait_for(folder / "log.jsonl", run)
    time.sleep(1)  # some steps
    began = time.time()
    run.terminate()
    out, _ = run.communicate(timeout=60)
    assert time.time() - began < 15  # after 30 s torchrun kills
    step = load_checkpoint(folder)["step"]
    assert f"stopped at step {step}: python train.py --resume" in out
    assert step > 0


def test_a_resumed_log_has_every_step_once(fit, tmp_path, records, monkeypatch):
    """Killed without a word in step 6, the last save being of step 3."""
    real = train.learning_rate

    def killed(step, cfg):
        if step == 5:
            raise MemoryError
        return real(step, cfg)

    flags = ["--max_iters=8", "--eval_interval=3"]
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(train, "learning_rate", killed)
        fit(folder, *flags)
    assert list(records(folder)) == [1, 2, 3, 4, 5]
    with (folder / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')  # a machine that went down in the middle of a write
    train.main(["--resume", f"--out_dir={folder}"])
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8]
    assert same_weights(folder, fit(tmp_path / "whole", *flags))


# ---- What is never saved -------------------------------------------------------------------------


def test_a_failed_save_keeps_the_checkpoint_before(fit, tmp_path, monkeypatch):
    real = torch.save
    saved = []

    def save_once(state, path):
        if saved:
            path.write_bytes(b"half of")
            raise OSError(28, "No space left on device")
        saved.append(path)
        real(state, path)

    monkeypatch.setattr(torch, "save", save_once)
    with pytest.raises(UsageError, match="(?s)No space left.*--resume"):
        fit(tmp_path / "run", "--max_iters=4", "--eval_interval=2")
    assert load_checkpoint(tmp_path / "run")["step"] == 2
    assert set(os.listdir(tmp_path / "run")) == {"ckpt.pt", "config.json", "log.jsonl"}


@pytest.mark.parametrize("log_interval", [1, 100])
def test_ruined_weights_are_told_and_never_saved(fit, tmp_path, monkeypatch, log_interval):
    """The fifth step ruins them. Its own loss is still finite."""
    flags = ["--max_iters=9", "--eval_interval=3", f"--log_interval={log_interval}"]
    monkeypatch.setattr(train, "learning_rate", lambda step, cfg: 1e38 if step == 4 else 1e-3)
    with pytest.raises(UsageError, match="nan at step 6.*last good checkpoint.*--learning_rate"):
        fit(tmp_path / "run", *flags)
    state = load_checkpoint(tmp_path / "run")
    assert state["step"] == 3
    assert all(weight.isfinite().all() for weight in state["model"].values())


def test_ruined_weights_are_not_saved_by_a_stop_either(fit, tmp_path, monkeypatch):
    def learning_rate(step, cfg):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1e38 if step == 4 else 1e-3

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    with pytest.raises(UsageError, match="validation loss is nan at step 5"):
        fit(tmp_path / "run", "--max_iters=9", "--eval_interval=3")
    assert load_checkpoint(tmp_path / "run")["step"] == 3


# ---- More than one process, or thread -----------------------------------------------------------


SHARED = [ENDLESS, "--gradient_accumulation_steps=4", "--eval_interval=2"]


@pytest.fixture(scope="module")
def two_ranks(tiny_flags, tmp_path_factory):
    """Two processes of one run, the second of which was killed: (folder, out and err of both)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder = tmp_path_factory.mktemp("out") / "run"
    world = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    with starting() as start:
        argv = [*tiny_flags(folder), *SHARED]
        ranks = [start(*argv, RANK=rank, LOCAL_RANK=rank, **world) for rank in "01"]
        wait_for(folder / "ckpt.pt", *ranks)
        while load_checkpoint(folder)["step"] < 4:
            assert ranks[0].poll() is None
            time.sleep(0.1)
        ranks[1].kill()
        said = [rank.communicate(timeout=60) for rank in ranks]
        assert ranks[0].returncode == 2
    return folder, said


def test_two_processes_compute_what_one_does(two_ranks, fit, tmp_path, records, stop_at):
    two, said = two_ranks
    stop_at(3)
    one = fit(tmp_path / "one", *SHARED)
    for key in ("loss", "val_loss", "copy"):
        found = records(two, key)
        expected = records(one, key)
        assert found[2] == pytest.approx(expected[2], rel=1e-3)
        assert found[4] == pytest.approx(expected[4], rel=1e-3)
    losses = [line for line in (two / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(losses) == len(records(two))  # one process writes
    assert "2 x cpu" in said[0][0]
    assert said[1][0] == ""  # the other is silent


def test_when_one_rank_dies_the_other_ends_with_one_clear_line(two_ranks):
    folder, said = two_ranks
    lines = said[0][1].splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.py: another process of this run has ended")
    assert load_checkpoint(folder)["step"] >= 4


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
        RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer"),
        RuntimeError("NCCL communicator was aborted on rank 1."),
    ],
    ids=repr,
)
def test_whatever_error_a_dead_process_causes_is_told_as_such(fit, tmp_path, monkeypatch, error):
    """A worker that dies between two batches, in the middle of one, before one; and a rank."""

    def load(*where):
        raise error

    monkeypatch.setattr(train.Batches, "load", load)
    with pytest.raises(UsageError, match="another process of this run has ended.*--resume"):
        fit(tmp_path / "run")


def test_a_run_whose_worker_died_ends_with_a_clear_line_and_leaves_no_process(
    start, tiny_flags, tmp_path
):
    """Spawned, the worker also opens the dataset itself."""
    folder = tmp_path / "run"
    argv = ["spawn", *tiny_flags(folder), ENDLESS, "--eval_interval=10"]
    run = start(*argv, program=["-c", WORKER])
    wait_for(folder / "ckpt.pt", run)
    family = psutil.Process(run.pid).children(recursive=True)
    for child in family:
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
    _, err = run.communicate(timeout=30)
    assert run.returncode == 2, err
    # torch's own handler may speak first, where the worker dies in the middle of a batch.
    assert "another process of this run has ended" in err.splitlines()[-1]
    assert not psutil.wait_procs(family, timeout=5)[1]
    load_checkpoint(folder)


def test_a_missing_nccl_is_not_told_as_a_dead_process():
    missing = "Distributed package doesn't have NCCL built in"
    with pytest.raises(RuntimeError, match=missing), train.explain_lost_process():
        raise RuntimeError(missing)


def test_news_of_a_dead_worker_may_come_while_its_first_error_is_explained(monkeypatch):
    class Reset(ConnectionResetError):
        def __repr__(self):  # here torch's handler of SIGCHLD speaks
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def lose(given):
        raise Reset

    monkeypatch.setattr(train, "train", lose)
    with pytest.raises(UsageError, match="another process of this run has ended .*worker"):
        train.main([])


def test_training_in_a_thread_is_training(tiny_run, tmp_path):
    model, cfg, _ = load_run(tiny_run)
    given = asdict(cfg) | asdict(model.config)
    given |= dict(out_dir=str(tmp_path / "run"), max_iters=3)
    ended = []
    thread = threading.Thread(target=lambda: ended.append(train.train(given)))
    thread.start()
    thread.join(60)
    assert ended == [(tmp_path / "run", 0)]
    assert load_checkpoint(tmp_path / "run")["step"] == 3


# ---- Two runs, one folder -----------------------------------------------------------------------


def test_a_run_that_is_being_trained_is_not_resumed(fit, tmp_path, monkeypatch):
    """The first is in another thread, and waits in the middle of its second step."""
    real = train.learning_rate
    inside = threading.Event()
    leave = threading.Event()

    def learning_rate(step, cfg):
        if step == 1:
            inside.set()
            leave.wait(20)
        return real(step, cfg)

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    folder = tmp_path / "run"
    first = threading.Thread(target=fit, args=[folder, "--max_iters=2", "--eval_interval=1"])
    first.start()
    assert inside.wait(20)
    with pytest.raises(UsageError, match="another process trains in .*run, or did a moment"):
        train.main(["--resume", f"--out_dir={folder}"])
    leave.set()
    first.join(20)
    assert load_checkpoint(folder)["step"] == 2


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_another_process_has_trained_meanwhile_is_left_alone(
    fit, tiny_flags, tmp_path, resumed, monkeypatch
):
    """It was opened before the other one ended, and locked after."""
    folder = tmp_path / "run"
    groups = dict(model=train.ModelConfig, training=train.TrainConfig)
    given = prepare_data.parse_flags(groups, [*tiny_flags(folder), "--max_iters=2"], "")
    if resumed:
        train.train(given)
        given = dict(resume=True, out_dir=folder)
    stale = train.make_run(given)
    other = fit(tmp_path / "other", "--max_iters=3")
    folder.mkdir(exist_ok=True)
    names = ("ckpt.pt", "log.jsonl", "config.json")
    for name in names:
        shutil.copyfile(other / name, folder / name)
    before = [(folder / name).read_bytes() for name in names]
    monkeypatch.setattr(train, "make_run", lambda given: stale)
    with pytest.raises(UsageError, match="another process has just trained in .*run: start again"):
        train.train(given)
    assert [(folder / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("name", ["", "-2"])
def test_a_folder_is_chosen_after_the_text_is_made(fit, tiny_flags, tmp_path, monkeypatch, name):
    """Another run of the same preset may begin while this one prepares its text."""
    monkeypatch.chdir(tmp_path)
    real = train.open_dataset

    def slow(*args):
        if name:
            Path("out/rnope-swa").mkdir(parents=True)
        return real(*args)

    monkeypatch.setattr(train, "open_dataset", slow)
    flags = [flag for flag in tiny_flags("x") if not flag.startswith("--out_dir")]
    assert train.main([*flags, "--max_iters=1"]) == Path(f"out/rnope-swa{name}")


def test_a_run_of_another_version_is_not_resumed(fit, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    del state["version"]
    torch.save(state, folder / "ckpt.pt")
    with pytest.raises(UsageError, match="another version .* or use --init_from="):
        train.main(["--resume", f"--out_dir={folder}"])
    assert load_run(folder)[2]["step"] == 100
    fit(tmp_path / "second", f"--init_from={folder}", "--max_iters=1")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("tail", [b"", b'{"step": 30}', b'{"step": 3', b'{"step": 21}\n{"st'])
def test_a_log_keeps_its_lines_up_to_the_checkpoint(tmp_path, end, tail):
    kept = b'{"step": 10}' + end + b'{"step": 20}' + end
    (tmp_path / "log.jsonl").write_bytes(kept + tail)
    with train.open_log(SimpleNamespace(folder=tmp_path, step=20, written=None)) as file:
        file.write(b"more\n")
    assert (tmp_path / "log.jsonl").read_bytes() == kept + b"more\n"


@pytest.mark.parametrize("line", [b"not json", b'{"mine": 1}', b"[1]"])
def test_a_log_with_a_line_of_another_s_is_left_alone(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 10}\n' + line + b'\n{"step": 20}\n')
    before = path.read_bytes()
    run = SimpleNamespace(folder=tmp_path, step=20, written=None)
    told = "a line that train.py did not write: move the file away"
    with pytest.raises(UsageError, match=told), train.open_log(run):
        pass
    assert path.read_bytes() == before


def test_of_two_runs_that_chose_a_folder_at_once_one_is_refused(fit, tmp_path, monkeypatch):
    """Both looked before either wrote: so do runs that a shell starts together."""
    real = train.make_run
    runs = []

    def begin_both(given):
        runs.extend([real(given), real(given | dict(seed=2))])
        return runs[0]

    def second_begins(run, heard):
        monkeypatch.setattr(train, "make_run", lambda given: runs[1])
        monkeypatch.setattr(train, "train_loop", lambda run, heard: (0, 0))
        with pytest.raises(UsageError, match="--out_dir"):
            fit(tmp_path / "run")
        return 0, 0

    monkeypatch.setattr(train, "make_run", begin_both)
    monkeypatch.setattr(train, "train_loop", second_begins)
    fit(tmp_path / "run")
    assert '"seed": 1337' in (tmp_path / "run" / "config.json").read_text()


# ---- A long life --------------------------------------------------------------------------------


def test_a_long_run_keeps_its_memory_and_its_files(start, tiny_flags, tmp_path):
    """Begun by a script without a main guard, where processes are spawned."""
    folder = tmp_path / "run"
    script = tmp_path / "mine.py"
    script.write_text(
        "import multiprocessing, sys, train\n"
        "multiprocessing.set_start_method('spawn')\n"
        "train.main(sys.argv[1:])\n"
    )
    flags = [f"--max_iters={SOAK}", "--eval_interval=50", "--log_interval=50"]
    run = start(*tiny_flags(folder), *flags, program=[script])
    wait_for(folder / "ckpt.pt", run)
    process = psutil.Process(run.pid)
    seen = []
    while run.poll() is None:
        try:
            seen.append((process.memory_info().rss, process.num_fds()))
        except psutil.Error:  # it has just ended
            break
        time.sleep(0.05)
    assert run.wait(20) == 0
    assert len(seen) > 10
    early = seen[len(seen) // 4]
    late = seen[len(seen) * 7 // 8]  # at its very end Python grows
    assert late[0] < 1.1 * early[0]
    assert late[1] <= early[1] + 2
