"""The manifests of cluster/: valid by KubeRay's own schemas, and locked: a token everywhere, no port in the open."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

from jobs.recipes import CURATE, NIGHTLY, TRAIN

CLUSTER = Path(__file__).parents[2] / "cluster"
FILES = sorted((CLUSTER / "kuberay").glob("*.yaml"))
SCHEMAS = json.loads((Path(__file__).parents[1] / "schemas" / "kuberay.json").read_text())
OTHER_KINDS = {
    "PersistentVolumeClaim": ("v1", {"accessModes", "resources"}),
    "NetworkPolicy": ("networking.k8s.io/v1", {"podSelector", "policyTypes", "ingress"}),
    "CronJob": (
        "batch/v1",
        {
            *("schedule", "timeZone", "concurrencyPolicy", "startingDeadlineSeconds", "jobTemplate"),
            *("successfulJobsHistoryLimit", "failedJobsHistoryLimit"),
        },
    ),
    "ServiceAccount": ("v1", set()),
    "ConfigMap": ("v1", set()),
    "Role": ("rbac.authorization.k8s.io/v1", set()),
    "RoleBinding": ("rbac.authorization.k8s.io/v1", set()),
}
"""Kinds of Kubernetes itself: apiVersion, and what we use of their spec."""


def _load_render() -> Any:
    spec = importlib.util.spec_from_file_location("render", CLUSTER / "render.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = _load_render()


def manifests() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every manifest of every file, and the RayJob in the ConfigMap, as Kubernetes gets them."""
    for path in FILES:
        for manifest in yaml.safe_load_all(render.dump(render.render(path))):
            yield path.name, manifest
            for text in manifest.get("data", {}).values():
                yield f"{path.name}, its ConfigMap", yaml.safe_load(text)


MANIFESTS = list(manifests())


def below(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a manifest."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from below(part)


def check(manifest: dict[str, Any]) -> None:
    schema = {**SCHEMAS["kinds"][manifest["kind"]], "$defs": SCHEMAS["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(manifest)


def clusters() -> list[dict[str, Any]]:
    """Every cluster that a manifest describes."""
    return [part for _, manifest in MANIFESTS for part in below(manifest) if "headGroupSpec" in part]


def pods() -> list[dict[str, Any]]:
    return [part for _, manifest in MANIFESTS for part in below(manifest) if "containers" in part]


@pytest.mark.parametrize(("file", "manifest"), MANIFESTS, ids=[f"{file}:{m['kind']}" for file, m in MANIFESTS])
def test_a_manifest_is_valid(file: str, manifest: dict[str, Any]) -> None:
    metadata = manifest["metadata"]
    name = metadata.get("name") or metadata["generateName"] + "x"
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 47, name
    if manifest["apiVersion"] == "ray.io/v1":
        check(manifest)
        return
    version, known = OTHER_KINDS[manifest["kind"]]
    assert manifest["apiVersion"] == version
    assert set(manifest.get("spec", {})) <= known


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rayClusterSpec": {"headGroupSpec": {}}}, "'template' is a required property"),
        ({"backofLimit": 3}, "'backofLimit' was unexpected"),
        ({"backoffLimit": "three"}, "is not of type 'integer'"),
        ({"rayClusterSpec": {"authOptions": {"mode": "none"}, "headGroupSpec": {"template": {}}}}, "not one of"),
    ],
)
def test_the_schemas_refuse_what_is_wrong(change: dict[str, Any], says: str) -> None:
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {}, "spec": {"entrypoint": "x"}}
    check(job)
    with pytest.raises(jsonschema.ValidationError, match=re.escape(says)):
        check({**job, "spec": {**job["spec"], **change}})


