"""What the process has only once is as it was, however many threads trace at the same time."""

from __future__ import annotations

import gc
import logging
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from small_networks import Run, conv
from torch import nn

import secateur as sc
from secateur._internal.state import without_fast_path
from secateur.tracing.proof import no_collection
from secateur.tracing.skeleton import quiet

LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
# a context that turns a switch of the process off, how to read it, how to set it
SWITCHES = {
    "attention's fast path": (
        without_fast_path, torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled),
    "garbage collection": (no_collection, gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    "PyTorch's log": (quiet, lambda: not LOGGER.disabled, lambda on: setattr(LOGGER, "disabled", not on)),
}  # fmt: skip


@pytest.fixture(params=SWITCHES)
def switch(request):
    off, is_on, turn = SWITCHES[request.param]
    before = is_on()
    yield off, is_on, turn
    turn(before)


@pytest.mark.parametrize("before", [True, False])
def test_a_switch_is_as_before_when_turns_overlap(switch, before):
    """The first to begin is the first to end: whoever comes second finds the switch off, and must not keep it so."""
    off, is_on, turn = switch
    turn(before)
    first, second = ExitStack(), ExitStack()
    first.enter_context(off())
    second.enter_context(off())
    assert not is_on()
    first.close()
    assert not is_on()  # the second still needs it off
    second.close()
    assert is_on() == before


def test_a_switch_is_as_before_after_many_threads(switch):
    off, is_on, turn = switch
    turn(True)
    wrong = []

    def use(seed):
        source = random.Random(seed)
        for _ in range(300):
            with off():
                for _ in range(source.randrange(3)):
                    if is_on():
                        wrong.append(seed)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert not wrong and is_on()


def test_a_switch_is_put_back_after_an_error(switch):
    off, is_on, turn = switch
    turn(True)
    with pytest.raises(KeyError), off(), off():
        raise KeyError
    assert is_on()


def networks():
    encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    plain = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 2))
    by_value = Run(lambda m, x: m.b(m.a(x) if m.flag.item() > 0 else x), a=nn.Linear(5, 8), b=nn.Linear(8, 3),
                   flag=nn.Parameter(torch.ones(())))  # fmt: skip
    return [(encoder, torch.randn(2, 3, 8)), (plain, torch.randn(1, 3, 4, 4)), (by_value, torch.randn(2, 5))]


def states():
    return (
        torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), gc.isenabled(),
        torch.backends.mha.get_fastpath_enabled(), LOGGER.disabled,
    )  # fmt: skip


def test_traces_in_many_threads_find_what_one_finds_and_leave_no_trace():
    cases = [*networks(), *networks()]
    alone = [sc.trace(*case).summary() for case in cases]
    before = states()
    barrier = threading.Barrier(len(cases))

    def traced(case):
        barrier.wait()
        return [sc.trace(*case).summary() for _ in range(3)]

    with ThreadPoolExecutor(len(cases)) as pool:
        found = list(pool.map(traced, cases))
    assert found == [[summary] * 3 for summary in alone]
    assert states() == before


def test_forwards_that_draw_in_two_threads_leave_the_random_states():
    """The first thread's forward waits for the second's, which would remember the first's state as everybody's."""
    begun, done = [threading.Event(), threading.Event()], threading.Event()

    def network(number):
        def forward(m, x):
            random.random(), np.random.rand(), torch.rand(())
            if threading.current_thread() is not threading.main_thread() and not begun[number].is_set():
                begun[number].set()
                (begun[1] if number == 0 else done).wait(0.5)
            return m.b(m.a(x))

        return Run(forward, a=nn.Linear(4, 8), b=nn.Linear(8, 2))

    models = [network(0), network(1)]  # a new network draws its weights

    def first():
        sc.trace(models[0], torch.zeros(1, 4))
        done.set()

    def second():
        begun[0].wait(5)
        sc.trace(models[1], torch.zeros(1, 4))

    before = states()
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(first), pool.submit(second)]:
            future.result(timeout=60)
    assert states() == before


def test_plans_of_one_graph_are_proven_in_many_threads():
    """They share a skeleton, which is cut and put back by one at a time."""
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 2))
    graph = sc.trace(model, torch.randn(1, 3, 4, 4))

    def proven(seed):
        source = random.Random(seed)
        for _ in range(20):
            removed = {g.name: source.sample(range(len(g)), source.randrange(1, len(g))) for g in graph.groups}
            assert sc.make_plan(graph, removed).proven
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(proven, range(6)))
