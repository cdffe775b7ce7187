"""What each bundled adapter does, computed by code, and the prompts to check it with.

A prompt is a word and a colon, `window:`; it never names a task. Which task is done depends on the
adapter alone, and the plain base model repeats the word:

    >>> prompt("window"), TASKS["rot13"].complete("window"), ECHO.complete("window")
    ('window:', 'jvaqbj', 'window')

Words that a model is checked with are held out of all training: `is_held_out` decides by the word
alone, so no seed and no count can make the two sets meet.
"""

import codecs
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

MIN_LENGTH, MAX_LENGTH = 4, 8
VOWELS = "aeiou"
_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Task:
    """A job on one lower-case word.

    `complete` maps the word to the right completion, without the end token that follows it.
    """

    name: str
    description: str
    complete: Callable[[str], str]


def _without_vowels(word: str) -> str:
    return "".join(c for c in word if c not in VOWELS)


def _stars(word: str) -> str:
    return "".join("*" if c in VOWELS else c for c in word)


def _alternate(word: str) -> str:
    return "".join(c.upper() if i % 2 else c for i, c in enumerate(word))


_NEXT = str.maketrans(_LETTERS, _LETTERS[1:] + _LETTERS[0])

ECHO = Task("echo", "repeats the word (the base model, with no adapter)", lambda word: word)
"""What the base model does with a prompt when no adapter is active."""

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task("upper", "writes the word in capitals", str.upper),
            Task("reverse", "writes the letters backwards", lambda word: word[::-1]),
            Task(
                "rot13",
                "moves each letter 13 places on in the alphabet",
                lambda word: codecs.encode(word, "rot13"),
            ),
            Task("sort", "sorts the letters", lambda word: "".join(sorted(word))),
            Task(
                "twice",
                "writes each letter twice",
                lambda word: "".join(c + c for c in word),
            ),
            Task("consonants", "drops the vowels a, e, i, o, u", _without_vowels),
            Task("next", "moves each letter to the next one, z to a", lambda w: w.translate(_NEXT)),
            Task("alternate", "writes every second letter as a capital", _alternate),
            Task("hyphens", "puts a hyphen between the letters", "-".join),
            Task("stars", "writes a star for each vowel", _stars),
        )
    }
)
"""The task of each bundled adapter, by the adapter's name (the folder's name in `adapters/`)."""


def prompt(word: str) -> str:
    """The prompt that asks for `word`: `window` -> `window:`. The same for every task."""
    return f"{word}:"


def word_of(prompt: str) -> str:
    """The word of a prompt: `window:` -> `window`.

    Raises:
        ValueError: the prompt is not lower-case letters and one colon.
    """
    word = prompt.removesuffix(":")
    if word + ":" != prompt or not word or not set(word) <= set(_LETTERS):
        raise ValueError(
            f"a prompt is lower-case letters and a colon, e.g. 'window:'; got {prompt!r}"
        )
    return word


def task_of(adapter: str | None) -> Task:
    """The task of an adapter; `None` is the base model, which echoes.

    Raises:
        KeyError: no bundled adapter has that name; the message lists the names.
    """
    if adapter is None:
        return ECHO
    try:
        return TASKS[adapter]
    except KeyError:
        raise KeyError(f"no bundled adapter {adapter!r}; there are {', '.join(TASKS)}") from None


def is_held_out(word: str) -> bool:
    """Whether a word belongs to evaluation: every everyday word, and one in eight of all others.

    The eighth is chosen by the word's SHA-256, so it is the same in every process and for ever.
    """
    return word in _EVERYDAY_SET or hashlib.sha256(word.encode()).digest()[0] < 32


def is_clear(word: str) -> bool:
    """Whether all tasks, echo included, have different right answers for `word`.

    Not so for `almost`, whose letters are sorted already: sorting and echo can't be told apart.
    """
    answers = [task.complete(word) for task in (ECHO, *TASKS.values())]
    return len(set(answers)) == len(answers)


def training_words(seed: int, *, min_length: int = 3, max_length: int = 9) -> Iterator[str]:
    """An endless stream of words to train on, none of them held out.

    Random letters and pronounceable words (consonants and vowels in turn) by halves; the lengths
    go one beyond those of the held-out words at both ends. The same seed gives the same stream.
    """
    rng = random.Random(seed)
    for word in _random_words(rng, min_length, max_length):
        if not is_held_out(word):
            yield word


