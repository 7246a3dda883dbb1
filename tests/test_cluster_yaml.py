"""The cluster files, as Ray itself reads them, and what they promise: a head without work, loopback, a token, labels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from raylabel.engine.cluster import POOL

ROOT = Path(__file__).resolve().parents[1]
FILES = ("cluster.yaml", "cluster.gcp.yaml", "cluster.local.yaml")


def prepared(tree: dict[str, Any]) -> dict[str, Any]:
    """The file as Ray goes on with it; raises what `ray up` would refuse it for."""
    config: dict[str, Any] = prepare_config(copy.deepcopy(tree))
    validate_config(config)
    return config


@pytest.fixture(params=FILES)
def given(request: pytest.FixtureRequest) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / request.param).read_text(encoding="utf-8"))
    return tree


def test_ray_takes_it_and_installs_nothing(given: dict[str, Any]) -> None:
    config = prepared(given)
    assert config["setup_commands"] == [] == config["head_setup_commands"] == config["worker_setup_commands"]


def test_ray_refuses_what_is_wrong(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        prepared({**given, "clutser_name": "x"})


def test_the_dashboard_is_on_loopback_and_every_process_asks_for_the_token(given: dict[str, Any]) -> None:
    config = prepared(given)
    [head] = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    [worker] = [c for c in config["worker_start_ray_commands"] if "ray start" in c]
    assert "--dashboard-host=127.0.0.1" in head and "0.0.0.0" not in head
    assert "RAY_AUTH_MODE=token ray start" in head and "RAY_AUTH_MODE=token ray start" in worker
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert any(path.endswith("/.ray/auth_token") for path in config["file_mounts"])
    assert "--num-cpus=0" in head


@pytest.mark.parametrize("name", FILES[:2])
def test_workers_are_spot_machines_from_zero_with_labels_that_the_engine_knows(name: str) -> None:
    config = prepared(yaml.safe_load((ROOT / name).read_text(encoding="utf-8")))
    kinds = config["available_node_types"]
    assert config["head_node_type"] == "head" and kinds["head"]["resources"]["CPU"] == 0
    for pool in ("gpu", "cpu"):
        assert kinds[pool]["min_workers"] == 0 < kinds[pool]["max_workers"]
        assert kinds[pool]["labels"] == {POOL: pool}
        assert "spot" in str(kinds[pool]["node_config"]).lower()
    assert kinds["gpu"]["resources"]["GPU"] == 1 and "GPU" not in kinds["cpu"]["resources"]
