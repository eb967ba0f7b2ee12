"""python -m llava_jax.score --answers=FILE --pope=DIR | --science_qa=DIR: benchmark scores of written answers."""

import json

from absl import flags

from llava_jax.commands import run_command

ANSWERS = flags.DEFINE_string(
    "answers", None, "What evaluate --questions=FILE --predictions=FILE wrote about all questions."
)
POPE = flags.DEFINE_string("pope", None, "The directory with POPE's coco_pope_*.json.")
SCIENCE_QA = flags.DEFINE_string(
    "science_qa", None, "The directory with ScienceQA's pid_splits.json and problems.json."
)
SPLIT = flags.DEFINE_string("split", "test", "Of ScienceQA.")
flags.mark_flags_as_required(["answers"])
flags.mark_flags_as_mutual_exclusive(["pope", "science_qa"], required=True)


def main() -> None:
    """Prints the scores, shares of 1."""
    from llava_jax.benchmark_scores import read_answers, score_pope, score_science_qa

    answers = read_answers(ANSWERS.value)
    scores = (
        score_pope(answers, POPE.value)
        if POPE.value
        else score_science_qa(answers, SCIENCE_QA.value, SPLIT.value)
    )
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    run_command(main)
