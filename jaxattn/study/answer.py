"""The closing answer: a sentence for each way in which a claim may come out, so that it says what was measured."""

from collections.abc import Mapping

QUESTION = "Is a CNN a kind of local self-attention?"
ANSWER: tuple[tuple[int, Mapping[str, str]], ...] = (
    (
        5,
        {
            "hold": "In one direction it is a theorem: every convolution is attention, with one head for each tap of "
            "its kernel, each of which looks at one offset.",
            "fail": "The theorem that every convolution is attention did not come out here, which is a fault of this "
            "study and not of the theorem.",
        },
    ),
    (
        18,
        {
            "hold": "Local attention without data in its scores, without “self”, is a convolution, to rounding; with "
            "them it is none.",
            "fail": "Local attention without data in its scores did not come out as a convolution.",
        },
    ),
    (
        15,
        {
            "hold": "The difference is what the weights are made of: parameters on one side and data on the other in a "
            "convolution, data on both in attention.",
            "fail": "That the difference lies in what the weights are made of was not borne out.",
        },
    ),
    (
        14,
        {
            "hold": "Data in the weights matter where the answer is a relation: with fixed weights a network could "
            "not tell same from different.",
            "depend": "Data in the weights matter where the answer is a relation, but with some fixed weights a "
            "network could tell same from different.",
            "fail": "That fixed weights cannot tell same from different was not seen: attention did not learn to "
            "either, or fixed weights did as well.",
        },
    ),
    (
        3,
        {
            "hold": "On images, as in a search, the similarity of query and key was worth more than positions could "
            "replace.",
            "depend": "Of two tasks, images and a search, one got by on positions alone, without the similarity of "
            "query and key; the other did not.",
            "fail": "On neither task was the similarity of query and key worth what positions could not replace.",
        },
    ),
    (
        10,
        {
            "hold": "With few images the convolution's prior won, and with many attention did.",
            "depend": "With few images the convolution's prior won, and with many it won by less; whether attention "
            "then wins, and from how many on, is a matter of the task and of the training.",
            "fail": "That more data turns the lead from convolution to attention was not seen at this size.",
        },
    ),
    (
        22,
        {
            "hold": "In practice either does the other's work: one flag turns a network's convolutions into local "
            "attention, at about the same accuracy and with no more parameters.",
            "depend": "In practice one flag turns a network's convolutions into local attention, at about the same "
            "accuracy with one stem and at less with another.",
            "fail": "In practice, at this size and with so few steps, local attention in a convolution's place was "
            "not as good.",
        },
    ),
)
SHORT = "So a CNN is local attention whose weights have been fixed by position. Local self-attention is not a CNN."


def answer(kinds: Mapping[int, str]) -> list[tuple[str, int]]:
    """The sentences that the outcomes call for, each with its claim: `kinds` has "hold", "depend" or "fail" for each.

    Of a claim that has no outcome, or one that the seeds do not decide, nothing is said.

    >>> answer({5: "hold", 18: "hold"})[-1]
    ('So a CNN is local attention whose weights have been fixed by position. Local self-attention is not a CNN.', 18)
    """
    said = [(ways[kinds[number]], number) for number, ways in ANSWER if kinds.get(number) in ways]
    both = kinds.get(5) == kinds.get(18) == "hold"
    return [*said, (SHORT, 18)] if both else said
