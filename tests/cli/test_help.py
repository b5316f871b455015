"""--help and --help-fields: their content and speed; the first word of a command."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from flax_cnns.cli import __main__ as command
from flax_cnns.cli import help
from flax_cnns.config import FIELDS
from flax_cnns.errors import UserError
from tests.tiny_runs import ROOT

# Runs in a separate process, because each command defines its flags when it is imported.
CODE = """
import contextlib, importlib, io, sys
from absl import flags
name = sys.argv[1]
module = importlib.import_module(f"flax_cnns.cli.{name}")
from flax_cnns.cli import flags as ours
sys.argv = [f"flax-cnns {name}", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    ours.main(getattr(module, name))
text = shown.getvalue()
for where, known in flags.FLAGS.flags_by_module_dict().items():
    for flag in known if where.startswith("flax_cnns.") else []:
        assert f"\\n  --{flag.name}" in text or f"\\n  --no-{flag.name}" in text, flag.name
        assert "_" not in flag.name, flag.name
assert "--verbosity" not in text
assert "jax" not in sys.modules
print(text)
"""


def test_the_page_of_every_command_has_its_examples_and_all_its_flags():
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", CODE, name],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in command.COMMANDS
    }
    for name, process in started.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.startswith(f"flax-cnns {name} "), out
        assert command.read_purpose(name) in out
        required = {
            "convert": 3,
            "predict": 0,
            "inspect": 0,
            "compare": 0,
            "evaluate": 0,
            "tabulate": 0,
            "visualize": 0,
            "search": 0,
            "fits": 0,
            "audit": 0,
        }.get(name, 1)
        assert len(re.findall(r"\sRequired\.\n", out)) == required
        assert f"\nflax-cnns {name} " in out
        assert ("--config.SECTION.FIELD=VALUE" in out) == (
            name in ("train", "ablate", "search", "visualize", "fits", "audit")
        )
        assert ("--config.pretrain.SECTION.FIELD=VALUE" in out) == (name == "finetune")


def test_a_script_of_the_repository_shows_how_it_is_started():
    started = [sys.executable, "-m", "experiments.train", "--help"]
    done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "\npython -m experiments.train --workdir=runs/digits\n" in done.stdout
    assert "flax-cnns" not in done.stdout


def test_the_table_of_fields_by_pattern():
    lines = help.make_fields_page().splitlines()
    assert {f"  --config.{path}={field.default!r}" for path, field in FIELDS.items()} <= set(lines)

    def shown(pattern):
        lines = help.make_fields_page(pattern).splitlines()
        return [line.partition("=")[0].strip() for line in lines if line.startswith("  --")]

    found = ["--config.mix.mixup"]
    assert shown("mixup") == shown("mix.mix*") == shown("--config.mix.mixup=1") == found
    assert all("decay" in name for name in shown("decay"))
    assert "--config.strategy.layer_decay" in shown("decay")
    with pytest.raises(
        UserError, match=r"no field matches 'weightdecay'; did you mean 'optimizer\.w"
    ):
        help.make_fields_page("weightdecay")


@pytest.mark.parametrize(
    ("argv", "first"),
    [
        (["--help-fields", "mixup"], "  --config.mix.mixup=0.0"),
        (["--workdir=x", "--help_fields=mixup"], "  --config.mix.mixup=0.0"),
        (["--help-fields", "--workdir=x"], "  --config.seed=0"),
        (["-h"], "flax-cnns train RUN [--FLAG=VALUE ...]"),
        (["--", "--help"], ""),
        (["help"], ""),
        (["--helpfull"], ""),  # absl's own
    ],
)
def test_what_asks_for_help(argv, first):
    found = help.find_help(["flax-cnns train", *argv], "flax_cnns.cli.train", "Doc.", "RUN")
    assert found.partition("\n")[0] == first


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "error: unknown command 'trian'; did you mean 'train'?\n"),
        ([], "error: expected a command, got none; known: ablate, audit, compare, convert,"),
    ],
)
def test_another_first_word_is_one_line(argv, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flax-cnns", *argv])
    with pytest.raises(SystemExit) as left:
        command.main()
    err = capsys.readouterr().err
    assert (left.value.code, err.count("\n")) == (2, 1)
    assert err.startswith(said)


def test_the_overview_has_a_line_for_each_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["flax-cnns", "--help"])
    command.main()
    out = capsys.readouterr().out
    assert all(f"\n  {name:9}  {command.read_purpose(name)}\n" in out for name in command.COMMANDS)


def test_a_switch_with_a_value_is_shown_as_it_is_written():
    assert help.show_switch("report", "[--join REPORT.csv...]") == "--report or --noreport"
    assert help.show_switch("join", "[--join REPORT.csv...]") == "--join REPORT.csv..."
