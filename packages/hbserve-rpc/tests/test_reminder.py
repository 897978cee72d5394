"""Something that is wrong for long: it is said at once, then ever more rarely."""

import itertools

from hbserve_rpc.reminder import Reminder


def test_it_is_said_at_once_then_ever_more_rarely_and_for_ever():
    reminder = Reminder(0.0, first_pause_s=60.0, longest_pause_s=3600.0)
    assert not reminder.was_said
    said_s = [float(now_s) for now_s in range(100_000) if reminder.say_now(now_s)]
    pauses_s = [late - early for early, late in itertools.pairwise(said_s)]
    assert said_s[0] == 0
    assert pauses_s[:4] == [60.0 * factor for factor in (1, 2, 4, 8)]
    assert pauses_s == sorted(pauses_s)
    assert pauses_s[-1] == 3600.0
    assert reminder.was_said


def test_what_was_said_when_it_began_is_said_again_after_a_pause():
    reminder = Reminder(5.0, was_said=True, first_pause_s=10.0)
    assert reminder.was_said
    assert not reminder.say_now(14.9)
    assert reminder.say_now(15.0)
    assert not reminder.say_now(34.9)
    assert reminder.say_now(35.0)
    assert reminder.began_s == 5.0
