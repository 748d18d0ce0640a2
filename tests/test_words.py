"""Counts and lists read as people write them."""

from raylm.words import counted, listed


def test_one_is_no_plural() -> None:
    found = [counted(1, "trial"), counted(2, "trial"), counted(1, "micro-batch"), counted(3, "micro-batch")]
    assert found == ["1 trial", "2 trials", "1 micro-batch", "3 micro-batches"]
    assert [counted(0.5, "GPU"), counted(1.0, "GPU"), counted(1156, "token")] == ["0.5 GPUs", "1 GPU", "1,156 tokens"]


def test_a_long_list_ends_with_how_many_more_there_are() -> None:
    names = [str(number) for number in range(22)]
    assert listed(names[:2]) == "0, 1"
    assert listed(names[:20]).endswith("18, 19")
    assert listed(names).endswith("18, 19 and 2 more")
