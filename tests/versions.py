"""Runs the tests, or makes the golden packages, on every JAX that obmlite promises to work with.

``python tests/versions.py test`` from the main environment, as ``make test`` does it:

==========  ====================================  ===================================================================
run         environment                           tests
==========  ====================================  ===================================================================
main        the one that this script runs in      all
oldest      ``.cache/venvs/jax-<version>``        those that depend on JAX; the version is pyproject.toml's lower bound
newest      ``.cache/venvs/jax-newest``           the same, where the main Python is older than 3.12 and a newer one is
                                                  found: ``PYTHON312``, ``python3.12`` and later on PATH, or pyenv's
objax       ``.cache/venvs/objax``                those of Objax, which needs the oldest JAX
tensorflow  ``.cache/venvs/tensorflow``           those of TensorFlow's processors and of Orbax' checkpoints
converters  ``.cache/venvs/converters``           those of OpenVINO and ONNX Runtime, which run what is converted
serving     ``.cache/venvs/serving``              clients of others: tensorflow-serving-api, tritonclient, and KServe
ray         ``.cache/venvs/ray``                  Ray Serve
fuzz        ``.cache/venvs/fuzz``                 hostile input that atheris guides; only where it has wheels
==========  ====================================  ===================================================================

In ``oldest`` and ``newest`` the files of tests in ``LONG``, and everywhere the tests that are marked ``long``, run only
with ``--all`` (``make test-all``), as do the environments in ``APART``, unless they are asked for by ``--only``.

Environments are made once, by plain pip, and made again when pyproject.toml changes. A run that should have been and
was not is a failure. Only the standard library is used here.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
NEWER = (3, 12)
"""Python that the newest JAX needs."""

# What no other version of JAX changes; the rest runs on each. A new file of tests belongs here only with a reason.
INDEPENDENT = {
    "tests/adversarial": "bytes that are refused before JAX sees them",
    "tests/foreign": "files and shapes; restoring itself runs on each",
    "tests/frameworks": "frameworks, which need a JAX of their own time",
    "tests/interop": "other libraries, which need a JAX of their own time",
    "tests/io": "bytes and files; nothing of JAX",
    "tests/plan/test_boxes.py": "arithmetic of indices",
    "tests/plan/test_layouts.py": "the same",
    "tests/plan/test_planner.py": "the same, and of bytes",
    "tests/plan/test_runs.py": "the same",
    "tests/schema": "the manifest's encoding; nothing of JAX",
    "tests/serving/test_batching.py": "threads and queues",
    "tests/serving/test_clients.py": "others' clients, in an environment of their own",
    "tests/serving/test_config.py": "a file's text",
    "tests/serving/test_example.py": "an example, which needs scikit-learn",
    "tests/serving/test_grpc.py": "protobuf's messages over a core that is tested on each",
    "tests/serving/test_grpc_tensors.py": "protobuf's messages",
    "tests/serving/test_kserve.py": "KServe, in an environment of its own",
    "tests/serving/test_malformed.py": "HTTP and JSON",
    "tests/serving/test_manager.py": "directories; what becomes of a version on each JAX is in test_repository.py",
    "tests/serving/test_metrics.py": "counters and their text",
    "tests/serving/test_oip_rest.py": "a protocol over a core that is tested on each",
    "tests/serving/test_page.py": "HTML, and a browser",
    "tests/serving/test_ray.py": "Ray, in an environment of its own",
    "tests/serving/test_requests.py": "threads",
    "tests/serving/test_server.py": "sockets and processes",
    "tests/serving/test_tfs_rest.py": "a protocol over a core that is tested on each",
    "tests/test_benchmarks.py": "the benchmarks' report",
    "tests/test_cli.py": "text in a terminal",
    "tests/test_collector.py": "Python's garbage collector",
    "tests/test_concurrent_saves.py": "races of saving, which are about files",
    "tests/test_consolidate.py": "files, rewritten",
    "tests/test_diff.py": "records and digests",
    "tests/test_durability.py": "crashes of saving, which are about files",
    "tests/test_examples.py": "the examples, which need scikit-learn and matplotlib",
    "tests/test_flushing.py": "the disk",
    "tests/test_full_disk.py": "the disk",
    "tests/test_independent_reader.py": "a reader without JAX",
    "tests/test_killed_together.py": "crashes of saving, which are about files",
    "tests/test_no_imports.py": "names, and what Python imports",
    "tests/test_numbered_versions.py": "directories",
    "tests/test_pipelines_document.py": "a document's text",
    "tests/test_planning.py": "a plan without devices",
    "tests/test_power_cuts.py": "the disk",
    "tests/test_readme.py": "the README's text",
    "tests/test_restore_document.py": "a document's text",
    "tests/test_restoring_bytes.py": "what the operating system counts",
    "tests/test_realign.py": "files, rewritten",
    "tests/test_scaling.py": "the figures of docs/scaling.md, from shapes alone",
    "tests/test_signing.py": "digests and keys",
    "tests/test_supplementals.py": "files, carried",
    "tests/test_validation.py": "a report",
    "tests/test_verify.py": "digests",
}

# What takes minutes, and where the versions of JAX have not differed beyond what the other files find.
LONG = (
    "tests/replay/test_conformance.py",
    "tests/replay/test_old_artifacts.py",
    "tests/replay/test_replay.py",
    "tests/test_broadcasting.py",
    "tests/test_captures.py",
    "tests/test_export_cases.py",
    "tests/test_gradients.py",
    "tests/test_hoisting.py",
    "tests/test_multihost.py",
    "tests/test_networks.py",
    "tests/test_replay_engine.py",
    "tests/test_reproducible.py",
    "tests/test_saving.py",
    "tests/test_transformations.py",
    "tests/test_untrusted.py",
    "tests/test_verify_levels.py",
)


APART = ("tensorflow", "converters", "serving", "ray", "fuzz")
"""Environments that are large, and made for ``--all`` only."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One JAX.

    Attributes:
      name: of its results.
      python: of its environment.
      requirement: what pip is asked for; None for the main environment, which is there.
      base: Python that the environment is made with.
      extras: of obmlite's, that it gets.
      tests: that run in it; None for all that depend on JAX.
    """

    name: str
    python: pathlib.Path
    requirement: str | None = None
    base: str = sys.executable
    extras: str = "test"
    tests: tuple[str, ...] | None = None


@dataclasses.dataclass
class Result:
    """What came of a run."""

    run: Run
    versions: str = ""
    outcome: str = "did not run"
    seconds: float = 0
    good: bool = False


def oldest() -> str:
    """The oldest JAX that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [m for text in project["dependencies"] if (m := re.fullmatch(r"jax\s*>=\s*([\d.]+)", text))]
    assert len(found) == 1, "pyproject.toml names one lower bound of jax"
    return str(found[0][1])


