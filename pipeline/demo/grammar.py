"""Short stories told by rules, one random choice after the other, with the probability of each story.

The choices of a story can be read off its text: no two sequences of choices tell the same. So the probability of a text
is the product of those of its choices, and -ln of it, in nats, is what the best possible model of these texts loses on
it (Shannon, A Mathematical Theory of Communication, 1948). A story keeps what it has said: names, things, colours, sums
and places come back, so a model that attends to them loses less than one that only knows which words go together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random


class Teller:
    """Tells one story; ``nats`` is -ln of the probability of all choices so far."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.parts: list[str] = []
        self.nats = 0.0

    def say(self, text: str) -> None:
        """Go on with ``text``."""
        self.parts.append(text)

    def pick(self, options: Sequence[str]) -> str:
        """Return one of the options: the first is the likeliest, the n-th has a weight of 1 / (n + 3)."""
        weights = _WEIGHTS[: len(options)]
        index = self.random.choices(range(len(options)), weights)[0]
        self.nats -= math.log(weights[index] / sum(weights))
        return options[index]


_WEIGHTS = [1 / (n + 4) for n in range(100)]

HEROES = {
    "fox": "Mara Finn Tilly Rufus Amber Jasper",
    "rabbit": "Lila Benny Clover Hugo Poppy Otis",
    "bear": "Greta Bruno Olga Barnaby Winnie Igor",
    "mouse": "Nellie Pip Dotty Edgar Mina Max",
    "owl": "Ada Oscar Luna Milo Sybil Ernest",
    "hedgehog": "Hazel Fred Ivy Bodo Thistle Ned",
    "duck": "Daisy Walter Gilda Drake Pearl Fergus",
    "cat": "Minka Tom Nora Felix Saffron Casper",
    "frog": "Fern Kermo Juno Toby Lotte Gus",
    "squirrel": "Robin Nutty Rosie Emil Sasha Theo",
}
"""Kind of animal -> its names; of the names of a kind, the first, third and fifth are hers, the others his."""

NATURES = ["little", "clever", "brave", "shy", "cheerful", "lazy", "curious", "kind", "sleepy", "proud", "gentle"]
HOMES = [
    "by the old mill", "under the big oak", "near the river", "behind the green hill", "at the edge of the forest",
    "in a hollow tree", "beside the blue lake", "below the stone bridge", "in the tall grass", "close to the village",
]  # fmt: skip
LOVES = {
    "singing": "sang", "dancing": "danced", "swimming": "swam", "reading": "read", "painting": "painted",
    "baking": "baked", "climbing": "climbed", "fishing": "fished", "counting the stars": "counted the stars",
    "telling jokes": "told jokes",
}  # fmt: skip
"""What an animal loves -> what it did then."""
OFTEN = ["every morning", "all day long", "every evening", "on sunny days", "when it rained"]
TIMES = ["One day", "One morning", "One evening", "On a cold day", "On a warm day", "After breakfast", "At noon"]
COLORS = ["red", "blue", "green", "yellow", "golden", "silver", "white", "purple"]
THINGS = ["ball", "kite", "hat", "lantern", "drum", "boat", "scarf", "key", "bell", "basket", "umbrella", "book"]
SPOTS = [
    "under the bed", "behind the door", "in the garden", "on the roof", "in the well", "under the stairs",
    "in the kitchen", "behind the barn", "on the bridge", "between the roots", "in the hay", "beside the path",
]  # fmt: skip
FRUIT = ["apples", "nuts", "berries", "pears", "plums", "cherries", "carrots", "mushrooms"]
NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen",
]  # fmt: skip
FEELINGS = ["happy", "glad", "proud", "tired", "surprised", "grateful"]
TROUBLES = {
    "a deep river": "a boat", "a high wall": "a ladder", "a dark cave": "a lamp", "a thick hedge": "a pair of shears",
    "a locked gate": "the right key", "a steep cliff": "a long rope", "a wide ditch": "a strong plank",
    "a sleeping dragon": "a soft song",
}  # fmt: skip
"""What is in the way -> what helps against it."""
GOALS = ["to see the sea", "to visit the fair", "to find the end of the rainbow", "to meet the king", "to buy honey"]
LESSONS = {
    "lost": ["that friends find more than four eyes see", "to put things back in their place", "to ask for help"],
    "count": ["that sharing makes rich", "to count to the end", "that a gift is worth more than its size"],
    "swap": ["that new things are old things of others", "to ask first", "that both can win"],
    "way": ["that there is always a way", "to think before turning back", "that two see what one does not"],
}


class Animal:
    """Who is in a story: the kind, the name, and the words that stand for them."""

    def __init__(self, teller: Teller, kinds: Sequence[str]) -> None:
        self.kind = teller.pick(kinds)
        names = HEROES[self.kind].split()
        self.name = teller.pick(names)
        is_she = names.index(self.name) % 2 == 0
        self.he, self.him, self.his = ("she", "her", "her") if is_she else ("he", "him", "his")


