"""The files of cluster/ are what Ray, KubeRay, Slurm and bash accept, and every command and path in them exists.

SIVAE_KUBERAY_SCHEMAS=../shared/schemas pytest tests/launch/test_cluster_files.py
"""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from launch import submit, sweep, sweep_spec, train
from launch.run import parse_workers, sizes
from tests.processes import ROOT

CLUSTER = ROOT / "cluster"
LAUNCHER_FILES = ["local.yaml", "onprem.yaml", "aws.yaml", "gcp.yaml"]
KUBERAY = {"raycluster.yaml": "raycluster.v1.schema.json", "rayjob.yaml": "rayjob.v1.schema.json"}
TEXTS = sorted(p for p in [*CLUSTER.rglob("*"), ROOT / "README.md"] if p.is_file() and "__pycache__" not in p.parts)


def validate_launcher(tree: dict) -> dict:
    """As `ray up` does before it touches anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(tree))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_ray_accepts_the_launcher_files(name):
    tree = yaml.safe_load((CLUSTER / name).read_text())
    prepared = validate_launcher(tree)
    assert prepared["head_node_type"] in prepared["available_node_types"]
    with pytest.raises(Exception, match="colour"):
        validate_launcher(tree | {"colour": "red"})
    start = " ".join(tree["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and "--disable-usage-stats" in start
    for command in re.findall(
        r"ray start[^;|&]*", " ".join(tree["head_start_ray_commands"] + tree["worker_start_ray_commands"])
    ):
        assert_ray_start_accepts(command)


def test_clouds_have_gpu_workers_on_spot_machines_that_scale():
    for name in ("aws.yaml", "gcp.yaml"):
        tree = yaml.safe_load((CLUSTER / name).read_text())
        gpu = tree["available_node_types"]["gpu"]
        assert gpu["resources"]["GPU"] == 8 and gpu["min_workers"] == 0 < gpu["max_workers"] <= tree["max_workers"]
        assert "spot" in json.dumps(gpu["node_config"]).lower()


def assert_ray_start_accepts(command: str) -> None:
    """Every option of a `ray start` is one that this version knows."""
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts + parameter.secondary_opts}
    for word in command.split():
        if word.startswith("--"):
            assert word.partition("=")[0] in known, word


def strict(schema: dict) -> dict:
    """The same schema, where an object takes no other keys than those named: an operator would drop them in silence."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if isinstance(schema.get("properties"), dict):
        result["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    return result


@pytest.fixture
def kuberay_errors():
    folder = os.environ.get("SIVAE_KUBERAY_SCHEMAS")
    if not folder:
        pytest.skip("needs SIVAE_KUBERAY_SCHEMAS, the folder with KubeRay's schemas of RayCluster and RayJob")
    import jsonschema

    def errors(name: str, tree: dict) -> list[str]:
        schema = strict(json.loads((Path(folder) / KUBERAY[name]).read_text()))
        schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
        return [
            f"{'.'.join(map(str, e.path))}: {e.message}" for e in jsonschema.Draft7Validator(schema).iter_errors(tree)
        ]

    return errors


@pytest.mark.parametrize("name", list(KUBERAY))
def test_kuberay_accepts_the_manifests(kuberay_errors, name):
    tree = yaml.safe_load((CLUSTER / name).read_text())
    assert kuberay_errors(name, tree) == []
    # The check sees a misspelt key and a wrong type, at the top and deep inside.
    for change in (
        lambda spec: spec.update(rayVersio="2"),
        lambda spec: spec["workerGroupSpecs"][0].update(minReplica=1),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0].update(imagePullPolice="x"),
        lambda spec: spec["workerGroupSpecs"][0].update(maxReplicas="two"),
    ):
        broken = copy.deepcopy(tree)
        change(cluster_spec(broken))
        assert kuberay_errors(name, broken)


def cluster_spec(tree: dict) -> dict:
    return tree["spec"].get("rayClusterSpec", tree["spec"])


