"""Requests that schemathesis makes of /openapi.json: right ones, and such as it says are wrong."""

import subprocess
import sys
from pathlib import Path

from serving import Server

NOT = "positive_data_acceptance"
"""What a schema cannot say, fields that exclude each other for one, is refused too."""


def test_what_is_described_is_answered_and_the_rest_refused(tmp_path):
    with Server("stories260k", "--ctx", 64, "--slots", 4) as server:
        run = subprocess.run(
            [
                Path(sys.executable).with_name("schemathesis"), "run", f"http://127.0.0.1:{server.port}/openapi.json",
                "--phases=fuzzing", "--seed=1", "--max-examples=8", "--max-time=20", "--exclude-checks", NOT,
                "--no-shrink", "--request-timeout=10", "--continue-on-failure", "--generation-database=none",
                "--warnings=off",
            ],
            capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout
        assert "error" not in {line["level"] for line in server.log()}
