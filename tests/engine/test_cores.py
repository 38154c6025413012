"""How instances share a CPU host's cores."""

import pytest

from llumnix.engine.cores import share_of_cores


@pytest.mark.parametrize(
    ("cores", "slot", "slots", "ranks", "share"),
    [
        ([0, 1, 2, 3], 0, 1, 1, None),  # alone: vLLM's own choice
        ([0, 1], 0, 2, 1, "0"),
        ([0, 1], 1, 2, 1, "1"),
        (list(range(8)), 1, 2, 1, "4,5,6,7"),
        (list(range(8)), 1, 2, 2, "4,5|6,7"),
        ([0, 1], 2, 3, 1, "0"),  # more instances than cores: in turn
        ([4, 9], 1, 2, 1, "9"),  # a host where not all cores are ours
        ([0, 1], 0, 1, 2, "0|1"),  # tensor parallel on a small host
        ([0], 0, 1, 2, "0|0"),
    ],
)
def test_share(cores: list[int], slot: int, slots: int, ranks: int, share: str | None) -> None:
    assert share_of_cores(cores, slot, slots, ranks) == share


def test_no_core_is_shared_while_there_are_enough() -> None:
    shares = [share_of_cores(list(range(16)), slot, 4, 2) for slot in range(4)]
    used = [c for s in shares for part in str(s).split("|") for c in part.split(",")]
    assert sorted(map(int, used)) == list(range(16))
