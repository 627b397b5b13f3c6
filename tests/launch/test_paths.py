"""Settings that name local files mean the same on every node, wherever the command was given.

python -m pytest tests/launch/test_paths.py
"""

from launch import paths, train
from sivae import config

GIVEN = [
    "run.directory=~/runs/x", "run.init_from=base", "data.url=sets/a", "evaluate.data=s3://bucket/b", "evaluate.lpips=nets/l.pt",
    "evaluate.detectors.mine=nets/m.pt#sha256=00", "data.cache_dir=/tmp/cache",
]  # fmt: skip


def test_every_setting_that_may_be_a_path_is_known():
    """By the schema: all free text but the names of splits. Models and objectives have none."""
    found = {
        f"{section}.{name}"
        for section, field in config.Config.model_fields.items()
        for name, setting in getattr(field.annotation, "model_fields", {}).items()
        if setting.annotation in (str, str | None)
    }
    assert found - {"data.split", "evaluate.split"} == {*paths.SETTINGS}


def test_workers_get_the_paths_of_the_one_who_starts_them(tmp_path, monkeypatch):
    file = f"{config.__path__[0]}/../../configs/digits.yaml"
    options = train.build_parser().parse_intermixed_args([file, *GIVEN])
    monkeypatch.chdir(tmp_path)
    settings = train.load(options)
    assert paths.of(settings) == {
        "run.directory": "~/runs/x",  # of the node where it is read, as Folder does
        "run.init_from": f"{tmp_path}/base", "data.url": f"{tmp_path}/sets/a", "data.cache_dir": "/tmp/cache",
        "evaluate.data": "s3://bucket/b", "evaluate.lpips": f"{tmp_path}/nets/l.pt",
        "evaluate.detectors.mine": f"{tmp_path}/nets/m.pt#sha256=00",
    }  # fmt: skip
    same = config.load(file, GIVEN)
    assert settings.model_dump(exclude={"run", "data", "evaluate"}) == same.model_dump(
        exclude={"run", "data", "evaluate"}
    )
    assert settings.evaluate.metrics == same.evaluate.metrics and settings.run.seed == same.run.seed
