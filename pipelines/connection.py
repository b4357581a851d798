"""Connecting to a Ray cluster, or starting one on this machine: its ports, tokens, folders and memory."""

import logging
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from h2t.errors import UserError
from pipelines.cluster import OBJECT_STORE_BYTES, SPARE_CPUS, Cluster
from pipelines.interruption import causes, reinstall, signal_behind
from pipelines.machine import GIB, available_cores, available_memory, memory_limit

LARGEST_SHARE = 0.5  # of the memory that the object store may have; less if it is for two matrices
SHARE_OF_TWO = 0.25
SHARED_MEMORY = "/dev/shm"
SHARED_MEMORY_SHARE = 0.9  # that it may have of what is free there
# A socket's path has at most 107 bytes, of which Ray's own part, with the longest process number, takes 67.
LONGEST_FOLDER = 40
SHORT_FOLDER = "/tmp"
LEAST_MEMORY = 2**28  # that Ray is told of
START_SECONDS = 300  # that Ray's processes may take to start, on a machine that is very busy
# The raylet ends itself when its agent, a Python program with many imports, takes more than 15 s.
STARTS = 3
TOKEN_REFUSED = "InvalidAuthToken"  # in what a cluster answers that asks for another token
TOKEN_ADVICE = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token (without "
    "either, ~/.ray/auth_token is read)"
)

# In what Ray's core says of every pool of actors of Ray Data, past Python's logging.
POOL_NOISE = "ray-project/ray/issues/53727"


def connect(
    address: str | None = None,
    cores: int | None = None,
    environment: Mapping[str, str] | None = None,
    matrix_bytes: Callable[[], int] = lambda: 0,
) -> Cluster:
    """Connect to the cluster at ``address`` (or ``RAY_ADDRESS``), or start one on this machine.

    ``environment``: variables of every worker; ``matrix_bytes``: of the largest matrix that is to find room
    in the object store of a cluster that is started here, as far as memory allows.

    Raises UserError when there is no cluster at the address, or that is one of the dashboard.
    """
    _check_address(address, os.environ.get("RAY_ADDRESS"))
    address = address or os.environ.get("RAY_ADDRESS")
    cores = cores or available_cores()
    store_folder = ""
    if not ray.is_initialized():
        store_folder = _start(address, cores, environment or {}, matrix_bytes)
        reinstall()
    total = ray.cluster_resources()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    store, memory = (
        max((int(node["Resources"].get(kind, 0)) for node in nodes), default=0)
        for kind in ("object_store_memory", "memory")
    )
    cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    return Cluster(cpus, gpus, len(nodes), address is None, cores, store, memory, store_folder)


def object_store_bytes(matrix: int) -> int:
    """Bytes for this machine's object store: two matrices beside the usual, or one where memory is short."""
    memory = memory_limit()
    two, one = (OBJECT_STORE_BYTES + copies * matrix for copies in (2, 1))
    return two if two <= SHARE_OF_TWO * memory else min(one, int(LARGEST_SHARE * memory))


def object_store_folder(size: int) -> str:
    """Where an object store of so many bytes is to lie: "" for shared memory, a folder where that is small.

    Raises UserError where the folder's disk is too small as well.
    """
    with suppress(OSError):
        if shutil.disk_usage(SHARED_MEMORY).free * SHARED_MEMORY_SHARE >= size:
            return ""
    return checked_folder(
        size, f"the object store finds no room in {SHARED_MEMORY} (in a container: --shm-size)"
    )


def checked_folder(size: int, why: str) -> str:
    """The folder in which Ray puts what finds no room in memory.

    Raises UserError, which begins with ``why``, where so many bytes find no room there either.
    """
    folder = _temporary_folder() or stated_folder()
    os.makedirs(folder, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{why}: expected {size / GIB:.1f} GiB of room in {folder}, got {free / GIB:.1f}; set RAY_TMPDIR "
            "to a folder on a larger disk"
        )
    return folder


def _check_address(given: str | None, in_environment: str | None) -> None:
    """The dashboard's address, which ``ray job submit`` takes, is often found in the environment."""
    address = given or in_environment or ""
    if address.startswith(("http://", "https://")):
        where = "--address" if given else "the environment variable RAY_ADDRESS"
        raise UserError(
            f"{where} is '{address}', which is for `ray job submit -- h2t …`; expected "
            "auto, host:port of the head node (such as 10.0.0.1:6379) or ray://host:10001, or nothing to run "
            "on this machine"
        )


def stated_folder() -> str:
    """Where Ray puts its sessions by itself."""
    return os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()


def _temporary_folder() -> str | None:
    """Where Ray is to put its sessions, whose sockets must have short paths; None for its own choice."""
    stated = stated_folder()
    if len(os.fsencode(stated)) <= LONGEST_FOLDER:
        return None
    if os.access(SHORT_FOLDER, os.W_OK):
        return f"{SHORT_FOLDER}/ray"
    raise UserError(
        f"Ray cannot open sockets in '{stated}': expected a folder of at most {LONGEST_FOLDER} characters, "
        f"got {len(stated)}; set RAY_TMPDIR to a shorter one"
    )