def test_the_pods_of_the_nightly_cronjob_are_pods_by_kuberays_schema_too() -> None:
    [cron] = [manifest for _, manifest in MANIFESTS if manifest["kind"] == "CronJob"]
    cluster = {"headGroupSpec": {"template": cron["spec"]["jobTemplate"]["spec"]["template"]}}
    check({"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {}, "spec": cluster})


def test_each_kind_that_is_asked_for_is_there() -> None:
    kinds = {manifest["kind"] for _, manifest in MANIFESTS}
    assert kinds == {"RayCluster", "RayJob", "RayCronJob", *OTHER_KINDS}
    assert len(clusters()) == 6  # alone, curate, train, night, and the night in CronJob and RayCronJob


def test_every_cluster_asks_for_a_token_and_opens_no_port() -> None:
    for cluster in clusters():
        assert cluster["authOptions"]["mode"] == "token"
        head = cluster["headGroupSpec"]
        assert head["serviceType"] == "ClusterIP" and head["enableIngress"] is False
        [container] = head["template"]["spec"]["containers"]
        assert {port["containerPort"] for port in container["ports"]} == {6379, 8265, 8080}
    for _, manifest in MANIFESTS:
        assert manifest["kind"] not in ("Ingress", "Service", "Route")
        for part in below(manifest):
            assert not {"hostPort", "hostNetwork", "nodePort", "privileged"} & part.keys()


def test_the_network_policy_lets_submitter_operator_and_prometheus_in_each_at_its_port() -> None:
    [policy] = [manifest["spec"] for _, manifest in MANIFESTS if manifest["kind"] == "NetworkPolicy"]
    ports = [[port["port"] for port in rule.get("ports", [])] for rule in policy["ingress"]]
    assert ports == [[], [8265], [8080]]
    [among_themselves] = policy["ingress"][0]["from"]
    assert among_themselves["podSelector"] == policy["podSelector"]
    wanted = policy["podSelector"]["matchLabels"]
    wanted = {name: value for name, value in wanted.items() if not name.startswith("ray.io/")}  # KubeRay's own
    for cluster in clusters():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert wanted.items() <= group["template"]["metadata"]["labels"].items()


def test_the_head_takes_no_tasks_and_workers_grow_from_nothing_on_nodes_that_may_be_taken() -> None:
    for cluster in clusters():
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert "tolerations" not in cluster["headGroupSpec"]["template"]["spec"]
        assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        assert set(groups) == {"cpu", "gpu"}
        for group in groups.values():
            assert group["minReplicas"] == group["replicas"] == 0 < group["maxReplicas"]
            spec = group["template"]["spec"]
            assert {"curation/preemptible"} <= {toleration["key"] for toleration in spec["tolerations"]}
            [container] = spec["containers"]
            asked = container["lifecycle"]["preStop"]["exec"]["command"][-1]
            assert "DRAIN_NODE_REASON_PREEMPTION" in asked
            [pause] = re.findall(r"sleep (\d+)", asked)
            assert int(pause) < spec["terminationGracePeriodSeconds"]
        gpus = {name: "nvidia.com/gpu" in str(group["template"]) for name, group in groups.items()}
        assert gpus == {"cpu": False, "gpu": True}


def test_every_pod_runs_as_nobody_special_with_limits() -> None:
    for pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["requests"] and container["resources"]["limits"]
            assert not container["image"].endswith(":latest")


def test_jobs_are_tried_again_and_their_commands_are_ours() -> None:
    recipes = {"jobs.curate": CURATE, "jobs.train": TRAIN, "jobs.nightly": NIGHTLY}
    seen = set()
    for _, manifest in MANIFESTS:
        for job in (part for part in below(manifest) if "entrypoint" in part):
            python, minus_m, module, recipe, *flags = shlex.split(job["entrypoint"])
            assert (job["backoffLimit"] == 0) == (module == "jobs.nightly") and job["shutdownAfterJobFinishes"]
            assert (python, minus_m) == ("python", "-m") and recipe in recipes[module]
            assert "--log-json" in flags and "--compute.wait-for-nodes-s" in flags
            seen.add(module)
    assert seen == set(recipes)


def test_another_image_is_taken_everywhere() -> None:
    text = render.dump(render.render(CLUSTER / "kuberay" / "nightly-cronjob.yaml", image="registry.example/ours:2"))
    assert render.DEFAULT_IMAGE not in text and text.count("registry.example/ours:2") == 4


def test_the_nightly_service_account_may_only_create_rayjobs() -> None:
    [role] = [manifest for _, manifest in MANIFESTS if manifest["kind"] == "Role"]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create"]}]


def test_the_ray_up_file_fits_rays_schema_and_asks_for_a_token() -> None:
    config = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    jsonschema.validate(config, json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()))
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}


def test_the_slurm_script_is_bash_asks_for_a_token_and_says_how_it_is_used() -> None:
    script = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    assert "export RAY_AUTH_MODE=token" in script.read_text()
    told = subprocess.run(["bash", script], capture_output=True, text=True)
    assert told.returncode == 2 and "usage: sbatch" in told.stderr


def test_the_image_has_a_pinned_base_the_tested_versions_and_no_root() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    [base] = [line.removeprefix("ARG BASE=") for line in lines if line.startswith("ARG BASE=")]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    assert "USER 1000" in lines and lines.index("USER 1000") < len(lines) - 1
    installs = [line for line in lines if "pip install" in line]
    assert installs and all("-c constraints.txt" in line for line in installs)
