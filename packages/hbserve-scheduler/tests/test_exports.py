"""What the package offers."""

import inspect

import hbserve_scheduler


def test_every_exported_name_exists_once_and_in_order() -> None:
    names = hbserve_scheduler.__all__
    assert names == sorted(set(names))
    assert all(hasattr(hbserve_scheduler, name) for name in names)


def test_every_class_and_function_of_the_package_is_exported() -> None:
    public = {
        name
        for name, value in vars(hbserve_scheduler).items()
        if not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
    }
    assert public == set(hbserve_scheduler.__all__)


def test_the_override_point_and_its_tools_are_documented() -> None:
    scheduler = hbserve_scheduler.CpuScheduler
    for name in ("_schedule_waiting_requests", "has_room", "start_request"):
        assert inspect.getdoc(getattr(scheduler, name))
    assert inspect.iscoroutinefunction(scheduler._schedule_waiting_requests)
    assert "_schedule_waiting_requests" in (inspect.getdoc(scheduler) or "")
