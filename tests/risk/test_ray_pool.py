"""Audits on real Ray clusters of this machine: the same answers as in worker processes; skips where Ray is absent."""

import os

import pytest

from edgepriv.device.release import parse_policy
from edgepriv.errors import UnavailableError
from edgepriv.risk.config import AuditSection
from edgepriv.risk.worker import AuditTask, open_pool, run_task

pytest.importorskip("ray", reason="Ray is not installed: pip install 'edgepriv[ray]'")
# Ray opens sockets and files that it closes in its own time
pytestmark = [pytest.mark.timeout(300), pytest.mark.filterwarnings("ignore")]


def test_ray_workers_reach_the_verdicts_that_this_process_reaches(digit_models, tmp_path):
    folder, _ = digit_models
    settings = AuditSection("digits", references=3, auditors="ridge", executor="ray", workers=2)
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"certainly no model")
    paths = [folder / "vicious.onnx", folder / "honest.onnx", junk]
    tasks = [AuditTask(path, settings, (parse_policy("argmax"),)) for path in paths]
    pool = open_pool(settings)
    try:
        answers = [future.result(timeout=240) for future in [pool.submit(run_task, task) for task in tasks]]
    finally:
        pool.shutdown()
    for task, answer in zip(tasks[:2], answers[:2], strict=True):
        here = run_task(task).report
        assert answer.report["verdict"] == here["verdict"]
        assert answer.report["policies"][0]["explained_variance"] == pytest.approx(
            here["policies"][0]["explained_variance"], abs=1e-6
        )
    assert answers[2].final
    assert "not an ONNX file" in answers[2].error


@pytest.fixture
def cluster():
    """A cluster of two nodes that runs already, as processes of this machine, and how to reach it."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=2)
    yield made.address
    made.shutdown()


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_cluster_that_runs_already_is_joined_and_gets_the_models_bytes(
    digit_models, tmp_path, cluster, by_environment, monkeypatch
):
    if by_environment:
        monkeypatch.setenv("RAY_ADDRESS", cluster)
    address = "" if by_environment else cluster
    settings = AuditSection("digits", references=2, auditors="ridge", executor="ray", ray_address=address)
    path = tmp_path / "model.onnx"
    path.write_bytes((digit_models[0] / "vicious.onnx").read_bytes())
    pool = open_pool(settings)
    try:
        assert pool.workers == 3  # the cluster's processors, not [audit] workers
        future = pool.submit(run_task, AuditTask(path, settings, (parse_policy("argmax"),), "gate"))
        path.unlink()  # another node never had it
        answer = future.result(timeout=240)
        assert (answer.error, answer.report["model"]) == ("", "gate")
        with pytest.raises(Exception, match=r"died|crashed|exit"):
            pool.submit(os._exit, 3).result(timeout=120)
        assert pool.submit(len, "four").result(timeout=120) == 4
    finally:
        pool.shutdown()


def test_a_cluster_that_is_not_there_is_named():
    with pytest.raises(UnavailableError, match=r"no Ray cluster at 127\.0\.0\.1:9"):
        open_pool(AuditSection("digits", executor="ray", ray_address="127.0.0.1:9"))