def tell(teller: Teller) -> None:
    """Tell a whole story: who, what happened, how it ended."""
    hero = _introduce(teller)
    plot = teller.pick(list(_PLOTS))
    friend = _PLOTS[plot](teller, hero)
    _end(teller, hero, friend, LESSONS[plot])


def _introduce(teller: Teller) -> Animal:
    """Say who the story is about, where they lived and what they loved."""
    opening = teller.pick(["Once upon a time there was", "Long ago there lived", "Far away there was"])
    teller.say(opening)
    nature = teller.pick(NATURES)
    teller.say(f" a {nature}")
    hero = Animal(teller, list(HEROES))
    teller.say(f" {hero.kind} named {hero.name}. {hero.he.capitalize()} lived")
    teller.say(f" {teller.pick(HOMES)}.")
    love = teller.pick(list(LOVES))
    teller.say(f" {hero.name} loved {love}, and")
    teller.say(f" {teller.pick(OFTEN)} {hero.he} {LOVES[love]}.\n\n")
    return hero


def _meet(teller: Teller, hero: Animal) -> Animal:
    """Say who comes by; never of the hero's kind."""
    friend = Animal(teller, [kind for kind in HEROES if kind != hero.kind])
    teller.say(f" Then {friend.name} the {friend.kind} came by.")
    return friend


def _lost(teller: Teller, hero: Animal) -> Animal:
    """Something is lost, looked for in a few places, and found with a friend in a new one."""
    teller.say(f"{teller.pick(TIMES)} {hero.name} lost")
    thing = teller.pick(COLORS)
    teller.say(f" {hero.his} {thing}")
    thing += f" {teller.pick(THINGS)}"
    teller.say(f"{thing[thing.index(' ') :]}.")
    spots = list(SPOTS)
    for _ in range(1 + int(teller.pick(["1", "2", "3"]))):
        spot = teller.pick(spots)
        spots.remove(spot)
        teller.say(f" {hero.he.capitalize()} looked {spot}, but it was not there.")
    friend = _meet(teller, hero)
    teller.say(
        f' "I have lost my {thing}," said {hero.name}. {friend.name} helped {hero.him} to look, and they found it'
    )
    teller.say(f" {teller.pick(spots)}.")
    return friend


def _count(teller: Teller, hero: Animal) -> Animal:
    """Two animals put their fruit together: a sum."""
    fruit = teller.pick(FRUIT)
    teller.say(f"{teller.pick(TIMES)} {hero.name} had")
    first = int(teller.pick(list("23456789")))
    teller.say(f" {NUMBERS[first]}")
    teller.say(f" {fruit}.")
    friend = _meet(teller, hero)
    second = int(teller.pick(list("1234567")))
    teller.say(f" {friend.name} gave {hero.him} {NUMBERS[second]}")
    teller.say(f" more. {NUMBERS[first].capitalize()} and {NUMBERS[second]} are {NUMBERS[first + second]}, so")
    teller.say(f" {hero.name} had {NUMBERS[first + second]} {fruit}.")
    return friend


def _swap(teller: Teller, hero: Animal) -> Animal:
    """Two animals give each other what they have: who has what in the end?"""
    teller.say(f"{teller.pick(TIMES)} {hero.name} was tired of {hero.his}")
    color = teller.pick(COLORS)
    teller.say(f" {color}")
    thing = teller.pick(THINGS)
    teller.say(f" {thing}.")
    friend = _meet(teller, hero)
    teller.say(f" {friend.name} had a")
    other_color = teller.pick(COLORS)
    teller.say(f" {other_color}")
    other = teller.pick([name for name in THINGS if name != thing])
    teller.say(f' {other}. "Let us swap," said {hero.name}.')
    teller.say(f" So {hero.name} got the {other_color} {other}, and {friend.name} got the {color} {thing}.")
    return friend


def _way(teller: Teller, hero: Animal) -> Animal:
    """Something is in the way; a friend brings what helps against it."""
    goal = teller.pick(GOALS)
    teller.say(f"{teller.pick(TIMES)} {hero.name} wanted")
    teller.say(f" {goal}, but")
    trouble = teller.pick(list(TROUBLES))
    teller.say(f" {trouble} was in the way.")
    friend = _meet(teller, hero)
    teller.say(f' "You need {TROUBLES[trouble]}," said {friend.name}, who had one. So they went {goal} together.')
    return friend


def _end(teller: Teller, hero: Animal, friend: Animal, lessons: Sequence[str]) -> None:
    teller.say(f"\n\nIn the end {hero.name} was")
    teller.say(f" {teller.pick(FEELINGS)}, and learned")
    teller.say(
        f" {teller.pick(lessons)}. {hero.name} the {hero.kind} and {friend.name} the {friend.kind} were friends."
    )


_PLOTS = {"lost": _lost, "count": _count, "swap": _swap, "way": _way}
