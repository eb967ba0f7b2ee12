"""How near an answer comes to the one that was expected."""

import re


def is_match(prediction: str, reference: str) -> bool:
    """Whether two answers are the same but for case and spaces around and between words."""
    return _normalized(prediction) == _normalized(reference)


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L (Lin, 2004): the F1 score of the longest common subsequence of words, regardless of case."""
    ours, theirs = _words(prediction), _words(reference)
    common = _common_length(ours, theirs)
    return 2 * common / (len(ours) + len(theirs)) if common else float(ours == theirs)


def _normalized(text: str) -> str:
    return " ".join(text.split()).casefold()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _common_length(first: list[str], second: list[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(second) + 1)  # of what was seen of `first` and each beginning of `second`
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            longest = diagonal + 1 if word == other else max(lengths[place], lengths[place - 1])
            diagonal, lengths[place] = lengths[place], longest
    return lengths[-1]
