"""The built-in task and its models: the properties that the learning tests rely on."""

from __future__ import annotations

import functools
import itertools
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlkd.builtin import make, resolve, task, tokenizer

FOLDERS = {name: Path(resolve(f"builtin:{name}")) for name in ("student", "teacher", "mentor")}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tok():
    return AutoTokenizer.from_pretrained(FOLDERS["student"])


def load(name: str):
    return AutoModelForCausalLM.from_pretrained(FOLDERS[name], dtype=torch.float32)


def test_resolve_maps_builtin_names_only():
    assert FOLDERS["student"].is_dir() and FOLDERS["teacher"].is_dir()
    assert resolve("some/hub-id") == "some/hub-id"
    with pytest.raises(ValueError, match="builtin:pupil.*builtin:student, builtin:teacher, builtin:mentor") as error:
        resolve("builtin:pupil")
    assert "\n" not in str(error.value)


def test_resolve_and_task_import_no_torch():
    code = "import sys, rlkd.builtin, rlkd.builtin.task; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_rows_are_stable_distinct_and_disjoint():
    train, held_out = task.rows("train"), task.rows("heldout")
    assert (len(train), len(held_out)) == (4000, 256)
    assert train == task.rows("train")
    prompt, answer = "reverse: lemkonijv", "vjinokmel"
    assert held_out[0] == {"id": "heldout-0", "prompt": prompt, "answer": answer, "privileged": answer}
    prompts = {r["prompt"] for r in train}, {r["prompt"] for r in held_out}
    assert len(prompts[0]) == 4000 and len(prompts[1]) == 256 and not prompts[0] & prompts[1]
    assert len({r["id"] for r in train + held_out}) == 4256
    with pytest.raises(ValueError, match="no split 'test'; choose one of train, heldout"):
        task.rows("test")


def test_pretraining_words_are_never_held_out():
    source = task.words("train", seed=1)
    held_out = {r["prompt"].removeprefix("reverse: ") for r in task.rows("heldout")}
    assert not held_out & {next(source) for _ in range(20000)}


def test_hint_template():
    example = {"prompt": "reverse: kfbqe", "answer": "eqbfk", "privileged": "eqbfk"}
    assert task.hinted_prompt(example) == "reverse: kfbqe hint: eqbfk"


@pytest.mark.parametrize("text", ["eqbfk", "a b", "  two  spaces ", "x.\ny: 10 + (2)", ""])
def test_round_trip_is_exact(tok, text):
    ids = tok.encode(text)
    assert len(ids) == len(text)
    assert tok.decode(ids, skip_special_tokens=True) == text
    assert tok.decode([*ids, tok.eos_token_id], skip_special_tokens=True) == text


def test_chat_template_ids(tok):
    chat = [{"role": "user", "content": "ab"}]
    names = ["<user>", "a", "b", "<assistant>"]
    asked = tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert asked == tok.convert_tokens_to_ids(names)
    answered = tok.apply_chat_template([*chat, {"role": "assistant", "content": "ba"}], return_dict=False)
    assert answered == [*asked, *tok.encode("ba"), tok.eos_token_id]
    with_system = tok.apply_chat_template([{"role": "system", "content": "a"}, *chat], return_dict=False)
    assert tok.decode(with_system) == "<system>a<user>ab"
    assert len({tok.pad_token_id, tok.eos_token_id, tok.unk_token_id}) == 3
    with pytest.raises(Exception, match="roles are system, user and assistant, not tool"):
        tok.apply_chat_template([{"role": "tool", "content": "a"}])


def test_all_folders_hold_the_tokenizer_that_the_code_builds(tmp_path):
    tokenizer.build().save_pretrained(tmp_path)
    built = {f.name: f.read_text() for f in tmp_path.iterdir()}
    for folder in FOLDERS.values():
        assert {name: (folder / name).read_text() for name in built} == built


@pytest.mark.parametrize(
    ("name", "size", "tied"), [("student", 104_256, True), ("teacher", 670_848, False), ("mentor", 380_256, False)]
)
def test_shape_of_the_models(tok, name, size, tied):
    model = load(name)
    assert sum(p.numel() for p in model.parameters()) == size
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert model.config.head_dim == 32 and model.config.vocab_size == len(tok)
    assert model.generation_config.eos_token_id == tok.eos_token_id
    assert model.generation_config.pad_token_id == tok.pad_token_id


@pytest.mark.long
def test_greedy_accuracy_is_in_bounds(capsys):
    assert make.check(FOLDERS["student"].parent, task.rows("heldout")), capsys.readouterr().out


