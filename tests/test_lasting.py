"""A run survives what happens to processes: kill -9, Ctrl-C, a dead peer, a long life."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import ROOT, TINY

from train import load_checkpoint

KILLS = int(os.environ.get("KILLS", 3))  # KILLS=30 is the full loop


def start(data_dir, folder, *flags, script=(str(ROOT / "train.py"),), **env):
    argv = [*TINY, f"--data_dir={data_dir}", "--dataset=tiny", f"--out_dir={folder}", *flags]
    return subprocess.Popen(
        [sys.executable, *script, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1", **env), start_new_session=True, cwd=ROOT,
    )  # fmt: skip


def wait_for(found, *runs):
    """Until found() is something, which is returned, while the runs go on."""
    while not (something := found()):
        assert all(run.poll() is None for run in runs)
        time.sleep(0.02)
    return something


def losses(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_killed_at_any_moment_goes_on_from_a_whole_checkpoint(data_dir, tmp_path):
    steps = 60 * KILLS + 20  # more than the killed run can do between its kills
    flags = [f"--max_iters={steps}", "--eval_interval=20"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(data_dir, whole, *flags).wait(120) == 0
    moments = random.Random(0)
    for _ in range(KILLS):
        resume = ["--resume"] if (killed / "ckpt.pt").exists() else []
        run = start(data_dir, killed, *flags, *resume)
        saved = killed / "ckpt.pt"
        before = saved.stat().st_mtime if saved.exists() else 0
        while run.poll() is None and not (saved.exists() and saved.stat().st_mtime > before):
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.3))
        run.kill()
        run.communicate(timeout=5)  # the process that makes batches holds these pipes, too
        assert run.returncode == -signal.SIGKILL  # it was alive until then
    assert start(data_dir, killed, *flags, "--resume").wait(120) == 0
    assert losses(killed) == losses(whole)
    a, b = load_checkpoint(whole)["model"], load_checkpoint(killed)["model"]
    assert all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(data_dir, tmp_path, number):
    run = start(data_dir, tmp_path / "run", "--max_iters=100000", "--eval_interval=10")
    wait_for((tmp_path / "run" / "ckpt.pt").exists, run)
    os.killpg(run.pid, number)  # the processes that make batches get it, too, as from a terminal
    out, err = run.communicate(timeout=60)
    assert run.returncode == 128 + number and not err
    step = load_checkpoint(tmp_path / "run")["step"]
    assert f"stopped at step {step}" in out and "--resume --out_dir=" in out


SPAWN = """if __name__ == "__main__":
    import multiprocessing, prepare_data, train
    multiprocessing.set_start_method("spawn")
    prepare_data.run_main(train.main)"""


def test_a_signal_while_the_first_batch_is_awaited_stops_a_run_as_cleanly(data_dir, tmp_path):
    script = "-c", SPAWN
    run = start(data_dir, tmp_path / "run", "--max_iters=100000", script=script)
    wait_for(psutil.Process(run.pid).children, run)
    time.sleep(0.5)  # spawned, a process imports torch now
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and not err, err
    assert "stopped at step" in out and load_checkpoint(tmp_path / "run")["step"] > 0


def test_a_batch_that_cannot_be_made_ends_the_run_and_its_processes(data_dir, tmp_path):
    shutil.copytree(data_dir / "tiny", tmp_path / "tiny")
    ids = np.memmap(tmp_path / "tiny" / "train.bin", "uint16", "r+")
    ids[:] = 60000
    run = start(tmp_path, tmp_path / "run")
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2 and "ids beyond its vocabulary" in err


LARGE = "--batch_size=800"  # more than a pipe holds: the process waits in the middle of a batch


def test_the_process_that_makes_batches_does_not_outlive_the_run(data_dir, tmp_path):
    run = start(data_dir, tmp_path / "run", "--max_iters=100000", "--eval_iters=1", LARGE)
    children = wait_for(psutil.Process(run.pid).children, run)
    run.kill()
    run.communicate(timeout=5)
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_a_run_whose_batches_are_no_longer_made_says_so(data_dir, tmp_path):
    flags = ["--max_iters=100000", "--eval_interval=1", "--eval_iters=1", LARGE]
    run = start(data_dir, tmp_path / "run", *flags)
    wait_for((tmp_path / "run" / "ckpt.pt").exists, run)
    for child in psutil.Process(run.pid).children():
        child.kill()
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2 and "go on with --resume" in err and "Traceback" not in err
    load_checkpoint(tmp_path / "run")


def test_when_one_rank_dies_the_other_ends_with_a_clear_line(data_dir, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    flags = ["--max_iters=100000", "--gradient_accumulation_steps=2", "--eval_interval=10"]
    ranks = [start(data_dir, tmp_path / "run", *flags, RANK=r, LOCAL_RANK=r, **env) for r in "01"]
    wait_for((tmp_path / "run" / "ckpt.pt").exists, *ranks)
    ranks[1].kill()
    _, err = ranks[0].communicate(timeout=60)
    ranks[1].communicate(timeout=5)
    assert ranks[0].returncode == 2
    assert "train.py: rank 0 lost another process" in err and "Traceback" not in err
    load_checkpoint(tmp_path / "run")


def test_a_long_run_keeps_its_memory_and_its_files(data_dir, tmp_path):
    steps = int(os.environ.get("SOAK", 600))  # SOAK=20000 is the full one
    flags = [f"--max_iters={steps}", "--eval_interval=50", "--log_interval=50"]
    run = start(data_dir, tmp_path / "run", *flags)
    process, seen = psutil.Process(run.pid), []
    while run.poll() is None:
        if (tmp_path / "run" / "ckpt.pt").exists():
            try:
                seen.append((process.memory_info().rss, process.num_fds()))
            except psutil.Error:
                break
        time.sleep(0.05)
    assert run.wait() == 0 and len(seen) > 10
    early, late = seen[len(seen) // 4], seen[len(seen) * 7 // 8]  # at its end Python grows
    assert late[0] < 1.1 * early[0] and late[1] <= early[1] + 2
