"""Sums over ranks by kernels that write into each other's memory, beside plain torch. All ranks are in this process: on
a GPU each has a stream; in Triton's interpreter one runs after the other, so each is run twice: what it has sent when
nobody waits for it any more is what the others find."""

import pytest
import torch
import torch.nn.functional as F
from hbserve_core_interpreted import KERNELS

pytest.importorskip("triton", reason="torch has Triton on Linux only")
pytestmark = KERNELS
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter cuts bfloat16 off
EPS = 1e-6
FEW_BYTES, MANY_BYTES = 256, 1 << 14
PROGRAMS = 2


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Who waits in vain looks at the host's word each time: interpreted, a look takes long."""
    if DEVICE.type == "cpu":
        import triton.language as tl

        for name in ("_LOOK_EVERY", "_ASK_EVERY"):
            monkeypatch.setattr(f"hbserve_core.cuda_runner.kernels.rank_sum.{name}", tl.constexpr(1))


class Ranks:
    """Some ranks' memory, each mapped into the others'."""

    def __init__(self, size):
        from hbserve_core.cuda_runner.kernels.rank_sum import MOST_PROGRAMS, SharedMemory

        is_pinned = DEVICE.type == "cuda"
        self.turn = 0
        self.shared = [
            SharedMemory(
                rank, size,
                torch.zeros(size, dtype=torch.int64, device=DEVICE),
                torch.ones(MOST_PROGRAMS, dtype=torch.int32, device=DEVICE),
                torch.zeros(1, dtype=torch.int32, device=DEVICE),
                torch.zeros(1, dtype=torch.int32, pin_memory=is_pinned),
                FEW_BYTES, MANY_BYTES,
            )
            for rank in range(size)
        ]  # fmt: skip
        self.memory = [torch.zeros(each.num_bytes, dtype=torch.uint8, device=DEVICE) for each in self.shared]
        for each in self.shared:
            each.bases.copy_(torch.tensor([memory.data_ptr() for memory in self.memory]))
        self.streams = [torch.cuda.Stream() for _ in self.shared] if DEVICE.type == "cuda" else []

    def sum(self, partials, **how):
        """What each rank finds."""
        if partials[0].nbytes > FEW_BYTES:
            how["start"] = self._start()
            partials = [self._placed(*each, how["start"]) for each in zip(self.memory, partials, strict=True)]
        if not self.streams:
            for each, partial in zip(self.shared, partials, strict=True):
                self.send(each, partial, how)
            return [self._one(*each, how) for each in zip(self.shared, partials, strict=True)]
        for each, partial in zip(self.shared, partials, strict=True):
            self.load(each, partial, how)
        found = []
        for stream, shared, partial in zip(self.streams, self.shared, partials, strict=True):
            with torch.cuda.stream(stream):
                found.append(self._one(shared, partial, how))
        torch.cuda.synchronize()
        return found

    def _start(self):
        """Of one of the two places for many rows, in turn."""
        self.turn = 1 - self.turn
        return self.shared[0].many_start + self.turn * MANY_BYTES

    @staticmethod
    def _placed(memory, partial, start):
        place = memory[start : start + partial.nbytes].view(partial.dtype).view(partial.shape)
        return place.copy_(partial)

    @staticmethod
    def _one(shared, partial, how):
        from hbserve_core.cuda_runner.kernels.rank_sum import rank_sum

        add_to = how.get("add_to")
        own = {**how, "add_to": None if add_to is None else add_to.clone()}
        if "parts" in how:
            own["parts"] = how["parts"][shared.rank]
        return rank_sum(partial, shared, programs=PROGRAMS, **own)

    def send(self, shared, partial, how):
        """A sum that this rank gives up, and after which it is as before."""
        from hbserve_core.cuda_runner.kernels.rank_sum import CLOSED, RUNNING

        before = shared.numbers.clone()
        shared.host_word.fill_(CLOSED)
        self._one(shared, partial, how)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        shared.numbers.copy_(before)
        shared.host_word.fill_(RUNNING)
        shared.device_word.fill_(RUNNING)

    def load(self, shared, partial, how):
        """A kernel is loaded onto a device while no other waits there: by a sum of a number that does not come."""
        before = shared.numbers.clone()
        shared.numbers.fill_(1 << 30)
        self.send(shared, partial, how)
        shared.numbers.copy_(before)
        torch.cuda.synchronize()


