"""What the README says is what the code does."""

import functools
import re
import shlex
import shutil
import subprocess

import pytest
from conftest import ROOT, TINY

import prepare_data
import sample
import train
from model import LAYERS, PRESETS, ModelConfig
from prepare_data import DataConfig, parse_flags
from sample import SampleConfig
from train import TrainConfig

README = (ROOT / "README.md").read_text()


def written_out(block):
    """A block of commands with its loops and braces as bash expands them, the first seed only."""
    if "for " not in block:
        return block
    tell = "python() { printf python; printf ' %q' \"$@\"; echo; }\n"
    told = subprocess.run(["bash", "-c", tell + block], capture_output=True, text=True, check=True)
    return "\n".join(x for x in told.stdout.splitlines() if not re.search(r"--seed=[^1]", x))


COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in re.split(r"\n|&&", written_out(block))
]
SCRIPTS = {"train.py": train, "sample.py": sample, "prepare_data.py": prepare_data}
CONFIGS = {
    "train.py": [TrainConfig, ModelConfig], "sample.py": [SampleConfig],
    "prepare_data.py": [DataConfig],
}  # fmt: skip


def script_and_flags(command):
    script, flags = re.search(r"(\w+\.py)(.*)", command).groups()
    return script, shlex.split(flags)


def test_the_table_of_variants_is_the_presets():
    rows = re.findall(r"^\| `([\w-]+)` \| `(.*?)` \|", README, re.M)
    said = {name: dict(pair.split("=") for pair in flags.split()) for name, flags in rows}
    assert said == {
        name: {key: str(value) for key, value in flags.items()} for name, flags in PRESETS.items()
    }


def test_every_letter_is_explained():
    assert set(re.findall(r"\*\*([A-Z])\*\*", README)) == set(LAYERS)


def test_every_flag_the_readme_names_exists():
    known = {name for configs in CONFIGS.values() for c in configs for name in c.__annotations__}
    named = set(re.findall(r"--(\w+)", README)) - {"help", "standalone", "nproc_per_node"}
    assert len(named) > 20 and named <= known


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py" in c])
def test_a_command_of_the_readme_is_understood(command):
    script, flags = script_and_flags(command)
    given = parse_flags(CONFIGS[script], flags)
    assert set(given) <= {name for c in CONFIGS[script] for name in c.__annotations__}
    if script == "prepare_data.py":
        prepare_data.check_config(DataConfig(**given))


USAGE = re.findall(r"^ {4}python (train\.py.*?)(?: +#.*)?$", train.__doc__, re.M)


@pytest.mark.parametrize(
    "command", [*USAGE, *(c for c in COMMANDS if c.startswith("python train.py"))]
)
def test_the_flags_of_a_training_command_fit_the_scale_of_a_gpu(command):
    given = parse_flags(CONFIGS["train.py"], script_and_flags(command)[1])
    base = ModelConfig() if "init_from" in given else None
    given["preset"] = given.get("preset", given.get("bench", "rnope-swa").split(",")[0])
    cfg, model = train.settle(given | dict(scale="gpu"), base)
    assert cfg.scale == "gpu" and model.block_size == 1024


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith(("python train.py", "python sample.py"))]
)
def test_a_command_of_the_readme_runs(command, tmp_path, monkeypatch, data_dir, tiny_run, capsys):
    shutil.copytree(data_dir, tmp_path / "data")
    used = re.findall(r"(?<!--out_dir=)out/([\w-]+)", command) or ["rnope-swa"]
    for name in used if "sample" in command or "init_from" in command else ():
        shutil.copytree(tiny_run, tmp_path / "out" / name)
    monkeypatch.chdir(tmp_path)
    fast = functools.partial(train.time_steps, seconds=0)
    monkeypatch.setattr(train, "time_steps", fast)
    script, flags = script_and_flags(command)
    small = ["--max_multiple=2", "--samples=2", "--max_new_tokens=3", "--cost_rows=1"]
    small += ["--questions=1"]  # a row of the tiny run has room for one, if it is short
    small += ["--probe=loss"] if "held_out" in command else []
    if script == "train.py":
        small = [*TINY, "--dataset=tiny", "--data_dir=data", "--max_iters=2"]
        small += ["--n_layer=8"] if "SSSSSSSN" in command else []
        small += ["--bench_lengths=64"] if "bench" in command else []
        small += ["--long_rows=128"] if "long_rows" in command else []
    small += ["--tasks=single"] if "ruler" in command or "tasks" in command else []
    SCRIPTS[script].main([*flags, *small])
    assert capsys.readouterr().out
