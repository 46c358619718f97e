"""Who gets which task: decided without a process or a clock."""

from __future__ import annotations

from mp_ipcchan._pools._schedule import Schedule


def _schedule(lanes: int, tasks: int, estimate: float | None = None) -> Schedule[int]:
    schedule: Schedule[int] = Schedule()
    for key in range(lanes):
        schedule.open(key)
    schedule.pending.extend(range(tasks))
    schedule.estimate = estimate
    return schedule


def test_one_each_while_nothing_is_known() -> None:
    schedule = _schedule(lanes=3, tasks=10)
    assert schedule.assign() == [(0, [0]), (1, [1]), (2, [2])]
    assert schedule.assign() == []
    assert list(schedule.pending) == [3, 4, 5, 6, 7, 8, 9]


def test_several_at_a_time_where_they_are_short() -> None:
    schedule = _schedule(lanes=2, tasks=1000, estimate=1e-5)
    assert schedule.window == 100
    assert [len(tasks) for _, tasks in schedule.assign()] == [100, 100]
    # Let alone until half of them are answered.
    for _ in range(49):
        schedule.answer(0, 1)
    assert schedule.assign() == []
    for _ in range(2):
        schedule.answer(0, 1)
    assert [(key, len(tasks)) for key, tasks in schedule.assign()] == [(0, 51)]


def test_few_tasks_are_spread() -> None:
    schedule = _schedule(lanes=4, tasks=8, estimate=1e-6)
    assert [tasks for _, tasks in schedule.assign()] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_one_at_a_time_where_they_are_long() -> None:
    schedule = _schedule(lanes=2, tasks=5, estimate=0.1)
    assert [tasks for _, tasks in schedule.assign()] == [[0], [1]]
    schedule.answer(1, 1)
    assert schedule.assign() == [(1, [2])]


def test_a_long_task_is_believed_at_once_and_short_ones_slowly() -> None:
    schedule = _schedule(lanes=1, tasks=0)
    schedule.measure(10, 1e-4)
    assert schedule.window == 100
    schedule.measure(1, 0.5)
    assert schedule.window == 1
    schedule.measure(1, 1e-5)
    assert schedule.window == 1


def test_room() -> None:
    """A worker that is to be replaced after some tasks is given no more."""
    schedule: Schedule[int] = Schedule()
    schedule.open(0, room=3)
    schedule.pending.extend(range(10))
    schedule.estimate = 1e-6
    assert schedule.assign() == [(0, [0, 1, 2])]
    schedule.answer(0, 3)
    assert schedule.assign() == []


def test_close_gives_what_was_not_answered() -> None:
    schedule = _schedule(lanes=1, tasks=5, estimate=1e-4)
    schedule.assign()
    assert schedule.answer(0, 1) == [0]
    assert schedule.close(0) == [1, 2, 3, 4]
    assert schedule.idle


def test_what_waits_behind_another_is_given_to_an_idle_lane() -> None:
    schedule = _schedule(lanes=1, tasks=4, estimate=1e-4)
    schedule.assign()
    assert schedule.waiting_elsewhere() is None
    schedule.open(1)
    behind = schedule.waiting_elsewhere()
    assert behind is not None
    assert behind.key == 0
    schedule.answer(0, 1)
    # The second one has begun: those from number 2 on are taken back.
    assert schedule.take_back(0, 2) == [2, 3]
    assert schedule.assign() == [(1, [2, 3])]
    assert schedule.answer(0, 3) == [1, None, None]
    assert schedule.waiting_elsewhere() is None or schedule.waiting_elsewhere() is schedule.lanes[1]


def test_idle_while_only_answers_for_what_was_taken_back_are_due() -> None:
    """A pool at its end doesn't wait for them: the workers are told to end behind those."""
    schedule = _schedule(lanes=1, tasks=2, estimate=1e-4)
    schedule.assign()
    schedule.answer(0, 1)
    assert not schedule.idle
    assert schedule.take_back(0, 1) == [1]
    assert not schedule.idle
    schedule.pending.clear()
    assert schedule.idle


def test_one_that_runs_alone_is_let_alone() -> None:
    schedule = _schedule(lanes=2, tasks=1)
    schedule.assign()
    assert schedule.waiting_elsewhere() is None


def test_what_is_cancelled_is_never_given() -> None:
    schedule: Schedule[int] = Schedule(dropped=lambda task: task % 2 == 0)
    schedule.any_dropped = True
    schedule.open(0)
    schedule.estimate = 1e-4
    schedule.pending.extend(range(7))
    assert schedule.assign() == [(0, [1, 3, 5])]
    assert schedule.close(0) == [1, 3, 5]
    assert schedule.idle


def test_large_ones_go_few_at_a_time() -> None:
    schedule: Schedule[int] = Schedule(weight=lambda task: task)
    schedule.open(0)
    schedule.estimate = 1e-6
    schedule.pending.extend([20000, 10000, 10000, 50000, 1])
    assert schedule.assign() == [(0, [20000, 10000])]
    schedule.answer(0, 1)
    assert schedule.assign() == [(0, [10000])]
    schedule.answer(0, 1)
    schedule.answer(0, 1)
    # Larger than all that a worker may have, it goes alone.
    assert schedule.assign() == [(0, [50000])]
    assert schedule.assign() == []
    schedule.answer(0, 1)
    assert schedule.assign() == [(0, [1])]


def test_busy_ones_are_refilled_only_if_asked() -> None:
    schedule = _schedule(lanes=2, tasks=1, estimate=1e-6)
    schedule.assign()
    schedule.pending.extend([7, 8])
    assert schedule.assign(refill=False) == [(1, [7, 8])]
    schedule.pending.append(9)
    assert schedule.assign(refill=False) == []
    assert schedule.assign() == [(0, [9])]


def test_which_lane_has_a_task_and_nothing_else() -> None:
    schedule = _schedule(lanes=2, tasks=3)
    schedule.assign()
    assert [schedule.sole(task) for task in range(3)] == [None, None, None]
    schedule.answer(0, 1)
    schedule.assign()
    assert [schedule.sole(task) for task in range(3)] == [None, 1, 0]
    schedule.estimate = 1e-4
    schedule.pending.append(3)
    schedule.assign()
    assert [schedule.sole(task) for task in range(4)] == [None, 1, None, None]


def test_an_answer_that_was_interrupted_is_finished_once() -> None:
    for taken in (False, True):
        schedule = _schedule(lanes=1, tasks=2, estimate=1e-4)
        schedule.assign()
        lane = schedule.lanes[0]
        lane.leaving = lane.given[0], 1
        if taken:
            lane.given.popleft()
        schedule.finish_answer(0)
        schedule.finish_answer(0)
        assert (list(lane.given), lane.answered) == ([1], 1)
        schedule.answer_one(0)
        assert (list(lane.given), lane.answered) == ([], 2)
