"""Clusters that are in the way, slow, or ask for a token: real ones, started here on loopback."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import yaml

from pipelines.cluster import Cluster
from tests.pipelines.conftest import small_config

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef"
CONNECT = """
import sys
from h2t.errors import UserError
from pipelines.connection import connect
import ray
try:
    print(connect(sys.argv[1] or None, cores=1).local, ray.get(ray.put("answered")))
except UserError as error:
    print("error:", error)
"""


def test_what_is_started_here_listens_on_loopback_alone(cluster: Cluster) -> None:
    listening = [
        (process.name(), connection.laddr.ip)
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {"raylet", "gcs_server"} <= {name for name, _ in listening}
    assert {ip.removeprefix("::ffff:") for _, ip in listening} == {"127.0.0.1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"  # other users of this machine reach loopback too


def environment(folder: str, **variables: str) -> dict[str, str]:
    """Of a process that finds the clusters in a folder, knows no token, and sees no other home."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Else the clusters that are started here would listen on every interface, and be looked for there.
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    return {**kept, **loopback, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": folder, "HOME": folder, **variables}


@pytest.fixture
def started(short_folder: str) -> Iterator[Callable[..., str]]:
    """Starts a cluster as somebody else would, and gives its address."""
    with ExitStack() as stack:

        def start(**variables: str) -> str:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            log = Path(short_folder, "head.log")
            command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--num-cpus=1",
                       f"--port={port}", "--include-dashboard=false", "--object-store-memory=100000000",
                       "--disable-usage-stats"]  # fmt: skip
            output = stack.enter_context(log.open("w"))
            process = stack.enter_context(
                subprocess.Popen(
                    command,
                    env=environment(short_folder, **variables),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
            stack.callback(process.terminate)
            while "runtime started" not in log.read_text():
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            return f"127.0.0.1:{port}"

        yield start


def connecting(address: str, variables: dict[str, str]) -> str:
    """All that a process says that connects and does a little work, on both of its streams."""
    done = subprocess.run(
        [sys.executable, "-c", CONNECT, address],
        env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_another_cluster_of_this_machine_is_left_alone(
    started: Callable[..., str], short_folder: str
) -> None:
    address = started(RAY_AUTH_MODE="disabled")
    host, port = address.split(":")
    assert Path(short_folder, "ray", "ray_current_cluster").read_text().endswith(f":{port}")
    assert connecting("", environment(short_folder)) == "True answered\n"
    assert connecting(address, environment(short_folder)) == "False answered\n"
    # One that has ended without taking its address with it.
    Path(short_folder, "ray", "ray_current_cluster").write_text(f"{host}:1")
    assert connecting("", environment(short_folder)) == "True answered\n"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_cluster_that_asks_for_a_token(started: Callable[..., str], short_folder: str) -> None:
    address = started(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    right = environment(short_folder, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert connecting(address, right) == "False answered\n"
    for variables, reason in (
        ({"RAY_AUTH_TOKEN": TOKEN}, "did not accept this process's token (RAY_AUTH_MODE is not set)"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"}, "(RAY_AUTH_MODE is token)"),
        ({"RAY_AUTH_MODE": "token"}, "is to be told a token, and there is none"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"}, "RAY_AUTH_TOKEN_PATH is set but"),
    ):
        said = connecting(address, environment(short_folder, **variables))
        assert said.startswith(f"error: the Ray cluster at '{address}'"), said
        assert said.count("\n") == 1, said
        assert reason in said
        assert "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in said


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_token_that_nobody_asks_for_does_no_harm(started: Callable[..., str], short_folder: str) -> None:
    address = started(RAY_AUTH_MODE="disabled")
    variables = environment(short_folder, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert connecting(address, variables) == "False answered\n"


SLOW = 40  # seconds: Ray itself gives up after 30


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "agent.py"])
@pytest.mark.timeout(400)
def test_ray_may_start_slowly(name: str, short_folder: str) -> None:
    process = psutil.Popen(
        [sys.executable, "-c", CONNECT, ""], env=environment(short_folder), stdout=subprocess.PIPE, text=True
    )
    held: list[psutil.Process] = []

    def hold() -> None:
        while not held and process.poll() is None:
            with suppress(psutil.Error):
                held.extend(
                    child
                    for child in process.children(recursive=True)
                    if any(part.endswith(f"/{name}") for part in child.cmdline()[:4])
                )
        held[0].suspend()
        time.sleep(SLOW)
        held[0].resume()

    threading.Thread(target=hold, daemon=True).start()
    assert process.communicate(timeout=200)[0] == "True answered\n"
    assert held


@pytest.mark.slow
def test_a_ray_that_cannot_start_is_one_message(short_folder: str) -> None:
    code = f"from pipelines import connection; connection.START_SECONDS = 1\n{CONNECT}"
    process = psutil.Popen(
        [sys.executable, "-c", code, ""], env=environment(short_folder), stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip

    def kill() -> None:
        while process.poll() is None:
            for child in process.children(recursive=True):
                with suppress(psutil.Error):
                    if child.name() == "raylet":
                        child.kill()

    threading.Thread(target=kill, daemon=True).start()
    said = process.communicate(timeout=280)[0]
    assert said.startswith("error: Ray did not start on this machine: The current node timed out"), said
    assert "end other programs, and the same command goes on" in said
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("home", ["/proc/nowhere", __file__, None])
@pytest.mark.timeout(400)
def test_a_run_needs_no_home(images: Path, tmp_path: Path, short_folder: str, home: str | None) -> None:
    """The home is where Ray keeps its token, and matplotlib, torch and the hubs their caches."""
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    config = small_config(images, ("first",), grid={"target_size": [16]}, seeds=[0])
    recipe.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    variables = environment(short_folder)
    del variables["HOME"]
    if home is not None:
        variables["HOME"] = home
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "run", str(recipe), "--run-dir", str(run)],
        env=variables, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (run / "report" / "index.html").is_file()
