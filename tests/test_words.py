"""Counts read as people write them."""

from raylm.words import counted


def test_one_is_no_plural() -> None:
    found = [counted(1, "trial"), counted(2, "trial"), counted(1, "micro-batch"), counted(3, "micro-batch")]
    assert found == ["1 trial", "2 trials", "1 micro-batch", "3 micro-batches"]
    assert [counted(0.5, "GPU"), counted(1.0, "GPU"), counted(1156, "token")] == ["0.5 GPUs", "1 GPU", "1,156 tokens"]