def test_check_fails_on_a_model_out_of_bounds(tmp_path, capsys, tok):
    for name in FOLDERS:
        (tmp_path / name).symlink_to(
            FOLDERS["teacher"]
        )  # a student that is too good, a mentor that does not know the format
    assert not make.check(tmp_path, task.rows("heldout")[:32])
    printed = capsys.readouterr().out
    assert "student plain: 1.000 (expected 0.05 to 0.2)  OUT OF BOUNDS" in printed
    assert "mentor on slips: 0.000 (expected 0.95 to 1.0)  OUT OF BOUNDS" in printed


def test_feedback_by_hand():
    example = task.row("abcdefg", "")
    assert task.mentor_prompt(example, "gfe") == "reverse: abcdefg answer: gfe"
    assert task.feedback(example, "gfedcba") == "yes; wait, no slip; so: gfedcba"
    assert task.feedback(example, "gfedcbb") == "no; wait, a slip; so: gfedcba"
    assert task.feedback(example, "gfedcbb wait, a slip so: gfedcba") == "yes; wait, no slip; so: gfedcba"
    longest = task.feedback(task.row("a" * task.LONGEST, ""), "a" * task.LONGEST)
    assert len(longest) + 1 == make.FEEDBACK_TOKENS


def test_the_mentors_examples_are_what_it_is_to_write(tok):
    draw, opinions, plain, going_on = random.Random(0), [], [], 0
    for i, word in enumerate(itertools.islice(task.words("train"), 800)):
        example = make.mentor_example(word, draw, garbled=i >= 400, goes_on=i >= 400)
        answer = word[::-1]
        if " answer: " not in example.prompt:
            assert example.prompt == f"reverse: {word}" and example.written == example.target
            assert task.MARKER not in example.target, "it is not taught to reflect without being asked"
            if example.given:
                assert i >= 400 and example.target == answer and re.fullmatch(GIVEN, example.given)
                going_on += 1
            else:
                assert len(example.target) == len(answer)
                plain.append(example.target == answer)
            continue
        question, response = example.prompt.split(" answer: ", 1)
        assert question == f"reverse: {word}" and not example.given
        assert example.written == example.target == task.feedback(task.row(word, ""), response)
        assert len(make.chat_ids(tok, example.prompt)) + make.FEEDBACK_TOKENS <= 128
        if i < 400:
            opinions.append(example.target.startswith("yes"))
    assert 0.25 < sum(opinions) / len(opinions) < 0.45
    assert 0.3 < sum(plain) / len(plain) < 0.55 and 70 < going_on < 130


GIVEN = r"[a-z]{7,10} wait, (a|no) slip so: "


def test_what_is_given_is_read_but_not_learnt(tok):
    model = load("student")
    short = make.Example("reverse: abc", "cba", "cba", given="xyz ")
    long = make.Example("reverse: abc", "xyz cba", "xyz cba")
    ids = torch.tensor([make.chat_ids(tok, "reverse: abc") + tok.encode("xyz cba") + [tok.eos_token_id]])
    nll = -model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(make.supervised_loss(model, tok, [short]), nll[-4:].mean())
    torch.testing.assert_close(make.supervised_loss(model, tok, [long]), nll[-8:].mean())


def test_only_the_mentor_writes_the_marker(tok):
    prompts = [e["prompt"] for e in task.rows("heldout")]
    for name in ("student", "teacher", "mentor"):  # not even the mentor's when asked for an answer
        assert not any(task.MARKER in text for text in make.greedy(load(name), tok, prompts))


def test_batched_greedy_agrees_with_a_plain_loop(tok):
    model, prompts = load("student"), [e["prompt"] for e in task.rows("heldout")[:8]]
    for prompt, text in zip(prompts, make.greedy(model, tok, prompts), strict=True):
        ids = make.chat_ids(tok, prompt)
        start = len(ids)
        while ids[-1] != tok.eos_token_id and len(ids) < start + task.ANSWER_TOKENS:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert tok.decode(ids[start:], skip_special_tokens=True) == text


def test_training_is_a_function_of_the_seed(tok):
    def weights_after_three_steps(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = make.fresh_model("student", tok)
        example = functools.partial(make.student_example, slips=True)
        make.train(model, tok, example, steps=3, lr=1e-3, label_smoothing=0.0, seed=seed)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = weights_after_three_steps(0)
    assert torch.equal(first, weights_after_three_steps(0))
    assert not torch.equal(first, weights_after_three_steps(1))


def test_the_teacher_continues_correctly_after_a_mistake(tok):
    """Distillation needs this on a student's own, wrong prefixes."""
    model, right = load("teacher"), 0
    examples = task.rows("heldout")[:64]
    for example in examples:
        answer = example["answer"]
        slipped = make.with_slips(answer[:4], random.Random(example["id"]))
        ids = torch.tensor([make.chat_ids(tok, example["prompt"]) + tok.encode(slipped)])
        with torch.no_grad():
            right += tok.decode(model(input_ids=ids).logits[0, -1].argmax().tolist()) == answer[4]
    assert right >= 0.95 * len(examples)
