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
            "hold": "But such attention has no “self”: take the data out of local attention's scores and what is "
            "left is a convolution, exactly; put them back and it is none.",
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
            "hold": "It matters where the answer is a relation: with fixed weights the network could not tell same "
            "from different, in reach or not.",
            "depend": "It matters where the answer is a relation: with some of the fixed weights the network could "
            "not tell same from different.",
            "fail": "It did not matter even where the answer is a relation, in networks of this size.",
        },
    ),
    (
        3,
        {
            "hold": "On images, too, the similarity of query and key carried what attention reached.",
            "depend": "Of the two tasks, images and a search, one got by on positions alone, without the similarity of "
            "query and key; the other did not.",
            "fail": "On neither task was the similarity of query and key what attention lived by.",
        },
    ),
    (
        10,
        {
            "hold": "With few images the convolution's prior won, and with many attention did.",
            "depend": "With few images the convolution's prior was worth much, and with all of them less; how much "
            "data turns the lead around was beyond what was tried.",
            "fail": "That more data turns the lead from convolution to attention was not seen at this size.",
        },
    ),
    (
        22,
        {
            "hold": "And in practice either does the other's work: one flag turns a network's convolutions into local "
            "attention, at about the same accuracy and fewer parameters.",
            "depend": "In practice one flag turns a network's convolutions into local attention, at an accuracy that "
            "depends on the stem.",
            "fail": "In practice, at this size and with so few steps, local attention in a convolution's place cost "
            "accuracy.",
        },
    ),
)
SHORT = "So: a CNN is local attention whose weights have been fixed by position. Local self-attention is not a CNN."


def answer(kinds: Mapping[int, str]) -> list[tuple[str, int]]:
    """The sentences that the outcomes call for, each with its claim: `kinds` has "hold", "depend" or "fail" for each.

    Of a claim that has no outcome, or one that the seeds do not decide, nothing is said.

    >>> answer({5: "hold", 18: "hold"})[-1]
    ('So: a CNN is local attention whose weights have been fixed by position. Local self-attention is not a CNN.', 18)
    """
    said = [(ways[kinds[number]], number) for number, ways in ANSWER if kinds.get(number) in ways]
    both = kinds.get(5) == kinds.get(18) == "hold"
    return [*said, (SHORT, 18)] if both else said
