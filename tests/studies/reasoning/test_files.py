"""The study's files fit what reads them: tasks and policies exist, and the retrofit makes what the study loads."""

from pathlib import Path

import pytest

from sparsekv import yaml_file
from sparsekv.evals.problems import tasks
from sparsekv.policies.registry import describe
from sparsekv.retrofit.config import load_config
from sparsekv.studies.reasoning.config import load

ROOT = Path(__file__).parents[3]
OWN = (ROOT / "studies/reasoning.yaml", ROOT / "studies/reasoning-kinds.yaml")
STUDIES = [*OWN, *sorted((ROOT / "studies/paper").glob("*/*.yaml"))]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_studies(path: Path):
    study = yaml_file.read(path)
    assert [tasks.get(name).name for name in study["tasks"]] == study["tasks"]
    own = study["policies"]
    assert all(describe((own[name] or {}).get("policy", name) if isinstance(own, dict) else name) for name in own)
    assert len(STUDIES) == 17


def test_the_studied_tasks_are_trained_on():
    """Each difficulty lies within its family's in the training data."""
    levels = {f.family: f.levels for f in load(ROOT / "studies/reasoning-model.yaml", overrides=[]).families}
    for name in yaml_file.read(ROOT / "studies/reasoning.yaml")["tasks"]:
        family, level = name.rsplit("-", 1)
        assert min(levels[family]) <= int(level) <= max(levels[family])


@pytest.mark.parametrize("kind", ["heads", "lora", "all"])
def test_retrofits(kind: str):
    config = load_config(ROOT / f"configs/reasoning-{kind}.yaml")
    study = yaml_file.read(ROOT / "studies/reasoning.yaml")
    assert config.trainable == kind
    assert config.model == study["model"]
    assert (config.output == study["adapter"]) is (kind == "all")
    if kind == "all":
        assert study["policies"]["dms"]["model"] == f"{config.output}/model"
    compared = yaml_file.read(ROOT / "studies/reasoning-kinds.yaml")["policies"][f"dms-{kind}"]
    assert config.output == compared["adapter"]
    assert config.length >= load(ROOT / "studies/reasoning-model.yaml", overrides=[]).length
