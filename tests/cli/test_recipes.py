"""Config files by name and by path; an installed wheel in another project."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import sys
import tomllib

import pytest

from flax_cnns import recipes
from flax_cnns.errors import UserError
from flax_cnns.studies.ablation.plan import load_sweep
from tests.tiny_runs import ROOT


def test_a_recipe_is_found_from_any_folder_by_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits_lenet5", "digits_lenet5.py", "configs/digits_lenet5.py"):
        assert recipes.find(name) == str(ROOT / "configs/digits_lenet5.py")
    nested = str(ROOT / "configs/ablations/regularizers.py")
    assert recipes.find("ablations/regularizers") == nested
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/digits_lenet5.py").touch()
    # A file in the current folder comes before a recipe.
    assert recipes.find("configs/digits_lenet5") == "configs/digits_lenet5.py"
    assert recipes.find("digits_lenet5") == str(ROOT / "configs/digits_lenet5.py")
    (tmp_path / "mine.py").touch()
    assert recipes.find("mine") == recipes.find("mine.py") == "mine.py"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("regularizers", "did you mean 'ablations/regularizers'"),
        ("configs/digits_lenet6.py", "did you mean 'digits_lenet5'"),
        ("./configs/digits_lenet5", "did you mean 'digits_lenet5'"),
        ("mime.py", "did you mean 'mine'"),
        ("/nowhere/x.py", "known: "),
        ("configs", "known: "),  # a folder
        ("../configs/common", ""),
    ],
)
def test_a_name_without_a_file_has_its_near_miss(tmp_path, monkeypatch, name, near):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    (tmp_path / "configs").mkdir()
    with pytest.raises(UserError) as told:
        recipes.find(name)
    assert str(told.value).startswith(f"there is no file or recipe {name!r}; ")
    assert near in str(told.value)


def test_recipes_are_loaded_as_one_package_and_own_files_alone(tmp_path):
    module = recipes.load(ROOT / "configs/ablations/regularizers.py")
    assert module.__name__ == "flax_cnns.recipes.ablations.regularizers"
    assert module.common.__name__ == "flax_cnns.recipes.common"
    assert load_sweep(module.__file__) == list(module.sweep())
    file = tmp_path / "mine.py"
    file.write_text("from flax_cnns.recipes import common\nget_config = common.get_config\n")
    assert recipes.load(file).get_config() == module.common.get_config()
    file.write_text("from . import common\n")
    with pytest.raises(UserError, match="in a copy of a recipe, write `from flax_cnns"):
        recipes.load(file)


def install(site):
    """Copies what pyproject.toml puts into a wheel. .ci/wheel builds and installs a real one."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        wheel = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]
    leave = [pattern.removeprefix("/") for pattern in wheel["exclude"]]
    for top in wheel["only-include"]:
        for path in (ROOT / top).rglob("*"):
            name = path.relative_to(ROOT).as_posix()
            if path.is_dir() or "__pycache__" in name:
                continue
            if not any(fnmatch.fnmatch(name, pattern) for pattern in leave):
                to = site / name.replace(top, wheel["sources"].get(top, top), 1)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to)


def test_the_wheel_is_one_package_with_the_recipes(tmp_path):
    install(tmp_path / "site")
    assert os.listdir(tmp_path / "site") == ["flax_cnns"]
    assert (tmp_path / "site/flax_cnns/py.typed").is_file()
    code = (
        "from flax_cnns import recipes; print(recipes.FOLDER, *recipes.list_recipes())\n"
        "for name in recipes.list_recipes():\n"
        "    if 'common' not in name: recipes.load(recipes.find(name)).get_config('smoke')"
    )
    done = start(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    folder, *names = done.stdout.split()
    assert folder == str(tmp_path / "site/flax_cnns/recipes")
    assert names == recipes.list_recipes()


@pytest.mark.slow
def test_an_installed_package_plans_an_ablation_in_an_empty_folder(tmp_path):
    """Planning times some steps of a recipe. .ci/wheel trains with an installed wheel."""
    install(tmp_path / "site")
    flags = ["--config=configs/ablations/regularizers.py:smoke", "--workdir=study", "--dry-run"]
    done = start(tmp_path, "-m", "flax_cnns.cli", "ablate", *flags, "--rows=cutout")
    assert done.returncode == 0, done.stderr
    assert "cutout" in done.stdout


def start(folder, *command):
    """Starts a process in an empty folder, with foreign packages `configs` and `experiments`."""
    for name in ("others/configs", "others/experiments", "empty"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("configs", "experiments"):
        (folder / f"others/{name}/__init__.py").write_text("raise ImportError('not ours')\n")
    path = os.pathsep.join([str(folder / "others"), str(folder / "site")])
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder / "empty",
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