def newer_python() -> tuple[str, str] | None:
    """A Python for the newest JAX and its version; None if there is none."""
    asked = os.environ.get("PYTHON312")
    if asked:
        version = probe(asked)
        if version is None:
            sys.exit(f"PYTHON312={asked} is no Python 3.12 or later that can make environments")
        return asked, version
    minors = range(NEWER[1], NEWER[1] + 4)
    candidates = [f"python3.{minor}" for minor in minors]
    pyenv = shutil.which("pyenv")
    root = os.environ.get("PYENV_ROOT") or (
        subprocess.run([pyenv, "root"], capture_output=True, text=True, check=False).stdout.strip() if pyenv else ""
    )
    if root:
        candidates += [str(p) for m in minors for p in sorted(pathlib.Path(root).glob(f"versions/3.{m}*/bin/python"))]
    for candidate in candidates:
        version = probe(candidate)
        if version is not None:
            return candidate, version
    return None


def probe(python: str) -> str | None:
    """The version of a Python that is new enough and can make environments; pyenv's shims may be no Python at all."""
    code = "import ensurepip, sys, venv; print(sys.implementation.name, *sys.version_info[:3])"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    except OSError:
        return None
    name, *version = done.stdout.split() or [""]
    if done.returncode or name != "cpython" or tuple(map(int, version[:2])) < NEWER:
        return None
    return ".".join(version)


