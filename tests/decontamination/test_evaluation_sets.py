"""Documents with a run of 13 words of a question, against sets of tuples of words made in plain Python."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.decontamination.evaluation_sets import EvaluationSets
from pipeline.decontamination.questions import Question
from pipeline.decontamination.words import gram_hashes, plain_words
from pipeline.errors import UserError
from tests.support.hellaswag_questions import make_questions, write_questions
from tests.support.task_files import write_bundle, write_harness

CHOOSE = random.Random(3)
DROPPED = {"Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm", "Sc", "Sk", "So", "Mn", "Mc", "Me", "Cf"}
VOCABULARY = [f"{chr(97 + number % 26)}ord{number}" for number in range(3000)]


def words(count: int) -> list[str]:
    return CHOOSE.choices(VOCABULARY, k=count)


def naive_words(text: str) -> list[str]:
    """Lower case, between white space, without punctuation, symbols, marks and signs that nobody sees."""
    folded = unicodedata.normalize("NFD", unicodedata.normalize("NFD", text).lower())
    return "".join(sign for sign in folded if unicodedata.category(sign)[:2] not in DROPPED).split()


def naive_grams(text: str) -> set[tuple[str, ...]]:
    own = naive_words(text)
    return {tuple(own[start : start + 13]) for start in range(len(own) - 12)}


def sets_of(*texts: str) -> EvaluationSets:
    return EvaluationSets.of([Question("set.jsonl", number, "", (text,)) for number, text in enumerate(texts, 1)])


def found_in(sets: EvaluationSets, *texts: str) -> list[int]:
    return sorted(sets.overlaps(pa.array(texts, pa.large_string())))


def test_planted_questions_are_found() -> None:
    question = words(20)
    changed = [*question[:10], "other", *question[11:]]  # no run of 13 is left: 10 before it and 9 behind
    late = [*question[:16], "other", *question[17:]]  # 16 are
    sets = sets_of(" ".join(question))
    around = " ".join(words(50))
    documents = [
        " ".join(question),
        f"{around}. {' '.join(question)}! {around}",
        f"{around} {' '.join(changed)} {around}",
        f"{around} {' '.join(late)} {around}",
        f"{around} {' '.join(question[:12])} {around}",
        f"{around} {' '.join(question[4:17])}",
        f"{around} {' -- '.join(question).upper()}, {around}",
        around,
        "...",
    ]
    found = sets.overlaps(pa.array(documents, pa.large_string()))
    assert sorted(found) == [0, 1, 3, 5, 6]
    assert {row: overlap.words.split() for row, overlap in found.items()} == {
        0: question,
        1: question,
        3: question[:16],
        5: question[4:17],
        6: question,
    }
    assert {overlap.question.number for overlap in found.values()} == {1}


def test_questions_of_fewer_than_13_words_are_never_found() -> None:
    short = " ".join(words(12))
    sets = sets_of(short, " ".join(words(13)))
    assert sets.num_short == 1
    assert found_in(sets, short, f"{short} {short} {short}") == []
    assert found_in(sets_of(short), short) == []


@pytest.mark.parametrize("seed", range(3))
def test_what_is_found_is_what_sets_of_tuples_find(seed: int) -> None:
    """Questions and documents of few words with many runs in common by chance, signs, accents and digits in them."""
    choose = random.Random(seed)
    few = ["It's", "é", "E\u0301", "3", "12", "(a)", "state-of-the-art", "b,", "—", "Ünd", "²", "x\u00ady", "…"]
    made = [[choose.choice(few) for _ in range(choose.randrange(5, 60))] for _ in range(60)]
    questions = [" ".join(own) for own in made[:20]]
    documents = [choose.choice([" ", "\n", "\t\u3000"]).join(own) for own in made[20:]]
    documents += [f"{' '.join(made[choose.randrange(20)][3:30])} {text}" for text in documents]
    grams = set().union(*map(naive_grams, questions))
    expected = [row for row, text in enumerate(documents) if naive_grams(text) & grams]
    sets = sets_of(*questions)
    assert 20 < len(expected) < len(documents)
    assert found_in(sets, *documents) == expected
    assert len(sets.hashes) == len(grams)
    for row, overlap in sets.overlaps(pa.array(documents, pa.large_string())).items():
        run = overlap.words.split()
        assert tuple(run[:13]) in naive_grams(documents[row]) & naive_grams(overlap.question.texts[0])


def test_words_are_those_that_are_hashed() -> None:
    texts = ["Ünd 3,5 中文字 x", "ab-c d", "กขค a", "\U00020000\U00020001 z", "e\u0301é", "a\u200bb  c"]
    for text in texts:
        own = list(plain_words(text))
        grams = gram_hashes(pa.array([f"{text} " * 13], pa.large_string()))
        assert len(grams.hashes) == 13 * len(own) - 12
    assert list(plain_words("“State-of-the-art”, E\u0301tat: 3,500 中文")) == [
        "stateoftheart",
        "etat",
        "3500",
        "中",
        "文",
    ]


def test_hellaswag_is_read_as_it_is_published(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "hellaswag_val.jsonl", 30)
    sets = EvaluationSets.read([str(path)])
    raw = make_questions(30)
    assert len(sets.questions) == 30 and all(len(question.texts) == 4 for question in sets.questions)
    assert [question.id for question in sets.questions] == [str(number) for number in range(30)]
    assert not any("[header]" in text or "[title]" in text for question in sets.questions for text in question.texts)
    whole = [f"before it {question['ctx']} {question['endings'][2]} behind it" for question in raw]
    long = [row for row, text in enumerate(whole) if len(naive_words(text)) - 4 >= 13 and row % 3]
    found = sets.overlaps(pa.array(whole, pa.large_string()))
    assert len(long) > 10 and set(long) <= found.keys()
    pq.write_table(pa.Table.from_pylist(raw), tmp_path / "0000.parquet")
    other = EvaluationSets.read([str(tmp_path / "0000.parquet")])
    assert (other.hashes == sets.hashes).all() and other.fingerprints != sets.fingerprints


def test_other_records_are_all_their_texts(tmp_path: Path) -> None:
    record = {"question": " ".join(words(9)), "choices": {"text": [" ".join(words(5)), "no"]}, "answer": 1, "id": "q7"}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(record) + "\n\n" + json.dumps(" ".join(words(14))) + "\n")
    (tmp_path / "lines.txt").write_text(" ".join(words(15)) + "\n")
    sets = EvaluationSets.read([str(tmp_path / "tasks.jsonl"), str(tmp_path / "lines.txt")])
    assert [(question.set, question.number, question.id) for question in sets.questions] == [
        ("tasks.jsonl", 1, "q7"),
        ("tasks.jsonl", 3, ""),
        ("lines.txt", 1, ""),
    ]
    text = f"{record['question']}: {record['choices']['text'][0]}"  # type: ignore[index]
    assert found_in(sets, text) == [0] and sets.num_short == 0


def test_questions_of_tasks_are_their_options(tmp_path: Path) -> None:
    bundle = write_harness(write_bundle(tmp_path / "bundle", count=9), ["piqa"], 5)
    sets = EvaluationSets.read([f"tasks:core,piqa@{bundle}"])
    lines = {
        f"core/{label}": (bundle / "eval_data" / "some" / f"{label}.jsonl").read_text().splitlines()
        for label in ("choices", "blanks", "words")
    }
    lines["piqa"] = (bundle / "piqa.jsonl").read_text().splitlines()
    expected = []
    for name, own in lines.items():
        for number, line in enumerate(own, 1):
            values = json.loads(line)
            texts = {
                "core/choices": lambda v: [f"{v['query']}\nAnswer: {choice}" for choice in v["choices"]],
                "core/blanks": lambda v: [f"{option} {v['continuation']}" for option in v["context_options"]],
                "core/words": lambda v: [f"{v['context']} {v['continuation']}"],
                "piqa": lambda v: [f"Question: {v['goal']}\nAnswer: {v[choice]}" for choice in ("sol1", "sol2")],
            }[name](values)
            expected.append(Question(name, number, "", tuple(texts)))
    assert list(sets.questions) == expected and len(expected) == 3 * 9 + 5
    assert [each.split(" ")[0] for each in sets.fingerprints] == list(lines)
    assert found_in(sets, *(question.texts[-1] for question in expected)) == [
        number for number, question in enumerate(expected) if len(naive_words(question.texts[-1])) >= 13
    ]


def test_tasks_are_known_by_their_questions_alone(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    before = EvaluationSets.read([f"tasks:core@{bundle}"]).fingerprints
    config, words_file = bundle / "core.yaml", bundle / "eval_data" / "some" / "words.jsonl"
    config.write_text(config.read_text().replace("num_fewshot: [2]", "num_fewshot: [3]"))
    assert EvaluationSets.read([f"tasks:core@{bundle}"]).fingerprints == before
    words_file.write_text("".join(words_file.read_text().splitlines(keepends=True)[:-1]))
    after = EvaluationSets.read([f"tasks:core@{bundle}"]).fingerprints
    assert after[:2] == before[:2] and after[2] != before[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tasks:cores", "there is no task cores; give of core, core/NAME"),
        ("tasks:", "tasks is ''; give of core"),
        ("tasks:core", "the files of core are not on the hub"),
        ("tasks:core@{0}/none", "there is no folder .*none of tasks"),
    ],
)
def test_tasks_that_cannot_be_read_are_a_sentence(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EvaluationSets.read([name.format(tmp_path)])


def test_half_a_character_in_json_is_no_word(tmp_path: Path) -> None:
    own = words(14)
    (tmp_path / "odd.jsonl").write_text(json.dumps({"q": f"{' '.join(own[:7])} \ud83d {' '.join(own[7:])}"}) + "\n")
    assert found_in(EvaluationSets.read([str(tmp_path / "odd.jsonl")]), " ".join(own)) == [0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl cannot be read .*--decontaminate none"),
        ("broken.jsonl", b'{"a": "b"}\n{"a": \n', "broken.jsonl, line 2 is no JSON"),
        ("empty.jsonl", b"\n", "has no question"),
        ("numbers.jsonl", b"[1, 2]\n", "has no question"),
        ("latin.jsonl", b'{"a": "\xe9"}', "latin.jsonl cannot be read"),
        ("bad.parquet", b"PAR1", "bad.parquet cannot be read"),
    ],
)
def test_bad_files_are_a_sentence(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        EvaluationSets.read([str(tmp_path / name)])
