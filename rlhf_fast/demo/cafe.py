"""The demo's world: guests of a café order, and a waiter answers in plain words.

The waiters of the demonstrations are a mixed crowd: some are kind, some rude, some bring the wrong
thing. How good an answer truly is, `utility` says; training never sees it. It sees which of two
answers a *judge* prefers, who errs the more often, the closer the two are.
"""

from __future__ import annotations

import itertools
import math
import random
import re

ITEMS = ("tea", "soup", "cake", "bread")
GREETINGS = ("Hello!", "Good morning!", "Hi there!", "Excuse me.")
REQUESTS = (
    "Could I have {}, please?",
    "I would like {}.",
    "One {}, please.",
    "May I get some {}?",
    "Some {} for me, thanks.",
    "Do you have any {}?",
)
SERVED = ("Here is your {}.", "Your {} is coming.")
REFUSED = "We have no {}."
KIND_OPENERS = ("Of course!", "With pleasure!", "Good choice!")
RUDE_OPENERS = ("What now?", "Ugh, fine.", "Hurry up.")
KIND_CLOSERS = ("Enjoy!", "Have a lovely day!")
RUDE_CLOSERS = ("Now go away.", "Do not come back.")
ASIDES = ("My cat is fat.", "I hate Mondays.", "It may rain today.")

BEST_UTILITY = 4.0


def item_of(prompt: str) -> str:
    """What the guest of `prompt` ordered."""
    words = re.findall("[a-z]+", prompt)
    return next(word for word in words if word in ITEMS)


def split_prompts(held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """All prompts in random order, cut into those to train on and `held_out` to evaluate on."""
    prompts = [
        f"Guest: {greeting} {request.format(item)}\nWaiter:"
        for greeting, request, item in itertools.product(GREETINGS, REQUESTS, ITEMS)
    ]
    random.Random(seed).shuffle(prompts)
    return prompts[held_out:], prompts[:held_out]


def demonstration(prompt: str, rng: random.Random) -> str:
    """An answer as some waiter of the mixed crowd would give it; it starts with a space."""
    item = item_of(prompt)
    other = rng.choice([x for x in ITEMS if x != item])
    core = rng.choices(
        [rng.choice(SERVED).format(item), rng.choice(SERVED).format(other), REFUSED.format(item)],
        [0.5, 0.25, 0.25],
    )[0]
    opener = rng.choices([rng.choice(KIND_OPENERS), "", rng.choice(RUDE_OPENERS)], [25, 35, 40])[0]
    aside = rng.choice(ASIDES) if rng.random() < 0.4 else ""
    closer = rng.choices([rng.choice(KIND_CLOSERS), "", rng.choice(RUDE_CLOSERS)], [25, 40, 35])[0]
    return " " + " ".join(part for part in (opener, core, aside, closer) if part)


def utility(prompt: str, answer: str) -> float:
    """How good `answer` truly is: at most `BEST_UTILITY`, reached by kindness and the right order.

    Serving what was ordered is worth 2, a kind opening 1, a kind closing 1, each once. A wrong
    dish costs 2; a rude sentence, a refusal, or words that make no sentence of the café cost 1
    each; an aside or a repetition costs 1/2.
    """
    item = item_of(prompt)
    good = {line.format(item): ("dish", 2.0) for line in SERVED}
    good |= dict.fromkeys(KIND_OPENERS, ("opener", 1.0)) | dict.fromkeys(
        KIND_CLOSERS, ("closer", 1.0)
    )
    wrong = {line.format(other) for line in SERVED for other in ITEMS if other != item}
    seen: set[str] = set()
    total = 0.0
    for sentence in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", answer):
        kind, worth = good.get(sentence.strip(), ("", 0.0))
        if kind and kind not in seen:
            seen.add(kind)
            total += worth
        else:
            total -= (
                2.0
                if sentence.strip() in wrong
                else 0.5
                if kind or sentence.strip() in ASIDES
                else 1.0
            )
    return total


def preference_probability(prompt: str, first: str, second: str) -> float:
    """How likely the judge is to prefer `first`: Bradley-Terry in the true utility."""
    return 1 / (1 + math.exp(utility(prompt, second) - utility(prompt, first)))
