"""Named streams of randomness, and the choice of the device."""

import re

import numpy as np
import pytest
import torch

from helpers.lab.runtime import device, generator, rng, seeded

SOURCES = {
    "generator": lambda stream: torch.rand(8, generator=generator(stream), device=device()).cpu().numpy(),
    "rng": lambda stream: rng(stream).random(8),
    "seeded": lambda stream: draw_in_seeded(stream),
}


def draw_in_seeded(stream):
    with seeded(stream):
        return torch.rand(8).numpy()


@pytest.fixture(params=SOURCES)
def draw(request):
    return SOURCES[request.param]


def test_same_seed_and_stream_give_the_same_draws(draw):
    np.testing.assert_array_equal(draw("a"), draw("a"))


def test_different_streams_give_different_draws(draw):
    assert not np.any(draw("a") == draw("b"))


def test_different_seeds_give_different_draws(draw, monkeypatch):
    monkeypatch.setenv("BOOK_SEED", "1")
    first = draw("a")
    monkeypatch.setenv("BOOK_SEED", "2")
    assert not np.any(first == draw("a"))


def test_seed_is_zero_unless_told_otherwise(draw, monkeypatch):
    monkeypatch.setenv("BOOK_SEED", "0")
    explicit = draw("a")
    monkeypatch.delenv("BOOK_SEED")
    np.testing.assert_array_equal(draw("a"), explicit)


def test_another_stream_does_not_shift_the_draws(draw):
    alone = draw("a")
    draw("b")
    rng("c").random(100)
    torch.rand(100, generator=generator("d"), device=device())
    np.testing.assert_array_equal(draw("a"), alone)


def test_global_draws_do_not_shift_a_stream(draw):
    alone = draw("a")
    torch.rand(3)
    np.testing.assert_array_equal(draw("a"), alone)


def test_seed_and_stream_are_not_run_together(draw, monkeypatch):
    # "1" + "2a" and "12" + "a" would be one string without a separator.
    monkeypatch.setenv("BOOK_SEED", "1")
    first = draw("2a")
    monkeypatch.setenv("BOOK_SEED", "12")
    assert not np.any(first == draw("a"))


def test_spellings_of_one_seed_are_one_seed(draw, monkeypatch):
    monkeypatch.setenv("BOOK_SEED", "7")
    plain = draw("a")
    monkeypatch.setenv("BOOK_SEED", " +07 ")
    np.testing.assert_array_equal(draw("a"), plain)


def test_negative_seeds_are_seeds(draw, monkeypatch):
    monkeypatch.setenv("BOOK_SEED", "-3")
    negative = draw("a")
    monkeypatch.setenv("BOOK_SEED", "3")
    assert not np.any(negative == draw("a"))


def test_each_call_starts_the_stream_afresh():
    first, second = generator("a"), generator("a")
    torch.rand(5, generator=first, device=device())
    np.testing.assert_array_equal(rng("a").random(3), rng("a").random(3))
    assert second.initial_seed() == first.initial_seed()
    assert not torch.equal(first.get_state(), second.get_state())


@pytest.mark.parametrize("value", ["", "one", "1.5", "0x10", "1e3"])
def test_a_seed_that_is_not_an_integer_is_refused(draw, monkeypatch, value):
    monkeypatch.setenv("BOOK_SEED", value)
    with pytest.raises(ValueError, match=re.escape(f"BOOK_SEED must be an integer, got {value!r}")):
        draw("a")


def test_a_stream_without_a_name_is_refused(draw):
    with pytest.raises(ValueError, match="a stream must have a name, got ''"):
        draw("")


def test_seeded_restores_the_global_state():
    state = torch.get_rng_state()
    draw_in_seeded("a")
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_restores_the_global_state_after_an_exception():
    state = torch.get_rng_state()

    def fail():
        with seeded("a"):
            torch.rand(3)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_blocks_nest():
    with seeded("a"):
        torch.rand(2)
        expected = torch.rand(2)
    with seeded("a"):
        torch.rand(2)
        draw_in_seeded("b")
        torch.testing.assert_close(torch.rand(2), expected, rtol=0, atol=0)


def test_module_constructors_obey_seeded():
    with seeded("a"):
        first = torch.nn.Linear(3, 2)
    with seeded("a"):
        second = torch.nn.Linear(3, 2)
    assert torch.equal(first.weight, second.weight)


def test_cpu_is_taken_literally(monkeypatch):
    monkeypatch.setenv("BOOK_DEVICE", "cpu")
    assert device() == torch.device("cpu")
    assert generator("a").device == torch.device("cpu")


@pytest.mark.parametrize("available", [True, False])
@pytest.mark.parametrize("unset", [True, False])
def test_auto_is_cuda_where_there_is_one(monkeypatch, available, unset):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(available))
    monkeypatch.setenv("BOOK_DEVICE", "auto")
    if unset:
        monkeypatch.delenv("BOOK_DEVICE")
    assert device() == torch.device("cuda" if available else "cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1"])
def test_cuda_is_taken_literally_where_there_are_two(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("BOOK_DEVICE", name)
    assert device() == torch.device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1"])
def test_cuda_is_refused_where_there_is_none(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("BOOK_DEVICE", name)
    with pytest.raises(ValueError, match=f"this machine has 0 CUDA devices, got '{name}'"):
        device()


def test_a_cuda_index_beyond_the_last_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("BOOK_DEVICE", "cuda:2")
    with pytest.raises(ValueError, match="this machine has 2 CUDA devices, got 'cuda:2'"):
        device()


@pytest.mark.parametrize("name", ["mps", "mps:0"])
def test_mps_is_refused_with_the_reason(monkeypatch, name):
    monkeypatch.setenv("BOOK_DEVICE", name)
    with pytest.raises(ValueError, match=f"MPS lacks float64, in which every claim is computed, got '{name}'"):
        device()


@pytest.mark.parametrize("name", ["", "gpu", "CPU", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "cuda:1:2", "cuda1", "meta"])
def test_other_devices_are_refused(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("BOOK_DEVICE", name)
    rule = f"BOOK_DEVICE must be auto, cpu, cuda or cuda:<index>, got {name!r}"
    with pytest.raises(ValueError, match=re.escape(rule)):
        device()


def test_generator_refuses_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setenv("BOOK_DEVICE", "gpu")
    with pytest.raises(ValueError, match="BOOK_DEVICE must be"):
        generator("a")
