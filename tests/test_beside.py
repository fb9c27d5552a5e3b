import importlib.util
import json
import sys

import pytest
from conftest import ROOT, TINY

import model
from model import UsageError

spec = importlib.util.spec_from_file_location("beside", ROOT / "results" / "beside.py")
beside = importlib.util.module_from_spec(spec)
spec.loader.exec_module(beside)


def test_models_are_timed_one_after_another_and_the_numbers_kept(tmp_path, capsys):
    out = tmp_path / "found.json"
    beside.main(["rope", "swa", *TINY, "--vocab_size=320", "--steps=2", f"--out={out}"])
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["rope", "swa"]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(4 * 64 / row["step_ms"] * 1e3)
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == [
        "rope", "swa"]  # fmt: skip


def test_a_model_trained_for_longer_scores_better(data_dir, tmp_path):
    flags = [*TINY, "--vocab_size=448", "--dataset=tiny", f"--data_dir={data_dir}",
             "--score_rows=8", "--needle_frac=0"]  # fmt: skip
    bits = []
    for seconds in ("0.01", "3"):
        out = tmp_path / seconds
        beside.main(["rope", *flags, f"--seconds={seconds}", f"--out={out}"])
        (row,) = json.loads(out.read_text())["rows"]
        assert row["seconds"] > 0.9 * float(seconds) and row["tokens"] == row["steps"] * 4 * 64
        bits.append(row["bits_per_byte"])
    assert bits[1] < 0.8 * bits[0]


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
    flags = [*TINY, "--vocab_size=320", "--steps=1", f"--peers={tmp_path}"]
    beside.main(["nanogpt", "rope", *flags])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0]["parameters"] == 320 * 320 != rows[1]["parameters"]
    assert sys.modules["model"] is model


def test_what_is_missing_is_said(tmp_path):
    for name in ("nanogpt", "nanochat"):
        with pytest.raises(UsageError, match="git clone https://github.com/karpathy/nano"):
            beside.main([name, *TINY, "--vocab_size=320", f"--peers={tmp_path}"])
    with pytest.raises(UsageError, match="name models to compare, of nanogpt"):
        beside.main(["gpt5"])
