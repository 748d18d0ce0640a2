import pickle

import pytest

from raylm import errors


def test_a_message_says_where_what_and_what_to_do() -> None:
    error = errors.DataError("chat.json: instance 17", "role 'bot' is unknown.", "Rename it.")
    assert str(error) == "chat.json: instance 17: role 'bot' is unknown. Rename it."
    assert str(errors.DataError("chat.json", "is empty.")) == "chat.json: is empty."


KINDS = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.RaylmError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling(kind: type[errors.RaylmError]) -> None:
    back = pickle.loads(pickle.dumps(kind("where", "what", "remedy")))  # noqa: S301
    assert type(back) is kind
    assert (back.where, back.problem, back.remedy) == ("where", "what", "remedy")