@pytest.mark.parametrize("name", list(KUBERAY))
def test_manifests_have_gpus_shared_memory_autoscaling_and_secrets_by_reference(name):
    tree = yaml.safe_load((CLUSTER / name).read_text())
    spec = cluster_spec(tree)
    group = spec["workerGroupSpecs"][0]
    pod = group["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8" == group["rayStartParams"]["num-gpus"]
    (shm,) = [
        v
        for v in pod["volumes"]
        if any(m["mountPath"] == "/dev/shm" and m["name"] == v["name"] for m in container["volumeMounts"])
    ]
    assert shm["emptyDir"]["medium"] == "Memory" and int(shm["emptyDir"]["sizeLimit"].removesuffix("Gi")) >= 64
    assert spec["enableInTreeAutoscaling"] and group["minReplicas"] < group["maxReplicas"]
    assert container["envFrom"][0]["secretRef"] and "AWS_" not in json.dumps(tree)
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP" and spec["authOptions"]["mode"] == "token"
    versions = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert spec["rayVersion"] == versions["ray"]


def test_job_and_cluster_describe_the_same_cluster():
    job, own = (yaml.safe_load((CLUSTER / name).read_text()) for name in ("rayjob.yaml", "raycluster.yaml"))
    assert job["spec"]["rayClusterSpec"] == own["spec"]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck: apt-get install shellcheck")
def test_shellcheck():
    scripts = [
        str(p.relative_to(ROOT)) for p in [*CLUSTER.rglob("*.sh"), *CLUSTER.rglob("*.sbatch"), ROOT / ".ci" / "run"]
    ]
    assert len(scripts) >= 6
    done = subprocess.run(["shellcheck", "-x", "-P", ".", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def commands(text: str, start: str) -> list[list[str]]:
    """The commands that begin so, over continued and folded lines, without the comment sign before them."""
    text = re.sub(r"\\\n\s*#?\s*", " ", text)
    found = []
    for match in re.finditer(rf"{re.escape(start)}([^\n`]*)", text):
        line = re.split(r"\s{3,}|\s#|;|&&", match[1])[0]
        found.append(shlex.split(line.replace("...", "")))
    return found


def entrypoints() -> list[list[str]]:
    tree = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())
    return [shlex.split(tree["spec"]["entrypoint"])[3:]]


def known_config(arguments: list[str]) -> list[str]:
    """The same arguments with paths as they are in this checkout, and names to fill in filled in."""
    values = {"CONFIG": "configs/digits.yaml", "N": "4"}
    return [values.get(a, a).replace("/opt/sivae/", "").replace("BUCKET", "bucket") for a in arguments]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_are_accepted(path, monkeypatch):
    """Every launch.train, launch.submit and launch.sweep that a file names: its options exist, its settings are valid, and all
    its numbers of workers can share the batch."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    text = path.read_text()
    folded = entrypoints() if path.name == "rayjob.yaml" else []
    for arguments in folded or [a for a in commands(text, "python -m launch.train ") if "$@" not in a and a]:
        options = train.build_parser().parse_intermixed_args(known_config(arguments))
        settings = train.check(options)
        if options.config.startswith("configs/ffhq"):
            workers = parse_workers(options.workers)
            assert {workers[0], workers[-1]} <= set(sizes(settings, workers)), options.workers
    for arguments in commands(text, "python -m launch.submit "):
        if not arguments or "|" in arguments[0]:
            continue
        options = submit.build_parser().parse_intermixed_args(known_config(arguments))
        if options.what not in submit.COMMANDS:
            assert submit.command(options)
    for arguments in commands(text, "python -m launch.sweep "):
        options = sweep.build_parser().parse_intermixed_args(known_config(arguments))
        if "NAME" not in options.sweep:
            assert sweep_spec.load(options.sweep, options.overrides)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_paths_exist(path):
    for name in re.findall(
        r"(?<![\w/.])((?:cluster|configs|launch|docs|benchmarks|tests)/[\w./-]+\w)", path.read_text()
    ):
        assert (ROOT / name).exists(), name


def test_dockerfile_copies_what_there_is():
    text = (CLUSTER / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    extras = re.search(r'"\.\[([\w,]+)\]"', text)[1].split(",")
    setup = (ROOT / "setup.cfg").read_text()
    assert all(re.search(rf"^{extra} =$", setup, re.MULTILINE) for extra in extras)


@pytest.mark.parametrize("script", ["torchrun.sbatch", "ray.sbatch"])
def test_sbatch_scripts_save_before_the_limit_and_requeue(script):
    text = (CLUSTER / "slurm" / script).read_text()
    assert "#SBATCH --requeue" in text and "#SBATCH --signal=B:USR1@" in text and "#SBATCH --open-mode=append" in text
    for command in re.findall(r"ray\.scripts\.scripts (start(?:[^\n\\]|\\\n)*)", text):
        assert_ray_start_accepts(command.replace("\\\n", " ").replace('"${slots[@]}"', ""))
    # Every variable that it heeds stands in its header.
    heeded = set(re.findall(r"\$\{(SIVAE_\w+):-", text + (CLUSTER / "slurm" / "common.sh").read_text()))
    for name in heeded - {"SIVAE_SLURM_DIR"}:
        assert re.search(rf"^# {name} +\w", text, re.MULTILINE), name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_slurm_jobs_ask_for_cores(path):
    """A job that does not has one on each node."""
    for arguments in commands(path.read_text(), "sbatch --"):
        assert any(a.startswith(("--exclusive", "--cpus-per-task=")) for a in arguments), arguments
