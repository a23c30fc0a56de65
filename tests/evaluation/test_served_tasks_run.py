"""In which order questions are asked, what is stored, and what the report says about it."""

import csv

import pytest

from mikv_vllm.evaluation.served_tasks import long_answers, report
from mikv_vllm.evaluation.served_tasks.question import Question, Reply, Session, Verdict
from mikv_vllm.evaluation.served_tasks.results import FILE, Result, Results
from mikv_vllm.evaluation.served_tasks.runner import Runner


class Recorder:
    """A client that answers with the ratio, and keeps what it was asked."""

    model = "recorder"

    def __init__(self, refused: str = "") -> None:
        self.asked, self._refused = [], refused

    def ask(self, messages, question, ratio, salt) -> Reply:
        texts = [message["content"] for message in messages]
        if self._refused in texts:
            raise ValueError(f"{self._refused} is refused")
        self.asked.append((ratio, texts, salt))
        stored = {"kv_bytes": 100, "uncompressed_kv_bytes": 100 * ratio, "reused_tokens": 5}
        return Reply(f"{ratio:g}", prompt_tokens=10, report=stored)


def question(content: str, task: str = "task", kind: str = "kind") -> Question:
    """A question whose answer is right at ratios below 5."""
    return Question(task, kind, content, lambda reply: Verdict(float(reply.text < "5"), True), 8)


def asked(sessions, folder, ratios, client=None) -> Recorder:
    client = client or Recorder()
    Runner(client, Results(folder), ratios, at_once=1).run(sessions, lambda result: None)
    return client


def test_a_prompt_is_sent_at_ratio_1_and_then_from_the_largest_ratio_on(tmp_path):
    client = asked([Session((question("a"),))], tmp_path, [1.0, 4.0, 6.0])
    assert [(ratio, texts) for ratio, texts, _ in client.asked] == [
        (1.0, ["a"]),
        (6.0, ["a"]),
        (4.0, ["a"]),
    ]
    assert len({salt for _, _, salt in client.asked}) == 1


def test_an_opening_is_sent_once_at_each_ratio_and_shared_by_its_questions(tmp_path):
    session = Session((question("a"), question("b")), opening="document")
    client = asked([session], tmp_path, [1.0, 4.0])
    assert [(ratio, texts) for ratio, texts, _ in client.asked] == [
        (1.0, ["document"]),
        (1.0, ["document", "1", "a"]),
        (1.0, ["document", "1", "b"]),
        (4.0, ["document"]),
        (4.0, ["document", "4", "a"]),
        (4.0, ["document", "4", "b"]),
    ]
    salts = [salt for _, _, salt in client.asked]
    assert salts[0] == salts[1] == salts[2] != salts[3] == salts[4] == salts[5]


def test_different_prompts_share_nothing(tmp_path):
    client = asked([Session((question("a"),)), Session((question("b"),))], tmp_path, [4.0])
    assert len({salt for _, _, salt in client.asked}) == 2


def test_only_what_is_missing_is_asked(tmp_path):
    sessions = [Session((question("a"), question("b")), opening="document")]
    asked(sessions, tmp_path, [1.0])
    path = tmp_path / FILE
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{second[:30]}")
    client = asked(sessions, tmp_path, [1.0, 4.0])
    assert [texts[-1] for _, texts, _ in client.asked] == ["document", "b", "document", "a", "b"]
    assert asked(sessions, tmp_path, [1.0, 4.0]).asked == []
    assert len(path.read_text().splitlines()) == 4


def test_a_changed_question_is_asked_again(tmp_path):
    asked([Session((question("a"),))], tmp_path, [1.0])
    assert asked([Session((question("a", kind="other"),))], tmp_path, [1.0]).asked
    assert asked([Session((question("a"),), opening="document")], tmp_path, [1.0]).asked


