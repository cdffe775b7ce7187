"""The demo's tasks: right answers, and prompts that training never sees."""

import doctest
import itertools

import pytest

from jax_lora.demo import tasks


def test_the_docstrings_example_is_true() -> None:
    result = doctest.testmod(tasks)
    assert result.attempted and not result.failed


@pytest.mark.parametrize(
    ("adapter", "word", "completion"),
    [
        (None, "window", "window"),
        ("upper", "window", "WINDOW"),
        ("reverse", "window", "wodniw"),
        ("rot13", "window", "jvaqbj"),
        ("sort", "window", "dinoww"),
        ("twice", "window", "wwiinnddooww"),
        ("consonants", "window", "wndw"),
        ("next", "zebra", "afcsb"),
        ("alternate", "window", "wInDoW"),
        ("hyphens", "window", "w-i-n-d-o-w"),
        ("stars", "window", "w*nd*w"),
    ],
)
def test_completion(adapter: str | None, word: str, completion: str) -> None:
    assert tasks.task_of(adapter).complete(word) == completion


def test_every_task_has_its_own_name_and_an_example_above() -> None:
    assert all(task.name == name for name, task in tasks.TASKS.items())
    examples = test_completion.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {adapter for adapter, *_ in examples} == {None, *tasks.TASKS}


def test_an_unknown_adapter_is_named_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"'lower'.*upper.*stars"):
        tasks.task_of("lower")


def test_prompt_and_word_are_inverse() -> None:
    assert tasks.word_of(tasks.prompt("window")) == "window"


@pytest.mark.parametrize("prompt", ["window", ":", "Window:", "two words:", "a:b:", ""])
def test_what_is_no_prompt_is_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="lower-case letters and a colon"):
        tasks.word_of(prompt)


def test_training_and_held_out_words_never_meet() -> None:
    held_out = set(tasks.held_out_words(3000)) | set(tasks.held_out_words(1000, seed=1))
    training = set(itertools.islice(tasks.training_words(seed=0), 50_000))
    assert not held_out & training
    assert all(map(tasks.is_held_out, held_out | set(tasks.EVERYDAY_WORDS)))
    assert not any(map(tasks.is_held_out, training))


def test_held_out_words_are_distinct_and_of_the_stated_lengths() -> None:
    words = tasks.held_out_words(2000)
    assert len(set(words)) == 2000
    assert {len(word) for word in words} == set(range(tasks.MIN_LENGTH, tasks.MAX_LENGTH + 1))
    assert all(word.isascii() and word.islower() and word.isalpha() for word in words)


def test_half_of_the_first_words_are_everyday_ones() -> None:
    assert sum(word in tasks.EVERYDAY_WORDS for word in tasks.held_out_words(200)) == 100


def test_no_two_tasks_agree_on_a_held_out_word() -> None:
    for word in tasks.held_out_words(1000):
        answers = [tasks.task_of(adapter).complete(word) for adapter in (None, *tasks.TASKS)]
        assert len(set(answers)) == len(answers), word


def test_few_everyday_words_are_ambiguous() -> None:
    unclear = [word for word in tasks.EVERYDAY_WORDS if not tasks.is_clear(word)]
    assert "ghost" in unclear  # sorted already
    assert len(unclear) < 0.05 * len(tasks.EVERYDAY_WORDS)


def test_the_same_seed_gives_the_same_words() -> None:
    assert tasks.held_out_words(5) == ["ocean", "loma", "diamond", "azvbxf", "tiger"]
    assert tasks.held_out_words(300, seed=3) == tasks.held_out_words(300, seed=3)
    assert tasks.held_out_words(300, seed=3) != tasks.held_out_words(300, seed=4)
    streams = [list(itertools.islice(tasks.training_words(seed), 100)) for seed in (5, 5, 6)]
    assert streams[0] == streams[1] != streams[2]


def test_prompts_are_the_words_with_a_colon() -> None:
    assert tasks.held_out_prompts(2) == ["ocean:", "loma:"]
