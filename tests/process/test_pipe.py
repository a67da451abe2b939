"""Messages and descriptors between two processes: nothing gets lost, and nothing waits."""

import os
import socket
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from lastgood._process.pipe import MessagePipe, Outbox, Received, RequestType, WorkerRequest, WorkerResponse


@pytest.fixture
def ends() -> Iterator[tuple[MessagePipe, MessagePipe]]:
    one, other = (MessagePipe(end) for end in socket.socketpair())
    yield one, other
    one.close()
    other.close()


def request(**payload: Any) -> WorkerRequest:
    return WorkerRequest(RequestType.WRITE_CHECKPOINT, payload)


def exchange(one: MessagePipe, other: MessagePipe) -> list[Received]:
    """Pump until all has arrived: neither end ever waits for the other."""
    found: list[Received] = []
    while True:
        one.flush()
        found += other.receive()
        if not one.has_unsent:
            return found + other.receive()


def test_messages_arrive_whole_and_in_order_whatever_their_size(ends: tuple[MessagePipe, MessagePipe]) -> None:
    one, other = ends
    sizes = [0, 3_000_000, 1, 70_000, 5_000_000, 2]
    for size in sizes:
        one.queue(request(data=b"x" * size))
    assert [len(received.message.payload["data"]) for received in exchange(one, other)] == sizes


def test_more_descriptors_than_fit_one_system_call_arrive_with_their_messages(
    ends: tuple[MessagePipe, MessagePipe],
) -> None:
    one, other = ends
    one.queue(request(number=0))
    one.queue(request(number=1), [os.open("/dev/null", os.O_RDONLY) for _ in range(450)])
    one.queue(request(number=2), [os.memfd_create("marked")])
    one.queue(request(number=3))
    found = exchange(one, other)
    assert [len(received.descriptors) for received in found] == [0, 450, 1, 0]
    assert "marked" in os.readlink(f"/proc/self/fd/{found[2].descriptors[0]}")
    for received in found:
        for descriptor in received.descriptors:
            assert not os.get_inheritable(descriptor)
            os.close(descriptor)


def test_descriptors_that_nobody_took_are_closed() -> None:
    before = os.listdir("/proc/self/fd")
    one, other = (MessagePipe(end) for end in socket.socketpair())
    one.queue(request(), [os.open("/dev/null", os.O_RDONLY)])
    one.flush()
    one.queue(request(), [os.open("/dev/null", os.O_RDONLY)])
    other.close()
    one.close()
    assert os.listdir("/proc/self/fd") == before


def test_a_full_socket_does_not_keep_the_sender_waiting(ends: tuple[MessagePipe, MessagePipe]) -> None:
    one, other = ends
    sent: list[int] = []
    one.queue(request(data=b"x" * 10_000_000), sent=lambda: sent.append(1))
    one.flush()
    assert one.has_unsent
    assert sent == []
    exchange(one, other)
    assert sent == [1]


def test_the_end_of_the_other_side_is_told_after_its_last_messages(ends: tuple[MessagePipe, MessagePipe]) -> None:
    one, other = ends
    one.queue(request(last=True))
    one.flush()
    one.close()
    assert [received.message.payload for received in other.receive()] == [{"last": True}]
    assert other.is_ended
    other.queue(request())
    with pytest.raises(BrokenPipeError):
        other.flush()


def test_a_connection_of_multiprocessing_understands_it_both_ways() -> None:
    ours, theirs = socket.socketpair()
    pipe, connection = MessagePipe(ours), Connection(theirs.detach())
    try:
        pipe.queue(WorkerResponse(RequestType.PING, True, payload={"size": "x" * 100_000}))
        pipe.flush()
        assert connection.recv() == WorkerResponse(RequestType.PING, True, payload={"size": "x" * 100_000})
        connection.send(WorkerRequest(RequestType.TERMINATE_PROCESS, {}))
        assert pipe.receive() == [Received(WorkerRequest(RequestType.TERMINATE_PROCESS, {}), [])]
    finally:
        connection.close()
        pipe.close()


def test_the_names_of_requests_are_those_that_users_know() -> None:
    assert {each.name: each.value for each in RequestType} == {
        "PING": "ping",
        "WRITE_CHECKPOINT": "write_checkpoint",
        "TERMINATE_PROCESS": "exit",
    }


def test_unsent_news_of_progress_is_replaced_by_newer_news_of_the_same_save(
    ends: tuple[MessagePipe, MessagePipe],
) -> None:
    one, other = ends
    outbox = Outbox()
    for save, staged in ((1, 10), (1, 20), (2, 5), (1, 30), (1, 40)):
        outbox.post(request(save=save, event="advance", staged=staged))
    outbox.post(request(save=1, event="complete"))
    outbox.move_to(one)
    outbox.close()
    found = [received.message.payload for received in other.receive()]
    assert [(each["save"], each.get("staged")) for each in found] == [(1, 20), (2, 5), (1, 40), (1, None)]


def test_what_is_posted_to_a_closed_outbox_is_dropped_with_its_descriptors() -> None:
    before = os.listdir("/proc/self/fd")
    outbox = Outbox()
    outbox.post(request(), [os.open("/dev/null", os.O_RDONLY)])
    outbox.close()
    outbox.post(request(), [os.open("/dev/null", os.O_RDONLY)])
    assert os.listdir("/proc/self/fd") == before
