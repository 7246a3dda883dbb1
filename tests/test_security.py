"""Foreign files: nothing in them is run, leads out of its folder, or ends a command with a traceback; no secret is kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylabel.config import build_config, load_config
from raylabel.errors import BadInput
from raylabel.models.loading import _refuse_outside
from raylabel.store.files import Files
from raylabel.store.rundir import RunDir
from tests.conftest import Command

ROOT = Path(__file__).resolve().parents[1]
MINIMAL = {"subject": {"model": "demo"}}
HOSTILE: list[bytes] = [
    b"", b"\0", b"null", b"[]", b"{}", b"0", b'"x"', b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"schema_version": []}',
    b'{"schema_version": "1.0", "configs": 3, "resolved": []}', b'{"stage": 1, "version": 1, "units": [{}]}',
    b'{"unit": "x", "files": [{"path": "../../../etc/passwd"}], "failures": [], "failed": false}', b'{"units": {"a": 1}}',
    b'{"stage": "scan", "version": 1, "units": [{"id": "../../x", "step": "s", "key": []}]}', b"PAR1" + b"\0" * 64 + b"PAR1",
]  # fmt: skip
PLACES = ("run.json", "_plan/scan.json", "_manifest/scan", "exemplars/_SUCCESS", "results/_SUCCESS", "results")
YAML = ("!!python/object/apply:os.system ['touch hacked']", "a: &a [*a]", "? [", "- " * 5_000, "\0", "a: {b: &x 1, c: *y}")
SECTIONS = ("subject", "exemplars", "identify", "run", "preset", "x")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8,
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_run_directory_with_anything_in_it_gives_one_line_or_an_answer(
    place: str, finished: RunDir, command: Command, tmp_path: Path
) -> None:
    for number, content in enumerate(HOSTILE):
        folder = tmp_path / f"run-{number}"
        shutil.copytree(finished.files.root, folder)
        target = folder / place
        if target.is_dir():
            target = next(path for path in sorted(target.rglob("*")) if path.suffix in (".json", ".parquet"))
        target.write_bytes(content)
        for arguments in (["status", folder, "--verify"], ["show", folder, "--json"]):
            code, _, err = command(*arguments)
            assert code in (0, 1, 2) and "Traceback" not in err, (place, content[:60], arguments, err[-300:])
            assert code == 0 or len(err.strip().splitlines()[-1]) < 600
        shutil.rmtree(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=st.dictionaries(st.sampled_from(SECTIONS), values, max_size=4))
def test_a_configuration_of_anything_is_refused_in_one_line_or_taken(tree: dict[str, Any]) -> None:
    try:
        build_config(tree)
    except BadInput as error:
        assert "\n" not in str(error).strip() or len(str(error)) < 2_000


@pytest.mark.parametrize("text", YAML)
def test_yaml_runs_nothing(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput):
        load_config(file)
    assert not Path("hacked").exists()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", ".."])
def test_no_name_leads_out_of_a_run_directory(name: str, tmp_path: Path) -> None:
    files = Files(str(tmp_path / "run"))
    for use in (files.read, files.delete, files.exists, lambda n: files.write(n, b"x")):
        with pytest.raises(BadInput, match="outside of itself"):
            use(name)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors"])
def test_no_weight_lies_outside_of_a_model_folder(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}), encoding="utf-8")
    with pytest.raises(BadInput, match="outside of its folder"):
        _refuse_outside(tmp_path)
    index.write_text(json.dumps({"weight_map": {"w": "model-00001.safetensors"}}), encoding="utf-8")
    _refuse_outside(tmp_path)


@pytest.mark.parametrize(
    ("section", "values"),
    [("describe", {"base_url": "https://me:hunter2@host/v1"}), ("describe", {"api_key_env": "sk-hunter2"}),
     ("run", {"out": "s3://hunter2:hunter2@bucket/run"}), ("exemplars", {"neuronpedia": {"url": "https://hunter2@x.org"}})],
)  # fmt: skip
def test_a_secret_in_the_settings_is_refused_and_not_repeated(section: str, values: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=section) as caught:
        build_config({**MINIMAL, section: values})
    assert "hunter2" not in str(caught.value)


def test_ray_that_raylabel_starts_asks_for_a_token(tmp_path: Path) -> None:
    code = """
import os, subprocess, sys
from raylabel.engine.pipeline import open_pool
pool = open_pool("local", 1)
import ray
address = ray.get_runtime_context().gcs_address
assert address.startswith("127."), address
ask = "import ray; ray.init(address=%r, log_to_driver=False); print('let in')" % address
for mode, expected in (("disabled", False), ("token", True)):
    done = subprocess.run([sys.executable, "-c", ask], env={**os.environ, "RAY_AUTH_MODE": mode}, capture_output=True, text=True)
    assert ("let in" in done.stdout) is expected, (mode, done.stderr[-2000:])
pool.close()
print("fine")
"""
    own = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "RAY_gcs_rpc_server_reconnect_timeout_s": "3"}
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    done = subprocess.run([sys.executable, "-c", code], env={**environment, **own}, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip().endswith("fine"), done.stderr[-3000:]
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o077 == 0 or (tmp_path / ".ray").stat().st_mode & 0o777
