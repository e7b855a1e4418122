"""The Ray engine on a cluster of this machine: a worker killed on the way, and a second run.

In a process of its own, started elsewhere: Ray puts the driver's folder on its workers' path, and
the checkout's bare `steerrec/` is no package.
"""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import polars as pl
import pytest

from steerrec.batch_scoring import ScoringSpec, score_blocks
from steerrec.cli import engine_options
from steerrec.data import build_histories, read_interactions
from steerrec.data.history_files import write_histories
from steerrec.engines import LocalEngine, told, unless_told
from steerrec.errors import DataError, EngineError
from steerrec.loading import load_recommender
from steerrec.ray_engine import RayEngine

DRIVER = """
    import json
    import os
    import signal
    import sys
    from pathlib import Path

    from steerrec.activations import ActivationSampling, capture_activations
    from steerrec.batch_capturing import capture_on_engine
    from steerrec.batch_scoring import ScoringSpec, ScoringWorker, score_blocks
    from steerrec.data.history_files import Slice, read_slice
    from steerrec.errors import DataError
    from steerrec.loading import load_recommender
    from steerrec.ray_engine import RayEngine


    class Killed(ScoringWorker):
        def __call__(self, block):
            here = self._folder.parent / "killed"
            if block["number"] == 2 and not here.exists():
                here.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(block)


    class Engine(RayEngine):
        def run(self, worker, spec, blocks):
            worker = Killed if worker is ScoringWorker else worker
            return super().run(worker, spec, blocks)


    class Failing:
        def __init__(self, spec):
            pass

        def __call__(self, block):
            raise DataError("of a worker")


    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    given = json.loads(sys.argv[1])
    spec, files = ScoringSpec.from_dict(given["spec"]), [Path(file) for file in given["files"]]
    out, engine = Path("out").absolute(), Engine(workers=2)
    first = score_blocks(spec, files, out, engine=engine, block_users=60)
    (out / "_blocks" / "00003.safetensors").unlink()
    second = score_blocks(spec, files, out, engine=engine, block_users=60)
    rec = load_recommender(spec.model)
    train, _ = read_slice(Slice(str(files[0]), 0, 100), rec.catalogue)
    sampling = ActivationSampling(rows=300, shard_rows=100)
    options = {"sampling": sampling, "batch_size": 64}
    capture_on_engine(rec, train, "shards", engine, model=spec.model, **options)
    capture_activations(rec, train, "alone", **options)
    try:
        list(engine.run(Failing, {}, [{"number": 0}]))
    except DataError as error:
        failed = str(error)
    print(json.dumps({"first": first.to_dict(), "second": second.to_dict(), "failed": failed}))
"""


@pytest.fixture(scope="module")
def scene(world, tmp_path_factory):
    """Two files of histories, and a spec of the small world's model and artifact."""
    folder = tmp_path_factory.mktemp("ray")
    rec = load_recommender(world.model)
    names = {"user_col": "who", "item_col": "what", "time_col": "when"}
    histories = build_histories(read_interactions(world.data, k_core=3, **names), rec.catalogue)
    files = [folder / "a.parquet", folder / "b.parquet"]
    for file, users in zip(files, (np.arange(100), np.arange(100, len(histories))), strict=True):
        write_histories(histories.select(users), rec.catalogue, file)
    return folder, files, ScoringSpec(artifact=str(world.artifact), model=str(world.model), k=5)


def test_a_killed_worker_loses_nothing_and_the_lists_are_those_of_one_process(scene):
    pytest.importorskip("ray", reason="needs ray: pip install 'steerrec[ray]'")
    folder, files, spec = scene
    (folder / "driver.py").write_text(textwrap.dedent(DRIVER))
    given = json.dumps({"spec": spec.to_dict(), "files": [str(file) for file in files]})
    command = [sys.executable, "-P", str(folder / "driver.py"), given]
    patient = {**os.environ, "RAY_raylet_start_wait_time_s": "240"}  # of a busy machine
    done = subprocess.run(
        command, cwd=folder, env=patient, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)

    assert (folder / "killed").read_text().isdigit()
    alone = score_blocks(
        spec, files, folder / "alone-lists", engine=LocalEngine(threads=1), block_users=60
    )
    for number in range(5):
        name = f"part-{number:05d}.parquet"
        one, other = (pl.read_parquet(folder / out / name) for out in ("out", "alone-lists"))
        assert one.equals(other), name
    assert told["first"]["metrics"] == alone.to_dict()["metrics"]
    assert told["first"]["protocol"] == alone.evaluation.protocol
    assert (told["first"]["blocks"], told["first"]["kept"]) == (5, 0)
    assert (told["second"]["blocks"], told["second"]["kept"]) == (5, 4)
    assert told["failed"] == "of a worker"

    names = sorted(path.name for path in (folder / "alone").iterdir())
    assert sorted(path.name for path in (folder / "shards").iterdir()) == names
    for name in names:
        assert (folder / "shards" / name).read_bytes() == (folder / "alone" / name).read_bytes()


def test_without_ray_there_is_one_line_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install 'steerrec\[ray\]'"):
        list(RayEngine().run(print, {}, [{}]))


def test_errors_of_workers_are_handed_on():
    with pytest.raises(DataError, match="so it is"):
        unless_told(told(DataError("so it is")))
    assert unless_told({"number": 1}) == {"number": 1}


def test_engines_from_options():
    local = engine_options.engine_of(engine_options.EngineName.local, None, None, 2)
    assert local == LocalEngine(threads=2)
    ray = engine_options.engine_of(engine_options.EngineName.ray, "auto", 3, None, "cuda")
    assert ray == RayEngine(address="auto", workers=3, threads=1, gpus=1)
