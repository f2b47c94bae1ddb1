"""Attributes of hivemind's objects: an error that says what to use instead, and else the usual one."""

from __future__ import annotations

import copy
import pickle

import pytest

from shoal.compat.advice import ABSENT_OF_OBJECTS
from shoal.compat.answers import attributes_with_advice


class Advised:
    __getattr__ = attributes_with_advice("StepControl")

    def __init__(self) -> None:
        self.kept = 1

    @property
    def broken(self) -> int:
        return self.missing_inside

    @property
    def attach(self) -> int:
        """A name with advice, which this class has all the same."""
        return self.missing_inside


def test_an_attribute_that_is_not_there_is_advised_on():
    with pytest.raises(AttributeError) as error:
        _ = Advised().get_timeout
    advice = ABSENT_OF_OBJECTS["StepControl"]["get_timeout"]
    assert str(error.value) == f"'Advised' object has no attribute 'get_timeout': {advice}"
    assert error.value.name == "get_timeout"
    assert not hasattr(Advised(), "get_timeout")


def test_other_attributes_are_the_usual_errors():
    class Bare:
        pass

    for name in ("no_such_name", "__no_such_protocol__"):
        with pytest.raises(AttributeError) as usual:
            getattr(Bare(), name)
        with pytest.raises(AttributeError) as ours:
            getattr(Advised(), name)
        assert str(ours.value) == str(usual.value).replace("Bare", "Advised")


@pytest.mark.parametrize("name", ["broken", "attach"])
def test_what_a_property_lacks_itself_is_named(name):
    with pytest.raises(AttributeError, match=r"^'Advised' object has no attribute 'missing_inside'$"):
        getattr(Advised(), name)


def test_objects_are_copied_and_pickled_as_ever():
    for again in (copy.copy(Advised()), copy.deepcopy(Advised()), pickle.loads(pickle.dumps(Advised()))):
        assert vars(again) == {"kept": 1}
    assert not hasattr(Advised.__new__(Advised), "kept")