def random(seed, *shape, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize(
    ("size", "rows", "columns", "dtype"),
    [
        (2, 1, 32, torch.float32),  # few rows: up to 256 bytes
        (3, 3, 24, HALF),
        (2, 5, 48, torch.float32),  # many
        (3, 6, 24, HALF),
    ],
)
def test_every_rank_has_the_same_sum_rounded_once_and_its_norm(size, rows, columns, dtype):
    ranks = Ranks(size)
    weight = random(1, columns, dtype=dtype)
    # The third sum is where the first one was.
    for number in range(3):
        partials = [random(10 * number + rank, rows, columns, dtype=dtype) for rank in range(size)]
        residual = random(99 + number, rows, columns, dtype=dtype)
        found = ranks.sum(partials, add_to=residual, norm=(weight, EPS))
        total = partials[0].float()
        for partial in partials[1:]:
            total = total + partial.float()
        expected = (total + residual.float()).to(dtype)
        normed = F.rms_norm(expected.float(), (columns,), None, EPS).to(dtype) * weight
        for rows_of_one, normed_of_one in found:
            assert torch.equal(rows_of_one, expected)
            torch.testing.assert_close(normed_of_one, normed, rtol=1e-2, atol=1e-5)
        assert all(torch.equal(found[0][1], each) for _, each in found)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_a_sum_of_parts_is_that_of_what_they_add_up_to(dtype):
    """Of two ranks, each with the first or the last of four experts; of padding there is nothing."""
    from hbserve_core.cuda_runner.kernels.experts import ExpertParts, combined

    ranks, rows, columns = Ranks(2), 3, 16
    experts = torch.tensor([[0, 3], [2, 3], [-1, -1]], dtype=torch.int32, device=DEVICE)
    found = [random(rank, rows * 2, columns, dtype=torch.float32) for rank in range(2)]
    parts = [ExpertParts(each, experts, 2 * rank, 2) for rank, each in enumerate(found)]
    partials = [combined(each, dtype=dtype) for each in parts]
    assert not partials[0][1:].any()
    residual = random(99, rows, columns, dtype=dtype)
    expected = ranks.sum(partials, add_to=residual)
    nowhere = [torch.full_like(each, float("nan")) for each in partials]
    for (total, _), (wanted, _) in zip(ranks.sum(nowhere, add_to=residual, parts=parts), expected, strict=True):
        assert torch.equal(total, wanted)


def test_a_sum_may_be_added_to_nothing_and_sums_of_other_sizes_follow_each_other():
    """Those of fewer rows have fewer programs: all must know how many sums there were."""
    ranks = Ranks(2)
    for number, rows in enumerate((1, 5, 1, 2, 6)):
        partials = [random(10 * number + rank, rows, 16, dtype=torch.float32) for rank in range(2)]
        for total, normed in ranks.sum(partials):
            assert torch.equal(total, partials[0] + partials[1])
            assert normed is None


def test_the_count_of_sums_goes_round_without_the_number_of_memory_that_nobody_has_written():
    ranks = Ranks(2)
    for each in ranks.shared:
        each.numbers.fill_(-1)
    for number in range(2):
        partials = [random(10 * number + rank, 1, 16, dtype=torch.float32) for rank in range(2)]
        for total, _ in ranks.sum(partials):
            assert torch.equal(total, partials[0] + partials[1])
    assert {int(each.numbers[0]) for each in ranks.shared} == {3}


@pytest.mark.parametrize("rows", [1, 5], ids=["few", "many"])
def test_who_waits_for_a_rank_that_is_lost_ends_when_the_host_says_so(rows):
    from hbserve_core.cuda_runner.kernels.rank_sum import CLOSED

    ranks = Ranks(2)
    ranks.shared[0].host_word.fill_(CLOSED)
    partial, how = random(1, rows, 48, dtype=torch.float32), {}
    if rows > 1:
        how["start"] = ranks._start()
        partial = ranks._placed(ranks.memory[0], partial, how["start"])
    found, _ = ranks._one(ranks.shared[0], partial, how)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(found, partial)  # nothing of the other is there
    assert ranks.memory[1].any()
    # Sums that are behind it, as in a graph, ask the host no more.
    assert int(ranks.shared[0].device_word) == CLOSED


@pytest.mark.parametrize(("size", "rows", "parts"), [(2, 256, [256]), (2, 257, [129, 128]), (2, 1000, [250] * 4),
                                                     (3, 1000, [1000])])  # fmt: skip
def test_what_is_too_much_for_a_place_is_summed_in_equal_parts_by_two_ranks_and_left_to_nccl_by_more(size, rows, parts):
    shape = rows, MANY_BYTES // 256 // 4
    count = Ranks(size).shared[0].rows_at_once(shape, torch.float32)
    assert [len(part) for part in torch.empty(shape).split(count)] == parts


def test_parts_of_more_rows_than_there_is_room_for_follow_each_other_and_are_normed_into_one():
    ranks, weight, columns = Ranks(2), random(1, 48, dtype=torch.float32), 48
    partials = [random(10 + rank, 9, columns, dtype=torch.float32) for rank in range(2)]
    residual = random(99, 9, columns, dtype=torch.float32)
    normed = torch.full_like(residual, float("nan"))
    for part in (slice(0, 3), slice(3, 6), slice(6, 9)):
        given = {"add_to": residual[part], "norm": (weight, EPS), "normed_to": normed[part]}
        for total, normed_of_one in ranks.sum([partial[part] for partial in partials], **given):
            assert torch.equal(total, partials[0][part] + partials[1][part] + residual[part])
            assert normed_of_one.data_ptr() == normed[part].data_ptr()
    expected = F.rms_norm(partials[0] + partials[1] + residual, (columns,), weight, EPS)
    torch.testing.assert_close(normed, expected, rtol=1e-4, atol=1e-5)
