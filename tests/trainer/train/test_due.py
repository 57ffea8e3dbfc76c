"""What is due after a step."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from trainer.group.requests import Request
from trainer.train.due import Due, Schedule, due_after

every = st.none() | st.integers(1, 12)
schedules = st.builds(Schedule, st.integers(1, 40), st.integers(1, 12), every, every)
requests = st.sampled_from(Request)
PLAIN = Schedule(total_steps=40, log_every=10, checkpoint_every=None, evaluate_every=None)
NOTHING = Due(*[False] * 8)


def due(schedule: Schedule, step: int, request: Request = Request.NONE, **times: bool) -> Due:
    return due_after(step, schedule, request, **{"snapshot_due": False, "checkpoint_overdue": False, **times})


@given(
    schedule=schedules, data=st.data(), request=requests, snapshot_due=st.booleans(), overdue=st.booleans()
)
def test_invariants_after_every_step(
    schedule: Schedule, data: st.DataObject, request: Request, snapshot_due: bool, overdue: bool
) -> None:
    step = data.draw(st.integers(1, schedule.total_steps))
    here, elsewhere = (
        due_after(step, schedule, request, snapshot, late)
        for snapshot, late in ((snapshot_due, overdue), (False, False))
    )
    # Ranks agree about all that they do together: they would wait for each other for ever otherwise.
    for name in ("meet", "evaluate", "stop", "finished"):
        assert getattr(here, name) == getattr(elsewhere, name)
    assert here.meet or not (here.evaluate or here.stop or here.finished)
    assert here.log or here == NOTHING
    assert here.picture == here.checkpoint
    assert here.finished == (step == schedule.total_steps)
    assert here.stop == (request is Request.SAVE and not here.finished)
    assert not (here.snapshot and (here.stop or here.finished))
    if here.finished:
        assert here.checkpoint
        assert here.evaluate == (schedule.evaluate_every is not None)


@given(schedule=schedules)
def test_each_thing_is_due_at_its_multiples_and_at_the_end(schedule: Schedule) -> None:
    steps = range(1, schedule.total_steps + 1)
    for name, interval in (("checkpoint", schedule.checkpoint_every), ("evaluate", schedule.evaluate_every)):
        multiples = {step for step in steps if interval and step % interval == 0}
        if name == "checkpoint" or interval:
            multiples.add(schedule.total_steps)
        assert {step for step in steps if getattr(due(schedule, step), name)} == multiples


def test_a_stop_request_stops_at_once_but_at_the_last_step() -> None:
    assert due(PLAIN, 3, Request.SAVE, snapshot_due=True) == replace(NOTHING, log=True, meet=True, stop=True)
    last = Due(
        log=True,
        meet=True,
        evaluate=False,
        checkpoint=True,
        picture=True,
        stop=False,
        snapshot=False,
        finished=True,
    )
    assert due(PLAIN, 40, Request.SAVE) == last


def test_a_stop_request_skips_an_evaluation_but_no_checkpoint() -> None:
    schedule = replace(PLAIN, checkpoint_every=5, evaluate_every=5)
    found = due(schedule, 5, Request.SAVE)
    assert found.checkpoint
    assert not found.evaluate


def test_an_overdue_checkpoint_waits_for_a_step_that_logs() -> None:
    assert due(PLAIN, 9, checkpoint_overdue=True) == NOTHING
    assert due(PLAIN, 10, checkpoint_overdue=True).checkpoint


def test_a_snapshot_makes_a_step_log() -> None:
    assert due(PLAIN, 9, snapshot_due=True) == replace(NOTHING, log=True, snapshot=True)
