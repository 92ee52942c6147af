"""Audits on a real Ray cluster of this machine: the same answers as in worker processes; skips where Ray is absent."""

import pytest

from edgepriv.device.release import parse_policy
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
