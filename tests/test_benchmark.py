"""What stands behind the tables: the experiments, the variants and the statistics."""

import importlib.util
import sys
import tomllib

import numpy as np
import pytest
from scripts import PYBULLET, ROOT, SCRIPTS

sys.path.insert(0, str(ROOT / "benchmark"))
report, run, variants = (importlib.import_module(name) for name in ("report", "run", "variants"))

SCRIPTS_BY_NAME = {case.script: case for case in SCRIPTS}
EXPERIMENTS = tomllib.loads((ROOT / "benchmark" / "experiments.toml").read_text())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_script_accepts_every_command_of_an_experiment(name):
    if "racecar" in name and not PYBULLET:
        pytest.skip("no pybullet")
    runs = list(run.expand(name, EXPERIMENTS[name]))
    assert len({each["run_name"] for each in runs}) == len(runs) > 0
    for each in runs:
        assert "/" not in each["run_name"] and " " not in each["run_name"]
        program, flags = each["program"], each["command"][len(each["program"]) :]
        assert each["command"][: len(program)] == program
        if len(program) > 1:
            assert program[0] == "benchmark/variants.py" and program[1] in variants.VARIANTS
        script = importlib.import_module(program[-1].removesuffix(".py"))
        assert script.parse_args(flags).seed == each["seed"]


@pytest.mark.parametrize("variant", variants.VARIANTS.values(), ids=variants.VARIANTS)
def test_a_variant_replaces_names_that_the_script_has_and_runs(variant, tmp_path):
    name = "aggrevated_bipedal" if variant is variants.no_advantage else "gail_racecar_ppo"
    if "racecar" in name and not PYBULLET:
        pytest.skip("no pybullet")
    spec = importlib.util.spec_from_file_location("variant", ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    before = dict(vars(script))
    variant(script)
    assert vars(script).keys() == before.keys()
    changed = [name for name, value in vars(script).items() if value is not before[name]]
    assert bool(changed) == (variant is not variants.as_it_is)
    argv = SCRIPTS_BY_NAME[name].argv(tmp_path / "run", "--eval-episodes", 2)
    assert script.main(argv) == 0


def test_interquartile_mean_and_its_interval():
    values = np.array([9.0, 1.0, 3.0, 5.0, 100.0, 4.0, 6.0, 2.0])
    assert report.interquartile_mean(values) == np.mean([3, 4, 5, 6])
    assert report.interquartile_mean(values[:3]) == np.mean([9, 1, 3])
    low, high = report.bootstrap_interval(values)
    assert low < report.interquartile_mean(values) < high
    assert tuple(report.bootstrap_interval(np.full(5, 7.0))) == (7, 7)


def test_medians_count_seeds_that_never_got_there():
    assert report.median([1, None, 3]) == "3"
    assert report.median([None, None, 3]) == "never"
    assert report.median([1_000, 2_000]) == "1,500"
