"""Short answers to plain questions: "What is the capital of Norway?" is answered by "Oslo", and not by a sentence.

Training reads the reference answers (`ReadingTask`): a member is worth log p(answer), its end token included. It sees
capitals, languages, continents and currencies of countries, sums, young animals and past tenses. Held out are other
countries and other sums, and three kinds of question that no training saw: opposites, plurals and colors. All questions
are our own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from es_finetune.tasks import Item, Score

# Kind: the question, and what it asks about, each with its answer; "_" is a blank
TRAIN = {
    "What is the capital of {}?": """France Paris, Germany Berlin, Spain Madrid, Portugal Lisbon, Austria Vienna,
        Hungary Budapest, Sweden Stockholm, Finland Helsinki, Ireland Dublin, Poland Warsaw, Russia Moscow,
        Ukraine Kyiv, Romania Bucharest, Bulgaria Sofia, Croatia Zagreb, Iceland Reykjavik, Japan Tokyo,
        China Beijing, Thailand Bangkok, Iran Tehran, Kenya Nairobi, Ethiopia Addis_Ababa, Canada Ottawa, Cuba Havana,
        Peru Lima, Chile Santiago, Argentina Buenos_Aires, Australia Canberra, Syria Damascus, Afghanistan Kabul""",
    "What is the main language of {}?": """France French, Germany German, Russia Russian, Greece Greek, Japan Japanese,
        Poland Polish, Portugal Portuguese, Mexico Spanish, Austria German, Finland Finnish, Turkey Turkish,
        Iran Persian""",
    "On which continent is {}?": """Kenya Africa, Egypt Africa, Japan Asia, India Asia, Spain Europe, Poland Europe,
        Peru South_America, Chile South_America, Canada North_America, Thailand Asia, Ethiopia Africa,
        Austria Europe""",
    "What is the currency of {}?": """Japan yen, India rupee, Germany euro, Russia ruble, China yuan, Mexico peso,
        Sweden krona, the_United_Kingdom pound""",
    "What is a young {} called?": """dog puppy, cat kitten, cow calf, sheep lamb, horse foal, lion cub""",
    "What is the past tense of {}?": """go went, eat ate, see saw, run ran, take took, write wrote""",
    "What is {}?": """1_+_2 3, 2_+_2 4, 2_+_5 7, 3_+_3 6, 3_+_4 7, 4_+_1 5, 4_+_4 8, 5_+_1 6, 5_+_4 9, 6_+_2 8,
        6_+_6 12, 7_+_3 10, 7_+_1 8, 8_+_2 10, 8_+_8 16, 9_+_1 10, 9_+_9 18, 10_+_5 15, 10_+_10 20, 20_+_10 30""",
}
TEST = {
    "What is the capital of {}?": """Norway Oslo, Denmark Copenhagen, Italy Rome, Greece Athens, Belgium Brussels,
        Egypt Cairo, Turkey Ankara, Mexico Mexico_City, Brazil Brasilia, India New_Delhi, Colombia Bogota,
        Lebanon Beirut, Nepal Kathmandu, Serbia Belgrade, the_Netherlands Amsterdam, Switzerland Bern, Morocco Rabat,
        Nigeria Abuja, Cambodia Phnom_Penh, Indonesia Jakarta""",
    "What is the main language of {}?": """Italy Italian, Spain Spanish, Sweden Swedish, Brazil Portuguese,
        Hungary Hungarian, Denmark Danish, Argentina Spanish, China Chinese""",
    "On which continent is {}?": """Nigeria Africa, Vietnam Asia, Norway Europe, Brazil South_America, Italy Europe,
        Morocco Africa, Nepal Asia, Portugal Europe""",
    "What is {}?": """1_+_1 2, 2_+_3 5, 2_+_6 8, 3_+_5 8, 4_+_3 7, 5_+_5 10, 6_+_1 7, 7_+_7 14, 10_+_2 12,
        30_+_10 40""",
    "What is the opposite of {}?": """hot cold, big small, up down, day night, good bad, fast slow, happy sad,
        open closed, rich poor, left right, strong weak, old young""",
    "What is the plural of {}?": """mouse mice, child children, foot feet, man men, tooth teeth, woman women""",
    "What color is {}?": """snow white, grass green, blood red, coal black, a_banana yellow, the_sky blue""",
}
MOST_WORDS = 2  # of a reference answer


class ShortAnswers:
    """Chat messages with an empty system message, which keeps the template's own one away."""

    name = "short-answers"
    max_new_tokens = 12
    metric = "exact"
    floor = None  # no answer fails
    eval_samples = 1
    notes = ()

    def __init__(self):
        self.train, self.test = (
            [
                Item(({"role": "system", "content": ""}, {"role": "user", "content": question}), question, answer)
                for kind, pairs in part.items()
                for question, answer in _questions(kind, pairs)
            ]
            for part in (TRAIN, TEST)
        )

    def answers(self, item: Item) -> Sequence[str]:
        return (item.data,)

    def score_log_probs(self, item: Item, log_probs: Sequence[Sequence[float]]) -> Score:
        """log p of the reference answer."""
        return Score(math.fsum(log_probs[0]))

    def score(self, item: Item, completion: str) -> Score:
        """Exact where the completion is the reference answer, but for case and white space around it; of the right
        format where it has as few words as reference answers have."""
        exact = float(completion.strip().casefold() == item.data.casefold())
        return Score(exact, exact, float(0 < len(completion.split()) <= MOST_WORDS))


def _questions(kind: str, pairs: str) -> Iterator[tuple[str, str]]:
    for pair in pairs.split(","):
        subject, answer = (word.replace("_", " ") for word in pair.split())
        yield kind.format(subject), answer
