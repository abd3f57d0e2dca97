"""Following a trainer that returns only when it is done."""

from __future__ import annotations

import threading

import pytest

from jaxpruner_baselines.background import follow
from jaxpruner_baselines.baseline import Progress


def drain(generator):
    reports = []
    while True:
        try:
            reports.append(next(generator))
        except StopIteration as end:
            return reports, end.value


def test_reports_come_in_order_and_then_the_result():
    def work(report):
        for step in range(3):
            report(Progress(step, 3))
        return threading.current_thread().name

    reports, name = drain(follow(work))
    assert [progress.done for progress in reports] == [0, 1, 2]
    assert name != threading.current_thread().name


def test_what_the_work_raises_is_raised_here():
    def work(report):
        report(Progress(1, 2))
        raise ValueError("a bad batch")

    following = follow(work)
    assert next(following).done == 1
    with pytest.raises(ValueError, match="a bad batch"):
        next(following)


def test_closing_ends_the_work_at_its_next_report():
    step, ended = threading.Semaphore(1), threading.Event()

    def work(report):
        try:
            for done in range(1_000_000):
                step.acquire()
                report(Progress(done, 1_000_000))
        finally:
            ended.set()

    following = follow(work)
    next(following)
    step.release(5)
    following.close()
    assert ended.is_set()
