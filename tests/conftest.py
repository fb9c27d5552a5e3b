import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # plain `pytest` does not put the repository on the path
    sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
import train  # noqa: E402

torch.set_num_threads(1)  # models this small only lose time to more threads

# Beats the scale's defaults everywhere; T 64 leaves room for one planted fact in BPE tokens.
TINY = [
    "--n_layer=4", "--n_head=2", "--n_kv_head=1", "--n_embd=32", "--block_size=64", "--window=16",
    "--batch_size=4", "--warmup_iters=2", "--eval_interval=1000", "--eval_iters=2",
    "--log_interval=1", "--device=cpu", "--needles=1", "--needle_digits=7",
    "--needle_frac=0.2", "--learning_rate=1e-3", "--min_lr=1e-4", "--optimizer=muon",
]  # fmt: skip


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A data_dir that holds one BPE dataset, `tiny`, made from generated text."""
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "return", "import", "self", "value"]
    for i in range(40):
        lines = [
            f"def {rng.choice(words)}_{rng.integers(100)}({rng.choice(words)}):\n"
            f"    return {rng.choice(words)} + {rng.integers(1000)}\n"
            + ("# The secret number of babebi is 1234567.\n" if n % 10 == 0 else "")
            for n in range(40)
        ]
        (folder / f"{i}.py").write_text("".join(lines))
    made = tmp_path_factory.mktemp("data")
    prepare_data.prepare(
        prepare_data.DataConfig(
            dataset=(str(folder),), tokenizer="bpe", bpe_vocab_size=400, data_dir=str(made),
            name="tiny", val_frac=0.25,
        )  # fmt: skip
    )
    return made


@pytest.fixture(scope="session")
def data(data_dir):
    return prepare_data.load_data(data_dir / "tiny")


@pytest.fixture(scope="session")
def fit(data_dir):
    """fit(folder, *flags): a tiny run of train.py on the tiny dataset. Returns its folder."""

    def run(folder, *flags):
        where = [f"--data_dir={data_dir}", "--dataset=tiny", f"--out_dir={folder}"]
        try:
            return train.main([*TINY, *where, *flags])
        except SystemExit as stopped:
            assert stopped.code == 128 + signal.SIGTERM
            return Path(folder)

    return run


@pytest.fixture(scope="session")
def tiny_run(fit, tmp_path_factory):
    """A run of the default preset, trained on for long enough to have learnt something."""
    folder = tmp_path_factory.mktemp("out") / "tiny-run"
    return fit(folder, "--max_iters=60", "--learning_rate=1e-2", "--min_lr=1e-3", "--seed=1")


@pytest.fixture(scope="session")
def records():
    """records(folder, key): {step: value} of the lines of log.jsonl that have the key."""

    def read(folder, key="loss"):
        lines = [json.loads(x) for x in (Path(folder) / "log.jsonl").read_text().splitlines()]
        return {x["step"]: x[key] for x in lines if key in x}

    return read


def forget_text(folder, **change):
    """Make the run in folder one that was trained on another text, as its checkpoint tells it."""
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    torch.save(state | dict(meta=state["meta"] | change), folder / "ckpt.pt")
