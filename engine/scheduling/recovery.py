"""Ends or repeats the requests of a failed step.

Nothing is repaired: a request whose step was not computed is preempted and computed again, which gives the
same tokens. Only the requests that may have caused the failure end.
"""

from __future__ import annotations

from engine.request import Request
from engine.scheduling.batch import ScheduledBatch
from engine.scheduling.scheduler import Scheduler


def retract(scheduler: Scheduler, batch: ScheduledBatch, error: Exception, culprit: Request | None) -> None:
    """Take back the latest step, whose computation raised ``error`` before it gave anything.

    If the culprit is known, or the step had a single request, that request ends. Otherwise the requests whose
    prompts were computed become suspects, or all requests if none had a prompt: suspects are computed apart
    from each other, so that another failure can be attributed. A request that is a suspect already ends. Each
    failure thus ends a request or makes one a suspect, and no step fails forever. Chunks of answers are not
    computed apart, so they are no prompts here.
    """
    requests = _requests_of(scheduler, batch)
    if all(chunk.request in requests for chunk in batch.prefills):
        for chunk in batch.prefills:
            scheduler.kv.withdraw(chunk.request, chunk.start)
    else:
        # The blocks of a request that has ended meanwhile are no longer known.
        scheduler.kv.pool.withdraw_all()
    scheduler.take_back(batch)
    for request in requests:
        scheduler.preempt(request, publish=False)
    if culprit is not None:
        scheduler.fail(culprit, error)
        return
    prompts = [chunk.request for chunk in batch.prefills if chunk.answer is None]
    for request in [request for request in prompts if request in requests] or requests:
        if request.suspect or len(requests) == 1:
            scheduler.fail(request, error)
        request.suspect = True


def abandon(scheduler: Scheduler, error: Exception, batch: ScheduledBatch | None = None) -> None:
    """Continue after an error that leaves unknown which tokens are computed.

    The requests of ``batch`` end, all others that run are preempted, and nothing stays cached.

    Args:
        batch: the step at fault; None ends all running requests, or all that wait if none runs.
    """
    scheduler.kv.pool.withdraw_all()
    running = scheduler.running
    ending = (running or scheduler.waiting) if batch is None else _requests_of(scheduler, batch)
    for request in ending:
        scheduler.fail(request, error)
    for request in running:
        if not request.finished:
            scheduler.preempt(request, publish=False)


def _requests_of(scheduler: Scheduler, batch: ScheduledBatch) -> list[Request]:
    """The requests of a step that have neither ended nor been preempted since it was scheduled."""
    assert batch.epochs is not None
    table, slots = scheduler.slots, batch.sampling_slots
    sampling = table.requests[slots[table.epoch[slots] == batch.epochs]].tolist()
    chunks = [chunk.request for chunk in batch.prefills if chunk.request.slot == chunk.slot]
    return list(dict.fromkeys([*sampling, *chunks]))
