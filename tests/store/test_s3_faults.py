"""A store that answers 503, is slow and hangs up: a run on it goes on, or ends with 1 and goes on when it is started again."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raylabel.cli import run_command
from raylabel.store import lock
from raylabel.store.rundir import RunDir
from tests.rundirs import config_file
from tests.runs import tables_equal, tiny_config
from tests.store.test_s3 import PER_RUN

app = pytest.importorskip("moto.moto_server.werkzeug_app", reason="needs the dev extra")
pytest.importorskip("s3fs", reason="needs the dev extra")
SERVER_ERROR = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>'


class Flaky:
    """An S3 server of which a share of the answers is 503, and some come late."""

    def __init__(self, seed: int) -> None:
        self.inner = app.DomainDispatcherApplication(app.create_backend_app)
        self.draw, self.failing, self.turned_away = random.Random(seed), 0.0, 0
        self.bad_until = 0

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if self.draw.random() < self.failing / 4:
            # An outage lasts: what asks again at once is turned away again.
            self.bad_until = self.turned_away + 30
        if self.draw.random() < self.failing or (self.failing and self.turned_away < self.bad_until):
            self.turned_away += 1
            if self.turned_away % 5:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", str(len(SERVER_ERROR)))])
            return [SERVER_ERROR]
        if environ["REQUEST_METHOD"] == "PUT" and self.draw.random() < self.failing:
            time.sleep(0.2)
        answer: Iterable[bytes] = self.inner(environ, start)
        return answer


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Flaky, str]]:
    import s3fs
    from werkzeug.serving import make_server

    flaky = Flaky(0)
    server = make_server("127.0.0.1", 0, flaky, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for variable, value in (
        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}"), ("AWS_ACCESS_KEY_ID", "none"),
        ("AWS_SECRET_ACCESS_KEY", "none"), ("AWS_DEFAULT_REGION", "us-east-1"), ("AWS_MAX_ATTEMPTS", "2"),
    ):  # fmt: skip
        monkeypatch.setenv(variable, value)
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"runs-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem().mkdir(name)
    yield flaky, f"s3://{name}"
    server.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_store_that_fails_now_and_then_changes_nothing(
    store: tuple[Flaky, str], finished: RunDir, tiny_model: Path, tiny_corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flaky, bucket = store
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    # A run that could not let go of its lock is taken for dead at once.
    monkeypatch.setattr(lock, "STALE", 0.0)
    monkeypatch.setattr(lock, "WATCH", 0.05)
    config = tiny_config(tiny_model, tiny_corpus, tmp_path, subject={"neurons": [0, 8]}, run={"out": f"{bucket}/a"})
    file, codes = config_file(config, tmp_path / "config.yaml"), list[int]()
    while not codes or codes[-1]:
        flaky.failing = 0.04 if len(codes) < 6 else 0.0
        codes.append(run_command(["run", str(file)]))
        said = capsys.readouterr().err
        assert codes[-1] in (0, 1) and "Traceback" not in said, said[-2000:]
    flaky.failing = 0.0
    assert flaky.turned_away > 20
    remote = RunDir(f"{bucket}/a")
    assert tables_equal(finished, remote, PER_RUN)
    assert remote.table("failures").num_rows == 0
