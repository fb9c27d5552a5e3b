"""Bad input gets one line that says what to do and exit status 2. It changes no file."""

import os
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch

import prepare_data
import train
from model import ModelConfig, UsageError

# Flags after those of a tiny run -> what the line must say.
TRAIN = [
    (["--preset=ropes"], "invalid choice: 'ropes' (choose from"),
    (["--scale=tpu"], "--scale"),
    (["--pattern=SSX"], "pattern 'SSX': use letters of R, N, S, W, C"),
    (["--pattern="], "use letters of"),
    (["--pattern=SSSSN"], "use --n_layer=5 or more"),
    (["--n_head=3"], "n_head=3"),
    (["--n_head=4", "--n_kv_head=3"], "not a multiple of n_kv_head=3"),
    (["--n_embd=30"], "even, whole width"),
    (["--window=0"], "--window=0: it must be 1 or more"),
    (["--rope_theta=0"], "--rope_theta=0.0: it must be"),
    (["--vocab_size=100"], "with the model's tokenizer, or raise --vocab_size"),
    (["--attention=flash"], "--attention=flash needs an NVIDIA GPU"),
    (["--attention=magic"], "'magic'"),
    (["--batch=4"], "did you mean --batch_size?"),
    (["--max_iter=4"], "did you mean --max_iters?"),  # an abbreviation is not guessed
    (["--colour=red"], "--help lists the flags"),
    (["extra"], "unknown argument 'extra'"),
    (["--max_iters=ten"], "invalid int value: 'ten'"),
    (["--max_iters=0"], "--max_iters=0: it must be 1 or more"),
    (["--learning_rate=-1"], "--learning_rate=-1.0: it must be 0 or more"),
    (["--learning_rate=nan"], "--learning_rate"),
    (["--min_lr=1"], "--min_lr=1.0: above --learning_rate"),
    (["--beta2=1"], "--beta2=1.0: it must be 0.9999 or less"),
    (["--seed=-1"], "--seed=-1: it must be 0 or more"),
    (["--seed=99999999999"], "or less"),
    (["--optimizer=sgd"], "(choose from"),
    (["--repeat_frac=1.5"], "--repeat_frac=1.5: it must be 0.9 or less"),
    (["--shortest_span=200"], "--shortest_span=200: above --longest_span=192"),
    (["--long_rows=100"], "--long_rows=100: it must be a multiple of --block_size=64 that"),
    (["--long_rows=32"], "--long_rows=32: it must be a multiple of --block_size=64"),
    (["--long_rows=192"], "--batch_size=4 times 64"),
    (["--batch_size=1", "--long_rows=128"], "divides the 64 tokens of a micro-batch"),
    (["--batch_size=65536", "--long_rows=1048576"], "too few for --long_rows=1048576"),
    (["--block_size=1000000"], "too few for --block_size=1000000"),
    (["--dataset=nowhere"], "prepare_data.py"),
    (["--dataset=shakespeare", "--data_dir=new"], "--dataset=shakespeare --data_dir=new"),
    (["--init_from=nowhere"], "there is no nowhere/ckpt.pt: nowhere is no run, or one that"),
    (["--init_from=out/run", "--resume"], "drop it"),
    (["--init_from=out/run", "--n_embd=64"], "the weights of out/run do not fit"),
    (["--out_dir=out/run"], "holds a run or a model: name another --out_dir"),
    (["--out_dir=good.txt/run"], "good.txt"),
    (["--device=abacus"], "use --device=cpu"),
    (["--device=cuda:99"], "use --device=cpu"),
    (["--device=meta"], "use --device=cpu"),
    (["--dtype=float8"], "'float8'"),
]

PREPARE = [
    (["--dataset=pythn"], "none of python, shakespeare"),
    (["--dataset=missing.txt"], "missing.txt is no file"),
    (["--dataset", "python", "good.txt"], "python is a dataset of its own"),
    (["--dataset=empty.txt"], "empty.txt is empty"),
    (["--dataset=binary.bin"], "binary.bin is not text"),
    (["--dataset=latin1.txt"], "save it as UTF-8"),
    (["--dataset=fineweb10B"], "add --tokenizer=gpt2"),
    (["--dataset=good.txt", "--name=../up"], "cannot be a folder"),
    (["--dataset=good.txt", "--name=tiny"], "has other settings: use another --name"),
    (["--tokenizer=words"], "--tokenizer=words: choose byte or gpt2"),
    (["--val_frac=1"], "--val_frac=1.0: it must be 0.5 or less"),
    (["--tokeniser=byte"], "did you mean --tokenizer?"),
]

# Flags of sample.py; its run is out/run.
SAMPLE = [
    (["out/run", "--temperature=inf"], "--temperature=inf: it must be"),
    (["out/run", "--top_p=nan"], "--top_p=nan: it must be"),
    (["out/run", "--rope_theta=nan"], "--rope_theta=nan: it must be"),
    (["nowhere"], "there is no nowhere/ckpt.pt: nowhere is no run, or one that has saved nothing "
     "yet. Runs here: out/run"),
    (["out/run", "out/run/"], "a run is named twice"),
    (["out/run"], "use fewer --needles or --digits"),  # its rows are 64 tokens long
    (["out/run", "--probe=speed"], "choose from loss, copy, needle, heatmap, attention"),
    (["out/run", "--max_multiple=99999"], "the text is too short: use --max_multiple="),
    (["out/run", "--max_multiple=0"], "--max_multiple=0: it must be 1 or more"),
    (["out/run", "--factor=1"], "--factor=1: it must be 2 or more"),
    (["out/run", "--digits=19"], "--digits=19: it must be 18 or less"),
    (["out/run", "--seed=-1"], "--seed=-1: it must be 0 or more"),
    (["out/run", "--top_p=2"], "--top_p=2.0: it must be 1 or less"),
    (["out/run", "--temperature=-1"], "--temperature=-1.0: it must be 0 or more"),
    (["out/run", "--text=nowhere"], "nowhere is no file, no folder"),
    (["out/run", "--text=tiny"], "was trained on it"),
    (["out/run", "--plot=x.nonsense"], "name a .png, .pdf or .svg file"),
    (["out/run", "--window=0"], "--window=0: it must be 1 or more"),
    (["out/run", "--attention=magic"], "magic"),
    (["out/run", "--device=abacus"], "use --device=cpu"),
    (["out/run", "--dtype=float16"], "'float16'"),
    (["out/run", "--prompt=FILE:missing.txt"], "missing.txt"),
    (["out/run", "--prompts=def"], "did you mean --prompt?"),
]

