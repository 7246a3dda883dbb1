"""A run directory on an object store: a real S3 server on loopback."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from raylabel.api import open_run
from raylabel.config import RunConfig
from raylabel.engine.pipeline import run_pipeline
from raylabel.store.rundir import RunDir
from tests.runs import tables_equal, tiny_config

server = pytest.importorskip("moto.server", reason="needs the dev extra")
pytest.importorskip("s3fs", reason="needs the dev extra")
PER_RUN = ("samples", "exemplars", "statistics", "candidates", "variants", "verifications", "results")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    import s3fs

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"), ("AWS_ACCESS_KEY_ID", "none"), ("AWS_SECRET_ACCESS_KEY", "none"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):  # fmt: skip
            patch.setenv(variable, value)
        s3fs.S3FileSystem.clear_instance_cache()
        name = f"runs-{uuid.uuid4().hex[:8]}"
        s3fs.S3FileSystem().mkdir(name)
        yield f"s3://{name}"
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


@pytest.fixture(scope="module")
def config(bucket: str, tiny_model: Path, tiny_corpus: Path) -> RunConfig:
    """Of a run in the bucket, which is there."""
    made = tiny_config(tiny_model, tiny_corpus, Path("unused"), subject={"neurons": [0, 8]}, run={"out": f"{bucket}/a"})
    run_pipeline(made)
    return made


def test_a_run_on_s3_gives_the_same_rows_and_is_left_alone(finished: RunDir, config: RunConfig) -> None:
    remote = RunDir(config.run.out)
    assert tables_equal(finished, remote, PER_RUN)
    assert not remote.files.exists("_lock")
    assert open_run(config.run.out).feature_neurons() is not None
    lines: list[str] = []
    run_pipeline(config, lines.append)
    assert lines and [line for line in lines if "already done" in line] == lines


def test_what_a_lost_object_takes_along_is_done_again(finished: RunDir, config: RunConfig) -> None:
    remote = RunDir(config.run.out)
    remote.files.delete(remote.paths("candidates")[0])
    lines: list[str] = []
    run_pipeline(config, lines.append)
    assert tables_equal(finished, remote, PER_RUN)
    assert any(line.startswith("identify: close") for line in lines)
    assert not any(line.startswith("scan: acc") for line in lines)
