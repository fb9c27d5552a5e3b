"""Bad input gets one line that says what to do, exit status 2, and costs nothing that was there."""

import hashlib
import io
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import TINY, forget_text

import prepare_data
import sample
import train
from prepare_data import run_main

TRAIN = [  # flags of train.py -> what the line must say
    (["--preset=ropes"], "invalid choice: 'ropes'"),
    (["--scale=tpu"], "invalid choice: 'tpu'"),
    (["--dataset=nowhere"], "prepare_data.py"),
    (["--pattern=SSX"], "not X"),
    (["--pattern="], "use letters of"),
    (["--pattern=SSSSN"], "--n_layer=5 or more"),
    (["--batch=4"], "did you mean --batch_size?"),
    (["--maxiters=4"], "did you mean --max_iters?"),
    (["--max_iters=ten"], "invalid int value: 'ten'"),
    (["--max_iters=0"], "--max_iters=0: it must be 1 or more"),
    (["--learning_rate=nan"], "--learning_rate: nan is not a finite number"),
    (["--learning_rate=-1"], "--learning_rate=-1.0: it must be more than 0"),
    (["--min_lr=1"], "above --learning_rate"),
    (["--window=0"], "--window=0: it must be 1 or more"),
    (["--block_size=0"], "--block_size=0"),
    (["--block_size=1000000"], "too few for --block_size=1000000"),
    (["--n_head=3"], "n_head=3"),
    (["--n_head=4", "--n_kv_head=3"], "not a multiple of n_kv_head=3"),
    (["--n_embd=30", "--n_head=2"], "even, whole width"),
    (["--n_kv_head=-1"], "--n_kv_head=-1"),
    (["--rope_theta=0"], "--rope_theta=0.0: it must be more than 0"),
    (["--logit_scale=inf"], "not a finite number"),
    (["--attention=magic"], "invalid choice: 'magic'"),
    (["--attention=flash"], "needs CUDA"),
    (["--optimizer=sgd"], "invalid choice: 'sgd'"),
    (["--needle_frac=2"], "it must be 1 or less"),
    (["--beta2=1"], "--beta2=1.0"),
    (["--init_from=out/run", "--dataset=bytes", "--data_dir=data"], "is not the text, or tokens"),
    (["--needles=0"], "--needles=0"),
    (["--needle_frac=1", "--needles=50"], "cannot hold the facts"),
    (["--tasks=words", "--needle_frac=0"], "plants nothing"),
    (["--tasks=wrods"], "choose from needle, single"),
    (["--resume", "--init_from=out/x"], "choose one"),
    (["--needle_digits=40", "--needle_frac=1"], "40 digits"),
    (["--seed=-1"], "--seed=-1"),
    (["--device=cuda"], "use --device=cpu"),
    (["--device=abacus"], "use --device=cpu"),
    (["--device=meta"], "use --device=cpu"),
    (["--dataset=enwik8"], "run prepare_data.py --dataset=enwik8 --data_dir=data first"),
    (["--dtype=float8"], "invalid choice: 'float8'"),
    (["--vocab_size=100"], "drop --vocab_size"),
    (["--gradient_accumulation_steps=0"], "--gradient_accumulation_steps=0"),
    (["--resume"], "holds no run"),
    (["--init_from=nowhere"], "holds no run"),
    (["--bench=rope,ropes"], "--preset=ropes: choose from"),
    (["--bench=rope", "--bench_lengths=1k"], "--bench_lengths=1k: give numbers"),
    (["--bench=rope", "--bench_paths=magic"], "--attention=magic"),
    (["extra"], "unknown argument 'extra'"),
    (["--preset=rnop"], "rnope-swa"),
    (["--colour=red"], "--colour"),
    (["--max_iter=3"], "--max_iters"),  # an abbreviation is not guessed
    (["--max_iters=many"], "many"),
    (["--needle_frac=1.5"], "--needle_frac"),
    (["--n_layer=3"], "--n_layer=4"),
    (["--device=tpu"], "--device"),
    (["--optimizer=sgd"], "adamw"),
    (["--seed=99999999999999999999"], "or less"),
    (["--attention=flash", "--needle_frac=0"], "--attention=flash"),
    (["--bench=roep"], "rnope-swa"),
    (["--bench=rope", "--bench_paths=flash", "--bench_lengths=8"], "--attention=flash"),
    (["--bench=rope", "--bench_lengths=0"], "block_size=0"),
]
PREPARE = [
    (["--dataset=pythn"], "did you mean python?"),
    (["--dataset", "python", "enwik8"], "one known name"),
    (["--tokenizer=words"], "invalid choice: 'words'"),
    (["--dataset=fineweb10B"], "add --tokenizer=gpt2"),
    (["--val_frac=1"], "0.9 or less"),
    (["--bpe_vocab_size=10"], "258 or more"),
    (["--dataset=empty.txt"], "is empty"),
    (["--dataset=binary.bin"], "is not text"),
    (["--dataset=latin1.txt"], "is not UTF-8 text"),
    (["--dataset=missing.txt"], "check the path"),
    (["--dataset=good.txt", "--name=../up"], "cannot be a folder"),
]
SAMPLE = [
    (["nowhere"], "nowhere holds no run"),
    (["run"], "did you mean out/run?"),
    (["--out_dir=out/run"], "--help lists the flags"),
    (["--probe=smell"], "choose from loss, needle"),
    (["--max_multiple=0"], "--max_multiple=0"),
    (["--max_multiple=99999999", "--haystack=noise"], "or less"),
    (["--max_multiple=100000"], "use --max_multiple="),
    (["--top_p=2"], "--top_p=2"),
    (["--factor=1"], "--factor=1"),
    (["--tasks=needle"], "choose from single"),
    (["--haystack=nowhere"], "no dataset folder"),
    (["--questions=100"], "cannot hold the facts"),
    (["--temperature=-1"], "--temperature=-1.0"),
    (["--top_p=0"], "--top_p=0.0"),
    (["--window=0"], "--window=0"),
    (["--device=cuda"], "use --device=cpu"),
    (["--plot=nowhere/x.png"], "in a folder that exists"),
    (["--probe=loss,needel"], "needle"),
    (["--samples=0"], "--samples=0"),
    (["--seed=99999999999999999999", "--prompt=x"], "or less"),
    (["--attention=flsh"], "flash"),
    (["--attention=flash"], "--attention=flash"),
    (["--temperature=-1", "--prompt=x"], "--temperature=-1"),
    (["--promt=x"], "--prompt"),
    (["--temp=1"], "--temp"),  # an abbreviation is not guessed
    (["--device=tpu"], "--device"),
]


