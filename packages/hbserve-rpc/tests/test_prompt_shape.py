"""What is said of a prompt in place of its tokens."""

import msgspec
import pytest

from hbserve_rpc.prompt_shape import DIGEST_BYTES, PromptShape, extend_digests, shape_of


def test_a_shape_has_length_largest_token_and_a_digest_of_each_full_block():
    shape = shape_of([3, 900, 4, 1, 5], 2)
    assert (shape.num_tokens, shape.largest_id, len(shape.digests)) == (5, 900, 2)
    assert shape_of([3, 900, 4, 1, 5]) == PromptShape(5, 900, [])
    assert shape_of([], 2) == PromptShape(0, 0, [])


def test_prompts_have_the_digests_of_their_common_prefix_in_common_and_no_other():
    one, other = shape_of([1, 2, 3, 4, 5, 6, 7, 8], 2), shape_of([1, 2, 3, 4, 9, 6, 7, 8], 2)
    assert one.digests[:2] == other.digests[:2]
    assert not {*one.digests[2:]} & {*other.digests}
    assert shape_of([3, 4], 2).digests[0] not in one.digests, "a block is known by all before it too"


def test_digests_that_are_extended_are_those_of_the_whole():
    digests: list[bytes] = []
    for end in (3, 4, 11):
        extend_digests(digests, range(100, 111), end, 2)
    assert [each[:DIGEST_BYTES] for each in digests] == shape_of([*range(100, 111)], 2).digests


@pytest.mark.parametrize("digests", [[b"x" * (DIGEST_BYTES + 1)], [b""] * ((1 << 18) + 1), ["text"]])
def test_what_is_too_much_is_refused_where_it_is_decoded(digests):
    sent = msgspec.msgpack.encode({"num_tokens": 3, "largest_id": 5, "digests": digests})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(sent, type=PromptShape)