def _start(
    address: str | None, cores: int, environment: Mapping[str, str], matrix_bytes: Callable[[], int]
) -> str:
    """Start Ray here, or connect to it; the folder of the object store if it isn't shared memory."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would swallow Ctrl-C, then and later
    # Of work that nobody waits for any more once a run is interrupted; all other errors are raised.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # else Tune prints a banner even when told to be silent
    # Of each thread's own heap glibc keeps what was freed, and Ray's workers have many threads.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    # First touching the memory of activations and features is a large part of computing them.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it logs it raises as well
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if environment:
        quiet["runtime_env"] = {"env_vars": dict(environment)}
    if address is None:
        return _start_here(cores, matrix_bytes(), quiet)
    _join(address, quiet)
    return ""


def _start_here(cores: int, matrix: int, quiet: Mapping[str, Any]) -> str:
    import psutil

    folder, size = _temporary_folder(), object_store_bytes(matrix)
    store_folder = object_store_folder(size)
    # Who reads a matrix has it twice for a moment, in its own memory and in the store.
    memory = max(available_memory() - size - matrix, LEAST_MEMORY)
    _provide_token()
    for attempt in range(1, STARTS + 1):
        before = psutil.Process().children()
        try:
            with _on_loopback(), _patience():
                ray.init(
                    address="local",  # and not whichever cluster was started last on this machine
                    num_cpus=cores + SPARE_CPUS,
                    include_dashboard=False,
                    object_store_memory=size,
                    _memory=memory,
                    _plasma_directory=store_folder or None,
                    _temp_dir=folder,
                    **quiet,
                )
            break
        except Exception as error:
            if signal_behind(error):
                raise
            for child in set(psutil.Process().children()) - set(before):
                with suppress(psutil.Error):
                    child.kill()
            if attempt == STARTS or isinstance(error, OSError):
                raise _not_started(error, folder) from None
    return store_folder


def _not_started(error: Exception, folder: str | None) -> UserError:
    """The error of a Ray that did not start with its files in a folder."""
    place = folder or stated_folder()
    advice = (
        f"Ray keeps its sockets, logs and spilled objects in {place}: make room there or make it writable, "
        "or set RAY_TMPDIR to another folder"
        if isinstance(error, OSError)
        else "the machine may be too busy or short of memory: see `h2t doctor`, end other programs, and the "
        f"same command goes on; Ray's own words are in {place}/ray/session_latest/logs"
    )
    return UserError(f"Ray did not start on this machine: {_first_line(error)}; {advice}")


def _join(address: str, quiet: Mapping[str, Any]) -> None:
    try:
        _check_port(address)
        with without_line(TOKEN_REFUSED):
            ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        if signal_behind(error):
            raise
        if refused := next(filter(None, map(_about_tokens, causes(error))), ""):
            raise UserError(f"the Ray cluster at '{address}' {refused}; {TOKEN_ADVICE}") from None
        raise UserError(
            f"no Ray cluster answers at '{address}' ({_first_line(error)}); start one with "
            "`ray start --head` or `ray up cluster.yaml`, or leave --address out to run on this machine"
            + (f". If it asks for a token: {TOKEN_ADVICE}" if address.startswith("ray://") else "")
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _about_tokens(error: BaseException) -> str:
    """What an exception says of tokens; "" for another one. Ray passes the answer of a server on as text."""
    if TOKEN_REFUSED in str(error):
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        return f"did not accept this process's token (RAY_AUTH_MODE is {mode})"
    if isinstance(error, ray.exceptions.AuthenticationError):
        return f"is to be told a token, and there is none: {str(error).split('. ')[0]}"
    return ""


def _provide_token() -> None:
    """Give a cluster that starts here a token of its own where none is stated, without a file in the home."""
    stated = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    saved = Path(os.environ.get("HOME", ""), ".ray", "auth_token")
    if not stated and not (os.environ.get("HOME") and os.access(saved, os.R_OK) and saved.is_file()):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray listen on this machine's loopback alone while it starts.

    Ray does so by itself where it knows no clusters (on macOS and Windows); else its ports are open on every
    interface, whatever node address it is given. Its processes inherit the setting; a cluster that this
    process joins later is not affected.
    """
    from ray._private import ray_constants

    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    with _environment({name: "0"}):
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _patience() -> Iterator[None]:
    """Have Ray wait ``START_SECONDS`` for its processes while they start, where it would give up after 30 s.

    The wait for the raylet is no setting, so each question whether it is there waits for the answer.
    """
    from ray._private import services

    ask = services.get_node

    def ask_until_there(gcs_address: str, node_id: str) -> Any:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return ask(gcs_address, node_id)
            except RuntimeError:
                if time.monotonic() > deadline or _has_died("raylet"):
                    raise
                time.sleep(0.1)

    seconds = str(START_SECONDS)
    waits = {"RAY_gcs_server_port_wait_time_s": seconds, "RAY_worker_register_timeout_seconds": seconds,
             "RAY_agent_register_timeout_ms": f"{seconds}000"}  # fmt: skip
    with _environment({name: os.environ.get(name, value) for name, value in waits.items()}):
        services.get_node = ask_until_there
        try:
            yield
        finally:
            services.get_node = ask


def _has_died(name: str) -> bool:
    """Whether a child of this process of that name has ended."""
    import psutil

    children = psutil.Process().children()
    return any(child.name() == name and child.status() == psutil.STATUS_ZOMBIE for child in children)


def _check_port(address: str) -> None:
    """Ray itself tries for many minutes to reach a port where nobody listens."""
    if (
        address == "auto"
    ):  # the file of a cluster that has ended may name it, or one that is another process's
        from ray._private.services import canonicalize_bootstrap_address

        address = canonicalize_bootstrap_address(address) or ""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def without_line(words: str) -> Iterator[None]:
    """Drop lines with ``words`` from standard error; all others pass at once, even if this process dies."""
    grep = shutil.which("grep")
    if grep is None:
        yield
        return
    before = os.dup(2)
    command = [grep, "--line-buffered", "--fixed-strings", "--invert-match", words]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=before, start_new_session=True)
    assert process.stdin
    os.dup2(process.stdin.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):  # a child that was started meanwhile may hold it open
            process.wait(timeout=2)
