import re
import subprocess

import yaml

from tests.infra.files import DOCKERFILE, INFRA, ROOT, VERSION, linter


def test_dockerfile__has_a_cpu_and_a_gpu_target_on_one_base():
    stages = dict(re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE))
    by_name = {name: base for base, name in re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)}
    assert by_name["cpu"] == by_name["gpu"] == "base"
    assert all(":" in base or base in by_name for base in stages)


def test_dockerfile__ends_every_target_without_root():
    for target in ("cpu", "gpu"):
        stage = re.split(r"^FROM ", DOCKERFILE.split(f" AS {target}\n")[1], flags=re.MULTILINE)[0]
        assert re.findall(r"^USER (\S+)$", stage, re.MULTILINE) == ["1000"]


def test_dockerfile__passes_hadolint():
    checked = subprocess.run([linter("hadolint"), INFRA / "Dockerfile"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_dockerfile__gets_from_the_context_what_the_wheel_is_made_of():
    context = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"LICENSE", "README.md", "pyproject.toml", "neuronlens", "pipeline", "jobs", "sql"} <= context
    assert all((ROOT / path).exists() for path in context)


def test_images__carry_this_version_everywhere():
    for path in ("ray/cluster.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "kuberay/rayservice.yaml"):
        images = set(re.findall(r"registry\.example\.com/\S+", yaml.safe_dump(yaml.safe_load((INFRA / path).open()))))
        assert images == {f"registry.example.com/neuronlens:{VERSION}-{target}" for target in ("cpu", "gpu")}


def test_images__have_the_packages_of_every_job_and_of_the_server():
    for installed in re.findall(r"\[([\w,]+)\]\" \"ray\[([\w,]+)\]", DOCKERFILE):
        assert {"cluster", "deploy", "finetune", "probe", "s3", "serve"} == set(installed[0].split(","))
        assert {"default", "serve"} == set(installed[1].split(","))