def test_a_refused_request_ends_the_run_and_keeps_the_results(tmp_path):
    sessions = [Session((question(text),)) for text in "abc"]
    client = Recorder(refused="b")
    with pytest.raises(ValueError, match="b is refused"):
        asked(sessions, tmp_path, [1.0, 4.0], client)
    assert [texts for _, texts, _ in client.asked][:2] == [["a"], ["a"]]
    assert len((tmp_path / FILE).read_text().splitlines()) == len(client.asked)
    again = asked(sessions, tmp_path, [1.0, 4.0])
    assert ["a"] not in [texts for _, texts, _ in again.asked]


def results_of(tmp_path) -> list[Result]:
    """Two tasks at ratios 1, 4 and 6; answers at ratio 6 are wrong."""
    sessions = [Session((question(text, text[0], text),)) for text in ("x1", "x2", "y1")]
    results, client = Results(tmp_path), Recorder()
    Runner(client, results, [1.0, 4.0, 6.0], 1).run(sessions, lambda result: None)
    return [
        results.get(client.model, session.identifiers()[0], ratio)
        for session in sessions
        for ratio in (1.0, 4.0, 6.0)
    ]


def test_rows_compare_with_ratio_1_by_question(tmp_path):
    rows = {(row.task, row.ratio): row for row in report.rows(results_of(tmp_path), by_kind=False)}
    assert list(rows) == [(task, ratio) for task in "xy" for ratio in (1.0, 4.0, 6.0)]
    assert rows["x", 1.0].difference is None
    assert rows["x", 4.0].difference.mean == 0.0
    assert rows["x", 6.0].difference.mean == -1.0
    assert (rows["x", 6.0].questions, rows["x", 6.0].achieved) == (2, 6.0)
    assert (rows["x", 6.0].kv_bytes, rows["x", 6.0].reused) == (100, 0.5)
    assert rows["x", 4.0].valid.mean == 1.0


def test_without_ratio_1_there_is_no_difference(tmp_path):
    found = [result for result in results_of(tmp_path) if result.ratio > 1.0]
    assert all(row.difference is None for row in report.rows(found, by_kind=True))


def test_the_mean_is_over_tasks(tmp_path):
    rows = report.rows(results_of(tmp_path), by_kind=False)
    first, second, third = report.mean_rows(rows)
    assert (first.accuracy.mean, second.accuracy.mean, third.accuracy.mean) == (1.0, 1.0, 0.0)
    assert third.difference.mean == -1.0
    assert third.difference.low <= -1.0 < third.difference.high < 0.0
    assert (third.questions, third.achieved) == (3, 6.0)


def test_markdown_and_csv_have_the_same_rows(tmp_path):
    results = results_of(tmp_path)
    report.write_csv(results, tmp_path / "summary.csv")
    rows = list(csv.DictReader((tmp_path / "summary.csv").open()))
    assert len(rows) == 6 + 3 + 9
    text = report.markdown("# Title", results, "## More")
    assert text.startswith("# Title\n\n| task |")
    headings = 2 * 2  # of each table, a row of names and one of dashes
    assert text.count("\n| ") == len(rows) + headings
    assert "\n## More\n" in text
    assert "| x | 2 | 6 | 6.00 | 0.00 | 0.0 (0.0 to 65.8) | -100.0 (" in text


def test_long_answers_are_compared_with_ratio_1_along_their_length():
    def result(ratio: float, text: str) -> Result:
        reply = Reply(text, prompt_tokens=1, report={})
        asked = question("q", long_answers.TASK)
        return Result.of("model", "key", asked, ratio, reply, Verdict(1.0), 1.0)

    same = "one two three four five six seven eight"
    found = long_answers.section([result(1.0, same), result(4.0, same.replace("seven", "other"))])
    assert "| 1 | 8 | 0.0 |  |" in found
    assert "| 4 | 8 | 0.0 | 6 | 100.0 | 100.0 | 100.0 | 50.0 |" in found
    assert long_answers.section([]) == ""