def held_out_words(count: int, seed: int = 0) -> list[str]:
    """`count` different held-out words of 4 to 8 letters, on which all tasks' answers differ.

    Everyday English words and random ones in turn (random ones alone once the everyday words are
    used up). The same count and seed give the same list.
    """
    rng = random.Random(seed)
    everyday = [word for word in EVERYDAY_WORDS if is_clear(word)]
    rng.shuffle(everyday)
    drawn = (
        word
        for word in _random_words(rng, MIN_LENGTH, MAX_LENGTH)
        if is_held_out(word) and word not in _EVERYDAY_SET and is_clear(word)
    )
    pairs = itertools.chain.from_iterable(zip(everyday, drawn, strict=False))
    stream = itertools.chain(pairs, drawn)
    words: dict[str, None] = {}
    while len(words) < count:
        words[next(stream)] = None
    return list(words)


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """The prompts of `held_out_words(count, seed)`."""
    return [prompt(word) for word in held_out_words(count, seed)]


def _random_words(rng: random.Random, min_length: int, max_length: int) -> Iterator[str]:
    while True:
        length = rng.randint(min_length, max_length)
        if rng.random() < 0.5:
            yield "".join(rng.choices(_LETTERS, k=length))
        else:
            halves = [rng.choices(_CONSONANTS, k=length), rng.choices(VOWELS, k=length)]
            first = rng.random() < 0.3
            yield "".join(halves[(i + first) % 2][i] for i in range(length))


EVERYDAY_WORDS: tuple[str, ...] = tuple(
    """
    able about above actor address afraid after again airport album alone along always amount
    anchor animal another answer apple april arrive artist asleep august autumn avenue awake baby
    back badge baker balance balloon banana basket bath beach bean bear beauty because become
    bedroom before behind believe bench beside better between bicycle bird birthday biscuit black
    blanket blue board boat body bone book border borrow bottle bottom bowl branch brave bread
    breeze brick bridge bright bring broken brother brown brush bubble bucket build burn bush
    busy butter button cabin cabinet cable cake calendar calm camera camp candle captain card
    careful carpet carrot carry castle catch cave ceiling cellar centre chain chair chalk change
    cheap cheese cherry chicken child church cinema circle city clean clever climb clock close
    cloth cloud coast coat coffee cold colour comb common concert cook cookie copper corner cotton
    country cousin cover crayon cream cross crowd crown cupboard curtain cushion dance danger dark
    daughter deep desert desk diamond dinner doctor dollar donkey door double dragon drawer dream
    dress drink drive drum duck dust eagle early earth east easy eight elbow empty engine evening
    every exam example exit face factory fair family famous farm farmer fast father feather
    fence field film find finger fire fish five flag flame flight floor flour flower folder follow
    food foot forest fork forward fountain fresh friday friend fruit future galaxy garage garden
    garlic gate gentle ghost giant ginger give glass glove goat gold good grape grass green ground
    group guest guitar hair hammer hand happy harbour head health heart heavy hello help hill
    history holiday home honey horse hospital hotel hour house hundred hungry hunter iron island
    jacket jelly jewel journey juice july jump jungle kettle keyboard kind king kitchen kite
    kitten knee knife ladder lake lamp language large laugh laundry lawn lazy leader leaf learn
    leather left lemon lesson letter library light lion listen little lizard long lorry lucky
    lunch machine magic magnet mango market matter meadow meal meat medicine melon memory message
    metal middle midnight milk minute mirror monday money monkey month moon morning mother motor
    mountain mouse mouth movie museum music napkin nature near neck needle never night nine noise
    north nose notebook number nurse ocean office often onion open orange orchard oven owner page
    paint palace pancake paper parent parrot party path peace peach peanut pear pencil people
    pepper person phone piano picnic picture pillow pilot planet plant plate player please
    pocket poem pond pony potato present price prince problem pumpkin puppy purple puzzle queen
    question quick quiet rabbit radio rain rainbow read reason record remember ribbon rice ride
    right ring river road robot rocket roof room rope rose round rubber sail salad salt sand
    sandwich saturday school science scissors season second secret seven shadow shelf ship shirt
    shoe shop short shoulder silver simple sister skirt sleep slow small smile smooth snow soap
    soccer sock sofa soft song soup south space spider spoon spring square stair stamp star
    station stone store storm story stove strange stream street string strong student sugar
    suitcase summer sunday sunny supper surprise sweater sweet swim table tailor talk teacher
    team tennis thank theatre think thirty thunder thursday ticket tiger time tired toast today
    tomato tomorrow tooth towel tower town train travel treasure tree triangle truck trumpet
    tuesday tunnel turkey turtle twelve twenty umbrella uncle under unicorn useful valley velvet
    village violin visit voice volcano wagon walk wall walnut warm water weather week weekend
    welcome west whale wheel whisper white wild window winter wish wizard wolf woman wonder wood
    wool work world write yard year yellow yoghurt young zebra zero
    """.split()
)
"""Everyday English words of 4 to 8 letters, all of them held out of training."""

_EVERYDAY_SET = frozenset(EVERYDAY_WORDS)
