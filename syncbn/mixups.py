"""In words: the ranks of a group were in different calls."""

from syncbn import fingerprint
from syncbn.fingerprint import Found
from syncbn.formulas import VOTE
from syncbn.names import Place, known_labels

HOW = (
    "Call the same layers in the same order on every rank, with an empty batch if there is nothing to do. "
    "If the models are alike and only converted or wrapped in different ways, call syncbn.name_layers(model) on every "
    "rank, or set SYNCBN_FINGERPRINT=0, which turns this comparison off."
)
RULE = "All ranks of a group must be in the same synchronized call"


def on_cpu(rank: int, place: Place, found: Found) -> str:
    """Found before anything has moved."""
    return (
        f"{RULE}; got rank {rank} in {worded(place)} and {_others(found)}. "
        f"The sums were dropped and no buffer has moved. {HOW}"
    )


def on_device(rank: int, place: Place | None, found: Found) -> str:
    """Found by a device after the host had gone on."""
    own = "an earlier call" if place is None else worded(place)
    return (
        f"{RULE}; the device of rank {rank} found it in {own} and {_others(found)}. "
        "From there on results are wrong, running statistics too: go back to a checkpoint from before. "
        f"SYNCBN_CHECK=1 finds such a call before anything is sent. {HOW}"
    )


def worded(place: Place) -> str:
    call, direction, _ = place
    return f"{call.what()} ({direction}, call {call.number}, {call.like()})"


def _others(found: Found) -> str:
    """What the rest is in, as far as two numbers tell."""
    other, voters = fingerprint.other_of(found), int(found.votes // VOTE)
    if other is None:
        return f"others of {voters} ranks in at least two more calls"
    calls = sorted({call for label in known_labels() for call in fingerprint.calls_with(other.tag, label)})
    known = " or ".join(calls) or "another call, of a layer that this rank does not know"
    return f"{other.ranks} of {voters} ranks in {known}"
