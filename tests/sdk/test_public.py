"""The public surface is what `__all__` says."""

import inspect

import medreasoner


def test_all_is_sorted_and_equal_to_the_real_exports() -> None:
    exported = {
        name for name, value in vars(medreasoner).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(medreasoner.__all__) == exported | {"__version__"}
    assert list(medreasoner.__all__) == sorted(medreasoner.__all__)


def test_every_public_name_has_a_docstring_and_says_where_it_belongs() -> None:
    for name in medreasoner.__all__:
        value = getattr(medreasoner, name)
        if name != "__version__":
            assert inspect.getdoc(value), name
            assert value.__module__.startswith("medreasoner."), name


def test_errors_share_a_base_and_are_natural_kinds() -> None:
    assert issubclass(medreasoner.QueryError, ValueError)
    assert issubclass(medreasoner.ImageReadError, OSError)
    errors = [getattr(medreasoner, name) for name in medreasoner.__all__ if name.endswith("Error")]
    assert all(issubclass(error, medreasoner.MedReasonerError) for error in errors)
