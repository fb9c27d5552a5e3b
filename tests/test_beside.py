import importlib.util
import json
import math
import sys

import pytest
import torch
from conftest import ROOT

import model
import train
from model import PRESETS, ModelConfig, UsageError

spec = importlib.util.spec_from_file_location("beside", ROOT / "results" / "beside.py")
beside = importlib.util.module_from_spec(spec)
spec.loader.exec_module(beside)

SMALL = ["--n_layer=4", "--n_head=2", "--n_embd=32", "--block_size=64", "--window=16",
         "--batch_size=4", "--device=cpu"]  # fmt: skip


@pytest.fixture
def cfg():
    return beside.BesideConfig(names=("rope",), batch_size=4, score_rows=8, device="cpu")


@pytest.fixture
def machine():
    return train.Machine("cpu")


@pytest.fixture
def contender(cfg, machine):
    torch.manual_seed(0)
    shape = ModelConfig(**PRESETS["rope"], vocab_size=448, n_layer=2, n_head=2, n_embd=32,
                        block_size=64)  # fmt: skip
    return beside.ours(cfg, shape, machine)


@pytest.fixture
def text(data, machine):
    return beside.Text(data, 64, machine)


def test_models_are_timed_one_after_another_and_the_numbers_kept(tmp_path, capsys):
    out = tmp_path / "new" / "found.json"
    beside.main(["rope", "swa", *SMALL, "--steps=2", f"--out={out}"])
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["rope", "swa"]
    assert rows == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(4 * 64 / row["step_ms"] * 1e3)


def test_compiling_leaves_no_trace(contender, text, cfg, machine):
    def weights():
        things = [contender[0], *contender[1]]
        return [x.clone() for thing in things for x in tensors(thing.state_dict())]

    def tensors(tree):
        if torch.is_tensor(tree):
            yield tree
        for part in tree.values() if isinstance(tree, dict) else ():
            yield from tensors(part)

    before = weights()
    beside.warm_up(contender, text, cfg)
    after = weights()
    assert all(map(torch.equal, before, after)) and len(before) == len(after)
    contender[2](text.draw(4), 0.5, 0)
    assert not all(map(torch.equal, before, weights()))


def test_a_score_is_what_train_py_says_of_the_same_rows(contender, text, data, machine):
    cfg = train.TrainConfig(batch_size=4, eval_iters=2)
    nats = train.evaluate(contender[0], data, cfg, 64, machine)
    per_token = data.meta["val_bytes"] / data.meta["val_tokens"]
    bits = text.score(contender[3], 8, 4)
    assert bits == pytest.approx(nats / math.log(2) / per_token, rel=1e-5)


def test_training_ends_with_the_time_and_learns(contender, text, cfg, machine, monkeypatch):
    cfg.seconds, seen = 50.0, []
    net, optimizers, step, loss = contender
    before = text.score(loss, 8, 4)

    def noted(batch, share, n):
        seen.append((share, n))
        return step(batch, share, n)

    # By this clock every step takes half a second, the one that compiles, too.
    monkeypatch.setattr(machine, "clock", lambda: len(seen) / 2)
    found = beside.train_for((net, optimizers, noted, loss), text, cfg, machine)
    shares, steps = zip(*seen[1:], strict=True)
    assert steps == (*range(100),) and shares == pytest.approx([n / 100 for n in range(100)])
    assert found["seconds"] == 50 and found["steps"] == 100
    assert found["tokens"] == 100 * 4 * 64 and found["tokens_per_second"] == found["tokens"] / 50
    assert found["bits_per_byte"] < 0.8 * before


def test_nanochats_schedules():
    """As in its base_train.py: 40 steps up, then level, and down over the last 65 % of the time."""
    for share, n, expected in ((0.0, 0, (1 / 40, 0.85, 1)), (0.2, 200, (1, 0.91, None)),
                               (0.35, 1000, (1, 0.97, None)), (1.0, 2000, (0.05, 0.90, 0))):
        for got, wanted in zip(beside.nanochat_schedule(share, n), expected, strict=True):
            assert wanted is None or got == pytest.approx(wanted), (share, n)


NANOGPT = """
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_embd: int; dropout: float
    bias: bool
class GPT(torch.nn.Embedding):
    def __init__(self, config):
        super().__init__(config.vocab_size, config.vocab_size)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)
    def forward(self, x, y):
        logits = super().forward(x)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


def test_a_checkout_whose_model_is_called_like_ours_stays_apart(tmp_path, capsys):
    (tmp_path / "nanoGPT").mkdir()
    (tmp_path / "nanoGPT" / "model.py").write_text(NANOGPT)
    path = [*sys.path]
    beside.main(["nanogpt", "rope", *SMALL, "--steps=1", f"--peers={tmp_path}"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["parameters"] == 320 * 320 != rows[1]["parameters"]
    assert sys.modules["model"] is model and sys.path == path


def test_what_is_wrong_is_said_before_anything_is_timed(data_dir, tmp_path, capsys):
    for name in ("nanogpt", "nanochat"):
        with pytest.raises(UsageError, match="git clone https://github.com/karpathy/nano"):
            beside.main(["rope", name, *SMALL, f"--peers={tmp_path}"])
    with pytest.raises(UsageError, match="name models to compare, of nanogpt"):
        beside.main(["gpt5"])
    with pytest.raises(UsageError, match="never builds 'N'"):
        beside.main(["rope", "rnope-swa", *SMALL, "--n_layer=2"])
    with pytest.raises(UsageError, match="token ids: drop --vocab_size"):
        beside.main(["rope", *SMALL, "--seconds=1", f"--data={data_dir}/tiny", "--vocab_size=64"])
    with pytest.raises(UsageError, match="lower --block_size"):
        beside.main(["rope", "--seconds=1", f"--data={data_dir}/tiny", "--block_size=9999999"])
    with pytest.raises(UsageError, match="is a folder: name a file"):
        beside.main(["rope", *SMALL, f"--out={tmp_path}"])
    assert not capsys.readouterr().out