CASES = [
    *[("prepare_data.py", argv, told) for argv, told in PREPARE],
    *[("sample.py", argv, told) for argv, told in SAMPLE],
]


@pytest.fixture
def place(tmp_path, monkeypatch, data_dir, tiny_run):
    """A working folder with the dataset data/tiny, the run out/run, and texts good and bad."""
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.copytree(tiny_run, tmp_path / "out" / "run")
    (tmp_path / "good.txt").write_text("good text\n" * 100)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(bytes(range(128)))
    (tmp_path / "latin1.txt").write_bytes("caf\xe9 ".encode("latin1") * 100)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def flags(tiny_flags):
    return [*tiny_flags("new"), "--data_dir=data"]


@pytest.fixture
def ends_in_one_line(place, as_script):
    """ends_in_one_line(script, argv, told): it does, and no file has changed."""

    def check(script, argv, told):
        before = everything_in(place)
        status, _, err = as_script(script, argv)
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith(f"{script}: ")
        assert told in lines[0]
        assert status == 2
        assert everything_in(place) == before

    return check


def words(value):
    return value if isinstance(value, str) else " ".join(value)


def everything_in(folder):
    paths = sorted(folder.rglob("*"))
    return [(path, path.is_file() and path.read_bytes()) for path in paths]


@pytest.mark.parametrize(("argv", "told"), TRAIN, ids=words)
def test_bad_flags_of_train(ends_in_one_line, flags, argv, told):
    ends_in_one_line("train.py", [*flags, *argv], told)


@pytest.mark.parametrize(("script", "argv", "told"), CASES, ids=words)
def test_bad_flags_of_the_other_scripts(ends_in_one_line, script, argv, told):
    ends_in_one_line(script, argv, told)


def test_a_bare_resume_without_a_run_is_told(ends_in_one_line, place):
    shutil.rmtree(place / "out")
    ends_in_one_line("train.py", ["--resume"], "no run in out/: train one with python train.py")


def test_a_world_without_a_rank_is_told(ends_in_one_line, flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    told = "WORLD_SIZE=2 is set without RANK, LOCAL_RANK, MASTER_ADDR: start with torchrun"
    ends_in_one_line("train.py", flags, told)


@pytest.mark.parametrize("config", [ModelConfig, train.TrainConfig, prepare_data.DataConfig])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_flag_takes_nan_or_infinity(config, value):
    names = [flag.name for flag in fields(config) if flag.type is float]
    assert names
    for name in names:
        with pytest.raises(UsageError, match=f"--{name}={value}: it must be"):
            prepare_data.check_ranges(config(**{name: value}))


# ---- Files that are not what they should be -----------------------------------------------------


def of_another_version(path):
    state = torch.load(path, weights_only=True)
    state["model_config"]["dropout"] = 0.1
    torch.save(state, path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a list": lambda path: torch.save([1, 2], path),
    "nanoGPT's": lambda path: torch.save(dict(model={}, model_args={}, iter_num=0), path),
    "another version's": of_another_version,
    "a program": lambda path: torch.save(dict(model=Evil()), path),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_told(ends_in_one_line, place, damage):
    DAMAGE[damage](place / "out" / "run" / "ckpt.pt")
    told = "there is no out/run/ckpt.pt" if damage == "missing" else "out/run/ckpt.pt is not"
    ends_in_one_line("train.py", ["--resume", "--out_dir=out/run"], told)
    ends_in_one_line("train.py", ["--init_from=out/run"], told)
    with pytest.raises(UsageError, match=r"ckpt\.pt"):
        train.load_run(place / "out" / "run")


def test_a_damaged_dataset_is_told(ends_in_one_line, place, flags):
    with open(place / "data" / "tiny" / "val.bin", "ab") as file:
        file.write(b"12")
    ends_in_one_line("train.py", flags, "is broken")


def test_token_ids_beyond_the_vocabulary_are_told(place, as_script, flags):
    ids = np.memmap(place / "data" / "tiny" / "train.bin", "uint16", "r+")
    ids[:] = 60000
    status, _, err = as_script("train.py", flags)
    assert status == 2
    assert "ids beyond its vocabulary" in err
    assert err.count("\n") == 1


# ---- How a script ends --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 80 GiB"), 2, "lower --batch_size"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (UsageError("several\nlines"), 2, "train.py: several lines"),
        (ImportError("No module named 'matplotlib'"), 2, "pip install -e '.[plot,hf]'"),
        (OSError(28, "No space left on device"), 2, "No space left"),
    ],
    ids=repr,
)
def test_what_the_user_can_put_right_is_one_line(as_script, monkeypatch, error, status, told):
    def main(argv):
        raise error

    monkeypatch.setattr(train, "main", main)
    found, _, err = as_script("train.py", [])
    assert found == status
    assert told in err
    assert err.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    def main(argv):
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="multiplied"):
        prepare_data.run_main(main)
