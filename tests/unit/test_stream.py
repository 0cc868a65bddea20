"""The background thread: how requests become batches, and what happens to errors."""

import asyncio
import random
import threading
import time

import pytest

from rlkd.stream import Pause, Station, Stream

IN_EITHER_THREAD = pytest.mark.parametrize("ahead", [True, False])


class Recorder:
    """Stations that answer a request with its double, and record their batches."""

    def __init__(self, *, together=True, ahead=True, names=("first", "second")):
        self.stream = Stream(together=together, ahead=ahead)
        self.batches, self.threads = [], set()
        self.stations = {name: Station(self.stream, self._act(name)) for name in names}

    def _act(self, name):
        def act(requests, deliver):
            self.batches.append((name, list(requests)))
            self.threads.add(threading.current_thread())
            for index, request in enumerate(requests):
                deliver(index, 2 * request)

        return act

    def __getitem__(self, name):
        return self.stations[name]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()


async def through_both(made, number, pause):
    answer = await made["first"].ask(number)
    await asyncio.sleep(pause)
    return await made["second"].ask(answer) if number % 3 else answer


@IN_EITHER_THREAD
def test_batches_are_a_function_of_the_requests_and_not_of_time(ahead):
    draw = random.Random(0)
    for _ in range(20):
        with Recorder(ahead=ahead) as made:
            ways = [through_both(made, i, draw.random() / 200) for i in range(9)]
            answers = made.stream.run(ways)
        assert made.batches == [("first", list(range(9))), ("second", [2, 4, 8, 10, 14, 16])]
        assert answers == [4 * i if i % 3 else 2 * i for i in range(9)]


@IN_EITHER_THREAD
def test_the_earlier_station_goes_first(ahead):
    """Tasks that ask the later one at once wait for those that come to it later: one batch, not two."""

    async def way(made, number):
        if number % 2:
            number = await made["first"].ask(number)
        return await made["second"].ask(number)

    with Recorder(ahead=ahead) as made:
        assert made.stream.run([way(made, i) for i in range(4)]) == [0, 4, 4, 12]
    assert made.batches == [("first", [1, 3]), ("second", [0, 2, 2, 6])]


@IN_EITHER_THREAD
def test_without_waiting_for_all_a_batch_begins_when_the_model_is_free(ahead):
    async def late(made):
        await asyncio.sleep(0.2)
        return await made["first"].ask(1)

    with Recorder(together=False, ahead=ahead) as made:
        assert made.stream.run([made["first"].ask(0), late(made)]) == [0, 2]
    assert made.batches == [("first", [0]), ("first", [1])]


@IN_EITHER_THREAD
def test_an_answer_arrives_before_the_batch_ends(ahead):
    stream, released = Stream(together=True, ahead=ahead), threading.Event()

    def act(requests, deliver):
        deliver(0, "early")
        assert released.wait(10), "nobody got the first answer while the second one was computed"
        deliver(1, "late")

    station = Station(stream, act)

    async def way(number):
        answer = await station.ask(number)
        if answer == "early":
            released.set()
        return answer

    assert stream.run([way(0), way(1)]) == ["early", "late"]
    stream.close()


def test_a_task_in_a_pause_holds_up_no_batch_and_counts_again_at_once():
    with Recorder() as made:

        async def waits(gate):
            value = await gate.wait()
            return await made["second"].ask(value)

        async def opens(gate):
            await made["first"].ask(1)
            gate.end(7)
            return await made["second"].ask(1)

        async def both():
            gate = Pause(made.stream)
            async with asyncio.TaskGroup() as group:
                made.stream.start(group, (0,), waits(gate))
                made.stream.start(group, (1,), opens(gate))

        made.stream.submit(both()).result(10)
        assert made.batches == [("first", [1]), ("second", [7, 1])]


@IN_EITHER_THREAD
def test_the_first_error_cancels_the_others_and_leaves_the_stream_usable(ahead):
    ended = []

    async def fails():
        raise ValueError("no such thing")

    async def waits():
        try:
            await asyncio.sleep(100)
        finally:
            ended.append(True)

    with Recorder(ahead=ahead) as made:
        with pytest.raises(ValueError, match="no such thing"):
            made.stream.run([made["first"].ask(0), waits(), fails()])
        assert ended == [True]
        assert made.stream.run([made["first"].ask(4), made["first"].ask(5)]) == [8, 10]
        assert made.batches[-1] == ("first", [4, 5])


@IN_EITHER_THREAD
def test_an_error_of_a_model_reaches_those_that_asked(ahead):
    stream = Stream(together=True, ahead=ahead)

    def act(requests, deliver):
        deliver(0, "fine")
        raise RuntimeError("out of memory")

    station = Station(stream, act)

    async def way(number):
        try:
            return await station.ask(number)
        except RuntimeError as error:
            return str(error)

    assert stream.run([way(0), way(1)]) == ["fine", "out of memory"]
    stream.close()


@IN_EITHER_THREAD
def test_models_compute_in_the_thread_that_waits_unless_the_stream_works_ahead(ahead):
    with Recorder(ahead=ahead) as made:
        assert made.stream.run([through_both(made, i, 0) for i in (1, 2)]) == [4, 8]
        assert (made.threads == {threading.current_thread()}) is not ahead


def test_a_signal_in_a_batch_ends_the_wait_and_the_stream_can_be_closed():
    stream = Stream(together=True, ahead=False)

    def act(requests, deliver):
        raise KeyboardInterrupt

    station = Station(stream, act)
    with pytest.raises(KeyboardInterrupt):
        stream.run([station.ask(0)])
    stream.close()


def test_closing_cancels_what_is_under_way_and_ends_the_thread():
    before = threading.active_count()
    made = Recorder()
    future = made.stream.submit(asyncio.sleep(100))
    time.sleep(0.05)
    made.stream.close()
    assert future.cancelled()
    assert threading.active_count() == before
