"""What the tests share: a small text, tiny runs on it, and processes that run train.py."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_data
import train

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)  # models this small only lose time to more threads
# A shell that starts pytest in the background lets it ignore Ctrl-C, which some tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = [
    "--n_layer=4", "--n_head=2", "--n_kv_head=1", "--n_embd=32", "--block_size=64", "--window=16",
    "--batch_size=4", "--warmup_iters=2", "--learning_rate=1e-3", "--eval_interval=1000",
    "--eval_iters=2", "--log_interval=1", "--device=cpu",
]  # fmt: skip

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def same_weights(a, b):
    """Do the checkpoints of two runs hold the same weights, bit for bit?"""
    a = train.load_checkpoint(a)["model"]
    b = train.load_checkpoint(b)["model"]
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data_dir with one byte dataset, `tiny`: 40 files of generated Python."""
    text = tmp_path_factory.mktemp("tiny-text")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "import", "self", "value"]
    for i in range(40):
        lines = []
        for _ in range(60):
            name, argument, result = rng.choice(words, 3)
            lines.append(f"def {name}_{rng.integers(100)}({argument}):\n")
            lines.append(f"    return {result} + {rng.integers(1000)}\n\n")
        (text / f"{i}.py").write_text("".join(lines))
    made = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(text.parent)  # a file's name decides its split: the same in all sessions
        prepare_data.prepare(prepare_data.DataConfig(
            dataset=(text.name,), data_dir=str(made), name="tiny", val_frac=0.25))
    return made


@pytest.fixture(scope="session")
def data(data_dir):
    return prepare_data.load_data(data_dir / "tiny")


@pytest.fixture(scope="session")
def tiny_flags(data_dir):
    """tiny_flags(folder): the command line of a tiny run in folder."""

    def flags(folder):
        return [*TINY, f"--data_dir={data_dir}", "--dataset=tiny", f"--out_dir={folder}"]

    return flags


@pytest.fixture(scope="session")
def fit(tiny_flags):
    """fit(folder, *flags): a tiny run of train.py, which a SIGTERM may stop. Its folder."""

    def run(folder, *flags):
        try:
            train.main([*tiny_flags(folder), *flags])
        except SystemExit as stopped:
            assert stopped.code == 128 + signal.SIGTERM
        return Path(folder)

    return run


@pytest.fixture(scope="session")
def tiny_run(fit, tmp_path_factory):
    """A run of the default preset, long enough to have learnt something."""
    folder = tmp_path_factory.mktemp("out") / "tiny-run"
    return fit(folder, "--max_iters=100", "--learning_rate=1e-2", "--min_lr=1e-3", "--seed=1")


@pytest.fixture(scope="session")
def records():
    """records(folder, key): {step: value} of the lines of log.jsonl that have the key."""

    def read(folder, key="loss"):
        lines = Path(folder, "log.jsonl").read_text().splitlines()
        return {line["step"]: line[key] for line in map(json.loads, lines) if key in line}

    return read


@contextmanager
def starting():
    """A function start(*argv, program=[...], **env): train.py as a process of its own.

    It leads a process group, as from a terminal. What still runs at the end is killed.
    """
    started = []

    def start(*argv, program=(ROOT / "train.py",), **env):
        process = subprocess.Popen(
            [sys.executable, *map(str, program), *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | env,
            start_new_session=True,
        )
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
            process.stderr.close()


@pytest.fixture
def start():
    with starting() as function:
        yield function


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step): a SIGTERM comes while that step is computed. It returns what ends that."""
    real = train.learning_rate

    def begin(step):
        def learning_rate(now, cfg):
            if now == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(now, cfg)

        monkeypatch.setattr(train, "learning_rate", learning_rate)
        return lambda: monkeypatch.setattr(train, "learning_rate", real)

    return begin


@pytest.fixture
def as_script(monkeypatch, capfd):
    """as_script(name, argv): (exit status, stdout, stderr) of `python NAME ARGV`, run in here."""

    def run(name, argv):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *argv])
        main = __import__(name.removesuffix(".py")).main
        status = 0
        try:
            prepare_data.run_main(main)
        except SystemExit as end:
            status = end.code
        return status, *capfd.readouterr()

    return run