def ends_in_one_line(script, main, argv, told, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [script, *argv])
    with pytest.raises(SystemExit) as exit:
        run_main(main)
    err = capfd.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert len(err) == 1 and err[0].startswith(script) and told in err[0], err
    assert "Traceback" not in err[0]


def everything_in(folder):
    return {
        p.relative_to(folder): hashlib.sha256(p.read_bytes()).digest()
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture
def place(tmp_path, monkeypatch, data_dir, tiny_run):
    """A working folder with a dataset and a run, of which no bad input may change a byte."""
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.copytree(tiny_run, tmp_path / "out" / "run")
    (tmp_path / "book.txt").write_text("some text of its own\n" * 200)
    made = dict(dataset=("book.txt",), name="bytes")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "latin1.txt").write_bytes("caf\xe9 ".encode("latin1") * 100)
    (tmp_path / "good.txt").write_text("good text\n" * 100)
    monkeypatch.chdir(tmp_path)
    prepare_data.prepare(prepare_data.DataConfig(**made))
    return tmp_path


@pytest.mark.parametrize(("argv", "told"), TRAIN, ids=lambda x: " ".join(x))
def test_a_bad_flag_of_the_trainer(place, argv, told, monkeypatch, capfd):
    before = everything_in(place)
    argv = [*TINY, "--dataset=tiny", "--out_dir=new", *argv]
    ends_in_one_line("train.py", train.main, argv, told, monkeypatch, capfd)
    after = everything_in(place)
    assert {p: h for p, h in after.items() if p.parts[0] != "new"} == before
    assert not (place / "new" / "ckpt.pt").exists()


@pytest.mark.parametrize(("argv", "told"), PREPARE, ids=lambda x: " ".join(x))
def test_a_bad_flag_of_the_preparation(place, argv, told, monkeypatch, capfd):
    before = everything_in(place)
    ends_in_one_line("prepare_data.py", prepare_data.main, argv, told, monkeypatch, capfd)
    assert everything_in(place) == before


@pytest.mark.parametrize(("argv", "told"), SAMPLE, ids=lambda x: " ".join(x))
def test_a_bad_flag_of_the_probes(place, argv, told, monkeypatch, capfd):
    before = everything_in(place)
    ends_in_one_line("sample.py", sample.main, argv, told, monkeypatch, capfd)
    assert everything_in(place) == before


def test_probing_on_another_text_is_refused(place, monkeypatch, capfd):
    forget_text(place / "out" / "run", val_sha256="0" * 64)
    told = "is not the text that"
    ends_in_one_line("sample.py", sample.main, ["--probe=loss"], told, monkeypatch, capfd)


def test_running_out_of_memory_names_the_flags_to_lower(place, monkeypatch, capfd):
    def optimise(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")

    monkeypatch.setattr(train, "optimise", optimise)
    argv = [*TINY, "--dataset=tiny", "--out_dir=new"]
    ends_in_one_line("train.py", train.main, argv, "lower --batch_size", monkeypatch, capfd)


def test_token_ids_beyond_the_vocabulary_are_told(place, monkeypatch, capfd):
    ids = np.memmap(place / "data" / "tiny" / "train.bin", "uint16", "r+")
    ids[:] = 60000
    argv, told = [*TINY, "--dataset=tiny", "--out_dir=new"], "ids beyond its vocabulary"
    ends_in_one_line("train.py", train.main, argv, told, monkeypatch, capfd)


def test_an_unwritable_folder_is_told(place, monkeypatch, capfd):
    argv = [*TINY, "--dataset=tiny", "--out_dir=good.txt/run"]
    ends_in_one_line("train.py", train.main, argv, "choose another folder", monkeypatch, capfd)


def test_a_terminal_without_a_sign_gets_its_number(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    run_main(lambda argv: print("0.5 \u00b1 0.1"))
    assert out.buffer.getvalue() == b"0.5 \\xb1 0.1\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook: it cannot be told
    run_main(lambda argv: print("0.5 \u00b1 0.1"))
    assert sys.stdout.getvalue() == "0.5 \u00b1 0.1\n"


def test_a_missing_extra_is_told(place, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sample, "GPT", lambda *_: None)
    monkeypatch.setattr(sample, "load_run", lambda *_, **__: __import__("transformers"))
    told = "pip install -e '.[plot,hf]'"
    ends_in_one_line("sample.py", sample.main, ["out/run"], told, monkeypatch, capfd)


def test_a_bug_is_not_dressed_up_as_out_of_memory(monkeypatch):
    def main(argv):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        run_main(main)