def runs() -> tuple[list[Run], str]:
    """All that should run, and why the newest does not, if so."""
    wanted = oldest()
    found = [
        Run("main", pathlib.Path(sys.executable)),
        Run("oldest", environment(f"jax-{wanted}"), f"jax=={wanted} jaxlib=={wanted}"),
        Run(
            "objax",
            environment("objax"),
            f"jax=={wanted} jaxlib=={wanted}",
            extras="test,objax",
            tests=(
                "tests/frameworks/test_objax.py",
                "tests/frameworks/test_examples.py",
                "tests/interop/test_safejax_objax.py",
            ),
        ),
        Run(
            "tensorflow",
            environment("tensorflow"),
            "jax jaxlib orbax-checkpoint",
            extras="test,tensorflow",
            tests=(
                "tests/interop/test_tensorflow.py",
                "tests/interop/test_orbax_model.py",
                "tests/interop/test_jax2tf_document.py",
                "tests/interop/test_saved_model.py",
            ),
        ),
        Run(
            "converters",
            environment("converters"),
            "jax jaxlib flax onnxruntime",
            extras="test,openvino,onnx",
            tests=("tests/interop/test_onnx.py", "tests/interop/test_openvino.py"),
        ),
        Run(
            "serving",
            environment("serving"),
            "jax jaxlib tensorflow-serving-api tritonclient[all] kserve",
            extras="test,serve,grpc",
            tests=(
                "tests/serving/test_clients.py",
                "tests/serving/test_kserve.py",
                "tests/serving/test_grpc.py",
                "tests/serving/test_grpc_tensors.py",
            ),
        ),
        Run("ray", environment("ray"), "jax jaxlib", extras="test,ray", tests=("tests/serving/test_ray.py",)),
    ]
    if sys.version_info[:2] <= (3, 13) and (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        guided = ("tests/adversarial/test_guided.py",)
        found.append(Run("fuzz", environment("fuzz"), "jax jaxlib atheris", extras="test", tests=guided))
    if sys.version_info[:2] >= NEWER:
        return found, ""  # main has the newest JAX
    newer = newer_python()
    if newer is None:
        return found, "the newest JAX was not run: no Python 3.12 or later is here (PYTHON312=… names one)"
    return [*found, Run("newest", environment("jax-newest"), "jax jaxlib", newer[0])], ""


def environment(name: str) -> pathlib.Path:
    """The Python of an environment."""
    return CACHE / "venvs" / name / "bin" / "python"


def prepare(run: Run) -> None:
    """Makes a run's environment, if it is not there as it should be."""
    if run.requirement is None:
        return
    folder = run.python.parent.parent
    state = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    state.update(f"{run.requirement} {run.base} {ROOT}".encode())
    stamp = folder / ".made"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == state.hexdigest():
        return
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([run.base, "-m", "venv", str(folder)], check=True)
    pip = [str(run.python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "--editable", f".[{run.extras}]", *run.requirement.split()], cwd=ROOT, check=True)
    stamp.write_text(state.hexdigest(), encoding="utf-8")


def versions(run: Run) -> dict[str, str]:
    """Of Python, jax and jaxlib in an environment."""
    code = (
        "import sys; from importlib.metadata import version\n"
        "print('.'.join(map(str, sys.version_info[:3])), version('jax'), version('jaxlib'))"
    )
    done = subprocess.run([str(run.python), "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(("python", "jax", "jaxlib"), done.stdout.split(), strict=True))


def number(version: str) -> tuple[int, ...]:
    """A version, to be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def test(result: Result, extra: list[str], at_length: bool) -> None:
    """Runs pytest, and reads its own report of it."""
    run = result.run
    report = CACHE / "results" / f"{run.name}.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    left_out: list[str] = []
    if run.requirement is not None and not run.tests and not extra:
        left_out += [*INDEPENDENT, *(() if at_length else LONG)]
    some = [f"--ignore={path}" for path in left_out] + ([] if at_length or extra else ["-m", "not long"])
    command = [str(run.python), "-m", "pytest", "-n", "2", "--dist", "loadfile", f"--junitxml={report}"]
    done = subprocess.run([*command, *some, *(extra or run.tests or ["tests"])], cwd=ROOT, check=False)
    if not report.exists():
        result.outcome = f"pytest did not finish (exit status {done.returncode})"
        return
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    result.outcome = f"{passed} passed, {failed} failed, {count['skipped']} skipped"
    result.good = done.returncode == 0 and failed == 0 and passed > 0


def golden(result: Result, extra: list[str], _: bool) -> None:
    """Makes the golden packages."""
    done = subprocess.run([str(result.run.python), "tests/golden/make.py", *extra], cwd=ROOT, check=False)
    result.good = done.returncode == 0
    result.outcome = "made" if result.good else f"not made (exit status {done.returncode})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["test", "golden"])
    parser.add_argument(
        "--only",
        action="append",
        choices=["main", "oldest", "objax", *APART, "newest"],
        help="some of the runs",
    )
    parser.add_argument("--all", action="store_true", help="also what takes long")
    parser.add_argument("extra", nargs="*", help="for pytest, or for make.py")
    options = parser.parse_args()
    chosen, why = runs()
    if (
        options.what == "golden" or options.extra
    ):  # of which that environment has nothing of its own, unless it is named
        chosen = [run for run in chosen if run.tests is None or run.name in (options.only or ())]
    if options.what == "test" and not options.all and not options.only:
        chosen = [run for run in chosen if run.name not in APART]
    chosen = [run for run in chosen if not options.only or run.name in options.only]
    results = [Result(run) for run in chosen]
    before: tuple[int, ...] = ()
    with concurrent.futures.ThreadPoolExecutor(
        1
    ) as pool:  # pip waits for the network while the main run needs the cores
        prepared = [pool.submit(prepare, run) for run in chosen]
        for result, ready in zip(results, prepared, strict=True):
            try:
                ready.result()
                found = versions(result.run)
            except (OSError, subprocess.CalledProcessError) as error:
                result.outcome = f"did not run: its environment could not be made: {error}"
                continue
            result.versions = f"jax {found['jax']}, jaxlib {found['jaxlib']}, Python {found['python']}"
            if result.run.name in ("oldest", "objax") and found["jax"] != oldest():
                result.outcome = f"did not run: the environment has jax {found['jax']}"
                continue
            if result.run.name == "newest" and number(found["jax"]) < before:
                result.outcome = f"did not run: the environment has jax {found['jax']}, which is not the newest"
                continue
            before = max(before, number(found["jax"]))
            print(f"--- {result.run.name}: {result.versions}", flush=True)
            begun = time.monotonic()
            {"test": test, "golden": golden}[options.what](result, options.extra, options.all)
            result.seconds = time.monotonic() - begun
    print("---")
    for result in results:
        label = f"{result.run.name}: {result.versions or result.run.requirement}"
        print(f"{label}: {result.outcome} in {result.seconds:.0f} s")
    if why:
        print(why)
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
